"""A small study whose runs are made up: files as a run leaves them, and a stand-in for Python that writes them."""

import json
from pathlib import Path

from megahybrid.cli import main
from megahybrid.files import write_json
from megahybrid.study.cells import Cell
from megahybrid.training.checkpoint_folder import name
from megahybrid.training.run_directory import RunDirectory

FILE = """
study: small
base: recipe.yaml
kinds: {one: "(G)*{layers}", two: {pattern: "(G)*{layers}", overrides: {model.init_std: 0.03}}}
sizes: [{width: 32, layers: 1}, {width: 32, layers: 2}]
overrides: {train.global_batch_size: 2}
budgets: {flops: [2.0e9, 4.0e9, 8.0e9]}
schedule: {warmup_tokens: 640}
rules: {learning_rate: fixed, batch: fixed}
hold_out: largest
"""


def leave(cell: Cell, state: str = "done", losses: tuple[float, ...] = (6.0, 3.0), reason: str = "", **more) -> None:
    """Files of a run whose lines have these losses, the last one its validation's; `skipped` counts those that are nan,
    as the guard does. The last of a run's steps are the last of its lines."""
    run, train = RunDirectory(cell.config.run.dir), cell.config.train
    first = (cell.branch_step or 0) + 1
    tokens = train.global_batch_size * train.seq_length
    steps = (
        [*range(first, first + len(losses) - 1), train.steps] if state == "done" else range(first, first + len(losses))
    )
    skipped, lines = 0, []
    for step, loss in zip(steps, losses, strict=True):
        skipped += loss != loss
        lines.append(
            {"step": step, "tokens": step * tokens, "loss": loss, "skipped": skipped, "tokens_per_second": 1e3}
        )
    if state == "done":
        lines[-1]["validation_loss"] = losses[-1]
    run.path.mkdir(parents=True, exist_ok=True)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.write_status(state, lines[-1]["step"], train.steps, reason)
    for step in [*cell.config.checkpoint.milestones, *([train.steps] if state == "done" else [])]:
        if step <= lines[-1]["step"]:
            write_json(run.checkpoints / name(step) / "checkpoint.json", {"megahybrid": "0.1.0 made up"} | more)


PYTHON = """#!{python}
import json, os, signal, sys, time
import yaml

config = yaml.safe_load(open(sys.argv[-1]))
run, train = config["run"]["dir"], config["train"]
name, first = config["tracking"]["name"], int((train["branch_from"] or "@0").rpartition("@")[2])
fault = json.load(open("faults.json")).get(name)

def note(what):
    facts = dict(name=name, what=what, time=time.time(), frozen=os.path.exists("studies/small/prediction.json"))
    facts["gpu"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    with open("calls.jsonl", "a") as calls:
        calls.write(json.dumps(facts) + "\\n")

def write(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".part", "w") as file:
        file.write(value if isinstance(value, str) else json.dumps(value))
    os.replace(path + ".part", path)

def status(state, step, reason=""):
    facts = dict(state=state, step=step, target=train["steps"], reason=reason, again=False, job=None, time=time.time())
    write(run + "/status.json", facts)

def stop(*_):
    status("stopped", 5, "SIGTERM")
    note("stopped")
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
note("begins")
if fault == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if fault == "fails":
    status("failed", 5, "ValueError: odd")
    sys.exit(1)
if first:
    trunk, _, step = train["branch_from"].rpartition("@")
    assert os.path.exists("%s/checkpoints/step_%08d/checkpoint.json" % (trunk, int(step)))
for step in config["checkpoint"]["milestones"]:
    write("%s/checkpoints/step_%08d/checkpoint.json" % (run, step), dict(megahybrid="made up"))
while fault == "waits" and open("calls.jsonl").read().count("begins") < 2:
    time.sleep(0.05)
time.sleep({seconds})
loss = dict(diverges=float("nan"), vanishes=0.0).get(fault, 3.0)
lines = [dict(step=first + 1, loss=6.0), dict(step=train["steps"], loss=loss, validation_loss=loss)]
lines = [line | dict(tokens=128 * line["step"], tokens_per_second=1e3, skipped=0) for line in lines]
write(run + "/metrics.jsonl", "".join(json.dumps(line) + "\\n" for line in lines))
status("done", train["steps"])
note("ends")
"""


def calls(folder: Path = Path()) -> list[dict]:
    """What the programs in Python's place have noted, in order."""
    path = folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def launch(*arguments: str) -> int:
    return main(["study", "launch", "study.yaml", *arguments])
