"""Likelihoods and generated texts against passes over the whole text in float64."""

import pytest
import torch

from megahybrid.config.schema import ParallelConfig
from megahybrid.errors import UserError
from megahybrid.evaluation.scorer import options
from megahybrid.inference.generate import Options
from megahybrid.inference.sampling import Sampling
from megahybrid.parallel import groups
from tests.evaluation.subjects import WORDS, score, scorer
from tests.inference.oracle import whole
from tools.workers import Workers

# Context and continuation, and what these are to mean: spaces go with the word behind them.
PAIRS = {
    ("the cat sat on", " a mat"): ("the cat sat on", " a mat"),
    ("Who is there? ", "Nobody!"): ("Who is there?", " Nobody!"),
    ("Who is there?  \n", " cat"): ("Who is there?", "  \n cat"),
    ("", "the dog"): ("", "the dog"),
    (" \n", "the dog"): ("", " \nthe dog"),
    (WORDS * 3, "the door"): ((WORDS * 3).rstrip(), " the door"),
    ("17", " + 4 = 21." * 9): ("17", " + 4 = 21." * 9),
    ("sat th", "e"): ("sat", " the"),  # one token
}


@pytest.fixture(autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


def brute_force(asked, before, after):
    """Logarithm of the probability of `after`, and the tokens of it that are the likeliest."""
    tokenizer = asked._tokenizer
    ids = [tokenizer.document_id, *tokenizer.encode(before + after)]
    logits = whole(asked._model, ids)[len(tokenizer.encode(before)) : -1]
    own = torch.tensor(ids[len(ids) - len(logits) :])
    right = logits[:, : tokenizer.vocab_size].argmax(1) == own
    return float(logits.log_softmax(1)[torch.arange(len(own)), own].sum()), right


def written(asked, text, most):
    """What follows a text greedily, a pass over everything for each token."""
    tokenizer = asked._tokenizer
    ids = [tokenizer.document_id, *tokenizer.encode(text)]
    new = []
    while len(new) < most:
        token = int(whole(asked._model, ids + new)[-1, : tokenizer.vocab_size].argmax())
        if token == tokenizer.document_id:
            break
        new.append(token)
    return tokenizer.decode(new)


@pytest.mark.parametrize("sizes", [{}, {"batch_size": 1, "prefill_chunk": 5}, {"batch_size": 3, "prefill_chunk": 40}])
@pytest.mark.parametrize("pattern", ["G", "GLSFN"])
def test_a_continuations_likelihood(pattern, sizes):
    asked = scorer(pattern, **sizes)
    found = dict(asked.likelihoods(list(PAIRS)))
    assert sorted(found) == list(range(len(PAIRS)))
    for number, (before, after) in enumerate(PAIRS.values()):
        logarithm, right = brute_force(asked, before, after)
        assert found[number].logarithm == pytest.approx(logarithm, abs=1e-9)
        assert found[number].greedy == bool(right.all())


def test_greedy_is_what_the_model_would_write():
    asked = scorer()
    tokens = [asked._tokenizer.decode([token]) for token in range(1, asked._tokenizer.vocab_size)]
    contexts = [word for word in WORDS.split() if len(word) > 1]
    pairs = [(context, token) for context in contexts for token in tokens if token.startswith(" ")]
    for number, likelihood in asked.likelihoods(pairs):
        assert likelihood.greedy == bool(brute_force(asked, *pairs[number])[1].all())
    assert {likelihood.greedy for _, likelihood in asked.likelihoods(pairs)} == {True, False}


def test_a_documents_likelihood():
    asked = scorer(prefill_chunk=16)
    texts = ["", WORDS * 10, "a", WORDS]
    found = dict(asked.document_likelihoods(texts))
    assert found[0] == (0, True)
    for number in (1, 2, 3):
        assert found[number].logarithm == pytest.approx(brute_force(asked, "", texts[number])[0], abs=1e-8)


def test_greedy_texts_up_to_their_stop_strings_and_lengths():
    asked = scorer()
    free = written(asked, WORDS, 20)
    stop = free[7:9]
    requests = [
        (WORDS, Options(20, (), Sampling(0))),
        ("the cat", Options(9, (), Sampling(0))),
        (WORDS, Options(20, (stop, "never there"), Sampling(0))),
        ("", Options(9, (), Sampling(0))),
    ]
    found = dict(asked.generate(requests))
    assert found == {
        0: free, 1: written(asked, "the cat", 9), 2: free[: free.find(stop)], 3: written(asked, "", 9),
    }  # fmt: skip


def test_a_text_asked_for_again_is_another_sample_and_a_new_start_gives_the_same():
    asked, request = scorer(), ("the cat", Options(12, (), Sampling(1)))
    first, second, greedy, third = (
        dict(asked.generate([request, request, ("the cat", Options(12, (), Sampling(0))), request]))[number]
        for number in range(4)
    )
    assert len({first, second, third, greedy}) == 4
    assert dict(asked.generate([request, request])) == {0: first, 1: second}


def test_two_tensor_parallel_processes_give_the_same():
    one = score(list(PAIRS), "the cat")
    workers = Workers(2)
    try:
        ranks = workers.run(2, "tests.evaluation.subjects:score_in_parallel", list(PAIRS), "the cat")
    finally:
        workers.close()
    assert ranks[0] == ranks[1]
    for (number, ours), (same, theirs) in zip(one[0], ranks[0][0], strict=True):
        assert (number, ours.greedy) == (same, theirs.greedy)
        assert ours.logarithm == pytest.approx(theirs.logarithm, abs=1e-9)
    assert one[1] == ranks[0][1]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({}, Options(256, (), Sampling(0))),
        ({"until": ["\n\n", "Q:"], "do_sample": False, "temperature": 0.7}, Options(256, ("\n\n", "Q:"), Sampling(0))),
        ({"until": "Q:", "temperature": "0.5", "top_p": 0.9}, Options(256, ("Q:",), Sampling(0.5, top_p=0.9))),
        ({"max_gen_toks": 7, "num_beams": 1, "until": ["", "."]}, Options(7, (".",), Sampling(0))),
        ({"max_new_tokens": 8, "do_sample": True, "temperature": 1, "top_k": 5}, Options(8, (), Sampling(1, 5))),
    ],
)
def test_generation_kwargs(asked, meant):
    assert options(asked) == meant


@pytest.mark.parametrize(
    ("asked", "said"), [({"num_beams": 4}, "'num_beams'"), ({"max_gen_toks": 0}, "it must be at least 1")]
)
def test_generation_kwargs_that_are_not_done_are_refused(asked, said):
    with pytest.raises(UserError, match=said):
        options(asked)
