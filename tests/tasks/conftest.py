"""Prose in a file."""

from __future__ import annotations

import pytest

from tests.tasks.texts import prose_text


@pytest.fixture(scope="session")
def haystack(tmp_path_factory) -> str:
    """Path of 6,000 words."""
    path = tmp_path_factory.mktemp("haystack") / "river.txt"
    path.write_text(prose_text(6000), encoding="utf-8")
    return str(path)
