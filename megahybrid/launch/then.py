"""What follows a run that is done: `python -m megahybrid.launch.then CONFIG STEP…`, in a job of one process.

A step is a command of megahybrid in one word, without the run: "eval --lengths 1k,4k", "export". Started again it goes
on: an evaluation has its lines, and an export is whole or absent.

Exit code 0: all is done; 75: it was asked to stop, and goes on when it is started again; 74: a machine was at fault;
above 128: a machine killed a step; 1: the run is not done, or a step failed.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megahybrid.config import load_config
from megahybrid.errors import MachineFault, UserError
from megahybrid.launch.task import GO_ON
from megahybrid.retry import retry
from megahybrid.training import checkpoint_folder
from megahybrid.training.signals import StopRequest

STEPS = ("eval", "harness", "export")
FAULT = 74
"""The exit code for: a machine was at fault."""


def main(config_file: str, steps: Sequence[str]) -> int:
    """Do the steps, each whatever became of the one before; returns the exit code."""
    with StopRequest() as stop_request:
        try:
            config = retry(lambda: load_config(Path(config_file)), f"Reading {config_file}")
            found = retry(lambda: checkpoint_folder.find(Path(config.run.dir)), f"Reading {config.run.dir}")
        except MachineFault as error:
            _say(str(error))
            return FAULT
        except UserError as error:
            _say(str(error))
            return 1
        done = 0 if found is None else checkpoint_folder.step_of(found)
        if done < config.train.steps:
            _say(f"{config.run.dir} is at step {done} of {config.train.steps}: what was to follow is left out.")
            return 1
        failed = False
        for step in steps:
            code = _do(_command(step, Path(config.run.dir), found.name), stop_request)
            if stop_request.signal:
                _say(f"Stopped by {stop_request.signal} in `{step}`; what is done stays.")
                return GO_ON
            if code < 0:
                _say(f"`{step}` was killed by signal {-code}.")
                return 128 - code
            if code == GO_ON:
                _say(f"`{step}` met a machine's fault.")
                return FAULT
            failed |= code != 0
    return int(failed)


def _command(step: str, run: Path, checkpoint: str) -> list[str] | None:
    """The step's arguments of megahybrid; None where it is done already."""
    verb, *arguments = shlex.split(step)
    if verb != "export":
        return [verb, str(run), *arguments]
    target = run / "exports" / checkpoint
    if _is_there(target, arguments):
        _say(f"{target} is there already.")
        return None
    return [verb, str(run), str(target), *arguments]


def _is_there(target: Path, arguments: Sequence[str]) -> bool:
    """Whether an export with these arguments is; beside another one a new one has no place, and it will say so."""
    from megahybrid.hf.export import is_exported

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--dtype")
    parser.add_argument("--license", dest="license_")
    return is_exported(target, **vars(parser.parse_known_args(arguments)[0]))


def _do(command: Sequence[str] | None, stop_request: StopRequest) -> int:
    """The exit code of a command, which ends when this process is asked to."""
    if command is None or stop_request.signal:
        return 0
    _say(shlex.join(command))
    told = False
    with subprocess.Popen([sys.executable, "-m", "megahybrid", *command]) as child:
        while child.poll() is None:
            if stop_request.signal and not told:
                child.terminate()
                told = True
            time.sleep(0.2)
    return child.returncode


def _say(text: str) -> None:
    print(f"megahybrid: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
