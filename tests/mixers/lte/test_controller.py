import pytest
import torch

from megahybrid.mixers.lte import LTEConfig, RetentionLossConfig
from megahybrid.mixers.lte.controller import LambdaController


def controller(**options):
    loss = RetentionLossConfig(update_interval=2, initial=1e-3, **options)  # moving average rate 2 / (1 + 2 / 2) = 1
    return LambdaController(LTEConfig(buffer_size=100, loss=loss), seq_length=1000, layers=[0], heads=1)


def counts(kept, positions):
    return {"kept": torch.tensor(kept).double(), "positions": torch.full((len(kept), 1), positions).double()}


def test_trajectory_from_a_table():
    """(kept of a document, lambda afterwards); target band 95 to 100."""
    table = [
        (1000, 1e-3),  # over: from 0 to the first value
        (500, 1.5e-3),  # over: grows
        (101, 2.25e-3),
        (100, 3.375e-3),  # the band excludes its upper end
        (99, 3.375e-3),  # band: rests
        (96, 3.375e-3),
        (95, 1.6875e-3),  # the band excludes its lower end: halves
        (10, 0.0),  # below the first value: off
        (10, 0.0),
        (99, 1e-3),  # off and in the band: switched on again
    ]
    subject = controller()
    step = 0
    for kept, expected in table:
        for _ in range(2):
            step += 1
            subject.update(step, counts([[kept * 3]], 3000), 1000)
        assert subject.lambdas.item() == pytest.approx(expected, rel=1e-6), (kept, step)


def test_lambda_has_a_maximum():
    subject = controller(maximum=2e-3)
    for step in range(1, 21):
        subject.update(step, counts([[1000]], 1000), 1000)
    assert subject.lambdas.item() == pytest.approx(2e-3)


def test_moving_average_and_scaling_to_the_longest_document():
    loss = RetentionLossConfig(update_interval=32)
    subject = LambdaController(LTEConfig(buffer_size=100, loss=loss), seq_length=1000, layers=[0], heads=2)
    subject.update(1, counts([[50, 0]], 500), 1000)  # 100 and 0 of a document of 1000
    rate = 2 / 17
    assert subject.kept.tolist()[0] == pytest.approx([(1 - rate) * 1000 + rate * 100, (1 - rate) * 1000])
    assert subject.kept_now.tolist() == [[100.0, 0.0]]
    subject.update(2, counts([[50, 0]], 500), 64)  # the same share of shorter ones
    assert subject.kept_now.tolist()[0] == pytest.approx([6.4, 0.0])


def test_without_counted_positions_nothing_changes():
    subject = controller()
    subject.update(1, counts([[0]], 0), 1)
    subject.update(3, None, 1)
    assert subject.kept.item() == 1000


def test_heads_are_independent_and_mixers_see_the_update():
    loss = RetentionLossConfig(update_interval=2, initial=1e-3)
    subject = LambdaController(LTEConfig(buffer_size=100, loss=loss), seq_length=1000, layers=[1, 3], heads=2)
    view = subject.lambdas[1]
    for step in (1, 2):
        subject.update(step, counts([[1000, 10], [10, 1000]], 1000), 1000)
    assert view.tolist() == pytest.approx([0.0, 1e-3])
    assert subject.lambdas[0].tolist() == pytest.approx([1e-3, 0.0])


def test_state_survives_json_exactly():
    import json

    subject, other = controller(), controller()
    for step in range(1, 8):
        subject.update(step, counts([[777]], 1003), 1000)
    other.load_state(json.loads(json.dumps(subject.state())))
    assert torch.equal(subject.lambdas, other.lambdas)
    assert torch.equal(subject.kept, other.kept)
