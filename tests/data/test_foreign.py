"""Data from elsewhere is what `prepare` would have written, or is refused: nothing of it is run or leaves the cache."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megahybrid.config.validate import validate
from megahybrid.data import TrainingData, open_prepared
from megahybrid.data.mds import Layout
from megahybrid.errors import UserError
from tests.data.corpora import SEQ_LENGTH
from tests.data.foreign import Foreign


@pytest.fixture
def foreign(corpus, tmp_path):
    return Foreign(corpus[0], tmp_path)


def refused(config) -> str:
    """The sentence with which an epoch of this data is refused."""

    def read():
        with TrainingData(config, 0, 1) as data:
            for _ in range(data.samples_per_epoch // 8 + 1):
                data.next_step()

    with pytest.raises(UserError) as error:
        read()
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and ". " not in message, message
    return message


def refused_everywhere(foreign, *words) -> None:
    """Refused as a folder and behind a cache, and nothing was written but below the cache."""
    before = outside(foreign)
    for config in (foreign.local, foreign.remote):
        message = refused(config)
        assert all(word in message for word in words), message
    assert outside(foreign) == before


def outside(foreign) -> set[Path]:
    """All files that are not in the cache."""
    paths = set(foreign.root.parent.parent.rglob("*")) - set(foreign.cache.parents)
    return {path for path in paths if foreign.cache not in (path, *path.parents)}


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path):
        self._file = file

    def __reduce__(self):
        return os.mkdir, (str(self._file),)


def test_what_is_not_changed_is_read(foreign, corpus):
    foreign.change_index(lambda shards: None)
    foreign.write_shard(0, bytes(foreign.read_shard(0)))
    with TrainingData(foreign.remote, 0, 1) as remote, TrainingData(corpus[0], 0, 1) as own:
        assert remote.next_step()[0].tokens.tolist() == own.next_step()[0].tokens.tolist()


@pytest.mark.parametrize("in_index", [True, False])
def test_no_pickle_is_run(foreign, tmp_path, in_index):
    """A whole shard of a column `pkl`, that mosaicml-streaming would decode; named by the index or by itself alone."""
    payload = pickle.dumps(Bomb(tmp_path / "ran"))
    entry = json.loads((foreign.folder / "index.json").read_text())["shards"][0]
    count, encodings = entry["samples"], ["ndarray:int32", "pkl"]
    keys = ("version", "format", "compression", "hashes", "size_limit", "column_names")
    header = {key: entry[key] for key in keys} | {"column_encodings": encodings, "column_sizes": [None, None]}
    header = json.dumps(header, sort_keys=True).encode()
    borders = bytes([4, 1, 0, 0, 0, 0])
    sample = len(borders).to_bytes(4, "little") + len(payload).to_bytes(4, "little") + borders + payload
    offsets = np.cumsum([8 + 4 * count + len(header), *[len(sample)] * count]).astype(np.uint32)
    changes = {"column_encodings": encodings, "column_sizes": [None, None]} if in_index else {}
    foreign.write_shard(0, np.uint32(count).tobytes() + offsets.tobytes() + header + sample * count, **changes)
    refused_everywhere(foreign, '["ndarray:int32", "pkl"]' if in_index else "shard.00000.mds' cannot be read")
    assert not (tmp_path / "ran").exists()


def one(**changes):
    """Changes of the first shard's entry; `raw_…` of its raw_data."""

    def change(shards):
        for key, value in changes.items():
            if key.startswith("raw_"):
                shards[0]["raw_data"][key.removeprefix("raw_")] = value
            else:
                shards[0][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (one(raw_basename="../../../../escaped.mds"), "raw_data.basename"),
        (one(raw_basename="/tmp/escaped.mds"), "raw_data.basename"),
        (one(raw_basename="shard.00001.mds"), "raw_data.basename"),
        (one(raw_basename="index.json"), "raw_data.basename"),
        (one(raw_basename=["x"]), "raw_data.basename"),
        (one(raw_hashes={}), "no xxh64 hash"),
        (one(raw_hashes={"xxh64": "0"}), "no xxh64 hash"),
        (one(raw_hashes={"xxh64": "0" * 16, "sha1": "0"}), "raw_data.hashes"),
        (one(raw_extra=1), "raw_data.extra"),
        (one(extra=1), "extra"),
        (one(raw_bytes=1 << 50), "cannot take"),
        (one(raw_bytes=9), "cannot take"),
        (one(raw_bytes=-1), "bytes -1"),
        (one(raw_bytes=1e3), "bytes 1000.0"),
        (one(samples=1 << 50), "cannot take"),
        (one(samples=True), "samples true"),
        (one(size_limit="1kb"), "size_limit"),
        (one(compression="zstd", zip_data={"basename": "x", "bytes": 1, "hashes": {}}), "compression"),
        (one(zip_data={"basename": "x", "bytes": 1, "hashes": {}}), "zip_data"),
        (one(column_names=["borders", "tokens", "x"]), "column_names"),
        (one(column_encodings=["ndarray:int32", f"ndarray:int64:{SEQ_LENGTH + 1}"]), "column_encodings"),
        (one(column_sizes=[None, None]), "column_sizes"),
        (one(format="json"), "format"),
        (one(version=3), "version"),
        (lambda shards: shards[0].update(raw_data=None), "shard 0 without size"),
        (lambda shards: shards.__setitem__(0, "x"), "shard 0 without size"),
        (lambda shards: shards.append(shards[0]), "raw_data.basename"),
        (lambda shards: shards.pop(), "lists"),
    ],
)
def test_an_index_that_prepare_does_not_write_is_refused(foreign, change, named):
    (foreign.root.parent.parent / "escaped.mds").write_bytes(foreign.read_shard(0))
    foreign.change_index(change)
    refused_everywhere(foreign, "index.json", named)


@pytest.mark.parametrize("text", ["{", "[]", '{"shards": 7}', '{"shards": ' + "[" * 100_000, "null"])
def test_an_index_that_is_none_is_refused(foreign, text):
    foreign.write_index(text)
    refused_everywhere(foreign, "index.json", "unreadable")


def rename(name):
    return lambda values: values["sources"].update({name: values["sources"].pop("small")})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (rename("../small"), "source's name"),
        (rename("../../../../small"), "source's name"),
        (rename("/tmp/small"), "source's name"),
        (rename("small/train"), "source's name"),
        (rename(".."), "source's name"),
        (rename("tokenizer"), "source's name"),
        (rename("small\n"), "source's name"),
        (lambda values: values.update(token_dtype="object"), "token_dtype"),
        (lambda values: values.update(seq_length="32"), "seq_length"),
        (lambda values: values.update(seq_length=0), "seq_length"),
        (lambda values: values.update(seq_length=1 << 60), "seq_length"),
        (lambda values: values.update(vocab_size=1.5), "vocab_size"),
        (lambda values: values.update(document_id=-1), "document_id"),
        (lambda values: values.update(root="/"), "root"),
        (lambda values: values.update(tokenizer_sha256=None), "tokenizer_sha256"),
        (lambda values: values["sources"]["small"]["train"].update(index_sha256=None), "index_sha256"),
        (lambda values: values["sources"]["small"]["train"].update(samples=-8), "samples"),
        (lambda values: values["sources"]["small"].pop("validation"), "splits of small"),
        (lambda values: values["sources"]["small"].update(test=values["sources"]["small"]["train"]), "splits of small"),
        (lambda values: values.update(sources=[]), "not readable"),
        (lambda values: values.update(settings=[]), "settings"),
    ],
)
def test_a_dataset_that_prepare_does_not_write_is_refused(foreign, change, named):
    foreign.change_dataset(change)
    foreign.local.data.sources, foreign.remote.data.sources = {}, {}
    refused_everywhere(foreign, "dataset.json", named)


def edited(data: bytearray, at: int, value: int) -> bytes:
    data[at : at + 4] = value.to_bytes(4, "little")
    return bytes(data)


def offset(data, index):
    return int.from_bytes(data[4 + 4 * index : 8 + 4 * index], "little")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: edited(data, 0, 10**6), "does not hold"),
        (lambda data: edited(data, 0, 1), "does not hold"),
        (lambda data: edited(data, 8, 1 << 31), "offsets"),  # outside the file
        (lambda data: edited(data, 8, offset(data, 0)), "offsets"),  # an empty sample
        (lambda data: edited(data, 8, offset(data, 2) + 1), "offsets"),  # not ascending
        (lambda data: edited(data, 4, 0), "offsets"),  # the first sample is the shard's head
        (lambda data: edited(data, 4, offset(data, 0) - 4), "offsets"),  # it begins in there
        (lambda data: bytes(data) + b"more", "offsets"),
        (lambda data: bytes(data).replace(b'"compression": null', b'"compression": "br"'), "description"),
        (lambda data: bytes(data).replace(b"ndarray:uint16", b"ndarray:int16 "), "description"),
        (lambda data: edited(data, offset(data, 0), 1 << 31), "borders and tokens"),
        (lambda data: edited(data, offset(data, 0), 3), "borders and tokens"),
        (lambda data: edited(data, offset(data, 0) + 6, 1), "ascend from 0"),  # the first border
        (lambda data: edited(data, offset(data, 1) - 4, 0xFFFFFFFF), "token 65535 of a vocabulary"),
    ],
)
def test_a_shard_that_contradicts_its_index_is_refused(foreign, change, named):
    foreign.write_shard(0, change(foreign.read_shard(0)))
    refused_everywhere(foreign, "shard.00000.mds", named)


@pytest.mark.parametrize("borders", [[0, 3, 3], [0, 5, 4], [0, -1], [0, SEQ_LENGTH], [1]])
def test_borders_that_do_not_ascend_are_refused(borders):
    layout = Layout(SEQ_LENGTH, "uint16", 1000)
    sample = layout.encode(np.zeros(SEQ_LENGTH + 1, np.uint16), np.array(borders, np.int32))
    with pytest.raises(ValueError, match="ascend from 0"):
        layout.decode(sample)


@pytest.mark.parametrize("cut", [0, 3, 4, 5, 9, 40, -1])
def test_a_part_of_a_sample_is_refused(cut):
    layout = Layout(SEQ_LENGTH, "uint16", 1000)
    sample = layout.encode(np.zeros(SEQ_LENGTH + 1, np.uint16), np.array([0, 7], np.int32))
    with pytest.raises(ValueError, match="borders and tokens"):
        layout.decode(sample[:cut])


def test_a_folder_of_the_cache_that_leads_out_of_it_is_refused(foreign, tmp_path):
    open_prepared(foreign.remote)
    (root,) = (path for path in foreign.cache.iterdir() if path.name != ".locks")
    (tmp_path / "home").mkdir()
    (root / "small").symlink_to(tmp_path / "home")
    assert "leads out of data.cache" in refused(foreign.remote)
    assert not list((tmp_path / "home").iterdir())
    (root / "small").unlink()
    (tmp_path / "mine").write_text("mine")
    for lock in (foreign.cache / ".locks").iterdir():
        lock.unlink()
    for number in range(64):
        (foreign.cache / ".locks" / str(number)).symlink_to(tmp_path / "mine")
    assert "data.cache" in refused(foreign.remote)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_link_in_place_of_a_file_of_the_cache_is_replaced(foreign, tmp_path):
    with TrainingData(foreign.remote, 0, 1) as data:
        expected = data.next_step()[0].tokens.tolist()
    (tmp_path / "mine").write_text("mine")
    shards = list(foreign.cache.rglob("*.mds"))
    for shard in shards:
        shard.unlink()
        shard.symlink_to(tmp_path / "mine")
        shard.with_name(f".{shard.name}.part").symlink_to(tmp_path / "mine")
    with TrainingData(foreign.remote, 0, 1) as data:
        assert data.next_step()[0].tokens.tolist() == expected
    assert shards and (tmp_path / "mine").read_text() == "mine"


def pinned(config, identity):
    return replace(config, data=replace(config.data, identity=identity))


def test_the_identity_pins_the_data(foreign, corpus):
    identity = open_prepared(corpus[0]).identity
    for config in (foreign.local, foreign.remote):
        assert open_prepared(pinned(config, identity)).identity == identity
        with pytest.raises(UserError, match=f"identity is {identity}, but data.identity is {'0' * 16}"):
            open_prepared(pinned(config, "0" * 16))
    foreign.change_index(lambda shards: shards[0]["raw_data"]["hashes"].update(xxh64="0" * 16))
    for config in (foreign.local, foreign.remote):
        assert open_prepared(config).identity != identity
        assert "but data.identity is" in refused(pinned(config, identity))


@pytest.mark.parametrize("identity", ["", "12", "0" * 15 + "g", "0" * 17, "1.2e+16"])
def test_an_identity_that_is_none_is_refused_at_load(corpus, identity):
    with pytest.raises(UserError, match=r"data\.identity is .* in quotes\.$"):
        validate(pinned(corpus[0], identity))
