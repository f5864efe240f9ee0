"""Import of the published laLTE format, from tiny folders written after its table of names and shapes."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file

import megahybrid.mixers.nsa.hf as nsa
from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.config.schema import ParallelConfig
from megahybrid.config.validate import validate
from megahybrid.hf.import_ import config_of
from megahybrid.hf.reference_format import reference_config, reference_name
from megahybrid.mixers.nsa import NSAConfig
from megahybrid.model.stack import Stack
from megahybrid.parallel import groups
from megahybrid.scaling.parameters import parameter_specs
from megahybrid.training import checkpoint
from tests.hf.published import published_logits
from tests.hf.tiny import expected_logits

HIDDEN, INNER, VOCAB, LAYERS = 32, 48, 384, 4
G_HEADS, G_DIM, TAPS = 2, 8, 4
HEADS, KV_HEADS, DIM = 4, 2, 8
N_DIM = 12  # NSA's heads together are wider than the model

ATTN = {"layers": [1, 3], "num_heads": HEADS, "num_kv_heads": KV_HEADS, "qkv_bias": False, "rope_theta": 5000.0}
LTE = {
    "attn_type": "lte", "window_size": 15, "conv_size": [3, 3, 3], "conv_dilation": [2, 2, 2], "dropout_prob": 0.1,
    "buffer_size": 8, "sink_size": 2, "routing_method": "sigmoid", "routing_shared": "head", "receptive_margin": 7,
}  # fmt: skip
NSA = {"attn_type": "nsa", "head_dim": N_DIM, "block_size": 16, "block_counts": 4, "window_size": 12}
KINDS = {
    "L": ATTN | LTE,
    "N": ATTN | NSA,
    "S": ATTN | {"window_size": 12},
    "F": ATTN | {"window_size": None},
    "G": None,
}


def published(kind, tied):
    """config.json and tensors of a tiny model."""
    config = {
        "model_type": "hybrid_gated_deltanet" if kind in "LN" else "gated_deltanet", "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "intermediate_size": INNER, "num_heads": G_HEADS,
        "head_dim": G_DIM, "expand_v": 1, "conv_size": TAPS, "norm_eps": 1e-6, "tie_word_embeddings": tied,
        "use_gate": True, "use_short_conv": True, "hidden_act": "swish", "max_position_embeddings": 64,
        "attn": KINDS[kind],
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def weight(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    tensors = {"model.embeddings.weight": weight(VOCAB, HIDDEN), "model.norm.weight": 1 + weight(HIDDEN)}
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"].clone() if tied else weight(VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = {
            "attn_norm.weight": 1 + weight(HIDDEN),
            "mlp_norm.weight": 1 + weight(HIDDEN),
            "mlp.gate_proj.weight": weight(INNER, HIDDEN),
            "mlp.up_proj.weight": weight(INNER, HIDDEN),
            "mlp.down_proj.weight": weight(HIDDEN, INNER),
        }
        if kind == "G" or i % 2 == 0:
            width = G_HEADS * G_DIM
            layer |= {f"attn.{name}_proj.weight": weight(width, HIDDEN) for name in "qkvg"}
            layer |= {f"attn.{name}_proj.weight": weight(G_HEADS, HIDDEN) for name in "ab"}
            layer |= {f"attn.{name}_conv1d.weight": weight(width, 1, TAPS) for name in "qkv"}
            layer |= {"attn.A_log": weight(G_HEADS), "attn.dt_bias": weight(G_HEADS)}
            layer |= {"attn.o_norm.weight": 1 + weight(G_DIM), "attn.o_proj.weight": weight(HIDDEN, width)}
        else:
            head_dim = N_DIM if kind == "N" else DIM
            layer["attn.q_proj.weight"] = weight(HEADS * head_dim, HIDDEN)
            layer["attn.k_proj.weight"] = weight(KV_HEADS * head_dim, HIDDEN)
            layer["attn.v_proj.weight"] = weight(KV_HEADS * head_dim, HIDDEN)
            layer["attn.o_proj.weight"] = weight(HIDDEN, HEADS * head_dim)
            if kind == "N":
                layer["attn.g_proj.weight"] = weight(3 * HEADS, HIDDEN)
            if kind == "L":
                stack, channels = "attn.router.conv_stack", 2 * DIM
                for n in range(3):
                    layer[f"{stack}.convs.{n}.weight"] = weight(KV_HEADS * channels // 2, channels, 1, 3)
                    layer[f"{stack}.convs.{n}.bias"] = weight(KV_HEADS * channels // 2)
                    channels //= 2
                layer[f"{stack}.proj.weight"] = weight(KV_HEADS, channels, 1, 1) * 3
                layer[f"{stack}.proj.bias"] = weight(KV_HEADS)
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    if kind == "L":
        tensors |= {"model.l1_lambda": torch.zeros(2, KV_HEADS), "model.num_kept": torch.zeros(2, KV_HEADS)}
    return config, tensors


def put_in_by_hand(model, tensors):
    """The published tensors in the training model, layer by layer."""

    def take(parameter, name, *index):
        tensor = tensors[name][index] if index else tensors[name]
        assert parameter.shape == tensor.shape, name
        parameter.copy_(tensor)

    take(model.embedding.weight, "model.embeddings.weight")
    take(model.final_norm.weight, "model.norm.weight")
    if hasattr(model, "output"):
        take(model.output.weight, "lm_head.weight")
    for i, block in model.layers.items():
        at, mixer = f"model.layers.{i}", block.mixer
        take(block.mixer_norm.weight, f"{at}.attn_norm.weight")
        take(block.mlp_norm.weight, f"{at}.mlp_norm.weight")
        for name in ("gate_proj", "up_proj", "down_proj"):
            take(getattr(block.mlp, name).weight, f"{at}.mlp.{name}.weight")
        for name in ("q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj", "o_proj"):
            if hasattr(mixer, name):
                take(getattr(mixer, name).weight, f"{at}.attn.{name}.weight")
        if hasattr(mixer, "A_log"):
            take(mixer.q_conv, f"{at}.attn.q_conv1d.weight", slice(None), 0)
            take(mixer.k_conv, f"{at}.attn.k_conv1d.weight", slice(None), 0)
            take(mixer.v_conv, f"{at}.attn.v_conv1d.weight", slice(None), 0)
            take(mixer.A_log, f"{at}.attn.A_log")
            take(mixer.dt_bias, f"{at}.attn.dt_bias")
            take(mixer.norm, f"{at}.attn.o_norm.weight")
        if hasattr(mixer, "router"):
            stack, router = f"{at}.attn.router.conv_stack", mixer.router
            for n in range(3):
                take(getattr(router, f"conv{n}_weight"), f"{stack}.convs.{n}.weight", slice(None), slice(None), 0)
                take(getattr(router, f"conv{n}_bias"), f"{stack}.convs.{n}.bias")
            take(router.projection, f"{stack}.proj.weight", slice(None), slice(None), 0, 0)
            take(router.projection_bias, f"{stack}.proj.bias")


def write(folder, config, tensors, prepared):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(next(prepared.rglob("tokenizer.json")), folder / "tokenizer.json")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_import(kind, tied, prepared, tmp_path, capsys):
    config, tensors = published(kind, tied)
    write(tmp_path / "published", config, tensors, prepared)
    assert main(["import", str(tmp_path / "published"), str(tmp_path / "imported"), "--verify"]) == 0
    assert "worst difference" in capsys.readouterr().out
    found = load_config(tmp_path / "imported" / "config.yaml")
    assert found.model.pattern == ("GGGG" if kind == "G" else f"G{kind}G{kind}")
    assert found.model.tie_embeddings == tied and found.train.seq_length == 64
    groups.initialize(ParallelConfig())
    try:
        ids = torch.randint(0, VOCAB, (130,), generator=torch.Generator().manual_seed(1))
        logits = []
        for put in (lambda model: checkpoint.load_weights(tmp_path / "imported", model), None):
            # The second is built from numbers written here, not from the imported configuration.
            model = Stack(found if put else by_hand(kind, tied)).double().requires_grad_(False)
            put(model) if put else put_in_by_hand(model, tensors)
            logits.append(expected_logits(model, ids))
        assert torch.allclose(*logits, rtol=0, atol=1e-12)
        if kind != "L":
            assert torch.allclose(logits[0], published_logits(config, tensors, ids), rtol=0, atol=1e-9)
    finally:
        groups.shut_down()


@pytest.mark.parametrize(
    "hidden, inner, gdn, tied, millions",
    [(1024, 2816, 128, True, 358), (2048, 5632, 256, False, 1323)],
    ids=["0.4B", "1.4B"],
)
def test_the_published_nsa_models(hidden, inner, gdn, tied, millions):
    attn = {"attn_type": "nsa", "layers": list(range(1, 24, 2)), "num_heads": 32, "num_kv_heads": 2, "head_dim": 64}
    attn |= {"qkv_bias": False, "block_size": 64, "block_counts": 16, "window_size": 512, "rope_theta": 10000.0}
    found = {
        "model_type": "hybrid_gated_deltanet", "attn": attn, "attn_mode": "chunk", "conv_size": 4, "expand_v": 1,
        "head_dim": gdn, "hidden_act": "swish", "hidden_ratio": 4, "hidden_size": hidden, "initializer_range": 0.006,
        "intermediate_size": None, "max_position_embeddings": 4096, "norm_eps": 1e-6, "num_heads": 8,
        "num_hidden_layers": 24, "tie_word_embeddings": tied, "use_gate": True, "use_short_conv": True,
        "vocab_size": 32000,
    }  # fmt: skip
    config = reference_config(found)
    validate(config)
    assert config.model.pattern == "GN" * 12 and config.model.nsa == NSAConfig(32, 2, 64, 64, 16, 512, 10000.0)
    specs = parameter_specs(config)
    shapes = {reference_name(name): spec.shape for name, spec in specs.items()}
    assert {name: shape for name, shape in shapes.items() if name.startswith("model.layers.1.")} == {
        "model.layers.1.attn_norm.weight": (hidden,),
        "model.layers.1.mlp_norm.weight": (hidden,),
        "model.layers.1.mlp.gate_proj.weight": (inner, hidden),
        "model.layers.1.mlp.up_proj.weight": (inner, hidden),
        "model.layers.1.mlp.down_proj.weight": (hidden, inner),
        "model.layers.1.attn.q_proj.weight": (2048, hidden),
        "model.layers.1.attn.k_proj.weight": (128, hidden),
        "model.layers.1.attn.v_proj.weight": (128, hidden),
        "model.layers.1.attn.g_proj.weight": (96, hidden),
        "model.layers.1.attn.o_proj.weight": (hidden, 2048),
    }
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(millions * 1e6, rel=0.005)


def by_hand(kind, tied):
    from megahybrid.config.schema import Config, ModelConfig, RunConfig, TrainConfig
    from megahybrid.mixers.attention import AttentionConfig
    from megahybrid.mixers.gdn import GDNConfig
    from megahybrid.mixers.lte import LTEConfig

    return Config(
        run=RunConfig(dir="unused"),
        model=ModelConfig(
            pattern="GGGG" if kind == "G" else f"(G{kind})*2",
            hidden_size=HIDDEN,
            vocab_size=VOCAB,
            intermediate_size=INNER,
            tie_embeddings=tied,
            norm_eps=1e-6,
            gdn=GDNConfig(num_heads=G_HEADS, head_dim=G_DIM, conv_size=TAPS),
            attention=AttentionConfig(
                num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, window_size=12, rope_theta=5000.0
            ),
            lte=LTEConfig(window_size=15, buffer_size=8, sink_size=2, conv_size=3, conv_dilation=2),
            nsa=NSAConfig(
                num_heads=HEADS,
                num_kv_heads=KV_HEADS,
                head_dim=N_DIM,
                block_size=16,
                num_blocks=4,
                window_size=12,
                rope_theta=5000.0,
            ),
        ),
        train=TrainConfig(seq_length=64, micro_batch_size=1, global_batch_size=1, steps=1),
    )


@pytest.mark.parametrize(
    "kind, sizes, tokens",
    [("N", {"block_size": 64, "block_counts": 16}, 1160), ("L", {"window_size": 199}, 336), ("L", {}, 256)],
)
def test_verification_goes_on_until_layers_choose(kind, sizes, tokens, prepared, tmp_path, capsys):
    config, tensors = published(kind, True)
    write(tmp_path / "published", config | {"attn": config["attn"] | sizes}, tensors, prepared)
    assert main(["import", str(tmp_path / "published"), str(tmp_path / "imported"), "--verify"]) == 0
    assert f"Logits of {tokens:,} tokens" in capsys.readouterr().out


def test_a_model_that_selects_other_blocks_is_refused(prepared, tmp_path, monkeypatch, capsys):
    """The worst ones: it differs after 1,024 tokens, all of which are selected."""
    right = nsa.NSAAttention.selected
    monkeypatch.setattr(
        nsa.NSAAttention, "selected", lambda self, q, at, scores, state: right(self, q, at, -scores, state)
    )
    config, tensors = published("N", True)
    sizes = {"block_size": 64, "block_counts": 16}
    write(tmp_path / "published", config | {"attn": config["attn"] | sizes}, tensors, prepared)
    assert main(["import", str(tmp_path / "published"), str(tmp_path / "imported"), "--verify"]) == 2
    assert "logits differ by up to" in capsys.readouterr().err


def test_a_run_starts_from_it(prepared, text, tmp_path):
    from tests.training.conftest import RECIPE

    config, tensors = published("L", True)
    write(tmp_path / "published", config, tensors, prepared)
    assert main(["import", str(tmp_path / "published"), str(tmp_path / "imported")]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(run=tmp_path / "run", data=prepared, text=text).replace("GLSFL", "GLGL"))
    sizes = ["model.gdn.num_heads=2", "model.attention.num_kv_heads=2", "train.steps=1"]
    assert main(["train", str(recipe), *sizes, f"train.init_from={tmp_path / 'imported'}"]) == 0


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({}, "bf16"),
        ({"dtype": "float32"}, "fp32"),
        ({"torch_dtype": "float32"}, "fp32"),
        ({"dtype": "bfloat16"}, "bf16"),
    ],
)
def test_it_computes_in_the_type_that_it_is_stored_in(stored, expected, tmp_path):
    config, _ = published("G", True)
    (tmp_path / "config.json").write_text(json.dumps(config | stored))
    assert config_of(tmp_path).train.dtype == expected


def test_what_cannot_be_imported(prepared, tmp_path, capsys):
    config, tensors = published("L", True)

    def refused(**changes):
        attn = {"attn": config["attn"] | changes.pop("attn", {})}
        write(tmp_path / "published", config | attn | changes, tensors, prepared)
        assert main(["import", str(tmp_path / "published"), str(tmp_path / "imported")]) == 2
        shutil.rmtree(tmp_path / "published")
        assert not list(tmp_path.iterdir())
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "lacks 'block_size'" in refused(attn={"attn_type": "nsa", "head_dim": 8})
    assert "attn_type 'mla'" in refused(attn={"attn_type": "mla"})
    assert "routing_method = relu" in refused(attn={"routing_method": "relu"})
    assert "qkv_bias = True" in refused(attn={"qkv_bias": True})
    assert "conv_dilation = [1, 2, 4]" in refused(attn={"conv_dilation": [1, 2, 4]})
    assert "use_gate = False" in refused(use_gate=False)
    assert "calls for" in refused(intermediate_size=64)
    assert "model_type 'nsa'" in refused(model_type="nsa")
