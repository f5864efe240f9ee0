"""Where a kernel's addresses can pass 32 bits, from its Triton IR: interval arithmetic over all values of all programs.

Numbers of programs and integer arguments are those of a launch. What a kernel loads counts tokens or what is fewer, as
do sums and what loops carry: at most `most`. An int32 result that can leave 32 bits is wrong only if it reaches an
address, so that hashes may wrap. int64 is never left.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

LEAST, MOST = -(2**31), 2**31 - 1
Range = tuple[int, int]


@dataclass(frozen=True)
class Wrapped:
    """A value that may have left its 32 bits, or of which nothing is known; `origin` is the line that made it."""

    origin: str


Value = Range | Wrapped
_SAME = {"splat", "expand_dims", "broadcast", "reshape", "trans", "unsplat", "extsi", "extui", "index_cast", "gather"}
_OPERATION = re.compile(r'^(?:(%[\w$.-]+)(?::(\d+))? = )?"?([a-z_]+\.[\w.]+)"?\s*(.*)$')
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")


@dataclass
class _Region:
    header: str
    lines: list[str | _Region] = field(default_factory=list)


def _regions(text: str) -> _Region:
    """The lines of the module's function, those within braces nested under the line that opens them."""
    root = _Region("")
    stack = [root]
    for raw in text.splitlines():
        line = re.sub(r"\s+loc\(.*\)$", "", raw).strip()
        if line.startswith("}"):
            stack.pop()
            if line.endswith("{"):
                # `} else {` and `} do {` belong to the line before.
                region = _Region(line)
                stack[-1].lines.append(region)
                stack.append(region)
            elif len(line) > 1:
                stack[-1].lines.append(line)
        elif line.endswith("{"):
            region = _Region(line)
            stack[-1].lines.append(region)
            stack.append(region)
        elif line:
            stack[-1].lines.append(line)
    return root


def _join(a: Value, b: Value) -> Value:
    if isinstance(a, Wrapped) or isinstance(b, Wrapped):
        return a if isinstance(a, Wrapped) else b
    return min(a[0], b[0]), max(a[1], b[1])


def _quotient(a: Range, b: Range) -> Range:
    # Rounds towards zero; a divisor is at least 1.
    low, high = max(1, b[0]), max(1, b[1])
    values = [abs(x) // y * (1 if x >= 0 else -1) for x in a for y in (low, high)]
    return min(values), max(values)


def _remainder(a: Range, b: Range) -> Range:
    largest = max(0, b[1] - 1)
    return (0 if a[0] >= 0 else -largest), min(largest, max(0, a[1]))


def _product(a: Range, b: Range) -> Range:
    values = [x * y for x in a for y in b]
    return min(values), max(values)


_ARITHMETIC = {
    "addi": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "subi": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "muli": _product,
    "divsi": _quotient,
    "remsi": _remainder,
    "minsi": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "maxsi": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
}


class Ranges:
    """Ranges of a kernel's values; `faults` are addresses that can be wrong."""

    def __init__(self, ttir: str, arguments: dict[int, int], programs: tuple[int, ...], most: int):
        """arguments: values of the integer ones, by their number; programs: the grid."""
        self.programs, self.most = (*programs, 1, 1)[:3], most
        self.values: dict[str, Value] = {}
        self.faults: set[str] = set()
        function = next(x for x in _regions(ttir).lines[0].lines if isinstance(x, _Region))
        names = re.findall(r"(%[\w$.-]+): (!tt\.ptr<[^>]*>|[\w.]+)", function.header)
        for number, (name, kind) in enumerate(names):
            if kind in ("i32", "i64"):
                self.values[name] = (arguments[number],) * 2
        self._block(function.lines)

    def _read(self, name: str) -> Value:
        return self.values.get(name, Wrapped(f"unknown {name}"))

    def _block(self, lines: list[str | _Region]) -> list[str]:
        """Runs the lines; returns the names that the last one yields."""
        yielded: list[str] = []
        for number, line in enumerate(lines):
            if isinstance(line, _Region):
                after = lines[number + 1 : number + 2]
                self._nested(line, after[0] if after else "")
            elif line.startswith(("scf.yield", "scf.condition", "tt.reduce.return", "tt.scan.return")):
                yielded = _NAME.findall(line.split(" : ")[0])
            else:
                self._operation(line)
        return yielded

    def _nested(self, region: _Region, after: str | _Region) -> None:
        match = _OPERATION.match(region.header)
        if match is None:  # the second part of a nest, run with its first
            return
        name, _, operation, rest = match.groups()
        if operation == "scf.for":
            self._for(name, rest, region)
        elif operation == "scf.while":
            self._while(name, rest, region, after)
        elif operation == "scf.if":
            results = [self._read(x) for x in self._block(region.lines)]
            if isinstance(after, _Region) and after.header.startswith("} else"):
                others = [self._read(x) for x in self._block(after.lines)]
                results = [_join(a, b) for a, b in zip(results, others, strict=True)]
            self._name(name, results)
        elif operation in ("tt.reduce", "tt.scan"):
            self._combine(name, operation, rest, region, after)
        elif operation != "tt.map_elementwise":
            raise NotImplementedError(region.header)

    def _name(self, name: str | None, results: list[Value]) -> None:
        if name is not None:
            for number, value in enumerate(results):
                self.values[f"{name}#{number}"] = value
            if len(results) == 1:
                self.values[name] = results[0]

    def _carried(self, initial: list[Value], names: list[str], body) -> list[Value]:
        """Ranges over all turns of what a loop carries; `body` runs it once and returns what it yields."""
        ranges = initial
        for last in (False, True):
            faults = set(self.faults)
            self.values.update(zip(names, ranges, strict=True))
            results = [_join(a, b) for a, b in zip(ranges, body(), strict=True)]
            if last or results == ranges:
                return results
            self.faults = faults
            ranges = [self._widened(a, b) for a, b in zip(ranges, results, strict=True)]
        raise AssertionError

    def _widened(self, before: Value, after: Value) -> Value:
        if isinstance(after, Wrapped) or before == after:
            return after
        return min(after[0], before[0] if after[0] >= before[0] else -self.most), max(after[1], self.most)

    def _for(self, name: str | None, rest: str, region: _Region) -> None:
        bounds = re.match(r"(?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+)", rest)
        variable, first, end, _ = bounds.groups()
        low, high = self._read(first), self._read(end)
        value = _join(low, high)
        self.values[variable] = value if isinstance(value, Wrapped) else (value[0], max(value[0], value[1] - 1))
        carried = re.search(r"iter_args\((.*?)\) ->", rest)
        pairs = re.findall(r"(%\S+) = (%[\w$.#-]+)", carried[1]) if carried else []
        names, initial = [x for x, _ in pairs], [self._read(x) for _, x in pairs]
        self._name(name, self._carried(initial, names, lambda: [self._read(x) for x in self._block(region.lines)]))

    def _while(self, name: str | None, rest: str, region: _Region, after: _Region) -> None:
        pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", rest)
        names, initial = [x for x, _ in pairs], [self._read(x) for _, x in pairs]
        passed: list[Value] = []

        def body() -> list[Value]:
            nonlocal passed
            passed = [self._read(x) for x in self._block(region.lines)[1:]]
            head = after.lines[0] if isinstance(after.lines[0], str) else ""
            self.values.update(zip(re.findall(r"(%[\w$.-]+):", head), passed, strict=False))
            return [self._read(x) for x in self._block(after.lines)]

        self._carried(initial, names, body)
        self._name(name, passed)

    def _combine(self, name: str | None, operation: str, rest: str, region: _Region, after: str | _Region) -> None:
        operands = [self._read(x) for x in _NAME.findall(rest.split(")")[0])]
        adds = any("arith.addi" in x for x in region.lines if isinstance(x, str))
        results = []
        for value in operands:
            if adds and not isinstance(value, Wrapped):
                axis = int(re.search(r"axis = (\d+)", region.header)[1])
                size = int(re.search(r"tensor<([\dx]+)x", str(after))[1].split("x")[axis])
                low, high = max(value[0] * size, -self.most), min(value[1] * size, self.most)
                value = min(value[0], low), max(value[1], high)
            results.append(value)
        self._name(name, results)

    def _operation(self, line: str) -> None:
        match = _OPERATION.match(line)
        if match is None:
            return
        name, _, operation, rest = match.groups()
        operands = [self._read(x) for x in _NAME.findall(rest.split(" : ")[0])]
        dialect, short = operation.split(".", 1)
        if short == "addptr" and isinstance(operands[1], Wrapped):
            self.faults.add(f"{line} <- {operands[1].origin}")
        if name is None:
            return
        if short in ("cmpi", "cmpf"):
            self.values[name] = 0, 1
            return
        kind = line.rsplit(" : ", 1)[-1].rsplit(" to ", 1)[-1].rsplit("-> ", 1)[-1]
        bits = re.search(r"(?:^|x)(i\d+)>?$", kind)
        if bits is None and short != "load":
            return
        value = self._value(dialect, short, rest, operands, kind)
        if value is not None:
            self.values[name] = self._fitting(value, bits[1] if bits else "", line)

    def _fitting(self, value: Value, bits: str, line: str) -> Value:
        if bits == "i32" and not isinstance(value, Wrapped) and not LEAST <= value[0] <= value[1] <= MOST:
            return Wrapped(line)
        return value

    def _value(self, dialect: str, short: str, rest: str, operands: list[Value], kind: str) -> Value | None:
        if short == "constant":
            number = re.match(r"(?:dense<)?(-?\d+|true|false)\b", rest)
            return (int({"true": "1", "false": "0"}.get(number[1], number[1])),) * 2 if number else None
        if short == "get_program_id":
            return 0, self.programs["xyz".index(rest[0])] - 1
        if short == "get_num_programs":
            return (self.programs["xyz".index(rest[0])],) * 2
        if short == "make_range":
            end, start = (int(re.search(rf"{x} = (\d+)", rest)[1]) for x in ("end", "start"))
            return start, end - 1
        if short == "load":
            return -1, self.most if re.search(r"ptr<i(32|16|8)>", kind) else 2**62
        if kind.endswith(("i1", "i1>")):
            return 0, 1
        if short == "andi" and any(masks := [x[1] for x in operands if not isinstance(x, Wrapped) and x[0] >= 0]):
            return 0, min(masks)
        wrapped = next((x for x in operands if isinstance(x, Wrapped)), None)
        if short == "select":
            wrapped = next((x for x in operands[1:] if isinstance(x, Wrapped)), None)
        if wrapped is not None:
            return wrapped
        if short in _SAME or short == "trunci":
            return operands[0]
        if short in _ARITHMETIC:
            return _ARITHMETIC[short](*operands)
        if short == "select":
            return _join(*operands[1:])
        if short == "shrsi":
            return _quotient(operands[0], (1 << operands[1][0],) * 2) if operands[0][0] >= 0 else operands[0]
        return Wrapped(f"{dialect}.{short} {rest}")
