"""`megahybrid doctor`: whether this machine computes what it should, and how fast, before a run depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from megahybrid.config.schema import Config
from megahybrid.doctor import kernels, machine
from megahybrid.doctor.finding import Finding


def diagnose(config: Config | None = None, say: Callable[[str], None] = print) -> list[Finding]:
    """Check software, devices, kernels, links and disk, with a recipe its data as well, and say each as it is found.

    Some three minutes on a GPU, most of it for compiling kernels. Returns what is wrong.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    parts = {
        "software": machine.software(),
        "devices": machine.devices(device),
        "links": machine.links(),
        f"kernels on {device.type.upper()}: error of the worst of output and gradients, time": kernels.check(
            device, config
        ),
        "disk": machine.disk(config),
        "data": machine.data(config),
        "start": machine.start(config),
    }
    wrong = []
    for title, findings in parts.items():
        said = False
        for finding in _guarded(findings):
            if not said:
                say(f"\n{title}")
                said = True
            say(f"  {finding.text}" if finding.right else f"  WRONG {finding.text}")
            wrong += [] if finding.right else [finding]
    say(f"\n{len(wrong)} {'thing is' if len(wrong) == 1 else 'things are'} wrong." if wrong else "\nNothing is wrong.")
    return wrong


def _guarded(findings: Iterator[Finding]) -> Iterator[Finding]:
    """A check that fails itself is a finding, and the others go on."""
    try:
        yield from findings
    except Exception as error:
        yield Finding(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False)
