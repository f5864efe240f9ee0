"""What is written against whole passes over every prefix."""

import pytest
import torch

from megahybrid.config.schema import ParallelConfig
from megahybrid.evaluation.generated import answers_one_by_one, continuations
from megahybrid.parallel import groups
from megahybrid.tasks import Answer, Sample, Span, Vocabulary
from tests.inference.oracle import tokens, whole
from tests.model import tiny

VOCABULARY = Vocabulary(tiny.VOCAB - 3, 0)  # the embedding has rows that are no tokens


@pytest.fixture(autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


def likeliest(model, ids):
    return int(whole(model, ids)[-1, : VOCABULARY.size].argmax())


def written(model, ids, count):
    ids, found = list(ids), []
    while len(found) < count:
        found.append(likeliest(model, ids))
        ids.append(found[-1])
    return found


def samples():
    """Answers of one token and of several, one right behind another, in samples of different lengths."""
    rows = []
    for seed, spans in enumerate(([(20, 21), (21, 24), (30, 32), (39, 40)], [(7, 12)], [(50, 51), (88, 93)])):
        ids = torch.tensor(tokens(spans[-1][1], seed=seed))
        rows.append(Sample(ids.numpy(), spans[0][0], [Answer(Span(*span), (Span(1, 2),)) for span in spans]))
    return rows


@pytest.mark.parametrize("chunk", [1, 13, 1000])
@pytest.mark.parametrize("pattern", ["GLSFN", "L"])
def test_each_answer_follows_the_right_ones_before_it(pattern, chunk):
    model = tiny.model(pattern)
    found = answers_one_by_one(model, samples(), VOCABULARY, chunk)
    for sample, answers in zip(samples(), found, strict=True):
        for (span, _, _), answer in zip(sample.answers, answers, strict=True):
            assert answer == written(model, sample.tokens[: span.begin], span.end - span.begin)


def test_a_text_ends_at_the_document_token_or_at_the_most():
    model = tiny.model("GLSFN")
    prompts = [tokens(length, seed=length) for length in (5, 40, 23, 31, 64)]
    free = [written(model, prompt, 9) for prompt in prompts]
    document = free[1][4]
    found = continuations(model, prompts, 9, Vocabulary(VOCABULARY.size, document), 16)
    assert found == [text[: text.index(document)] if document in text else text for text in free]
    assert len(found[1]) <= 4 and max(map(len, found)) == 9
