"""Training reads prepared data only as the recipe says that it was prepared."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megahybrid.config.schema import Config, SourceConfig
from megahybrid.data import TrainingData, open_prepared
from megahybrid.data.prepare import prepare
from megahybrid.errors import UserError
from tests.data.corpora import silent
from tests.data.formats import ids_of, recipe, some_texts, write_jsonl


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tokenizer) -> Config:
    """Prepared sources of text, lines, and bare tokens."""
    root = tmp_path_factory.mktemp("mixed")
    file, known = tokenizer
    for name in ("files", "lines", "ids"):
        (root / name).mkdir()
    for number, each in enumerate(some_texts(30)):
        (root / "files" / f"{number}.txt").write_text(each)
    write_jsonl(root / "lines" / "x.jsonl", some_texts(30, seed=1))
    (root / "ids" / "x.bin").write_bytes(np.array(ids_of(known, some_texts(30, seed=2)), np.uint16).tobytes())
    sources = {
        "files": SourceConfig(str(root / "files")),
        "lines": SourceConfig(str(root / "lines"), "jsonl"),
        "ids": SourceConfig(str(root / "ids"), "bin", dtype="uint16"),
    }
    config = recipe(root, file, **sources)
    prepare(config, silent)
    return config


def changed(config: Config, source: str | None = None, **values) -> Config:
    """With other keys of `data`, or of one of its sources."""
    if source is not None:
        values = {"sources": config.data.sources | {source: replace(config.data.sources[source], **values)}}
    return replace(config, data=replace(config.data, **values))


def weighed(config: Config) -> dict[str, SourceConfig]:
    return {name: replace(source, weight=1) for name, source in config.data.sources.items()}


@pytest.fixture
def copy(mixed, tmp_path) -> Config:
    """On data that may be changed."""
    shutil.copytree(mixed.data.path, tmp_path / "data")
    return changed(mixed, path=str(tmp_path / "data"))


def record(config: Config, change) -> None:
    """Change the settings in dataset.json."""
    file = Path(config.data.path) / "dataset.json"
    values = json.loads(file.read_text())
    change(values["settings"])
    file.write_text(json.dumps(values))


CHANGES = [
    (None, {"validation_fraction": 0.2}, "data.validation_fraction (0.1, now 0.2)"),
    ("files", {"include": ["*.txt", "*.md"]}, "data.sources.files.include (['*.txt'], now ['*.txt', '*.md'])"),
    ("files", {"exclude": ["old"]}, "data.sources.files.exclude ([], now ['old'])"),
    ("lines", {"field": "content"}, "data.sources.lines.field (text, now content)"),
    ("ids", {"dtype": "uint32"}, "data.sources.ids.dtype (uint16, now uint32)"),
    ("ids", {"eos_token_id": 0}, "data.sources.ids.eos_token_id (not set, now 0)"),
    (
        "files",
        {"format": "npy"},
        "data.sources.files.format (text, now npy), data.sources.files.include (['*.txt'], now ['*.npy'])",
    ),
]


@pytest.mark.parametrize(("source", "values", "said"), CHANGES)
def test_a_recipe_that_was_changed_after_prepare_is_refused(source, values, said, mixed, tmp_path):
    other = changed(mixed, source, **values)
    remote = changed(other, remote=mixed.data.path, cache=str(tmp_path / "cache"), path="unused")
    for config, where in ((other, f"data.path '{mixed.data.path}'"), (remote, f"data.remote '{mixed.data.path}'")):
        with pytest.raises(UserError) as error:
            TrainingData(config, 0, 1)
        sentence = f"{where} was prepared with another {said}; set it back, or prepare into another data.path."
        assert str(error.value) == sentence
    with pytest.raises(UserError) as error:
        prepare(other, silent)
    assert all(part in str(error.value) for part in said.split("), "))


@pytest.mark.parametrize(("source", "values", "said"), CHANGES)
def test_what_the_data_does_not_record_is_not_compared(source, values, said, copy):
    record(copy, lambda settings: [settings.pop(part.split(" (")[0]) for part in said.split("), ")])
    open_prepared(changed(copy, source, **values))


def test_what_is_spelled_out_and_where_the_text_lies_are_no_change(mixed, copy):
    identity = open_prepared(mixed).identity
    same = changed(changed(mixed, "files", include=["*.txt"], exclude=[]), "lines", path="/elsewhere", weight=2)
    assert open_prepared(changed(same, "ids", path="elsewhere", field="text")).identity == identity
    record(copy, lambda settings: settings.update({"data.of_a_later_version": 1}))
    assert open_prepared(copy).identity == identity


def test_patterns_and_names_are_taken_in_any_order(mixed, copy):
    names = {"include": ["*.txt", "*.md"], "exclude": ["old", "new"]}
    record(copy, lambda settings: settings.update({f"data.sources.files.{key}": names[key] for key in names}))
    turned = changed(copy, "files", **{key: each[::-1] for key, each in names.items()})
    assert open_prepared(turned).identity == prepare(turned, silent).identity
    with pytest.raises(UserError, match=r"files\.exclude \(\['old', 'new'\], now \['old'\]\)"):
        open_prepared(changed(copy, "files", **names | {"exclude": ["old"]}))


@pytest.mark.parametrize(("source", "values", "said"), CHANGES)
def test_how_a_source_that_is_left_out_is_read_does_not_count(source, values, said, mixed):
    used = changed(mixed, sources=weighed(mixed))
    if source is None:
        with pytest.raises(UserError, match="was prepared with another"):
            open_prepared(changed(used, **values))
    else:
        open_prepared(changed(used, source, weight=0, **values))


@pytest.mark.parametrize(("source", "values", "said"), CHANGES)
def test_data_of_the_identity_that_the_recipe_names_is_taken_however_it_was_prepared(source, values, said, mixed):
    """Lines and rows of the same documents have the same one."""
    pinned = changed(mixed, identity=open_prepared(mixed).identity)
    assert open_prepared(changed(pinned, source, **values)).identity == pinned.data.identity


def test_a_recipe_without_sources_says_nothing_by_a_default(mixed):
    default = Config().data.validation_fraction
    bare = changed(mixed, sources={}, validation_fraction=default)
    assert open_prepared(mixed).settings["data.validation_fraction"] != default
    assert open_prepared(bare).identity == open_prepared(mixed).identity
    with pytest.raises(UserError, match=r"data\.validation_fraction \(0\.1, now 0\.3\)"):
        open_prepared(changed(bare, validation_fraction=0.3))
    with pytest.raises(UserError, match=r"data\.validation_fraction \(0\.1, now 0\.005\)"):
        open_prepared(changed(mixed, validation_fraction=default))


def test_tasks_beside_text_have_nothing_that_was_prepared(mixed):
    task = SourceConfig(format="task", task="copy", weight=1)
    sources = weighed(mixed) | {"made": task}
    assert TrainingData(changed(mixed, sources=sources), 0, 1).opened.prepared.root == Path(mixed.data.path)


def test_values_that_prepare_does_not_write_are_told_on_a_line(copy):
    record(copy, lambda settings: settings.update({"data.sources.lines.field": "a\nb" + 9999 * "x"}))
    with pytest.raises(UserError, match=r"lines\.field \(a bx{197}, now text\)") as error:
        open_prepared(copy)
    assert len(str(error.value)) < 600
