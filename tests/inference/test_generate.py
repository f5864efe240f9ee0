"""Texts: the same alone and in company, whatever the portions, up to a stop string, on any tensor parallel size."""

import dataclasses
import subprocess
import tempfile

import pytest
import torch

from megahybrid.cli import main
from megahybrid.config.schema import ParallelConfig
from megahybrid.inference import loading
from megahybrid.inference.batch import Batch, share
from megahybrid.inference.generate import Generator, Options
from megahybrid.inference.loading import load_generator
from megahybrid.inference.sampling import Sampling
from megahybrid.inference.text import StopFilter
from megahybrid.parallel import groups
from tests.inference.oracle import BUFFER, WINDOW, tokens, whole
from tests.model import tiny
from tests.training.conftest import prepared, recipe, reference, text  # noqa: F401
from tools.workers import environment, python

PROMPTS = ["def main(", "import", "class Queue:\n    def __init__(self", "x"]


def texts(generator: Generator, prompts: list[str], options: Options) -> list[str]:
    parts = [""] * len(prompts)
    for piece in generator.generate(prompts, options):
        parts[piece.prompt] += piece.text
    return parts


@pytest.fixture(autouse=True)
def process_group():
    """None before a test: what it calls joins one."""
    yield
    groups.shut_down()


@pytest.fixture
def generator(reference):  # noqa: F811
    return load_generator(reference)


def test_ops_without_kernels_are_named(reference, monkeypatch, caplog):  # noqa: F811
    asked = []
    monkeypatch.setattr(
        loading, "kernel_notes", lambda *args, **options: asked.append((args[2], options)) or ["a note"]
    )
    load_generator(reference)
    assert asked == [(torch.float32, {"training": False})] and caplog.messages == ["a note"]


def test_greedy_is_the_likeliest_token_of_a_whole_pass(generator):
    prompt, model = "def main(", generator.model
    ids = [generator.tokenizer.document_id, *generator.tokenizer.encode(prompt)]
    written = []
    for _ in range(60):
        token = int(whole(model, ids)[-1, : generator.tokenizer.vocab_size].argmax())
        if token == generator.tokenizer.document_id:
            break
        ids.append(token)
        written.append(token)
    (found,) = texts(generator, [prompt], Options(tokens=60, sampling=Sampling(temperature=0)))
    assert found == generator.tokenizer.decode(written)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1},
        pytest.param({"batch_size": 2}, marks=pytest.mark.slow),
        pytest.param({"prefill_chunk": 1}, marks=pytest.mark.slow),
        {"prefill_chunk": 5},
    ],
)
def test_a_text_does_not_depend_on_its_company(generator, changes):
    options = Options(tokens=40, sampling=Sampling(temperature=0.9, top_k=50, repetition_penalty=1.1, seed=3))
    together = texts(generator, PROMPTS, options)
    assert texts(generator, PROMPTS, dataclasses.replace(options, **changes)) == together
    assert [texts(generator, [prompt], options)[0] for prompt in PROMPTS] == together
    other = dataclasses.replace(options, sampling=dataclasses.replace(options.sampling, seed=4))
    assert texts(generator, PROMPTS, other) != together


def test_a_stop_string_ends_a_text_before_it(generator):
    options = Options(tokens=40, sampling=Sampling(seed=3))
    (free,) = texts(generator, PROMPTS[:1], options)
    stop = free[5:8]
    (stopped,) = texts(generator, PROMPTS[:1], dataclasses.replace(options, stop=(stop,)))
    assert stopped == free[: free.index(stop)]


def test_a_stop_string_over_pieces_is_found_and_part_of_one_is_not_lost():
    stop = StopFilter(["abcd"])
    assert [stop.push(piece) for piece in ("xa", "b", "c")] == [("x", False), ("", False), ("", False)]
    assert stop.push("xab") == ("abcx", False)
    assert stop.push("cdz") == ("", True)
    rest = StopFilter(["abcd"])
    assert rest.push("abc") == ("", False) and rest.finish() == "abc"


@pytest.mark.parametrize("pattern", ["G", "L", "S", "GLS"])
def test_memory_does_not_grow_with_the_context(pattern):
    groups.initialize(ParallelConfig())
    batch = Batch(tiny.model(pattern), prefill_chunk=64)
    batch.add([tokens(10)])
    batch.step()
    after_ten = batch.state_bytes
    for token in tokens(20 * (WINDOW + BUFFER), seed=1):
        batch.extend(0, token)
        batch.step()
    assert batch.state_bytes == after_ten > 0


def test_portions_are_even_and_take_at_least_one():
    assert share([1, 10, 100], 20) == [1, 9, 10]
    assert share([1, 2, 100], 50) == [1, 2, 47]
    assert share([5, 5, 5], 2) == [1, 1, 1]
    assert share([4], 2048) == [4]


def test_several_prompts_are_printed_in_order(reference, tmp_path, capsys):  # noqa: F811
    (tmp_path / "prompts").write_text("import os\n\nclass A\n")
    command = ["generate", str(reference), "--prompt", "def f(", "--tokens", "5"]
    assert main([*command, "--prompts-file", str(tmp_path / "prompts")]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [index for index, line in enumerate(lines) if line.startswith("--- ")]
    assert [lines[index] for index in heads] == ["--- 1 of 3", "--- 2 of 3", "--- 3 of 3"]
    for index, prompt in zip(heads, ("def f(", "import os", "class A"), strict=True):
        assert lines[index + 1].startswith(prompt)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "There is no prompt"),
        (["--prompt", "x", "--tokens", "0"], "--tokens is 0"),
        (["--prompt", "x", "--stop", ""], "--stop is empty"),
        (["--prompts-file", "/nowhere"], "cannot be read"),
    ],
)
def test_wrong_flags_are_refused(reference, capsys, arguments, said):  # noqa: F811
    assert main(["generate", str(reference), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_exported_model_writes_what_its_checkpoint_does(reference, tmp_path, capsys, monkeypatch, dtype):  # noqa: F811
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert main(["export", str(reference), str(tmp_path / "exported"), "--no-verify", "--dtype", dtype]) == 0
    said = []
    for path in (reference, tmp_path / "exported"):
        capsys.readouterr()
        command = ["generate", str(path), "--prompt", "def main(", "--tokens", "20", "--dtype", dtype]
        assert main(command) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > len("def main(")
    assert not any((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("verb", [["generate", "--prompt", "x"], ["eval", "--task", "copy"], ["loss", __file__]])
@pytest.mark.parametrize(
    ("device", "trained", "flags", "expected"),
    [
        ("cpu", "bf16", [], torch.float32),
        ("cpu", "fp32", ["--dtype", "bf16"], torch.bfloat16),
        ("cuda", "bf16", [], torch.bfloat16),
        ("cuda", "fp32", [], torch.float32),
        ("cuda", "bf16", ["--dtype", "fp32"], torch.float32),
    ],
)
def test_weights_are_of_the_dtype_that_is_asked_for(
    reference,  # noqa: F811
    monkeypatch,
    verb,
    device,
    trained,
    flags,
    expected,
):
    class Loaded(Exception):
        """Far enough: there may be no GPU."""

    def notes(config, where, dtype, **_):
        raise Loaded(dtype)

    monkeypatch.setattr(loading, "kernel_notes", notes)
    real = loading.load_config
    monkeypatch.setattr(loading, "load_config", lambda path: real(path, [f"train.dtype={trained}"]))
    monkeypatch.setattr(groups, "device", lambda: torch.device(device))
    with pytest.raises(Loaded) as caught:
        main([verb[0], str(reference), *verb[1:], *flags])
    assert caught.value.args == (expected,)


def test_what_holds_no_model_is_refused(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "or an exported model." in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "llama" in capsys.readouterr().err


def test_tensor_parallel_processes_write_the_same_text(reference):  # noqa: F811
    arguments = ["-m", "megahybrid", "generate", str(reference), "--prompt", "def main(", "--tokens", "30"]
    arguments += ["--temperature", "0.7"]
    surroundings = environment(PYTHON_EXEC=python())  # what torchrun starts its processes with
    two = [python(), "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    two += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    said = []
    for command in ([python(), *arguments], [*two, *arguments]):
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout)
    assert said[0] == said[1] and said[0].startswith("def main(") and len(said[0]) > 20
