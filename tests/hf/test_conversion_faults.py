"""What export and import refuse, and that a conversion which fails leaves nothing."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import megahybrid.hf.export as export_module
import megahybrid.hf.import_ as import_module
from megahybrid.cli import main
from megahybrid.config import load_config, save_config
from tests.hf.test_conversion import last_checkpoint, names


@pytest.mark.parametrize(
    "change",
    [lambda x: {n: w[:, None] for n, w in x.items()}, lambda x: x | {"model.num_kept": torch.zeros(1)}],
)
def test_what_only_published_models_have_is_refused_in_ours(exported, tmp_path, change, capsys):
    """Axes of length 1, and tensors beside the weights."""
    shutil.copytree(exported, tmp_path / "source")
    file = next((tmp_path / "source").glob("model-00001-*"))
    save_file(change(load_file(file)), file)
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "imported"), "--no-verify"]) == 2
    assert "config.json " in capsys.readouterr().err


def test_resuming_from_weights_alone_is_refused(exported, recipe, tmp_path, capsys):
    """A checkpoint without moments in a run directory, with the configuration that the recipe has."""
    folder = tmp_path / "run" / "checkpoints" / "step_00000000"
    assert main(["import", str(exported), str(folder), "--no-verify"]) == 0
    save_config(load_config(recipe), folder / "config.yaml")
    capsys.readouterr()
    assert main(["train", str(recipe), f"run.dir={folder}"]) == 2
    assert f"holds weights only; start a new run with train.init_from='{folder}'" in capsys.readouterr().err


def test_a_wrong_conversion_leaves_nothing(reference, exported, tmp_path, monkeypatch, capsys):
    real = export_module._read

    def wrong(*arguments):
        for number, tensor in enumerate(real(*arguments)):
            yield tensor * 1.001 if number == 3 else tensor

    monkeypatch.setattr(export_module, "_read", wrong)
    assert main(["export", str(reference), str(tmp_path / "model"), "--dtype", "fp32", "--verify"]) == 2
    assert "logits differ by up to" in capsys.readouterr().err
    real_stream = import_module.write_stream

    def wrong_stream(file, entries, tensors):
        return real_stream(file, entries, (tensor + 1e-3 for tensor in tensors))

    monkeypatch.setattr(import_module, "write_stream", wrong_stream)
    assert main(["import", str(exported), str(tmp_path / "checkpoint"), "--verify"]) == 2
    assert "logits differ by up to" in capsys.readouterr().err
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.embedding.weight", "The converted model's logits differ by up to"),
        # Too little for a decision to fall differently.
        ("model.layers.1.mixer.router.conv0_weight", "router.conv0_weight is not what the model has"),
    ],
)
def test_a_file_that_changes_once_it_is_written(name, message, reference, tmp_path, monkeypatch, capsys):
    """What is compared is what the folder holds: here with one bit changed."""
    real = export_module._write_weights

    def damaged(part, *arguments):
        real(part, *arguments)
        (file,) = part.glob("*.safetensors")
        data = bytearray(file.read_bytes())
        size = int.from_bytes(data[:8], "little")
        end = json.loads(data[8 : 8 + size])[name]["data_offsets"][1]
        data[8 + size + end - 2] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(export_module, "_write_weights", damaged)
    assert main(["export", str(reference), str(tmp_path / "model"), "--verify"]) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == []


@pytest.mark.parametrize("verb", ["export", "import"])
def test_a_full_disk_leaves_nothing(verb, exported, reference, tmp_path, monkeypatch, capsys):
    module = {"export": export_module, "import": import_module}[verb]
    real = module.write_stream

    def full(file, entries, tensors):
        real(file, dict(list(entries.items())[:1]), (next(iter(tensors)),))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_stream", full)
    source = {"export": reference, "import": exported}[verb]
    assert main([verb, str(source), str(tmp_path / "target")]) == 2
    message = capsys.readouterr().err
    assert "could not be written (No space left on device)" in message and message.count("\n") == 1
    assert names(tmp_path) == []


def test_bad_exports(reference, tmp_path, capsys):
    def refused(*arguments):
        assert main(["export", *map(str, arguments)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    assert "not an empty folder" in refused(reference, tmp_path / "full")
    assert "no checkpoint" in refused(tmp_path / "full", tmp_path / "model")
    assert "--shard-size is '5'" in refused(reference, tmp_path / "model", "--shard-size", "5")
    shutil.copytree(last_checkpoint(reference), tmp_path / "damaged")
    with open(tmp_path / "damaged" / "weights-00000.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert "not what was saved" in refused(tmp_path / "damaged", tmp_path / "model")
    assert names(tmp_path) == ["damaged", "full"] and names(tmp_path / "full") == ["file"]


def test_bad_imports(exported, tmp_path, capsys):
    def refused(change):
        source = tmp_path / "source"
        shutil.copytree(exported, source)
        change(source)
        assert main(["import", str(source), str(tmp_path / "target")]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        shutil.rmtree(source)
        assert names(tmp_path) == []
        return message

    def set_config(**values):
        def change(source):
            found = json.loads((source / "config.json").read_text())
            (source / "config.json").write_text(json.dumps(found | values))

        return change

    def pickled(source):
        for file in source.glob("model*.safetensors*"):
            file.unlink()
        (source / "pytorch_model.bin").write_bytes(b"not opened")

    def outside(source):
        file = source / "model.safetensors.index.json"
        file.write_text(file.read_text().replace("model-00001", "../model-00001"))

    def without_a_tensor(source):
        file = next(source.glob("model-00002-*"))
        tensors = load_file(file)
        tensors.pop(min(tensors))
        save_file(tensors, file)

    def put_first(**tensors):
        def change(source):
            file = next(source.glob("model-00001-*"))
            save_file(load_file(file) | tensors, file)

        return change

    def damaged(source):
        next(source.glob("model-00002-*")).write_bytes(b"\xff" * 100)

    assert "is missing; download it again" in refused(lambda source: next(source.glob("model-00002-*")).unlink())
    assert "damaged or no safetensors" in refused(damaged)
    assert "has no tensor model." in refused(without_a_tensor)
    last = load_file(max(exported.glob("model-*.safetensors")))
    name = min(last)
    assert f"has {name} twice, in model-00001-of" in refused(put_first(**{name: last[name] + 1}))
    output = load_file(next(exported.glob("model-00001-*")))["model.embedding.weight"] + 1
    assert "an output layer, lm_head.weight, that is not the embedding" in refused(
        put_first(**{"lm_head.weight": output})
    )
    assert "but config.json calls for" in refused(set_config(hidden_size=48))
    assert "has no place for" in refused(set_config(layers="GLSF"))
    assert "model_type 'llama'" in refused(set_config(model_type="llama"))
    assert "pickle (pytorch_model.bin)" in refused(pickled)
    assert "names files outside" in refused(outside)
    assert "There is no" in refused(lambda source: (source / "config.json").unlink())
    assert "cannot be read as JSON" in refused(lambda source: (source / "config.json").write_text("{"))
    assert "tokenizer_config.json' cannot be read (" in refused(
        lambda source: (source / "tokenizer_config.json").write_text('{"chat_template": [1]}')
    )
    assert "not a readable tokenizer.json" in refused(lambda source: (source / "tokenizer.json").write_text("{"))
    assert "unknown letter" in refused(set_config(layers="GLSFX"))
