"""lm-evaluation-harness's own model of transformers on an export, where both are installed."""

import importlib.util
import json
import subprocess
import sys

import pytest

from megahybrid.evaluation.scorer import Scorer
from megahybrid.evaluation.subject import load
from megahybrid.parallel import groups
from tests.evaluation.test_scorer import written
from tests.hf.test_kinds import round_trip

NEEDED = ("lm_eval", "accelerate")

# As single needles of RULER, arXiv 2404.06654.
NEEDLE = "One of the special magic numbers for {} is: {}. "
TASK = """
task: needle
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def sample(number):
    # No two lines alike: NSA's blocks of equal text tie, and rounding would choose among them.
    hay = [
        f"The grass of {word} is green. "
        for word in ("Quito", "Bern", "Oslo", "Lima", "Cairo", "Hanoi", "Minsk", "Accra")
    ]
    hay.insert(number, NEEDLE.format(f"queue-{number}", 1_000 + number))
    return {"text": "".join(hay) + f"The special magic number for queue-{number} is:", "answer": str(1_000 + number)}


@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason=f"it needs {' and '.join(NEEDED)}")
def test_needles_are_answered_as_the_training_model_answers(prepared, tmp_path, monkeypatch):
    """Prompts of several windows and lengths in one batch; new weights, whose answers depend on all of a prompt."""
    exported = round_trip("GLSFN", tmp_path, prepared)
    groups.shut_down()
    samples = [sample(number) for number in (0, 2, 5)]
    samples[1]["text"] = "Hm. " * 9 + samples[1]["text"]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, samples)))
    (tmp_path / "needle.yaml").write_text(TASK.format(data=tmp_path / "data.json"))
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # left by training here
        monkeypatch.delenv(name, raising=False)
    arguments = f"pretrained={exported},trust_remote_code=True,dtype=float64,add_bos_token=True,max_length=100000"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
    command += ["--tasks", tmp_path / "needle.yaml", "--batch_size", "3", "--output_path", tmp_path / "out"]
    done = subprocess.run([*map(str, command), "--log_samples"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    subject = load(tmp_path / "imported")
    exact = Scorer(subject.model.double(), subject.tokenizer)
    (file,) = (tmp_path / "out").rglob("samples_needle_*.jsonl")
    found = {line["doc"]["text"]: line["resps"][0][0] for line in map(json.loads, file.read_text().splitlines())}
    expected = {each["text"]: written(exact, each["text"], 6).split("\n")[0] for each in samples}
    groups.shut_down()
    assert found == expected and len(set(expected.values())) == 3
    assert min(len(subject.tokenizer.encode(text)) for text in expected) > 100
