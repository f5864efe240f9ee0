"""Which kinds of layers an exported folder holds."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megahybrid.cli import main
from megahybrid.errors import UserError
from megahybrid.hf import model_files
from megahybrid.hf.configuration_megahybrid import MegahybridConfig
from megahybrid.hf.modeling_megahybrid import MegahybridForCausalLM
from megahybrid.hf.naming import MODEL_TYPE, exported_config
from tests.model import tiny

ALWAYS = {f"{name}_megahybrid.py" for name in ("cache", "configuration", "inference", "layers", "modeling", "packing")}


def round_trip(letters, folder, prepared, theta=10000.0):
    """A model with new weights, imported and exported again as `model`; both verify."""
    config = tiny.config(letters, tie_embeddings=False)
    config.model.vocab_size = 384
    config.model.attention.rope_theta = config.model.nsa.rope_theta = theta
    architecture = exported_config(config)
    torch.manual_seed(0)
    model = MegahybridForCausalLM(MegahybridConfig(**architecture))
    (folder / "new").mkdir()
    (folder / "new" / "config.json").write_text(json.dumps({"model_type": MODEL_TYPE, **architecture}))
    save_file(model.state_dict(), folder / "new" / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(next(prepared.rglob("tokenizer.json")), folder / "new" / "tokenizer.json")
    assert main(["import", str(folder / "new"), str(folder / "imported"), "--verify"]) == 0
    assert main(["export", str(folder / "imported"), str(folder / "model"), "--dtype", "fp32", "--verify"]) == 0
    stored = load_file(folder / "model" / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[name], weight) for name, weight in model.state_dict().items())
    return folder / "model"


def code(folder):
    return {file.name for file in folder.glob("*.py")}


@pytest.mark.parametrize(
    "letters, kinds, sections",
    [
        ("GS", {"gdn", "attention"}, {"gdn", "attention"}),
        ("F", {"attention"}, {"attention"}),
        ("GL", {"gdn", "lte", "attention"}, {"gdn", "lte", "attention"}),  # LTE has attention's projections
        ("GN", {"gdn", "nsa", "attention"}, {"gdn", "nsa"}),
    ],
)
def test_the_kinds_of_its_pattern(letters, kinds, sections, prepared, tmp_path):
    """All models here are in folders of one name, and loaded by one process."""
    folder = round_trip(letters, tmp_path, prepared)
    assert code(folder) == ALWAYS | {f"{kind}_megahybrid.py" for kind in kinds}
    config = json.loads((folder / "config.json").read_text())
    assert {"gdn", "attention", "lte", "nsa"} & config.keys() == sections
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(sys.modules[type(model).__module__].MIXERS) == set(letters)
    rows = torch.arange(80)[None]
    assert torch.equal(model(rows).logits, MegahybridForCausalLM.from_pretrained(folder)(rows).logits)


def test_without_rotary_embedding(prepared, tmp_path):
    config = json.loads((round_trip("SFLN", tmp_path, prepared, theta=None) / "config.json").read_text())
    assert config["attention"]["rope_theta"] is None and config["nsa"]["rope_theta"] is None


def test_what_an_exported_file_may_not_import_is_told(tmp_path, monkeypatch):
    """As the module of a kind that takes something of the package's others."""
    (tmp_path / "hf.py").write_text(
        "import megahybrid_kernels\nfrom megahybrid.key import key\n\n\nclass Mine:\n    pass\n"
    )
    monkeypatch.setattr(Mine := type("Mine", (), {}), "__module__", "mine.hf")
    monkeypatch.setitem(sys.modules, "mine.hf", SimpleNamespace(__file__=str(tmp_path / "hf.py")))
    monkeypatch.setitem(model_files.MIXERS, "G", Mine)
    with pytest.raises(UserError, match=r"^mine.hf cannot be exported: 'from megahybrid.key import key' is of"):
        model_files.model_files("G")
