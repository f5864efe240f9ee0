"""The tool in two processes, and what it is put together from: layouts, intervals, a trace's parts."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import layouts  # noqa: E402
import resume_steps  # noqa: E402
import step_parts  # noqa: E402

sys.path.remove(str(ROOT / "tools"))


@pytest.mark.slow
def test_layouts_are_compared_with_one_process_and_a_checkpoint_goes_on_in_others(tmp_path):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, ROOT / "tools" / "bench_scaling", "recipes/quickstart.yaml", "--gpus", "2", "--out", out]
    command += ["--samples", "4", "--steps", "1", "--layout", "tensor=2,sequence=true", "train.seq_length=64"]
    command += ["train.micro_batch_size=1", "model.pattern=GL", "model.vocab_size=512"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    first, tensor, saved, two, one, last = (json.loads(line) for line in out.read_text().splitlines())
    assert (first["processes"], tensor["processes"], first["share"]) == (1, 2, 1)
    assert tensor["loss_difference"] < 2e-6 and len(tensor["losses"]) == 2
    assert tensor["share"] == pytest.approx(tensor["tokens_per_second"] / 2 / first["tokens_per_second"], rel=1e-3)
    for times in (tensor["time_by_part"], tensor["time_by_part_of_last_rank"]):
        assert times["step"] == pytest.approx(times["compute"] + times["exposed"] + times["idle"], abs=0.05)
        assert times["tensor"]["calls"] > 10 and times["tensor"]["sum"] > 0
    assert saved["layout"] == "tensor=2,sequence=true" and len(saved["losses"]) == 6
    for line in (two, one):
        assert line["checkpoint"] == "gone on after step 3" and line["loss_difference"] < 2e-6
    assert last["goes_on"] is True and last["failed"] == last["skipped"] == []


def test_a_hosts_layouts_begin_with_its_whole_size():
    for gpus in (2, 4, 8):
        found = layouts.fitting(gpus)
        worlds = [layouts.parse(layout)[2] for layout in found]
        assert worlds == sorted(worlds, reverse=True) and worlds[0] == gpus and worlds[-1] == 2
        assert len(found) == len(set(found))
    assert set(layouts.GOALS) == set(layouts.fitting(8)[:2])
    assert {"tensor=4,sequence=true", "pipeline=4", "pipeline=4,virtual_pipeline=2", "data=2,zero_stage=3"} <= set(
        layouts.fitting(4)
    )
    assert layouts.fitting(1) == [] and layouts.fitting(6) == layouts.fitting(4)


@pytest.mark.parametrize(
    ("layout", "micro", "samples", "expected"),
    [
        ("", 4, 256, 4),
        ("data=8", 4, 256, 4),
        ("data=8", 4, 16, 2),
        ("tensor=2,sequence=true,pipeline=2,data=2", 4, 256, 8),  # 16 micro-batches
        ("tensor=4,sequence=true,data=2", 4, 256, 16),
        ("context=2,data=2", 4, 256, 8),
        ("pipeline=4", 4, 64, 2),
        ("pipeline=4", 4, 8, 1),
    ],
)
def test_micro_batches_of_a_layout(layout, micro, samples, expected):
    assert layouts.micro_batch(layout, micro, samples) == expected


def test_bubbles_are_as_in_narayanan_et_al():
    assert layouts.bubble(2, 1, 16) == pytest.approx(1 / 17)
    assert layouts.bubble(4, 2, 8) == pytest.approx(1.5 / 9.5)
    assert layouts.bubble(1, 1, 8) == 0


def test_goals_are_met_missed_or_not_measured():
    line = {"layout": "data=8", "share": 0.94, "micro_batches": 8}
    first, second = layouts.goals([{"layout": "one process", "share": 1.0, "micro_batches": 64}, line])
    assert first["met"] is True and second["met"] == "not measured"
    assert layouts.goals([line | {"share": 0.92}])[0]["met"] is False


def test_saving_takes_the_largest_layout():
    assert resume_steps.layouts(8) == ("tensor=2,sequence=true,pipeline=2,data=2", ["data=2", ""])
    assert resume_steps.layouts(4)[0] == "tensor=2,sequence=true,pipeline=2"
    assert resume_steps.layouts(12) == resume_steps.layouts(8)
    assert resume_steps.layouts(1) == ("", [""])


def test_intervals_against_single_points():
    """Random intervals with whole ends, against the set of unit steps that they cover."""
    chance = random.Random(0)

    def some():
        starts = [chance.randrange(40) for _ in range(chance.randrange(8))]
        return [(start, start + chance.randrange(6)) for start in starts]

    def points(intervals):
        return {point for start, end in intervals for point in range(start, end)}

    for _ in range(500):
        first, second = some(), some()
        joined, others = step_parts.union(first), step_parts.union(second)
        assert points(joined) == points(first) and step_parts.total(joined) == len(points(first))
        assert all(before[1] < after[0] for before, after in itertools.pairwise(joined))
        left = step_parts.subtract(joined, others)
        assert points(left) == points(first) - points(second) and step_parts.total(left) == len(points(left))


def kernel(name, start, end, category="kernel", **args):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "args": args}


def reduction(start, end, group):
    return kernel("ncclDevKernel_AllReduce", start, end, **{"Process Group Description": group})


def test_a_gpus_trace_by_part():
    """A step from 1,000 to 11,000 µs: what overlaps computing is not exposed, what is outside the step not counted."""
    events = [
        {"ph": "M", "name": "process_name"},
        kernel(step_parts.STEP, 1000, 11000, "user_annotation"),
        kernel(step_parts.STEP, 1100, 10900, "gpu_user_annotation"),
        kernel("aten::mm", 1000, 11000, "cpu_op"),
        kernel("gemm", 500, 3000),
        kernel("gemm", 4000, 6000),
        kernel("Memcpy HtoD", 5000, 7000, "gpu_memcpy"),
        reduction(2000, 3500, "TENSOR_MODEL_PARALLEL_GROUP"),
        reduction(6500, 8000, "DATA_PARALLEL_GROUP"),
        reduction(7500, 7700, "DATA_PARALLEL_GROUP"),
        kernel("ncclDevKernel_SendRecv", 7000, 9000, **{"Process Group Description": "default_pg"}),
        reduction(9500, 9600, "MODEL_PARALLEL_GROUP"),
    ]
    times = step_parts.time_by_part(events, {"tensor": 2, "pipeline": 2, "data": 2})
    assert times == {
        "step": 10, "compute": 5, "exposed": 2.6, "idle": 2.4,
        "tensor": {"sum": 1.5, "exposed": 0.5, "calls": 1},
        "data": {"sum": 1.7, "exposed": 1, "calls": 2},
        "pipeline": {"sum": 2, "exposed": 2, "calls": 1},
        "all": {"sum": 0.1, "exposed": 0.1, "calls": 1},
    }  # fmt: skip


def test_kernels_without_a_group_belong_to_their_streams_or_to_the_only_one_there_is():
    events = [
        kernel(step_parts.STEP, 0, 1000, "user_annotation"),
        kernel("ncclDevKernel_AllGather", 0, 10, stream=20, **{"Process Group Description": '"DATA_PARALLEL_GROUP"'}),
        kernel("ncclDevKernel_ReduceScatter", 20, 30, stream=20),
        kernel("ncclDevKernel_ReduceScatter", 40, 50, stream=24),
    ]
    parts = [part for part, *_ in step_parts.classify(events, {"tensor": 2, "pipeline": 1, "data": 4})]
    assert parts == ["data", "data", "unknown"]
    parts = [part for part, *_ in step_parts.classify(events, {"tensor": 1, "pipeline": 1, "data": 8})]
    assert parts == ["data"] * 3
    exchanges = [kernel(step_parts.STEP, 0, 1000, "user_annotation"), kernel("ncclDevKernel_SendRecv", 0, 10, stream=7)]
    sizes = {"tensor": 1, "context": 4, "pipeline": 1, "data": 1}
    assert [part for part, *_ in step_parts.classify(exchanges, sizes)] == ["context"]
    assert [part for part, *_ in step_parts.classify(exchanges, sizes | {"pipeline": 2})] == ["pipeline"]
    assert step_parts.only_group({"tensor": 1, "pipeline": 1, "data": 1}) == "all"
    assert step_parts.named_group("gloo:send", {}) == "pipeline"
    exchange = "ncclDevKernel_SendRecv", {"Process Group Description": "CONTEXT_PARALLEL_GROUP"}
    assert step_parts.named_group(*exchange) == "context"
    assert step_parts.named_group("x", {"Process Group Description": "EMBEDDING_GROUP"}) == "pipeline"
    assert step_parts.named_group("gloo:all_reduce", {}) is None
