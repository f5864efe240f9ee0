from unittest.mock import patch

import pytest
import torch
from torch import nn

from megahybrid.errors import UserError
from megahybrid.mixers.lte import LTEConfig, RetentionLossConfig
from megahybrid.mixers.lte.controller import LambdaController


def controller(**options):
    loss = RetentionLossConfig(update_interval=2, initial=1e-3, **options)  # moving average rate 2 / (1 + 2 / 2) = 1
    return LambdaController(LTEConfig(buffer_size=100, loss=loss), seq_length=1000, layers=[0], heads=1)


def counts(kept, positions, missing=None):
    kept = torch.tensor(kept).double()
    positions = torch.full((len(kept), 1), positions).double()
    return {"kept": kept, "positions": positions, "missing": torch.zeros_like(kept) if missing is None else missing}


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


def context_parallel(tokens=1000, buffer_size=100):
    loss = RetentionLossConfig(update_interval=2)
    config = LTEConfig(buffer_size=buffer_size, sink_size=4, loss=loss)
    return LambdaController(config, 4000, layers=[1, 3], heads=2, tokens=tokens)


def rooms(subject):
    mixers = [nn.Identity(), nn.Identity()]
    for layer, mixer in zip((1, 3), mixers, strict=True):
        mixer.keeps_tokens = False
        with patch("megahybrid.mixers.lte.controller.groups.head_parallel", lambda: (0, 1)):
            subject.attach(layer, mixer)
    return [int(mixer.room) for mixer in mixers]


def test_room_for_what_the_head_that_keeps_most_is_expected_to_retain():
    """Half as many more, four standard deviations and the sinks, up to a power of two; and no more than for a rank that
    retains all that a buffer holds."""
    subject = context_parallel()
    assert rooms(subject) == [0, 0]
    subject.update(1, counts([[1210, 100], [20, 100]], 10_000), 4000)  # of 1,000 121 and 10: 230.5 and 32.6
    assert rooms(subject) == [256, 64]
    subject.update(2, counts([[1400, 0], [0, 0]], 10_000), 4000)  # 140: 262.3; none: only sinks
    assert rooms(subject) == [0, 8]
    assert rooms(context_parallel(tokens=0)) == [0, 0]


def test_room_is_made_for_the_one_document_that_goes_on():
    """Of 8 samples a micro-batch on 2 ranks each has 4, but passes on what one retains; a checkpoint knows how long."""
    subject, other = (context_parallel(tokens=4 * 4096, buffer_size=512) for _ in range(2))
    for longest, expected in ((4096, 1024), (2048, 512)):  # 512: 867.5; 256: 453
        subject.update(1, counts([[5120, 0], [0, 5120]], 40_960), longest)
        assert rooms(subject) == [expected] * 2
    other.load_state(subject.state())
    assert rooms(other) == [512, 512]


def test_a_state_that_lacks_something_is_refused():
    subject = controller()
    with pytest.raises(UserError, match="lacks kept, margins; use one that this version of megahybrid has written"):
        subject.load_state({"lambdas": [[1.0]], "shares": [1.0], "longest": [8]})
    assert subject.lambdas.item() == 0


def test_what_was_not_enough_is_doubled_and_a_checkpoint_knows_it():
    import json

    subject, other = (context_parallel() for _ in range(2))
    missing = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    for step in (1, 2):
        subject.update(step, counts([[100, 0], [100, 0]], 10_000, missing), 4000)  # 10: 32.6, 40: 90.3
    assert rooms(subject) == [64, 128]
    subject.update(3, None, 4000)
    assert rooms(subject) == [64, 128]
    other.load_state(json.loads(json.dumps(subject.state())))
    assert rooms(other) == [64, 128]
    for step in range(4, 4 + 3467):
        subject.update(step, counts([[100, 0], [100, 0]], 10_000), 4000)
    assert rooms(subject) == [64, 64]  # 20: 52.9
