"""Recall with weights that cannot fail but for what the policy let go: the scale that policies are measured on."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from megahybrid.config.schema import ParallelConfig
from megahybrid.evaluation import runner
from megahybrid.evaluation.forced import read
from megahybrid.evaluation.generated import answers_one_by_one
from megahybrid.model.mixer import swapped
from megahybrid.parallel import groups
from megahybrid.parallel.parameters import initialize_parameters
from megahybrid.tasks import TASKS, Vocabulary
from megahybrid.tasks.draws import Draws
from tests.evaluation.induction import VOCAB, model
from tests.evaluation.subjects import chosen, plan, subject

VOCABULARY = Vocabulary(VOCAB, 0)
WINDOW, BUFFER, PAIRS = 7, 24, 20
CHANCE = 2 / VOCAB  # values are half of the vocabulary


@pytest.fixture(autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


def draw(task, length, count, pairs=PAIRS):
    parameters = TASKS[task].parameters(pairs=pairs)
    return [TASKS[task].sample(parameters, length, VOCABULARY, Draws(task, n)) for n in range(count)]


def needles(sample):
    return np.array([answer.needles[0].begin for answer in sample.answers])


def right(stack, samples, policy, wanted=()):
    """bool, a row of answers a sample."""
    with swapped(stack, policy, wanted):
        readings = read(stack, samples, VOCAB, 300)
    return [
        reading.found[each.asked] == each.tokens[each.asked] for each, reading in zip(samples, readings, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [256, 1500])
def test_an_oracle_answers_all_and_one_of_other_places_none(length, dtype):
    """Needles are 64 tokens or more from their questions, the window has 8."""
    stack, samples = model(WINDOW, BUFFER, dtype=dtype), draw("selective_mqar", length, 4)
    places = [needles(each) for each in samples]
    assert np.all(right(stack, samples, "oracle", [each.tolist() for each in places]))
    # The fillers behind the values.
    assert np.mean(right(stack, samples, "oracle", [(each + 1).tolist() for each in places])) < 5 * CHANCE


def test_full_attention_answers_all():
    assert np.all(right(model(WINDOW, BUFFER, last="F"), draw("selective_mqar", 256, 4), "learned"))


def test_what_an_oracle_leaves_out_is_not_answered():
    stack, samples = model(WINDOW, BUFFER), draw("selective_mqar", 256, 6)
    kept = [np.arange(PAIRS) % 3 > 0] * len(samples)
    wanted = [needles(each)[those].tolist() for each, those in zip(samples, kept, strict=True)]
    found, kept = np.array(right(stack, samples, "oracle", wanted)), np.array(kept)
    assert found[kept].all() and found[~kept].mean() < 5 * CHANCE


def test_all_are_answered_where_the_buffer_holds_the_needles_and_no_more():
    samples = draw("selective_mqar", 256, 2)
    wanted = [needles(each).tolist() for each in samples]
    assert np.all(right(model(WINDOW, PAIRS), samples, "oracle", wanted))
    assert np.mean(right(model(WINDOW, PAIRS - 5), samples, "oracle", wanted)) == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize("sinks", [0, 2])
def test_recency_answers_what_its_window_holds(sinks):
    """The recency null of a window of w + 1 + b keys, of which the sinks take theirs."""
    stack, samples = model(31, 24, sinks), draw("mqar", 128, 8)
    found = np.concatenate(right(stack, samples, "recency"))
    apart = np.concatenate([each.asked - 1 - needles(each) for each in samples])  # from the question's last token
    seen = apart <= 31 + 24 - sinks
    assert 0.2 < seen.mean() < 0.8
    assert found[seen].all() and found[~seen].mean() < 5 * CHANCE


def test_written_answers_are_the_forced_ones():
    stack, samples = model(WINDOW, BUFFER), draw("selective_mqar", 256, 3)
    with swapped(stack, "oracle", [needles(each).tolist() for each in samples]):
        written = answers_one_by_one(stack, samples, VOCABULARY, 100)
    assert written == [[[int(token)] for token in each.tokens[each.asked]] for each in samples]


def apart(sample):
    """From each needle to the query that its answer is predicted from."""
    return sample.asked - 1 - needles(sample)


@pytest.mark.parametrize("policy", ["recency", "oracle"])
def test_what_it_sees_ends_at_one_token(policy):
    """Of windows alone too, where an oracle keeps other tokens. In samples of even and odd length all distances are
    there."""
    window, buffer, sinks = (16, 24, 2) if policy == "recency" else (38, 24, 0)
    stack = model(window, buffer, sinks)
    samples = draw("selective_mqar", 80, 20, 10) + draw("selective_mqar", 81, 20, 10)
    others = [(needles(each) + 1).tolist() for each in samples]
    found, distances = np.concatenate(right(stack, samples, policy, others)), np.concatenate([*map(apart, samples)])
    assert found[distances <= 38].all()
    assert min((distances == 38).sum(), (distances == 39).sum()) >= 5
    assert found[distances == 39].mean() < 0.2 and found[distances > 38].mean() < 5 * CHANCE


@pytest.mark.parametrize("policy", ["learned", "recency", "oracle"])
def test_random_weights_are_at_chance(policy):
    stack, samples = model(WINDOW, BUFFER), draw("selective_mqar", 256, 10)
    initialize_parameters(stack, 1)
    assert np.mean(right(stack, samples, policy, [needles(each).tolist() for each in samples])) < 5 * CHANCE


def test_evaluate_writes_what_the_policy_leaves(tmp_path):
    """Its own oracle's needles, and whether they were kept: by the L layer, one of two heads; S never reaches them."""
    policies = "oracle", "recency", "random"
    asked = dataclasses.replace(subject(tmp_path), model=model(WINDOW, 40), vocabulary=VOCABULARY)
    asked.config.model.pattern = "SL"
    tasks = (chosen("selective_mqar", pairs=6),)
    runner.evaluate(asked, plan(tasks=tasks, lengths=(80, 81), policies=policies, samples=12), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "selective_mqar.jsonl").read_text().splitlines()]
    right, kept, distance = (
        {each: np.concatenate([line[name] for line in lines if line["policy"] == each]) for each in policies}
        for name in ("right", "kept", "distance")
    )
    assert right["oracle"].all() and set(kept["oracle"]) == {0.5}
    assert np.array_equal(kept["recency"] > 0, distance["recency"] <= WINDOW + 1 + 40)
    for policy in ("recency", "random"):
        held = kept[policy] > 0
        assert 0.2 < held.mean() < 0.95
        assert right[policy][held].all() and right[policy][~held].mean() < 10 * CHANCE
