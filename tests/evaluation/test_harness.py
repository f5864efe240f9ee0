"""The harness's model on a run, by itself and, where lm-evaluation-harness is installed, in whole evaluations."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megahybrid.cli import main
from megahybrid.errors import UserError
from megahybrid.evaluation.scorer import Scorer
from megahybrid.evaluation.subject import load
from megahybrid.parallel import groups
from tests.evaluation.test_scorer import brute_force, written
from tests.training.conftest import prepared, recipe, reference, text  # noqa: F401

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed")

QUESTIONS = [
    {"question": "def push(self, item):", "choices": ["return item", "import heapq", "zzz"], "answer": 0},
    {"question": "import ", "choices": ["copy", "self.queue = []"], "answer": 1},
    {"question": "class Queue:\n", "choices": ["    pass", "x", "    def get(self):", "0"], "answer": 2},
]
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
READ = """
task: read
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


@pytest.fixture(autouse=True)
def process_group():
    yield
    groups.shut_down()


@pytest.fixture
def stand_in(monkeypatch):
    """What this project needs of lm_eval, where that is not installed."""
    if INSTALLED:
        yield
        return
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    modules = {name: ModuleType(name) for name in names}

    class LM:
        def __init__(self):
            self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    modules["lm_eval.api.model"].LM = LM
    modules["lm_eval.api.registry"].register_model = lambda name: lambda model: model
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "megahybrid.evaluation.harness", raising=False)
    yield
    sys.modules.pop("megahybrid.evaluation.harness", None)


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def double(path):
    """A scorer in float64, as tests.evaluation.test_scorer takes it."""
    subject = load(path)
    return Scorer(subject.model.double(), subject.tokenizer)


def test_results_come_in_the_order_of_the_requests_and_go_to_the_cache(stand_in, reference):  # noqa: F811
    from megahybrid.evaluation.harness import HarnessModel

    model, cached = HarnessModel(str(reference), batch_size="2", device="cuda:0"), {}
    model.cache_hook.add_partial = lambda kind, asked, found: cached.update({(kind, asked[0]): found})
    exact = double(reference)
    pairs = [("import", " copy"), ("class Queue:", "\n    pass"), ("def", " push(self, item):")]
    found = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for pair, (logarithm, greedy) in zip(pairs, found, strict=True):
        expected, right = brute_force(exact, *pair)
        assert logarithm == pytest.approx(expected, abs=1e-3) and greedy == bool(right.all())
        assert cached["loglikelihood", pair[0]] == (logarithm, greedy)
    texts = ["import copy", "", "def push(self, item):\n    return item"]
    for place, logarithm in enumerate(model.loglikelihood_rolling(requests(*zip(texts)))):
        expected = brute_force(exact, "", texts[place])[0] if texts[place] else 0
        assert logarithm == pytest.approx(expected, abs=1e-3)
        assert cached["loglikelihood_rolling", texts[place]] == logarithm
    how = {"until": ["e"], "max_gen_toks": 6}
    generated = model.generate_until(requests(("im", how), ("def push", {**how, "max_gen_toks": 4})))
    assert generated == [written(exact, "im", 6).split("e")[0], written(exact, "def push", 4).split("e")[0]]
    assert cached["generate_until", "def push"] == generated[1]
    assert model.get_model_info()["step"] == 20


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "fp8"}, "dtype=fp8; choose among fp32, bf16"),
        ({"batch_size": "auto:4"}, "batch_size is auto:4"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"path": "nosuch"}, "no checkpoint and no exported model"),
    ],
)
def test_what_cannot_be_is_refused(stand_in, reference, changes, said):  # noqa: F811
    from megahybrid.evaluation.harness import HarnessModel

    with pytest.raises(UserError, match=said):
        HarnessModel(**{"path": str(reference), **changes})


def test_several_processes_cannot_have_a_cache(stand_in, reference, monkeypatch):  # noqa: F811
    from megahybrid.evaluation.harness import HarnessModel

    model = HarnessModel(str(reference))
    monkeypatch.setattr(groups, "world", lambda: (0, 2))
    with pytest.raises(UserError, match="--use_cache is for one process"):
        model.set_cache_hook(None)


@needs_lm_eval
def test_an_unknown_task_is_refused_in_a_sentence(reference, capsys):  # noqa: F811
    assert main(["harness", str(reference), "--tasks", "nosuch"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("megahybrid: Tasks not found: nosuch; ")


@pytest.mark.parametrize("module", ["lm_eval.api.model", "lm_eval.__main__"])
@pytest.mark.parametrize("found", [None, ModuleType("of another version")])
def test_without_the_harness_a_sentence_says_what_to_install(module, found, stand_in, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, found)
    monkeypatch.delitem(sys.modules, "megahybrid.evaluation.harness", raising=False)
    assert main(["harness", str(tmp_path), "--tasks", "arc_easy"]) == 2
    error = capsys.readouterr().err.strip()
    (wanted,) = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["evaluation"]
    command = f"pip install '{wanted}' transformers"  # what pip resolves without it breaks transformers 4.57
    assert error.endswith(f"install it with `{command}`.") and len(error.splitlines()) == 1
    assert f"\n{command} " in (Path(__file__).parents[2] / "docs/evaluation.md").read_text()


@needs_lm_eval
def test_texts_split_as_the_harness_splits_them(reference):  # noqa: F811
    from lm_eval.api.model import TemplateLM

    tokenizer = load(reference).tokenizer
    split = SimpleNamespace(backend="causal", tok_encode=tokenizer.encode)
    for context, continuation in [
        ("import ", "copy"),
        ("def push(self):\n\n  ", "return"),
        ("(a", ".b"),
        ("x =", " 1"),
    ]:
        asked = double(reference)
        before, after = TemplateLM._encode_pair(split, context, continuation)
        ((_, found),) = asked.likelihoods([(context, continuation)])
        assert found.logarithm == pytest.approx(
            brute_force(asked, tokenizer.decode(before), tokenizer.decode(after))[0], abs=1e-9
        )


@needs_lm_eval
def test_local_tasks(reference, tmp_path, monkeypatch):  # noqa: F811
    data = tmp_path / "data.json"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, task in (("choice", CHOICE), ("write", WRITE), ("read", READ)):
        (tmp_path / f"{name}.yaml").write_text(task.format(data=data))
    command = [sys.executable, "-m", "megahybrid", "harness", str(reference), "--tasks"]
    command += [str(tmp_path / f"{name}.yaml") for name in ("choice", "write", "read")]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["step"] == 20 and results["config"]["pattern"] == "GLSFL"
    exact = double(reference)
    right = rightly = 0
    for line in QUESTIONS:
        scores = [brute_force(exact, line["question"].rstrip(), _behind(line, choice))[0] for choice in line["choices"]]
        right += scores.index(max(scores)) == line["answer"]
        normed = [score / len(choice) for score, choice in zip(scores, line["choices"], strict=True)]
        rightly += normed.index(max(normed)) == line["answer"]
    found = results["results"]
    assert found["choice"]["acc,none"] == pytest.approx(right / 3)
    assert found["choice"]["acc_norm,none"] == pytest.approx(rightly / 3)
    (file,) = (tmp_path / "out").rglob("samples_write_*.jsonl")
    for sample in map(json.loads, file.read_text().splitlines()):
        assert sample["resps"] == [[written(exact, sample["doc"]["question"], 6).split("e")[0]]]
    nats = sum(brute_force(exact, "", line["question"])[0] for line in QUESTIONS)
    size = sum(len(line["question"]) for line in QUESTIONS)
    assert found["read"]["byte_perplexity,none"] == pytest.approx(2.718281828 ** (-nats / size), rel=1e-4)


def _behind(line, choice):
    """The harness puts a space before each choice; what ends the question goes there, too."""
    question = line["question"]
    return question[len(question.rstrip()) :] + " " + choice
