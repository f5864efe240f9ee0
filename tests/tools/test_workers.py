"""The forks that stand in for Python (tools/workers.py) against Python itself."""

import os
import signal
import subprocess
import sys

import pytest

from tools.workers import environment, python

SAY = "import os, sys; print(sys.argv, os.getcwd(), os.environ['WORD'], __name__, sys.stdin.read()); "


def run(program, arguments, folder):
    done = subprocess.run(
        [program, *arguments], input="read\n", env=environment(WORD="x"), cwd=folder, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", SAY, "one", "-two"],
        ["-u", "-c", SAY + "sys.exit(3)"],
        ["-c", SAY + "sys.exit('no')"],
        ["-c", "print('lost?'); 1 / 0"],
        ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGABRT)"],
        ["-c", "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()"],
        ["-c", "import atexit; atexit.register(print, 'at last')"],
        ["-m", "json.tool", "absent.json"],
        ["-m", "told", "three"],
        ["told.py", "four"],
    ],
    ids=lambda arguments: arguments[-1][-30:],
)
def test_it_does_what_python_does(arguments, tmp_path):
    (tmp_path / "told.py").write_text(SAY)
    assert run(python(), arguments, tmp_path) == run(sys.executable, arguments, tmp_path)


def begin(code):
    """A process that has printed a line, and the number in it."""
    process = subprocess.Popen([python(), "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


# In short sleeps: a signal just before one would wait for its end.
WAIT = "import os, time; print(os.getpid(), flush=True); [time.sleep(0.1) for _ in range(600)]"


def test_signals_go_on_and_what_is_killed_is_gone():
    process, number = begin("import signal, sys; signal.signal(15, lambda *_: sys.exit(4)); " + WAIT)
    process.terminate()
    assert process.wait(60) == 4
    process, number = begin(WAIT)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    begin("print(0)")
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
    process, number = begin(WAIT)
    os.kill(number, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


def test_siblings_draw_different_numbers():
    code = "import os, random, numpy; print(random.random(), numpy.random.rand(), os.urandom(8).hex())"
    drawn = [run(python(), ["-c", code], ".")[1].split() for _ in range(2)]
    assert all(one != other for one, other in zip(*drawn, strict=True))


def test_siblings_have_temporary_folders_of_their_own():
    code = "import os; from wandb.sdk.data_types._private import MEDIA_TMP as t; print(os.path.isdir(t.name), t)"
    first, second = (run(python(), ["-c", code], ".")[1].split(maxsplit=1) for _ in range(2))
    assert first[0] == second[0] == "True" and first[1] != second[1]
