"""Whole evaluations of tiny models: chance, both modes, going on, many processes, memory."""

import json
import math

import pytest
import torch

from megahybrid.config.schema import ParallelConfig
from megahybrid.errors import UserError
from megahybrid.evaluation import costs, modes, pictures, report
from megahybrid.evaluation.lines import Folder
from megahybrid.evaluation.progress import Progress
from megahybrid.evaluation.runner import _where, evaluate
from megahybrid.inference import states
from megahybrid.parallel import groups
from megahybrid.tasks import Answer, Span
from tests.evaluation.subjects import brief, chosen, plan, subject
from tests.model import tiny

STEP = "evaluations/step_00000000"


@pytest.fixture(autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


def lines(home, task):
    return [json.loads(line) for line in (home / STEP / f"{task}.jsonl").read_text().splitlines()]


def results(home):
    """results.json without what a clock says."""
    found = json.loads((home / STEP / "results.json").read_text())
    assert [each["length"] for each in found.pop("costs")] == sorted({each["length"] for each in found["results"]})
    found["model"].pop("path")
    return found


def binomial_limit(n, p, tail):
    """The least count that is exceeded with a probability below `tail`."""
    above, count = 1.0, -1
    while above >= tail:
        count += 1
        above -= math.comb(n, count) * p**count * (1 - p) ** (n - count)
    return count


def test_random_weights_are_at_chance(tmp_path):
    asked = plan(tasks=(chosen("selective_mqar", pairs=8),), lengths=(64,), samples=150, batch_size=16)
    evaluate(subject(tmp_path, "GL"), asked)
    (found,) = results(tmp_path)["results"]
    assert found["n"] == 1200
    # Values are half of the vocabulary; what is always answered is right as often as one of them is asked for.
    assert 1200 * found["accuracy"] <= binomial_limit(1200, 2 / tiny.VOCAB, 1e-6)
    assert found["nll"] > math.log(tiny.VOCAB) - 0.5


@pytest.mark.parametrize("pattern", ["GLSFN", "L"])
def test_generate_equals_forced(pattern, tmp_path):
    model = subject(tmp_path, pattern, torch.float64)
    for mode in modes.MODES:
        evaluate(model, plan(mode=mode, lengths=(32, 96)))  # of the longer one N does not select every block
    for task, single in (("selective_mqar", True), ("copy", False)):
        found = {mode: [line for line in lines(tmp_path, task) if line["mode"] == mode] for mode in modes.MODES}
        assert len(found["forced"]) == len(found["generate"]) == 14
        for one, other in zip(found["forced"], found["generate"], strict=True):
            assert one["right"] == other["right"]
            # A text of one token is what the forced pass thinks likeliest; a longer one goes on from what is written.
            assert not single or one["text"] == other["text"]


def test_places_are_those_of_the_samples(tmp_path):
    model, asked = subject(tmp_path), plan()
    evaluate(model, asked)
    for line in lines(tmp_path, "selective_mqar"):
        sample = asked.tasks[0].sample(line["length"], model.vocabulary, None, line["index"])
        assert line["real_length"] == line["length"] == len(sample.tokens)
        for answer, distance, near, place in zip(
            sample.answers, line["distance"], line["in_window"], line["place"], strict=True
        ):
            value, query = answer.needles[0].begin, answer.span.begin - 1  # the query sees itself and 7 keys before
            assert sample.tokens[value] == sample.tokens[answer.span.begin]
            assert distance == query + 1 - value and near == (query - value <= 7)
            assert place == pytest.approx(value / (query + 1), abs=1e-4)


def test_a_policy_decides_what_is_held(tmp_path):
    """Three needles are as many as the buffer holds beside the sinks."""
    asked = plan(tasks=(chosen("selective_mqar", pairs=3),), lengths=(96,), policies=("oracle", "recency", "learned"))
    for mode in modes.MODES:
        evaluate(subject(tmp_path, "L"), plan(**{**vars(asked), "mode": mode}))
    found = {(each["policy"], each["mode"]): each for each in results(tmp_path)["results"]}
    assert found["oracle", "forced"]["kept"] == 1 and found["recency", "forced"]["kept"] == 0
    assert found["oracle", "forced"]["beyond_kept"]["n"] == found["recency", "forced"]["beyond_evicted"]["n"] == 21
    texts = {
        (policy, mode): [line["text"] for line in lines(tmp_path, "selective_mqar")
                         if (line["policy"], line["mode"]) == (policy, mode)]
        for policy, mode in found
    }  # fmt: skip
    for policy in asked.policies:
        assert texts[policy, "forced"] == texts[policy, "generate"]
    assert texts["oracle", "forced"] != texts["recency", "forced"] != texts["learned", "forced"]


def test_policies_are_refused_where_no_layer_has_one(tmp_path):
    with pytest.raises(UserError, match="choose among learned: the pattern is GS"):
        evaluate(subject(tmp_path, "GS"), plan(policies=("recency",)))


@pytest.mark.parametrize(("apart", "inside"), [(8, 1), (9, 0)])
def test_the_window_reaches_as_many_keys_back_as_it_has(apart, inside):
    answer = Answer(Span(20, 22), (Span(1, 3), Span(20 - apart, 22 - apart)))
    assert _where(answer, 8) == (apart, round(1 - apart / 20, 4), inside)


class Killed(BaseException):
    """What nobody catches."""


def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluate(subject(whole), plan())
    real, calls, asked = Folder.add, 0, []

    def dying(self, task, new):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            real(self, task, new[:1])
            with open(self.path / f"{task}.jsonl", "ab") as file:
                file.write(json.dumps(new[1] if len(new) > 1 else new[0]).encode()[:20])
            raise Killed
        real(self, task, new)

    def counted(subject, task, samples, *rest):
        asked.append(len(samples))
        return modes.forced(subject, task, samples, *rest)

    monkeypatch.setattr(Folder, "add", dying)
    monkeypatch.setitem(modes.MODES, "forced", counted)
    kills = 0
    for _ in range(20):
        try:
            evaluate(subject(parts), plan())
            break
        except Killed:
            kills += 1
    assert kills >= 3
    for task in ("selective_mqar", "copy"):
        assert (parts / STEP / f"{task}.jsonl").read_bytes() == (whole / STEP / f"{task}.jsonl").read_bytes()
    assert results(parts) == results(whole)
    asked.clear()
    evaluate(subject(parts), plan())
    assert asked == [] and results(parts) == results(whole)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), UserError("The disk is full.")])
def test_whatever_ends_it_what_is_done_is_reported(fault, tmp_path, monkeypatch, capsys):
    real, reported, closed = Folder.add, [], []

    def failing(self, task, new):
        if (task, new[0]["length"]) == ("copy", 64):
            reported.extend(each["length"] for each in results(tmp_path)["results"])
            raise fault
        real(self, task, new)

    monkeypatch.setattr(Folder, "add", failing)
    monkeypatch.setattr(Progress, "close", lambda self: closed.append(True))
    with pytest.raises(type(fault)):
        evaluate(subject(tmp_path), plan())
    found = json.loads((tmp_path / STEP / "results.json").read_text())["results"]
    assert {(each["task"], each["length"]) for each in found} == {
        ("selective_mqar", 32), ("selective_mqar", 64), ("copy", 32),
    }  # fmt: skip
    assert reported == [32, 32] and closed == [True] and "recency null" in capsys.readouterr().out


def test_more_samples_and_lengths_join_what_is_there(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    evaluate(subject(first), plan(lengths=(64,), samples=3))
    evaluate(subject(first), plan())
    evaluate(subject(second), plan())
    for task in ("selective_mqar", "copy"):
        one, other = (
            sorted(lines(home, task), key=lambda each: (each["length"], each["index"])) for home in (first, second)
        )
        assert one == other
    assert results(first) == results(second)


def test_costs_of_other_devices_stay_and_are_not_drawn(tmp_path, monkeypatch):
    real, drawn = pictures.draw, []
    monkeypatch.setattr(pictures, "draw", lambda *args: drawn.append(args[2]) or real(*args))
    for device in ("one", "other", "one"):
        monkeypatch.setattr(report, "device", lambda name=device: name)
        evaluate(subject(tmp_path), plan(samples=1))
    costs = json.loads((tmp_path / STEP / "results.json").read_text())["costs"]
    assert [(each["device"], each["length"]) for each in costs] == [
        ("one", 32), ("one", 64), ("other", 32), ("other", 64),
    ]  # fmt: skip
    assert [[each["device"] for each in costs] for costs in drawn] == [["one"] * 2, ["other"] * 2, ["one"] * 2]
    assert drawn[0] == drawn[2]


def test_other_parameters_are_refused(tmp_path):
    evaluate(subject(tmp_path), plan(samples=1))
    before = sorted((path, path.read_bytes()) for path in (tmp_path / STEP).iterdir())
    with pytest.raises(UserError, match="selective_mqar with other settings"):
        evaluate(subject(tmp_path), plan(tasks=(chosen("selective_mqar", pairs=3),)))
    assert sorted((path, path.read_bytes()) for path in (tmp_path / STEP).iterdir()) == before
    evaluate(subject(tmp_path), plan(tasks=(chosen("selective_mqar", pairs=3),), samples=1), tmp_path / "other")
    assert (tmp_path / "other" / "results.json").exists()


def test_lines_that_no_evaluation_wrote_are_refused_and_are_no_task(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"holds metrics.jsonl .*; give --out another folder"):
        evaluate(subject(tmp_path), plan(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    folder = Folder(tmp_path / "other")
    folder.open({}, {"copy": {}})
    folder.add("copy", [])
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert folder.tasks() == ["copy"]


def test_what_cannot_be_asked_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="room for 1 pairs in 8 tokens"):
        evaluate(subject(tmp_path), plan(lengths=(8, 64)))
    assert list(tmp_path.iterdir()) == []


def test_lengths_beyond_memory_leave_the_others_done(tmp_path, monkeypatch):
    def limited(subject, task, samples, *rest):
        if len(samples[0].tokens) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return modes.forced(subject, task, samples, *rest)

    monkeypatch.setitem(modes.MODES, "forced", limited)
    with pytest.raises(UserError, match=r"memory; lower .* from there on\.$"):
        evaluate(subject(tmp_path), plan(lengths=(64,)))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"Samples of 64 tokens do not fit into memory; .*: what is done stays, in "):
        evaluate(subject(tmp_path), plan())
    assert {each["length"] for each in results(tmp_path)["results"]} == {32}
    assert (tmp_path / STEP / "lengths.png").exists()


def test_lengths_whose_states_alone_do_not_fit_are_not_begun(tmp_path, monkeypatch):
    # Of three sequences, the states of G, L and S and the keys of 40 tokens of F.
    model = subject(tmp_path).model
    monkeypatch.setattr(costs, "free_memory", lambda device: states.size_in_bytes(model.initial_states(3), 40))
    with pytest.raises(UserError, match="Samples of 64 tokens do not fit into memory"):
        evaluate(subject(tmp_path), plan())
    assert {each["length"] for each in results(tmp_path)["results"]} == {32}


def test_all_processes_end_where_one_has_no_memory(tmp_path, workers):
    said = workers.run(2, "tests.evaluation.subjects:run_out_of_memory_on_one", str(tmp_path))
    assert len(said) == 2 and all("Samples of 64 tokens do not fit into memory" in each for each in said)
    assert {each["length"] for each in results(tmp_path)["results"]} == {32}


@pytest.mark.parametrize(
    ("processes", "pattern", "length"),
    [(2, "GLSF", 48), pytest.param(4, "NF", 100, marks=pytest.mark.slow)],  # of the latter, two share each KV head
    ids=str,
)
def test_tensor_parallel_processes_give_the_same(processes, pattern, length, tmp_path, workers):
    for mode in modes.MODES:
        evaluate(subject(tmp_path / "1", pattern), brief(mode, pattern, length))
    workers.run(processes, "tests.evaluation.subjects:evaluate_in_parallel", str(tmp_path / "2"), pattern, length)
    for task in ("selective_mqar", "copy"):
        one, two = lines(tmp_path / "1", task), lines(tmp_path / "2", task)
        assert len(one) == len(two) == 4 * 2 * (3 if "L" in pattern else 1)  # samples, modes, policies
        for ours, theirs in zip(one, two, strict=True):
            expected = [None if nll is None else pytest.approx(nll, abs=1.1e-3) for nll in ours.pop("nll")]
            assert theirs.pop("nll") == expected
            assert ours == theirs
    assert sorted(path.name for path in (tmp_path / "1" / STEP).iterdir()) == sorted(
        path.name for path in (tmp_path / "2" / STEP).iterdir()
    )
