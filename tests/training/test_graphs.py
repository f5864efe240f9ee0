"""Steps whose passes are recorded and replayed, beside steps whose passes are not, to the last bit."""

import pytest
import torch

from megahybrid.config import load_config
from megahybrid.data.packing import Batch
from megahybrid.errors import UserError
from megahybrid.parallel import groups
from megahybrid.training.engine import Engine
from megahybrid.training.graphs import Graphs, Inputs
from megahybrid_kernels import Sequences

RECIPE = """
run: {dir: runs/graphs}
model:
  pattern: GLSFNL
  hidden_size: 64
  intermediate_size: 96
  vocab_size: 256
  gdn: {num_heads: 2, head_dim: 16}
  attention: {num_heads: 4, num_kv_heads: 2, head_dim: 16, window_size: 24}
  nsa: {block_size: 16, num_blocks: 3, window_size: 16}
  lte: {window_size: 15, buffer_size: 8, sink_size: 2, loss: {update_interval: 2, initial: 0.1}}
train: {seq_length: 64, micro_batch_size: 4, global_batch_size: 8, steps: 99}
optimizer: {learning_rate: 0.01, warmup_steps: 4}
data: {sources: {recall: {format: task, task: selective_mqar, weight: 1}}}
"""
TOKENS = 4 * 64
LONG, SHORT, UNEQUAL = (64,) * 4, (16,) * 16, (64, 128, 33, 31)
REFUSED = 3, 5
SHAPES = [LONG, LONG, LONG, SHORT, LONG, SHORT, SHORT, LONG, UNEQUAL, UNEQUAL, SHORT, UNEQUAL, LONG]


def batch(lengths, number, weighted):
    """One with tokens of its own."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(256, (TOKENS + 1,), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    samples = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) + 100 * number
    weights = torch.rand(TOKENS, generator=generator) if weighted else None
    return Batch(tokens[:-1], tokens[1:], Sequences.of(lengths), samples, positions, weights)


class ByHand:
    """In place of CUDA graphs: replays are the passes as Python has them, counted."""

    def __init__(self):
        self.replays = 0
        self.graphs = Graphs(torch.device("cpu"), self.record)

    def record(self, passes):
        def replay():
            self.replays += 1
            return passes()

        passes()
        return replay


@pytest.fixture
def trained(tmp_path):
    """Results of all steps, the weights after them and the engine, with graphs or without."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)

    def train(graphs, weighted, *keys):
        config = load_config(recipe, [f"train.cuda_graph={graphs == 'cuda'}", *keys])
        groups.initialize(config.parallel, config.train.seed)
        engine = Engine(config)
        engine.initialize()
        if not config.train.cuda_graph:
            engine.graphs = graphs
        results = []
        for step, lengths in enumerate(SHAPES, 1):
            batches = [batch(lengths, 2 * step + number, weighted) for number in range(2)]
            if weighted and step in REFUSED:
                batches[1].weights[7] = torch.nan
            results.append(engine.step(batches, step))
            if step == 7:
                results += engine.validate([batch(UNEQUAL, 0, False)])
        weights = {name: parameter.detach().cpu().clone() for name, parameter in engine.model.named_parameters()}
        regulated = [regulator.metrics() for regulator in engine.regulators.values()]
        return results, weights, regulated, engine.graphs

    yield train
    groups.shut_down()


def assert_equal_steps(trained, graphs, weighted, *keys):
    results, weights, regulated, _ = trained(None, weighted, *keys)
    groups.shut_down()
    theirs, their_weights, their_regulated, recorded = trained(graphs, weighted, *keys)
    assert str(theirs) == str(results)  # NaN equals none
    assert len(set(map(str, results))) == len(SHAPES) + 1
    assert [result.skipped is not None for result in results[:5]] == [weighted and n in REFUSED for n in range(1, 6)]
    assert weights.keys() == their_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, their_weights[name]), name
    for mine, other in zip(regulated, their_regulated, strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    # Each shape that came twice in a row, and no other.
    assert set(recorded.shapes) == {(LONG,) * 2, (SHORT,) * 2, (UNEQUAL,) * 2}


@pytest.mark.parametrize(("weighted", "zero_stage"), [(False, 2), (True, 1)])
def test_replayed_passes_are_the_same_to_the_bit(trained, weighted, zero_stage):
    by_hand = ByHand()
    assert_equal_steps(trained, by_hand.graphs, weighted, f"parallel.zero_stage={zero_stage}", "train.dtype=fp32")
    assert by_hand.replays == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("keys", [(), ("parallel.zero_stage=2",), ("train.dtype=fp32", "train.z_loss=0.001")], ids=str)
def test_cuda_graphs_are_the_same_to_the_bit(trained, weighted, keys):
    assert_equal_steps(trained, "cuda", weighted, *keys)


def test_old_shapes_are_given_up(trained, monkeypatch):
    monkeypatch.setattr("megahybrid.training.graphs._MOST", 2)
    *_, recorded = trained(ByHand().graphs, False, "train.dtype=fp32")
    assert list(recorded.shapes) == [(UNEQUAL,) * 2, (LONG,) * 2]


@pytest.mark.parametrize(
    ("lengths", "said"),
    [([[4], [5], [4], [5]], 1), ([[5], [5], [4], [6]], 0), ([[4], [5], [5]], 0), ([[4], [5]], 0)],
    ids=["never two alike", "recorded before", "recorded now", "too few steps"],
)
def test_it_is_said_once_where_lengths_never_repeat(monkeypatch, caplog, lengths, said):
    monkeypatch.setattr("megahybrid.training.graphs._PATIENCE", 3)
    graphs = ByHand().graphs
    for row in lengths:
        sequences = Sequences.of(row)
        tokens = torch.zeros(sum(row), dtype=torch.long)
        graphs.run([Inputs(tokens, tokens, sequences, tokens, None)], 1.0, lambda *_: None)
    assert sum("has recorded nothing in 3 steps" in message for message in caplog.messages) == said


def test_passes_that_cannot_be_recorded_are_a_sentence(trained):
    def failing(_):
        raise RuntimeError("CUDA error: operation not permitted\nFor debugging consider")

    with pytest.raises(UserError, match=r"recorded \(CUDA error: operation not permitted\); set train"):
        trained(Graphs(torch.device("cpu"), failing), False, "train.dtype=fp32")


def test_recomputed_activations_are_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match="cuda_graph cannot record recomputed"):
        load_config(tmp_path / "recipe.yaml", ["train.cuda_graph=true", "train.recompute=L"])
