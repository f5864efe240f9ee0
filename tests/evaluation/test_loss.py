"""The verb on a run and an exported model; its numbers against a pass over each piece in float64; what it refuses."""

import json
import math
import shutil

import pytest

from megahybrid.cli import main
from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups
from tests.evaluation.subjects import WORDS, scorer
from tests.evaluation.test_scorer import brute_force
from tests.training.conftest import prepared, recipe, reference, text  # noqa: F401


@pytest.fixture(autouse=True)
def process_group():
    yield
    groups.shut_down()


@pytest.mark.parametrize("length", [1, 7, 1000])
def test_each_piece_is_read_by_itself(length):
    groups.initialize(ParallelConfig())
    asked, texts = scorer(), [WORDS, "the cat sat", WORDS * 2]
    found = sorted(asked.losses(texts, length))
    expected = []
    for number, each in enumerate(texts):
        ids = asked._tokenizer.encode(each)
        assert asked._tokenizer.decode(ids) == each
        for first in range(0, len(ids), length):
            piece = asked._tokenizer.decode(ids[first : first + length])
            assert asked._tokenizer.encode(piece) == ids[first : first + length]  # or choose other texts
            expected.append((number, -brute_force(asked, "", piece)[0], len(ids[first : first + length])))
    assert [each[::2] for each in found] == [each[::2] for each in sorted(expected)]
    assert [each[1] for each in found] == pytest.approx([each[1] for each in sorted(expected)], abs=1e-9)


def test_a_run_and_its_export_say_the_same(reference, tmp_path, capsys):  # noqa: F811
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("def push(self, item):\n    return item  # é\n" * 9)
    other.write_bytes(b"import copy\r\n" * 3)
    assert main(["loss", str(reference), str(one), str(other)]) == 0
    said = capsys.readouterr().out.splitlines()
    groups.shut_down()
    assert main(["export", str(reference), str(tmp_path / "exported"), "--dtype", "fp32", "--no-verify"]) == 0
    groups.shut_down()
    capsys.readouterr()
    assert main(["loss", str(tmp_path / "exported"), str(one), str(other), "--length", "64"]) == 0
    assert capsys.readouterr().out.splitlines() == said
    rows = [line.rsplit(maxsplit=4) for line in said[-3:]]
    assert [row[0] for row in rows] == [str(one), str(other), "all"]
    tokens, mean, perplexity, bits = ([float(row[n].replace(",", "")) for row in rows] for n in (1, 2, 3, 4))
    assert tokens[2] == tokens[0] + tokens[1]
    assert mean[2] == pytest.approx((mean[0] * tokens[0] + mean[1] * tokens[1]) / tokens[2], abs=2e-4)
    sizes = [len(file.read_bytes()) for file in (one, other)]
    for n, size in enumerate([*sizes, sum(sizes)]):
        assert perplexity[n] == pytest.approx(math.exp(mean[n]), rel=1e-3)
        assert bits[n] == pytest.approx(mean[n] * tokens[n] / math.log(2) / size, rel=1e-3)
    assert 1 < mean[0] < math.log(384)


def test_a_file_without_tokens_is_refused_before_any_is_read(reference, tmp_path, capsys, monkeypatch):  # noqa: F811
    """A tokenizer may drop all that a text consists of. A single token is predicted from the document token."""
    copy, blank, one = tmp_path / "copy", tmp_path / "blank.txt", tmp_path / "one.txt"
    shutil.copytree(next((reference / "checkpoints").glob("step_*")), copy)
    blank.write_text("\n \n")
    one.write_text("x")
    assert main(["loss", str(copy), str(one), str(blank)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1] == "1"
    groups.shut_down()
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("megahybrid.evaluation.scorer.read", None)
    assert main(["loss", str(copy), str(one), str(blank)]) == 2
    error = capsys.readouterr().err
    assert f"finds no token in '{blank}'; leave it out." in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        (None, [], "cannot be read (No such file or directory); give files of text."),
        (b"\xff\xfe", [], "is no UTF-8 text; give files of text."),
        (b"", [], "is empty; leave it out."),
        (b"x", ["--length", "0"], "--length is 0; it must be at least 1."),
    ],
)
def test_what_is_refused(content, flags, said, reference, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    capsys.readouterr()
    assert main(["loss", str(reference), str(file), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
