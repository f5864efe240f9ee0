"""Prefill and decode on several tensor parallel ranks, also more than there are KV heads, beside one pass on one."""

import pytest
import torch

PROMPTS, CHUNK, DECODED = (150, 20), 60, 12


def model_of(world):
    from megahybrid.config.schema import ParallelConfig
    from megahybrid.model.stack import build
    from megahybrid.parallel import groups
    from tests.model import tiny

    config = tiny.config("GSNF")
    config.model.gdn.num_heads, config.model.attention.num_heads = 4, 8
    config.parallel = ParallelConfig(tensor=world)
    groups.initialize(config.parallel)
    return build(config, "cpu", torch.float64)


def texts():
    from tests.inference.oracle import tokens

    return [tokens(prompt + DECODED, seed=seed) for seed, prompt in enumerate(PROMPTS)]


def in_one_pass():
    from tests.inference.oracle import whole

    model = model_of(1)
    return [whole(model, text)[prompt - 1 : -1] for text, prompt in zip(texts(), PROMPTS, strict=True)]


def in_steps(world):
    """Logits after each text's prompt and each token that follows."""
    from megahybrid.inference.batch import Batch

    batch, read, found = Batch(model_of(world), CHUNK), list(PROMPTS), [[] for _ in PROMPTS]
    batch.add([text[:prompt] for text, prompt in zip(texts(), PROMPTS, strict=True)])
    while min(map(len, found)) < DECODED:
        for row, logits in zip(*batch.step(), strict=True):
            found[row].append(logits.clone())
            batch.extend(row, texts()[row][read[row] % len(texts()[row])])
            read[row] += 1
    return [torch.stack(logits[:DECODED]) for logits in found]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_steps_give_what_one_pass_does(world, workers):
    (expected,) = workers.run(1, "tests.inference.test_ranks:in_one_pass")
    for found in workers.run(world, "tests.inference.test_ranks:in_steps", world):
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-10 * theirs.abs().max()


def heads(world):
    """By layer with keys, of how many KV heads this rank says what is held, and what is seen."""
    from megahybrid.model.context import Context, Watch
    from megahybrid_kernels import Sequences

    model, place = model_of(world), torch.tensor([3])
    held = [model.layers[str(n)].mixer.held(state) for n, state in model.initial_states(1).items()]
    out = model(torch.arange(8), Context(Sequences.of([8]), watch=Watch(place, place)))
    return [each.shape[1] for each in held if each is not None], [aux.seen.shape[1] for aux in out.aux.values()]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_head_of_several_ranks_is_told_of_once(world, workers):
    ranks = torch.tensor(workers.run(world, "tests.inference.test_ranks:heads", world))
    assert ranks.sum(0).tolist() == [[2, 2, 2]] * 2
