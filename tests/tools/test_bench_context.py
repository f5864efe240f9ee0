"""The tool over two processes, and by what it calls an error wrong."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import loaded

ROOT = Path(__file__).parents[2]
SIZES = ["model.hidden_size=32", "model.gdn.num_heads=2", "model.gdn.head_dim=16", "model.attention.head_dim=16"]
SIZES += ["model.attention.num_heads=2", "model.attention.num_kv_heads=2"]
SIZES += ["model.lte.window_size=20", "model.lte.buffer_size=8"]

tool = pytest.fixture(scope="module")(lambda: (yield from loaded("bench_context")))


def lines_of(tmp_path, program, *more, sizes=SIZES):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, *program, "recipes/quickstart.yaml", "--gpus", "2", "--out", out, "--tokens", "64,128"]
    done = subprocess.run([*command, *more, *sizes], capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_every_way_of_a_mixer_is_judged_and_timed_beside_one_process(tmp_path):
    lines = lines_of(tmp_path, ["tools/bench_context"], "--mixers", "G,L capped,L", "--judged", "31,2,63")
    ways = [("G", "tokens stay"), ("G", "tokens for heads"), ("L capped", "tokens stay")]
    ways += [("L capped", "tokens for heads"), ("L", "tokens stay"), ("L", "tokens for heads")]
    assert [(x["mixer"], x["way"], x["tokens"]) for x in lines] == [(*way, n) for way in ways for n in (64, 128)]
    for line in lines:
        assert line["tokens_of_one"] == line["tokens"] // 2
        assert line["efficiency"] == pytest.approx(line["ms_of_one"] / line["ms"], abs=1e-3)
        assert "error" not in line
        assert ("room" in line) == ((line["mixer"], line["way"]) == ("L", "tokens stay"))
        if line["mixer"] != "G":  # of what is seen with dropout, of 2 heads
            share = 8 / line["tokens"] if line["mixer"] == "L" else 0.125
            assert line["kept"] == pytest.approx(share, abs=1 / line["tokens"])
        if "errors" in line:
            assert line["errors"].keys() == {"y", "x", "weights"} and max(line["errors"].values()) < 1e-4
    assert all(("errors" in line) == (number % 2 == 0) for number, line in enumerate(lines))
    for stays, exchanges in zip(
        lines[:2] + lines[4:6] + lines[8:10], lines[2:4] + lines[6:8] + lines[10:], strict=True
    ):
        assert stays["chosen"] != exchanges["chosen"]
        assert stays.get("kept") == exchanges.get("kept")


@pytest.mark.slow
def test_a_lost_gradient_is_found_and_not_timed(tmp_path):
    """Borrowed rows give nothing back."""
    (tmp_path / "context_broken.py").write_text(
        "from context_steps import *\nfrom megahybrid.parallel import tokens\n"
        "tokens._Borrowed.backward = staticmethod(lambda ctx, *grads: (None, None, *grads[: len(ctx.widths)]))\n"
    )
    program = tmp_path / "bench"
    text = (ROOT / "tools" / "bench_context").read_text().replace("context_steps:", "context_broken:")
    program.write_text(text.replace("Path(__file__).resolve()", f"Path({str(ROOT / 'tools' / 'bench_context')!r})"))
    program.write_text(program.read_text().replace("sys.path[:0] = [", f"sys.path[:0] = [{str(tmp_path)!r}, "))
    first, *others = lines_of(tmp_path, [program], "--mixers", "S", "--judged", "31,2,63")
    assert first["error"].startswith("x, k_proj.weight, v_proj.weight are off") and "ms" not in first
    assert [line["way"] for line in others] == ["tokens for heads"] * 2


@pytest.mark.slow
def test_a_mixer_that_has_no_way_is_told(tmp_path):
    sizes = [*SIZES, "model.attention.num_heads=1", "model.attention.num_kv_heads=1"]
    without, *others = lines_of(
        tmp_path, ["tools/bench_context"], "--mixers", "F,S", "--judged", "31,2,63", sizes=sizes
    )
    assert without["mixer"] == "F" and without["error"].startswith("neither way is possible: parallel.context is 2")
    assert [(x["mixer"], x["way"], x["tokens"]) for x in others] == [("S", "tokens stay", n) for n in (64, 128)]


def test_what_one_process_would_explain_is_not_wrong(tool):
    from context_steps import FLOOR, off

    of_one = {"y": 0.004, "x": 0.03, "w": 0.0}
    assert off({"y": 0.0179, "x": 0.0699, "w": 0.01}, of_one, FLOOR[torch.bfloat16]) == []
    assert off({"y": 0.0181, "x": 0.0701, "w": float("nan")}, of_one, FLOOR[torch.bfloat16]) == ["y", "x", "w"]
    assert off({"y": 0.0082, "x": 0.06, "w": 1e-3}, of_one, FLOOR[torch.float32]) == ["y", "w"]


def test_zeros_and_missing_gradients_are_compared_as_well(tool):
    from context_steps import compared

    one, zero = torch.ones(4), torch.zeros(4)
    exact = {
        "same": one,
        "missing": one,
        "zero": zero,
        "none": None,
        "both": None,
        "unset": zero,
        "nan": one * math.nan,
    }
    found = {"same": one * 1.5, "missing": None, "zero": one, "none": one, "both": None, "unset": None, "nan": one}
    errors = compared(found, exact)
    assert math.isnan(errors.pop("nan"))
    assert errors == {"same": 0.5, "missing": math.inf, "zero": 2.0, "none": 2.0, "both": 0.0, "unset": 0.0}


def test_what_is_not_finite_is_told(tool):
    from context_steps import told

    found = {"y": 0.1, "x": math.inf, "a": 0.5, "b": math.nan, "c": 2.0}
    assert told(found) == {"y": 0.1, "x": "inf", "weights": "nan"}
    assert told(found | {"x": 0.2, "b": 0.3}) == {"y": 0.1, "x": 0.2, "weights": 2.0}


def test_lists_have_commas(tool, capsys):
    assert tool.names("G,L capped") == ["G", "L capped"] and tool.numbers("64,128") == [64, 128]
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench_context", "--mixers", "G,X"])
        tool.arguments()
    assert "'X' is none of G, L capped, L, S, F, N" in capsys.readouterr().err


def test_tokens_that_cannot_be_cut_are_refused(tool, capsys):
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench_context", "--gpus", "4", "--tokens", "130"])
        tool.arguments()
    assert "130 tokens cannot be cut into 4 equal parts" in capsys.readouterr().err


def test_heads_keep_a_share_or_what_the_buffer_holds(tool):
    from context_case import Given

    given = Given(str(ROOT / "recipes" / "lalte-0.4b.yaml"), (), (8,), 0.125, Path("unused"))
    assert given.kept("L capped", 65536) == given.kept("L", 2048) == 0.125
    assert given.kept("L", 65536) == 512 / 65536
