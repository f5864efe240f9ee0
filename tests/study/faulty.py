"""Runs a module as Python does, and spoils the weights of the run that NAN_IN names, once it has done two steps."""

import os
import runpy
import sys

import torch


def install() -> None:
    from megahybrid.training.engine import Engine

    real = Engine.step

    def step(self, batches, number, *flags, **others):
        if self.config.tracking.name == os.environ.get("NAN_IN") and number > 2:
            with torch.no_grad():
                next(self.model.parameters()).fill_(torch.nan)
        return real(self, batches, number, *flags, **others)

    Engine.step = step


if __name__ == "__main__":
    del sys.argv[:2]
    sys.executable = os.environ.get("FAULTY", sys.executable)  # of what it starts, too
    if not sys.argv[0].endswith(".verdict"):
        install()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
