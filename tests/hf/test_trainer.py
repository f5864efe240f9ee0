"""The exported model under transformers' Trainer, TRL and PEFT, where these are installed (accelerate, trl, peft)."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megahybrid.hf.configuration_megahybrid import MegahybridConfig
from megahybrid.hf.modeling_megahybrid import MegahybridForCausalLM
from megahybrid.hf.naming import exported_config
from tests.hf.tiny import random_tokens
from tests.model import tiny

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow

PATTERN = "GLSFN"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MegahybridForCausalLM(MegahybridConfig(**exported_config(tiny.config(PATTERN))))


def options(folder, **more):
    quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    return {"output_dir": str(folder), "bf16": False, "gradient_checkpointing": False, **quiet, **more}


class Rows(torch.utils.data.Dataset):
    """Of one length, with more and more labels left out."""

    def __len__(self):
        return 16

    def __getitem__(self, number):
        row = random_tokens(40, number)
        return {"input_ids": row, "labels": row.masked_fill(torch.arange(40) < 2 * number, -100)}


@pytest.mark.parametrize("recomputed", [False, True])
def test_accumulation(model, recomputed, tmp_path):
    from transformers import Trainer, TrainingArguments

    found = []
    for count in (1, 4, 16):
        sizes = {"per_device_train_batch_size": 16 // count, "gradient_accumulation_steps": count}
        more = {"max_steps": 1, "max_grad_norm": 1e9, "learning_rate": 0.0, "gradient_checkpointing": recomputed}
        trainer = Trainer(model, TrainingArguments(**options(tmp_path, **sizes, **more)), train_dataset=Rows())
        trainer.train()
        found.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)


def sft_losses(model, folder, adapters=False, **more):
    """Of ten steps of TRL's fine-tuning, on texts of four kinds."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    config = None
    if adapters:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    words = Tokenizer(models.WordLevel({str(number): number for number in range(tiny.VOCAB)}, unk_token="0"))
    tokens = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="1", eos_token="2", pad_token="0")
    texts = [random_tokens(10 + number % 25, number % 4).tolist() for number in range(64)]
    # Transformers 4 counts a row's first label, too, if there is one.
    texts = [{"input_ids": text, "labels": [-100, *text[1:]]} for text in texts]
    steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 10, "learning_rate": 1e-2}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**options(folder, **steps, **more)),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokens,
        peft_config=config,
    )
    trainer.train()
    return trainer, [each["loss"] for each in trainer.state.log_history if "loss" in each]


def test_supervised_fine_tuning(model, tmp_path):
    """Without padding, in one row, as with padding on the right; and packed."""
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    raw = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    losses = {}
    for name, more in {"padded": raw, "free": {**raw, "padding_free": True}, "packed": {"packing": True}}.items():
        model.load_state_dict(start)
        losses[name] = sft_losses(model, tmp_path, **{"max_length": 64, **more})[1]
        assert losses[name][-1] < losses[name][0] - 1, name
    assert losses["free"] == pytest.approx(losses["padded"], rel=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_alone_learn(model, reentrant, tmp_path):
    """Recomputed too; they are stored, and come back."""
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    recomputed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer, losses = sft_losses(model, tmp_path, adapters=True, packing=True, max_length=64, **recomputed)
    assert losses[-1] < losses[0] - 0.5
    import peft

    row = random_tokens(30)[None]
    adapted = trainer.model.eval()
    with torch.no_grad():
        expected = adapted(row, use_cache=False).logits
    trainer.save_model(tmp_path / "adapters")
    base = MegahybridForCausalLM(model.config)
    base.load_state_dict(start)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    with torch.no_grad():
        assert torch.equal(again(row, use_cache=False).logits, expected)
        assert (again.merge_and_unload()(row, use_cache=False).logits - expected).abs().max() < 1e-4
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["peft_type"] == "LORA"
