"""Ops without kernels on a GPU: training says so when it begins, or refuses."""

import torch

from megahybrid.cli import main
from megahybrid.model.fallbacks import kernel_notes
from megahybrid.training import loop


def as_on_a_gpu(config, device, *rest, **options):
    return kernel_notes(config, torch.device("cuda"), *rest, **options)


def test_a_run_names_what_has_no_kernel_and_refuses_what_cannot_train(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "kernel_notes", as_on_a_gpu)
    assert main(["train", str(recipe), "model.attention.head_dim=264"]) != 0
    assert "lte_attention's kernels take head dims up to 256, not 264" in capsys.readouterr().err
    small = ["model.pattern=G", "model.gdn.num_heads=1", "train.steps=1", "train.micro_batch_size=2"]
    assert main(["train", str(recipe), "model.gdn.head_dim=264", *small]) == 0
    note = "gated_delta_rule runs in PyTorch here, many times slower than its kernels, which take head dims up to 256"
    assert capsys.readouterr().out.count(note) == 1
    assert note in (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
