"""Processes that turn units into tokens, and those into shards.

Each reads a job a line from its input and answers a message a line, so that it shares nothing with its parent, is
started the same way from everywhere, and ends when the parent does.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from megahybrid.data.blocks import Block, write_block
from megahybrid.data.documents import Unit
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.data.units import Format, write_unit
from megahybrid.errors import MachineFault, UserError
from megahybrid.processes import answers_to_parent, start_python

Advance = Callable[[int], Any]
Job = Unit | Block


def write_all(jobs: Sequence[tuple[Job, Path]], made: Format, workers: int, advance: Advance) -> None:
    """Write every unit or block into its folder, by so many processes (one: this one). `advance(bytes)` hears of the
    progress.

    Raises UserError for what a source makes impossible, MachineFault where it cannot be read now, OSError for the
    disk's faults, RuntimeError if a worker dies.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        tokenizer = Tokenizer.load(made.tokenizer)
        for job, folder in jobs:
            _write(job, made, tokenizer, folder, advance)
        return
    waiting: queue.SimpleQueue[tuple[Job, Path]] = queue.SimpleQueue()
    for each in jobs:
        waiting.put(each)
    told: queue.SimpleQueue[int | Exception | None] = queue.SimpleQueue()
    processes = [_start(made) for _ in range(workers)]
    threads = [threading.Thread(target=_drive, args=(process, waiting, told), daemon=True) for process in processes]
    for thread in threads:
        thread.start()
    try:
        running = workers
        while running:
            message = told.get()
            if isinstance(message, Exception):
                raise message
            if message is None:
                running -= 1
            else:
                advance(message)
    finally:
        for process in processes:
            process.kill()  # idle, unless something went wrong
            process.wait()
        for thread in threads:
            thread.join()
        for pipe in (pipe for process in processes for pipe in (process.stdin, process.stdout) if pipe):
            with contextlib.suppress(OSError):  # what was not sent any more
                pipe.close()


def _write(job: Job, made: Format, tokenizer: Tokenizer, folder: Path, advance: Advance) -> None:
    if isinstance(job, Block):
        write_block(job, made, folder, advance)
    else:
        write_unit(job, made, tokenizer, folder, advance)


def _start(made: Format) -> subprocess.Popen[str]:
    return start_python("from megahybrid.data.workers import serve; serve()", json.dumps(asdict(made)), text=True)


def _drive(process: subprocess.Popen[str], waiting: queue.SimpleQueue, told: queue.SimpleQueue) -> None:
    """Give a process job after job; tell of progress, of an error, and None at the end."""
    assert process.stdin is not None and process.stdout is not None
    while True:
        try:
            job, folder = waiting.get_nowait()
        except queue.Empty:
            told.put(None)
            return
        try:
            process.stdin.write(json.dumps([type(job).__name__, job.to_json(), str(folder)]) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                message = json.loads(line)
                if "error" in message:
                    told.put(_exception(message))
                    return
                if "done" in message:
                    break
                told.put(message["advance"])
            else:
                raise BrokenPipeError
        except OSError:
            told.put(
                RuntimeError(
                    f"a process of prepare died (exit code {process.wait()}); if memory ran out, lower data.workers"
                )
            )
            return


def _exception(message: dict[str, Any]) -> Exception:
    for kind in (UserError, MachineFault):
        if message["error"] == kind.__name__:
            return kind(message["text"])
    if message.get("errno") is not None:
        return OSError(message["errno"], message["text"])
    return RuntimeError(f"a process of prepare failed: {message['error']}: {message['text']}")


def serve() -> None:
    """The life of a worker."""
    answers = answers_to_parent("w")
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        _serve(Format(**json.loads(sys.argv[1])), sys.stdin, answers)


def _serve(made: Format, requests: IO[str], answers: IO[str]) -> None:
    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    tokenizer = Tokenizer.load(made.tokenizer)
    for line in requests:
        kind, values, folder = json.loads(line)
        job = Block.from_json(values) if kind == "Block" else Unit.from_json(values)
        try:
            _write(job, made, tokenizer, Path(folder), lambda size: answer({"advance": size}))
        except Exception as error:
            number = error.errno if isinstance(error, OSError) else None
            text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            answer({"error": type(error).__name__, "text": text, "errno": number})
            return
        answer({"done": True})
