"""Export and import of a checkpoint that training wrote."""

import itertools
import json
import shutil
import weakref

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import megahybrid.hf.export as export_module
import megahybrid.hf.import_ as import_module
from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.hf.naming import exported_name

TEXT = "def f(x):\n    return x + 1\n"


def last_checkpoint(run):
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def test_what_an_exported_folder_holds(exported, reference):
    shards = [name for name in names(exported) if name.endswith(".safetensors")]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    stored = {}
    for shard in shards:
        assert (exported / shard).stat().st_size < 110_000
        stored |= load_file(exported / shard)
    saved = load_file(last_checkpoint(reference) / "weights-00000.safetensors")
    assert stored.keys() == {exported_name(name) for name in saved} == index["weight_map"].keys()
    assert all(torch.equal(stored[exported_name(name)], weight) for name, weight in saved.items())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in saved.values())
    card = (exported / "README.md").read_text()
    metrics = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    for fact in ("`GLSFL`", "| steps | 20 of 20 |", f"| tokens | {20 * 8 * 64:,} |", f"{metrics[-1]['loss']:.4f} nats"):
        assert fact in card
    assert "trust_remote_code" in card and "| data | python, by size; identity " in card


def test_transformers_loads_it(exported):
    assert AutoConfig.from_pretrained(exported, trust_remote_code=True).layers == "GLSFL"
    model, report = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(model).__module__.startswith("transformers_modules")
    assert model.lm_head.weight is model.model.embedding.weight
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ours = Tokenizer.load(exported / "tokenizer.json")
    batch = tokenizer([TEXT, TEXT * 4], return_tensors="pt", padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][1].tolist() == [ours.document_id, *ours.encode(TEXT * 4)]
    assert batch["attention_mask"][0, 0] == 0
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)
    alone = model.generate(**tokenizer(TEXT, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    written = out[0, batch["input_ids"].shape[1] :]
    expected = alone[0, -12:]
    assert torch.equal(written[: len(expected)], expected) or tokenizer.eos_token_id in out


def test_bf16(reference, tmp_path):
    assert main(["export", str(reference), str(tmp_path / "model")]) == 0
    assert "model.safetensors" in names(tmp_path / "model")
    assert import_module.config_of(tmp_path / "model").train.dtype == "bf16"
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in load_file(last_checkpoint(reference) / "weights-00000.safetensors").items():
        expected = weight if name.endswith(("A_log", "dt_bias")) else weight.bfloat16()
        assert stored[exported_name(name)].dtype == expected.dtype
        assert torch.equal(stored[exported_name(name)], expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True, dtype=torch.bfloat16)
    assert model.model.layers[0].mixer.A_log.dtype == torch.float32
    assert model.model.layers[0].mixer.q_conv.dtype == torch.bfloat16
    assert model(torch.arange(100)[None]).logits.isfinite().all()


def test_round_trip_and_a_training_step(exported, reference, recipe, tmp_path, capsys):
    assert main(["import", str(exported), str(tmp_path / "imported"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "worst difference" in said and "Not verified" not in said
    saved = load_file(last_checkpoint(reference) / "weights-00000.safetensors")
    imported = load_file(tmp_path / "imported" / "weights-00000.safetensors")
    assert saved.keys() == imported.keys()
    assert all(torch.equal(imported[name], weight) for name, weight in saved.items())
    assert load_config(tmp_path / "imported" / "config.yaml").train.dtype == "fp32"  # as it is stored
    weights = shutil.copytree(last_checkpoint(reference), tmp_path / "weights")
    facts = json.loads((weights / "checkpoint.json").read_text())
    del facts["regulators"]  # lambda, which an exported folder does not have
    (weights / "checkpoint.json").write_text(json.dumps(facts))
    trained = []
    for name, start in (("before", weights), ("after", tmp_path / "imported")):
        run = tmp_path / name
        assert main(["train", str(recipe), f"run.dir={run}", "train.steps=1", f"train.init_from={start}"]) == 0
        trained.append(
            [(last_checkpoint(run) / f"{kind}-00000.safetensors").read_bytes() for kind in ("weights", "exp_avg")]
        )
    assert trained[0] == trained[1]
    # What was imported is a checkpoint: it generates and can be exported again.
    assert main(["generate", str(tmp_path / "imported"), "--prompt", "def", "--tokens", "3"]) == 0
    assert main(["export", str(tmp_path / "imported"), str(tmp_path / "again"), "--dtype", "fp32"]) == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[exported_name(name)], weight) for name, weight in saved.items())


@pytest.mark.parametrize("key", ["_attn_implementation", "_attn_implementation_internal"])
def test_config_json_has_no_code_loaded(exported, key, tmp_path, monkeypatch):
    """As transformers does for an attention that is named as a repository of the hub."""
    loaded = []
    monkeypatch.setattr(transformers.modeling_utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(transformers.modeling_utils, "load_and_register_kernel", loaded.append)
    shutil.copytree(exported, tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "somebody/kernel"}))
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "imported"), "--verify"]) == 0
    assert not loaded


def test_an_adapter_does_not_redirect_the_comparison(exported, tmp_path, monkeypatch):
    """As from_pretrained is, where peft is installed, to another model by name."""
    shutil.copytree(exported, tmp_path / "source")
    adapter = {"base_model_name_or_path": str(tmp_path / "another"), "peft_type": "LORA"}
    (tmp_path / "source" / "adapter_config.json").write_text(json.dumps(adapter))
    monkeypatch.setattr(transformers.modeling_utils, "is_peft_available", lambda: True)
    found = transformers.utils.find_adapter_config_file
    monkeypatch.setattr(transformers.modeling_utils, "find_adapter_config_file", found, raising=False)
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "imported"), "--verify"]) == 0


def test_what_transformers_has_stored(exported, reference, tmp_path):
    """Once a model has been tuned there."""
    AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).save_pretrained(tmp_path / "tuned")
    assert main(["import", str(tmp_path / "tuned"), str(tmp_path / "imported"), "--verify"]) == 0
    saved, found = (
        load_file(each / "weights-00000.safetensors") for each in (last_checkpoint(reference), tmp_path / "imported")
    )
    assert found.keys() == saved.keys() and all(torch.equal(found[name], weight) for name, weight in saved.items())


def test_without_a_tokenizer(exported, reference, tmp_path, capsys):
    source, imported, model = (tmp_path / name for name in ("source", "imported", "model"))
    shutil.copytree(exported, source, ignore=shutil.ignore_patterns("tokenizer*"))
    assert main(["import", str(source), str(imported), "--verify"]) == 0
    said = capsys.readouterr().out
    assert said.count("worst difference") == 2 and "nats" not in said
    assert f"It has no tokenizer, since {source} has none: for text put one into {imported}" in said
    for verb in (["generate", str(imported), "--prompt", "def"], ["export", str(imported), str(model)]):
        assert main(verb) == 2
        assert f"There is no tokenizer '{imported}/tokenizer.json'; put one there" in capsys.readouterr().err
    assert main(["eval", str(source), "--task", "selective_mqar"]) == 2
    assert f"There is no tokenizer '{source}/tokenizer.json'; put one there" in capsys.readouterr().err
    shutil.copy(last_checkpoint(reference) / "tokenizer.json", imported)
    assert main(["export", str(imported), str(model), "--no-verify"]) == 0
    assert (model / "tokenizer.json").read_bytes() == (exported / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("old", [False, True])
def test_a_chat_template_goes_along(exported, old, tmp_path, capsys):
    """With the tokens that it names: as the source's tokenizer writes it, also in what is made of the export."""
    template = "{{ bos_token }}{% for each in messages %}{{ each.role }}: {{ each.content }}{{ eos_token }}{% endfor %}"
    backend = Backend.from_file(str(exported / "tokenizer.json"))
    ids = [backend.encode(text).ids[-1] for text in ("a", "b")]
    bos, eos = map(backend.id_to_token, ids)  # tokens that the vocabulary has room for
    shutil.copytree(exported, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"bos_token": bos, "eos_token": {"__type": "AddedToken", "content": eos}}
    if old:
        several = [{"name": "tools", "template": "none"}, {"name": "default", "template": template}]
        settings["chat_template"] = several
    else:
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
        (tmp_path / "model" / "additional_chat_templates").mkdir()
        (tmp_path / "model" / "additional_chat_templates" / "tools.jinja").write_text("none")
    file.write_text(json.dumps(settings))
    for source, target in itertools.pairwise(tmp_path / name for name in ("model", "second", "third")):
        imported = target.with_name(f"{target.name}-imported")
        assert main(["import", str(source), str(imported), "--no-verify"]) == 0
        assert ("chat template is imported, not tools." in capsys.readouterr().out) == (source.name == "model")
        assert main(["export", str(imported), str(target), "--no-verify"]) == 0
        messages = [{"role": "user", "content": "def"}, {"role": "assistant", "content": "f"}]
        written = AutoTokenizer.from_pretrained(target).apply_chat_template(messages, tokenize=False)
        assert written == f"{bos}user: def{eos}assistant: f{eos}"
        document = Tokenizer.load(target).document_id
        config = AutoConfig.from_pretrained(target, trust_remote_code=True)
        assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == [*ids, document]
        assert GenerationConfig.from_pretrained(target).eos_token_id == sorted((ids[1], document))


def test_a_chat_models_token_that_its_tokenizer_lacks(exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ eos_token }}")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<end>"}))
    assert main(["import", str(tmp_path / "model"), str(tmp_path / "imported"), "--no-verify"]) == 0
    assert main(["export", str(tmp_path / "imported"), str(tmp_path / "again"), "--no-verify"]) == 2
    assert "lacks the token <end> that tokenizer_config.json names; correct either.\n" in capsys.readouterr().err


def test_shards_are_read_one_tensor_at_a_time(reference, tmp_path, monkeypatch):
    """Host memory holds one parameter: the next is read only when the one before is written."""
    alive, most = [], []
    real = export_module._read

    def counted(*arguments):
        for tensor in real(*arguments):
            alive.append(weakref.ref(tensor))
            most.append(sum(each() is not None for each in alive))
            yield tensor
            del tensor

    monkeypatch.setattr(export_module, "_read", counted)
    assert main(["export", str(reference), str(tmp_path / "model"), "--no-verify"]) == 0
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as tensors:
        assert len(most) == len(list(tensors.keys())) and max(most) <= 2
