"""What is no file of its format is named in one sentence, and runs no code."""

from __future__ import annotations

import io
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megahybrid.config.schema import SourceConfig
from megahybrid.config.validate import validate
from megahybrid.data import Tokenizer
from megahybrid.data.documents import Piece, Skipped
from megahybrid.data.planning import plan
from megahybrid.data.prepare import prepare
from megahybrid.errors import UserError
from tests.data.corpora import make_config, silent
from tests.data.formats import ids_of, read, recipe, some_texts, write_parquet


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_column_of_a_pickled_type_runs_no_code(tmp_path):
    """As pyarrow before 14.0.1 wrote them and unpickled them when a file was opened."""
    named = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Touch(tmp_path / "ran")),
    }
    texts = some_texts(5)
    schema = pa.schema([pa.field("text", pa.string(), metadata=named)])
    pq.write_table(pa.table([pa.array(texts)], schema=schema), tmp_path / "x.parquet")
    piece = Piece("x.parquet", 0, (tmp_path / "x.parquet").stat().st_size)
    assert read(tmp_path, "parquet", piece)[0] == texts
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_pyarrow_that_is_missing_or_old_is_named_before_anything_is_read(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", ["x"])
    config = recipe(tmp_path, None, s=SourceConfig(str(tmp_path), "parquet"))
    with monkeypatch.context() as patch:
        patch.setattr(pa, "__version__", "14.0.0")
        with pytest.raises(UserError, match=r"can run code in pyarrow 14\.0\.0; `pip install 'pyarrow>=21'`\.$"):
            plan(config, Skipped())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"data\.sources\.s\.format is parquet, which needs the package pyarrow; `pip"):
        plan(config, Skipped())


def refusals(known: Tokenizer) -> dict[str, tuple[str, bytes | Callable[[Path], None], dict]]:
    """Expected message → a file's name, its content, and the source's settings."""
    parquet, npy, uint16 = {"format": "parquet"}, {"format": "npy"}, {"format": "bin", "dtype": "uint16"}
    ids = np.array(ids_of(known, some_texts(20)), np.uint16)

    def saved(array: np.ndarray) -> Callable[[Path], None]:
        return lambda file: np.save(file, array)

    def table(**columns) -> Callable[[Path], None]:
        return lambda file: pq.write_table(pa.table(columns), file)

    def cut(write: Callable[[Path], None], by: int) -> Callable[[Path], None]:
        def write_and_cut(file: Path) -> None:
            write(file)
            file.write_bytes(file.read_bytes()[:-by])

        return write_and_cut

    def damaged(file: Path) -> None:
        write_parquet(file, some_texts(100), compression="none", use_dictionary=False)
        data = bytearray(file.read_bytes())
        data[4:300] = bytes(296)
        file.write_bytes(data)

    beyond, signed, bordered = ids.copy(), ids.astype(np.int64), ids[ids != known.document_id]
    beyond[70], signed[3] = 300, -1
    llm_c = struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253)
    return {
        "is not a readable parquet file .*; fetch it again": ("x.parquet", b"no parquet at all", parquet),
        r"not a readable parquet file \(Parquet magic": ("x.parquet", cut(table(text=["x"] * 9), 20), parquet),
        r"x\.parquet' is not a readable": ("x.parquet", damaged, parquet),
        r"has no column 'text'; set data\.sources\.s\.field to one of its columns \('content', 'id'\)": (
            "x.parquet",
            table(content=["x"], id=[1]),
            parquet,
        ),
        r"has int64 in its column 'text', not text": ("x.parquet", table(text=[1]), parquet),
        r"has list<.*> in its column": ("x.parquet", table(text=[["a", "b"]]), parquet),
        r"has binary in its column": ("x.parquet", table(text=[b"a"]), parquet),
        r"no row with a text under 'text' \(2 lack it": (
            "x.parquet",
            table(text=pa.array([None, None], "string")),
            parquet,
        ),
        r"has 65 bytes, which is no whole number of uint16": ("x.bin", ids.tobytes()[:65], uint16),
        "finds no text": ("x.bin", b"", uint16),
        "holds no text in its 1 files": ("x.npy", saved(ids[:0]), npy),
        "looks like uint32, since every second": ("x.bin", ids.astype("<u4").tobytes(), uint16),
        r"has token \d+ at place 0, outside the 300 tokens": (
            "x.bin",
            ids[: len(ids) // 2 * 2].tobytes(),
            {"format": "bin", "dtype": "uint32"},
        ),
        r"has token 300 at place 70, outside the 300 tokens of data\.tokenizer; .* made with, or its dtype": (
            "x.bin",
            beyond.tobytes(),
            uint16,
        ),
        r"has token 300 at place 70, .* made with\.$": ("x.npy", saved(beyond), npy),
        r"has token -1 at place 3": ("x.npy", saved(signed), npy),
        r"x\.bin' has an \.npy header; set data\.sources\.s\.format to npy": ("x.bin", saved_bytes(ids), uint16),
        r"has no \.npy header; if it is bare tokens .* OLMo-core": ("x.npy", ids.tobytes(), npy),
        r"header that is not readable": ("x.npy", saved_bytes(ids).replace(b"'descr'", b"'desc' "), npy),
        r"an array of float32 in 1 dimensions": ("x.npy", saved(ids.astype(np.float32)), npy),
        r"an array of uint16 in 2 dimensions": ("x.npy", saved(ids[:20].reshape(2, 10)), npy),
        r"an array of object in 1 dimensions": ("x.npy", saved(np.array([1, "x"], object)), npy),
        r"but its header says": ("x.npy", cut(saved(ids), 1), npy),
        r"has llm\.c's header of \d+ tokens of uint16, which \d+ bytes of uint32 do not hold": (
            "x.bin",
            llm_c + ids.tobytes(),
            {"format": "bin", "dtype": "uint32"},
        ),
        r"which \d+ bytes of uint16 do not hold": ("x.bin", llm_c + ids.tobytes()[:-2], uint16),
        rf"has no end of a document \(token {known.document_id}\) .* set data\.sources\.s\.eos_token_id": (
            "x.bin",
            bordered.tobytes(),
            uint16,
        ),
    }


def saved_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_what_is_no_such_file_is_refused_in_one_sentence(tmp_path, tokenizer):
    file, known = tokenizer
    for i, (expected, (name, content, values)) in enumerate(refusals(known).items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        if callable(content):
            content(folder / name)
        else:
            (folder / name).write_bytes(content)
        config = recipe(tmp_path, file, s=SourceConfig(str(folder), **values))
        with pytest.raises(UserError, match=expected) as error:
            prepare(config, silent)
        message = str(error.value)
        assert "\n" not in message and message.endswith(".") and ". " not in message, message


def test_a_document_without_an_end_takes_no_memory(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("megahybrid.data.tokens._WINDOW", 10)
    monkeypatch.setattr("megahybrid.data.tokens._LONGEST", 50)
    eos = tokenizer[1].document_id
    for length, fits in ((45, True), (70, False)):
        (tmp_path / "x.bin").write_bytes(np.array([7, eos, *[8] * length, eos], np.uint16).tobytes())
        piece = Piece("x.bin", 0, (tmp_path / "x.bin").stat().st_size)
        if fits:
            assert len(read(tmp_path, "bin", piece, tokenizer=tokenizer[1], dtype="uint16")[0]) == 2
        else:
            with pytest.raises(UserError, match="has no end of a document"):
                read(tmp_path, "bin", piece, tokenizer=tokenizer[1], dtype="uint16")


def test_sources_of_tokens_are_checked_when_the_recipe_is_read(tmp_path):
    def config(tokenizer="t.json", **values):
        return make_config(tmp_path, {"s": SourceConfig("x", **values)}, tokenizer=tokenizer)

    cases = {
        r"s holds tokens \(format npy\), .*; set data\.tokenizer": config(None, format="npy"),
        r"s\.format bin says nothing .*; set data\.sources\.s\.dtype to uint16 or uint32": config(format="bin"),
        r"s\.dtype is 'int8'; choose one of uint16, uint32": config(format="bin", dtype="int8"),
        r"s\.dtype is for format bin": config(format="npy", dtype="uint16"),
        r"s\.dtype is for the formats npy and bin, not text": config(dtype="uint16"),
        r"s\.eos_token_id is for the formats npy and bin, not jsonl": config(format="jsonl", eos_token_id=0),
        r"s\.eos_token_id is -1": config(format="npy", eos_token_id=-1),
    }
    for expected, each in cases.items():
        with pytest.raises(UserError, match=expected):
            validate(each)
    for values in ({"format": "npy", "eos_token_id": 0}, {"format": "bin", "dtype": "uint32"}, {"format": "parquet"}):
        validate(config(**values))
