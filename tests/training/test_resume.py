"""Whether a run can go on as it is asked to: what is read for it, and what is said where it cannot."""

import contextlib
import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from megahybrid import retry
from megahybrid.config import load_config, save_config
from megahybrid.data.opened import open_data
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import UserError
from megahybrid.training.resume import Start
from tests.config.test_task_sources import KEY, RECIPE

JSON = '{"model":\r\n "é"}'


def data(identity="new", tokenizer=JSON, prepared=True):
    return SimpleNamespace(identity=identity, tokenizer_json=tokenizer, prepared=object() if prepared else None)


@pytest.fixture
def branch(tmp_path):
    """The start of a branch, and the tokenizer's file in its checkpoint."""
    file = tmp_path / "step_00000010" / "tokenizer.json"
    file.parent.mkdir()
    file.write_bytes(JSON.encode())
    return Start(file.parent, branches=True), file


def recipe(branch_data):
    return SimpleNamespace(data=SimpleNamespace(path="data/new"), train=SimpleNamespace(branch_data=branch_data))


def test_the_trunks_tokenizer_is_read_again_where_a_disk_refuses(branch, monkeypatch):
    start, file = branch
    real, faults = Path.read_bytes, [errno.ESTALE, errno.EIO]

    def read_bytes(path):
        if path == file and faults:
            raise OSError(faults[0], os.strerror(faults.pop(0)))
        return real(path)

    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    start.check_data(recipe("own"), "old", data())
    assert not faults
    with pytest.raises(UserError, match=f"than 'data/new' holds; .*tokenizer='{re.escape(str(file))}"):
        start.check_data(recipe("own"), "old", data(tokenizer=JSON.replace("\r", "")))


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"\xff")])
def test_a_tokenizer_that_cannot_be_read_is_said(damage, branch):
    start, file = branch
    damage(file)
    with pytest.raises(UserError, match=f"'{re.escape(str(file))}' is missing or not readable; put it back, or branch"):
        start.check_data(recipe("own"), "old", data())
    with pytest.raises(
        UserError, match=r"on other data than 'data/new' holds; set it back, or set train\.branch_data=own"
    ):
        start.check_data(recipe("trunk"), "old", data())


def test_the_trunks_own_tokenizer_fits_tasks_alone_to_the_byte(branch, tmp_path):
    start, file = branch
    file.write_bytes(Tokenizer.train(["a text"], 257).to_json().replace("\n", "\r\n").encode())
    (tmp_path / "recall.yaml").write_text(RECIPE)
    opened = open_data(load_config(tmp_path / "recall.yaml", [f"data.tokenizer={file}"]))
    assert opened.prepared is None and "\r\n" in opened.tokenizer_json
    start.check_data(recipe("own"), "old", opened)


INSTEAD = "set it back, or start with train.init_from."
OWN = INSTEAD[:-1] + "; other data takes train.branch_data=own."


@pytest.mark.parametrize(
    ("now", "said", "said_of_own"),
    [
        ("train.seed=7", INSTEAD, INSTEAD),
        ("model.pattern=GLL", INSTEAD, INSTEAD),
        ("data.document_masking=false", OWN, None),
        (f"{KEY}.parameters.pairs=5", OWN, None),
    ],
)
def test_data_of_its_own_is_named_where_the_data_differs(now, said, said_of_own, branch, tmp_path):
    start, file = branch
    (tmp_path / "recall.yaml").write_text(RECIPE)
    save_config(load_config(tmp_path / "recall.yaml"), file.parent / "config.yaml")
    for branch_data, expected in (("trunk", said), ("own", said_of_own)):
        keys = ["train.branch_from=runs/trunk@1", f"train.branch_data={branch_data}", now]
        with pytest.raises(UserError) if expected else contextlib.nullcontext() as refused:
            start.check(load_config(tmp_path / "recall.yaml", keys))
        assert not expected or str(refused.value).endswith(f"; {expected}")


def test_other_data_is_told_what_makes_it_the_branchs_own(branch):
    start, file = branch
    for prepared, tokenizer, said in (
        (True, JSON, "than 'data/new' holds; set it back, or set train.branch_data=own."),
        (False, JSON, "than the recipe's tasks make; set it back, or set train.branch_data=own."),
        (True, "{}", f"; set it back, or prepare with data.tokenizer='{file}' and set train.branch_data=own."),
        (False, "{}", f"; set it back, or set data.tokenizer='{file}' and set train.branch_data=own."),
    ):
        with pytest.raises(UserError) as refused:
            start.check_data(recipe("trunk"), "old", data("new", tokenizer, prepared))
        assert str(refused.value).endswith(said)
    with pytest.raises(UserError, match=r"another tokenizer than the recipe's tasks make; set data\.tokenizer='"):
        start.check_data(recipe("own"), "old", data("new", "{}", prepared=False))
    start.check_data(recipe("trunk"), "old", data("old", "{}"))
    with pytest.raises(UserError, match=r"than 'data/new' holds; set it back\.$"):
        Start(file.parent).check_data(recipe("trunk"), "old", data())
