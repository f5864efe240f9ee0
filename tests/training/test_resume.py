"""Whether a run can go on as it is asked to: what is read for it, and what is said where it cannot."""

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from megahybrid import retry
from megahybrid.errors import UserError
from megahybrid.training.resume import Start

JSON = '{"model":\r\n "é"}'


def data(identity="new", tokenizer=JSON):
    return SimpleNamespace(identity=identity, tokenizer_json=tokenizer)


@pytest.fixture
def branch(tmp_path):
    """The start of a branch, and the tokenizer's file in its checkpoint."""
    file = tmp_path / "step_00000010" / "tokenizer.json"
    file.parent.mkdir()
    file.write_bytes(JSON.encode())
    return Start(file.parent, branches=True), file


def recipe(branch_data, path="data/new"):
    return SimpleNamespace(data=SimpleNamespace(path=path), train=SimpleNamespace(branch_data=branch_data))


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
