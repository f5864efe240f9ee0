"""Samples of bare tokens: what stands where, drawn as the formulas say, the same for the same draws."""

from __future__ import annotations

import numpy as np
import pytest

from megahybrid.errors import UserError
from megahybrid.tasks import TASKS, Vocabulary
from megahybrid.tasks.draws import Draws

CASES = [
    ("mqar", {"pairs": 48}, 512),
    ("mqar", {"pairs": 4}, 17),
    ("selective_mqar", {"pairs": 48}, 512),
    ("selective_mqar", {"pairs": 5}, 43),
    ("copy", {}, 64),
    ("copy", {}, 4),
]
DOCUMENTS = [0, 1, 500, 1023]


def make(name, given, length, document=0, size=1024, index=0):
    task = TASKS[name]
    parameters = task.parameters(**given)
    vocabulary = Vocabulary(size, document)
    task.check(parameters, length, vocabulary)
    return task.sample(parameters, length, vocabulary, Draws("test", index))


def read(sample):
    """The pairs and the questions by a walk over the answers: [(key, value, place of pair, place of question)]."""
    found = []
    for answer in sample.answers:
        (needle,) = answer.needles
        assert answer.span.end - answer.span.begin == needle.end - needle.begin == 1
        assert sample.tokens[answer.span.begin] == sample.tokens[needle.begin]
        assert sample.tokens[answer.span.begin - 1] == sample.tokens[needle.begin - 1]
        found.append(
            (sample.tokens[needle.begin - 1], sample.tokens[needle.begin], needle.begin - 1, answer.span.begin - 1)
        )
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize(("name", "given", "length"), CASES)
def test_what_every_sample_has(name, given, length, document):
    for index in range(50):
        sample = make(name, given, length, document, index=index)
        assert sample.tokens.dtype == np.int64 and len(sample.tokens) == length
        assert sample.tokens.min() >= 0 and sample.tokens.max() < 1024
        assert np.flatnonzero(sample.tokens == document).tolist() == [0]
        begins = [answer.span.begin for answer in sample.answers]
        assert begins == sorted(begins) and sample.prompt == begins[0]
        for answer in sample.answers:
            for needle in answer.needles:
                assert needle.end <= answer.span.begin
                assert np.array_equal(sample.tokens[slice(*needle)], sample.tokens[slice(*answer.span)])


@pytest.mark.parametrize(("name", "given", "length"), CASES)
def test_weights_stand_on_the_answers(name, given, length):
    sample = make(name, given, length)
    parameters = TASKS[name].parameters(**given, answer_weight=3, context_weight=0.5)
    expected = [0.5] * length
    for answer in sample.answers:
        for place in range(*answer.span):
            expected[place] = 3
    assert sample.weights(parameters).tolist() == expected
    assert sample.weights(parameters).dtype == np.float32


@pytest.mark.parametrize(("name", "given", "length"), CASES)
def test_the_draws_alone_decide(name, given, length):
    first, again, other = (make(name, given, length, index=index) for index in (0, 0, 1))
    assert np.array_equal(first.tokens, again.tokens) and list(first.answers) == list(again.answers)
    assert not np.array_equal(first.tokens, other.tokens)


def test_a_sample_is_this_one():
    """Data of finished runs: who changes this raises the task's version."""
    vocabulary = Vocabulary(64, 0)
    tokens = {
        name: TASKS[name]
        .sample(TASKS[name].parameters(**given), 16, vocabulary, Draws("train", 0, "x", 5, 2))
        .tokens.tolist()
        for name, given in {"mqar": {"pairs": 2}, "selective_mqar": {"pairs": 2}, "copy": {}}.items()
    }
    assert tokens == EXPECTED


EXPECTED = {
    "mqar": [0, 20, 63, 14, 59, 14, 59, 50, 41, 18, 21, 27, 57, 20, 63, 42],
    "selective_mqar": [0, 7, 61, 14, 39, 19, 29, 17, 16, 18, 30, 25, 7, 61, 14, 39],
    "copy": [0, 40, 29, 62, 55, 13, 14, 53, 1, 40, 29, 62, 55, 13, 14, 53],
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_keys_values_and_fillers_of_mqar_never_meet(document):
    for index in range(100):
        sample = make("mqar", {"pairs": 48}, 512, document, index=index)
        pairs = read(sample)
        keys, values, places, questions = (np.array(each) for each in zip(*pairs, strict=True))
        assert len(set(keys)) == 48 and keys.min() >= 1 and keys.max() < 512
        assert len(set(values)) == 48 and values.min() >= 512
        assert sorted(places) == list(range(1, 97, 2))
        assert len(set(questions)) == 48 and questions.min() >= 97 and ((questions - 97) % 2 == 0).all()
        rest = np.delete(sample.tokens, np.concatenate([[0], places, places + 1, questions, questions + 1]))
        assert not set(rest) & set(keys)
        assert (rest < 512).any() and (rest >= 512).any()


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize(("length", "pairs"), [(512, 48), (43, 5), (2048, 48)])
def test_keys_values_and_fillers_of_selective_mqar_have_ids_of_their_own(document, length, pairs):
    for index in range(100):
        sample = make("selective_mqar", {"pairs": pairs}, length, document, index=index)
        keys, values, places, questions = (np.array(each) for each in zip(*read(sample), strict=True))
        assert len(set(keys)) == pairs and keys.min() >= 1 and keys.max() < 256
        assert values.min() >= 512
        assert places.min() >= 1 and places.max() + 1 < (length + 1) // 2
        assert questions.min() >= 3 * length // 4 and questions.max() + 1 < length
        taken = np.concatenate([[0], places, places + 1, questions, questions + 1])
        assert len(set(taken)) == 4 * pairs + 1
        rest = np.delete(sample.tokens, taken)
        assert rest.min() >= 256 and rest.max() < 512


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
@pytest.mark.parametrize(("name", "given", "length"), [*CASES, ("selective_mqar", {"pairs": 4}, 32)])
def test_samples_are_those_of_each(name, given, length, count):
    task, vocabulary = TASKS[name], Vocabulary(1024, 0)
    parameters, keys = task.parameters(**given), [("x", index) for index in range(count)]
    found = list(task.samples(parameters, length, vocabulary, [Draws(*key) for key in keys]))
    assert len(found) == count
    for key, sample in zip(keys, found, strict=True):
        alone = task.sample(parameters, length, vocabulary, Draws(*key))
        assert sample.tokens.tolist() == alone.tokens.tolist() and sample.prompt == alone.prompt
        assert list(sample.answers) == list(alone.answers)


def test_copy_is_a_string_a_separator_and_the_string():
    sample = make("copy", {}, 12, document=0)
    string = sample.tokens[1:6]
    assert sample.tokens.tolist() == [0, *string, 1, *string] and sample.prompt == 7
    assert string.min() > 1 and [tuple(answer.span) for answer in sample.answers] == [(7, 12)]
    assert make("copy", {}, 12, document=9).tokens[6] == 0


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_places_of_questions_follow_the_power_law(power):
    """The first pair's place has p of i^(a - 1) itself; the second's follows from drawing without replacement."""
    task, vocabulary = TASKS["mqar"], Vocabulary(1024, 0)
    parameters, room, count = task.parameters(pairs=2, power=power), 8, 20_000
    law = np.arange(1, room + 1) ** (power - 1)
    law /= law.sum()
    second = law * sum(p / (1 - p) for p in law) - law * law / (1 - law)
    seen = np.zeros((2, room))
    for index in range(count):
        sample = task.sample(parameters, 21, vocabulary, Draws(index))
        for _, _, place, question in read(sample):
            seen[(place - 1) // 2, (question - 5) // 2] += 1
    for observed, expected in zip(seen, (law, second), strict=True):
        # 99.9 % of chi-square with 7 degrees of freedom
        assert ((observed - count * expected) ** 2 / (count * expected)).sum() < 24.3


def test_every_value_key_and_place_is_as_likely():
    task, vocabulary = TASKS["selective_mqar"], Vocabulary(64, 0)
    parameters, count = task.parameters(pairs=2), 10_000
    seen = {"key": np.zeros(15), "value": np.zeros(32), "place": np.zeros(7), "question": np.zeros(4)}
    for index in range(count):
        for a_key, value, place, question in read(task.sample(parameters, 32, vocabulary, Draws(index))):
            seen["key"][a_key - 1] += 1
            seen["value"][value - 32] += 1
            seen["place"][(place - 1) // 2] += 1
            seen["question"][(question - 24) // 2] += 1
    for observed in seen.values():
        expected = 2 * count / len(observed)
        freedom = len(observed) - 1
        assert ((observed - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom) + 6


def test_samples_of_training_and_of_evaluation_are_others():
    task, vocabulary = TASKS["selective_mqar"], Vocabulary(8192, 0)
    parameters = task.parameters(pairs=4)
    keys = [("train", seed, "recall", row, place) for seed in (0, 1) for row in range(50) for place in range(4)]
    keys += [("evaluate", "selective_mqar", 64, depth, index) for depth in (None, 0, 1) for index in range(100)]
    samples = {task.sample(parameters, 64, vocabulary, Draws(*each)).tokens.tobytes() for each in keys}
    assert len(samples) == len(keys)


@pytest.mark.parametrize(
    ("name", "given", "length", "size", "words"),
    [
        ("mqar", {"pairs": 16}, 64, 1024, "mqar has room for 15 pairs in 64 tokens, not for 16"),
        ("mqar", {"pairs": 1}, 1, 1024, "room for 0 pairs"),
        ("mqar", {"pairs": 15}, 64, 32, "mqar with 15 pairs finds only 14 keys in a vocabulary of 32 tokens"),
        ("selective_mqar", {"pairs": 9}, 64, 1024, "room for 8 pairs in 64 tokens, not for 9"),
        ("selective_mqar", {"pairs": 8}, 64, 32, "finds only 6 keys"),
        ("copy", {}, 63, 1024, "even length"),
        ("copy", {}, 2, 1024, "even length of 4"),
        ("copy", {}, 8, 2, "needs 3 tokens"),
    ],
)
def test_what_cannot_be_made_is_refused(name, given, length, size, words):
    with pytest.raises(UserError, match=words):
        make(name, given, length, document=1, size=size)


@pytest.mark.parametrize(
    ("name", "given", "length", "size"),
    [("mqar", {"pairs": 15}, 64, 34), ("selective_mqar", {"pairs": 8}, 64, 40), ("copy", {}, 4, 3)],
)
def test_what_just_fits_is_made(name, given, length, size):
    for index in range(50):
        sample = make(name, given, length, document=1, size=size, index=index)
        assert len(sample.answers) == given.get("pairs", 1)
