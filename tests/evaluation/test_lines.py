"""The folder keeps whole lines, and refuses those of other settings."""

import pytest

from megahybrid.errors import UserError
from megahybrid.evaluation.lines import Folder, key_of

MODEL, TASKS = {"weights": "a", "window": 8}, {"mqar": {"version": 1, "parameters": {"pairs": 4}}}


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path / "evaluations" / "step_1")
    folder.open(MODEL, TASKS)
    folder.add("mqar", [])
    return folder


def test_a_torn_line_is_cut_and_whole_ones_stay(folder):
    folder.add("mqar", [{"index": 0, "text": ["ü"]}, {"index": 1}])
    file = folder.path / "mqar.jsonl"
    whole = file.read_bytes()
    for torn in range(1, 12):
        file.write_bytes(whole + b'{"index": 2}\n'[:torn])
        assert [line["index"] for line in folder.read("mqar")] == [0, 1]
        Folder(folder.path).open(MODEL, TASKS)
        assert file.read_bytes() == whole
    folder.add("mqar", [{"index": 2}])
    assert [line["index"] for line in folder.read("mqar")] == [0, 1, 2]


def test_other_settings_are_refused_and_other_tasks_are_not(folder):
    with pytest.raises(UserError, match="window was 8, it is 9"):
        folder.open({**MODEL, "window": 9}, TASKS)
    other = {"mqar": {"version": 1, "parameters": {"pairs": 5}}}
    with pytest.raises(UserError, match=r"mqar with other settings \(parameters.pairs was 4, it is 5\); give --out"):
        folder.open(MODEL, other)
    folder.open(MODEL, {"copy": {"version": 1}})
    folder.add("copy", [])
    folder.open(MODEL, TASKS)
    with pytest.raises(UserError, match="version was 1, it is 2"):
        folder.open(MODEL, {"copy": {"version": 2}})


def test_settings_are_written_with_the_first_line(tmp_path):
    folder = Folder(tmp_path / "step_1")
    folder.open(MODEL, TASKS)
    assert not folder.path.exists() and folder.tasks() == []
    folder.add("mqar", [{"index": 0}])
    assert sorted(path.name for path in folder.path.iterdir()) == ["mqar.jsonl", "settings.json"]


def test_lines_whose_settings_are_gone_are_refused(folder):
    """They may be another model's."""
    folder.add("mqar", [{"index": 0}])
    (folder.path / "settings.json").unlink()
    with pytest.raises(UserError, match=r"holds mqar.jsonl .*; give --out another folder\.$"):
        folder.open({**MODEL, "weights": "b"}, TASKS)
    assert [path.name for path in folder.path.iterdir()] == ["mqar.jsonl"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another with --out"):
        Folder(tmp_path / "file" / "step_1").open(MODEL, TASKS)


def test_keys_survive_the_file(folder):
    line = {"mode": "forced", "policy": "learned", "length": 64, "depth": 0.1111, "index": 3, "right": [1]}
    folder.add("mqar", [line, {**line, "depth": None}])
    assert [key_of(each) for each in folder.read("mqar")] == [
        ("forced", "learned", 64, 0.1111, 3), ("forced", "learned", 64, None, 3),
    ]  # fmt: skip
