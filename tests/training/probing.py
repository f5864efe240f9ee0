"""Probes of a tiny model with its initial weights by the engine, in any layout, and the same by brute force."""

import math

import torch

from megahybrid.config.schema import ParallelConfig
from megahybrid.config.validate import validate
from megahybrid.mixers.nsa import NSAConfig
from megahybrid.tasks import TASKS, Answer, Sample, Span, Task, TaskParameters

VOCABULARY, LENGTH = 6, 64  # so few tokens that bigrams come again, and that random weights are right at times
# Of each validation sample; replicas have unequally many rows, and a pipeline an odd number.
NSA = NSAConfig(num_heads=4, num_kv_heads=2, head_dim=8, block_size=4, num_blocks=4, window_size=6)
DOCUMENTS = ((64,), (40, 24), (1, 2, 61), (50, 14), (20, 20, 24))


def config_of(pattern, parallel, micro_batch_size=2, **evaluate):
    from tests.model import tiny

    config = tiny.config(pattern, train_cap=True)  # with which context parallel ranks keep LTE's tokens, too
    config.model.vocab_size, config.train.seq_length, config.train.global_batch_size = VOCABULARY, LENGTH, 8
    config.train.micro_batch_size, config.data.path = micro_batch_size, "unused"
    config.parallel = ParallelConfig(**parallel)
    config.evaluate.every, config.evaluate.samples = 1, 5
    for name, value in evaluate.items():
        setattr(config.evaluate, name, value)
    validate(config)
    config.model.nsa = NSA  # smaller blocks than a recipe may have, so that short documents have some to choose among
    return config


def samples():
    """Tokens and labels of the validation samples, each `[64]`, with its documents' lengths."""
    for number, lengths in enumerate(DOCUMENTS):
        tokens = torch.randint(VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(number))
        yield tokens[:-1], tokens[1:], lengths


def batches(micro_batch_size, replica, replicas):
    from megahybrid.data.packing import Batch
    from megahybrid_kernels import Sequences

    mine = list(samples())[replica::replicas]
    for first in range(0, len(mine), micro_batch_size):
        tokens, labels, lengths = zip(*mine[first : first + micro_batch_size], strict=True)
        tokens, labels = torch.cat(tokens), torch.cat(labels)
        zeros = torch.zeros_like(tokens)
        yield Batch(tokens, labels, Sequences.of(sum(lengths, ())), zeros, zeros)


class Scattered(Task):
    """Answers of one to three tokens, with one or two needles as long: anywhere, whatever stands there."""

    name = "scattered"

    def sample(self, parameters, length, vocabulary, draws, depth=None):
        length -= int(10 * depth)  # none as long as the next one
        tokens, answers = draws.below(vocabulary.size, length), []
        for _ in range(20):
            size, needles, begin = (int(draws.below(limit, 1)[0]) for limit in (3, 2, length - 8))
            size, needles, begin = size + 1, needles + 1, begin + 4
            places = draws.below(begin - 3, needles).tolist()
            answers.append(Answer(Span(begin, begin + size), tuple(Span(place, place + size) for place in places)))
        return Sample(tokens, 4, tuple(answers))


def questions(length):
    from megahybrid.training.probes.questions import Question

    mqar = TASKS["mqar"]
    scattered = Scattered()
    return [
        Question(task.name, task, parameters, length)
        for task, parameters in ((mqar, mqar.parameters(pairs=2)), (scattered, TaskParameters()))
    ]


def by_engine(pattern, parallel, micro_batch_size=2, **evaluate):
    """What this rank's probes give, and the weights."""
    from megahybrid.parallel import groups
    from megahybrid.tasks import Vocabulary
    from megahybrid.training.engine import Engine
    from megahybrid.training.probes.recall import RecallProbes
    from megahybrid.training.probes.text import TextProbes

    config = config_of(pattern, parallel, micro_batch_size, **evaluate)
    groups.initialize(config.parallel)
    engine = Engine(config)
    engine.initialize()
    text = TextProbes(config, list(batches(micro_batch_size, *groups.data_parallel())))
    recall = RecallProbes(config, questions(48), Vocabulary(VOCABULARY, 0))
    first = text.run(engine) | recall.run(engine)
    assert first == text.run(engine) | recall.run(engine)
    return first


def model_of(pattern):
    """The same weights in float64, on one process."""
    from megahybrid.model.stack import build
    from megahybrid.parallel import groups

    config = config_of(pattern, {})
    groups.initialize(config.parallel)
    return build(config, "cpu").double()


class Oracle:
    """A token after the other, each by a pass over what stands before it."""

    def __init__(self, pattern):
        self.model, self.scores, self.inputs = model_of(pattern), {}, {}
        for layer, letter in enumerate(pattern):
            mixer = self.model.layers[str(layer)].mixer
            if letter == "L":
                mixer.router.register_forward_hook(lambda _, given, result, n=layer: self.scores.update({n: result[0]}))
            if letter == "N":
                mixer.register_forward_pre_hook(
                    lambda mixer, given, n=layer: self.inputs.update({n: (mixer, *given[:2])})
                )

    @torch.no_grad()
    def selects(self, layer):
        """Of N's two heads, the last query's blocks."""
        from tests.kernels.oracles_nsa import oracle_selection

        mixer, x, context = self.inputs[layer]
        q, k, _ = mixer.project(x)
        q, k = mixer.rotate(q, k, context.sequences)
        return oracle_selection(q, k, (len(q),), NSA.block_size, NSA.num_blocks, [len(q) - 1])[0].tolist()

    @torch.no_grad()
    def logits(self, context):
        from megahybrid.model.context import Context
        from megahybrid_kernels import Sequences

        hidden = self.model(context, Context(Sequences.of([len(context)]))).hidden
        return self.model.logits(hidden)[-1].tolist()

    def nats(self, context, label):
        logits = self.logits(context)
        return math.log(sum(math.exp(each) for each in logits)) - logits[label]


def mean(values):
    return sum(values) / len(values) if values else None


def text_by_hand(pattern, window):
    """position, hits and gain."""
    oracle = Oracle(pattern)
    by_position, hits, others, cut, whole = {}, ([], [], []), [], [], []
    for tokens, labels, lengths in samples():
        begin = 0
        for length in lengths:
            document, targets = tokens[begin : begin + length], labels[begin : begin + length].tolist()
            begin += length
            words = document.tolist()
            for p, target in enumerate(targets):
                loss = oracle.nats(document[: p + 1], target)
                by_position.setdefault(len(f"{p:b}") if p else 0, []).append(loss)
                before = [q for q in range(p) if (words[q], targets[q]) == (words[p], target)]
                if before:
                    hits[(p - before[-1] > window) + (p - before[-1] > 4 * window)].append(loss)
                else:
                    others.append(loss)
                if p >= 2 * window:
                    whole.append(loss)
                    cut.append(oracle.nats(document[(p // window - 1) * window : p + 1], target))
    return {
        "probe_position_loss": [mean(by_position.get(n)) for n in range(7)],
        "probe_hit_loss": [mean(each) for each in hits],
        "probe_other_loss": mean(others),
        "probe_gain": mean(cut) - mean(whole) if whole else None,
    }


def holders(oracle, pattern, query, needles):
    """Of each attending layer, how many of its two heads see a whole needle from the query, the last pass's end."""
    from tests.kernels.oracles_lte import causal_mask, eviction_mask

    found = {}
    for layer, letter in enumerate(pattern):
        if letter == "L":
            heads = eviction_mask(oracle.scores[layer], 7, 2, 5)[:, query].tolist()
        elif letter == "N":
            heads = [
                [query - key < NSA.window_size or key // NSA.block_size in blocks for key in range(query + 1)]
                for blocks in oracle.selects(layer)
            ]
        else:
            heads = [causal_mask(query + 1, 7 if letter == "S" else None)[query].tolist()] * 2
        if letter != "G":
            found[layer] = sum(any(all(seen[key] for key in range(*needle)) for needle in needles) for seen in heads)
    return found


def recall_by_hand(pattern, window, samples=5, length=48):
    from megahybrid.tasks import Vocabulary
    from megahybrid.tasks.draws import Draws

    oracle, found = Oracle(pattern), {}
    for _, task, parameters, _ in questions(length):
        right, nats, held = ([], []), ([], []), []
        for number in range(samples):
            depth = number / (samples - 1)
            draws = Draws("evaluate", task.name, length, depth, number)
            sample = task.sample(parameters, length, Vocabulary(VOCABULARY, 0), draws, depth)
            tokens = torch.from_numpy(sample.tokens)
            for answer in sample.answers:
                begin, end = answer.span
                beyond = all(needle.begin < begin - window for needle in answer.needles)
                rows = [oracle.logits(tokens[:place]) for place in range(begin, end)]
                words = tokens[begin:end].tolist()
                nats[beyond].extend(
                    math.log(sum(map(math.exp, row))) - row[word] for row, word in zip(rows, words, strict=True)
                )
                right[beyond].append(all(max(row) == row[word] for row, word in zip(rows, words, strict=True)))
                if beyond:
                    oracle.logits(tokens[:begin])
                    held.append(holders(oracle, pattern, begin - 1, answer.needles))
        name = f"{task.name}_{length}"
        found |= {
            f"probe_accuracy_{name}": [mean(each) for each in right],
            f"probe_nll_{name}": [mean(each) for each in nats],
            f"probe_recency_null_{name}": len(right[0]) / (len(right[0]) + len(right[1])),
            f"probe_kept_{name}": mean([heads / 2 for each in held for heads in each.values()]),
            f"probe_held_{name}": mean([any(each.values()) for each in held]),
            f"probe_by_layer_{name}": [
                mean([each[layer] / 2 for each in held if layer in each]) for layer in range(len(pattern))
            ],
            f"probe_given_{name}": [
                mean([ok for ok, each in zip(right[1], held, strict=True) if any(each.values()) == kept])
                for kept in (False, True)
            ],
        }
    return found
