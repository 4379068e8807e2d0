"""Ctrl-C ends either command line with exit code 130, without a traceback, and leaves nothing half done."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "data" / "moe-40m-Q4_K_M.gguf")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


def start(*words: str, **how: Any) -> subprocess.Popen[bytes]:
    """The command as in the foreground of a shell: whoever runs the tests may have interrupts ignored."""
    action = how.pop("action", signal.SIG_DFL)
    env = os.environ | {"PYTHONPATH": str(ROOT)} | how.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, **pipes,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, action))  # fmt: skip


def interrupt(process: subprocess.Popen[bytes]) -> bytes:
    """Interrupt it; what it said on stderr, which must be that alone. A hang fails after 20 s."""
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors and b"Exception" not in errors and b"\nerror" not in errors
    assert errors.endswith(b"\ninterrupted\n")
    return errors


def until(found: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "what the test waits for has not come"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("package", "module"), [("moe_ref", "numpy"), ("moe_cupy", "moe_cupy.cli"), ("moe_cupy", "moe_cupy.engine.engine")]
)
def test_while_modules_are_imported(package, module):
    command = {"moe_ref": "generate", "moe_cupy": "run"}[package]
    process = start("-X", "importtime", "-m", package, command, MODEL, "-p", "The", "-n", "-1")
    assert process.stderr is not None
    assert any(line.split()[-1] == module.encode() for line in process.stderr), "it was not imported"
    interrupt(process)


COMPILING = """
from moe_ref import interrupts
interrupts.watch()
import numba
print("begun", flush=True)
while True:
    numba.njit("f8(f8[:, ::1], i8)")(lambda a, n: sum([a[i, i % n] ** i for i in range(n)]) + a[1].sum() - a.max())
"""


def test_while_llvm_compiles():
    """Where a KeyboardInterrupt was lost in a callback; several moments of one function's compilation."""
    for wait in (0.0, 0.3):
        process = start("-c", COMPILING)
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        time.sleep(wait)
        interrupt(process)


KERNELS = """
from numba import njit
from moe_ref import interrupts
interrupts.watch()
from moe_cupy import numba_cache

@njit("i8(i8)", cache=True)
def first(n):
    return n + 1

@njit("i8(i8)", cache=True)
def second(n):
    return first(n) + 1

print(second(1))
"""


def test_a_cold_cache_is_left_usable(tmp_path):
    """Interrupted when the first function has been kept: what is there was written whole."""
    (tmp_path / "kernels.py").write_text(KERNELS)
    env = {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    process = start(str(tmp_path / "kernels.py"), env=env)
    until(lambda: any(tmp_path.rglob("*.nbi")))
    interrupt(process)
    done = start(str(tmp_path / "kernels.py"), env=env)
    assert done.communicate(timeout=120) == (b"3\n", b"") and done.returncode == 0


ENDINGS = {
    "at exit": "import atexit; atexit.register(lambda: (print('at', flush=True), time.sleep(30)))",
    "threads join": "threading.Thread(target=time.sleep, args=(30,)).start(); print('at', flush=True); "
                    "[t.join() for t in threading.enumerate()[1:] if t.name != 'interrupts']",
    "a destructor": "print('at', flush=True)\nclass D:\n def __del__(self): time.sleep(30)\nD()",
    "code that is not Python's": "import ctypes; print('at', flush=True); ctypes.CDLL(None).sleep(30)",
    "an except that catches all": "print('at', flush=True)\n"
                                  "while True:\n try: time.sleep(30)\n except BaseException: pass",
    "writing": "import os; r, w = os.pipe(); print('at', flush=True); os.write(w, bytes(1 << 24))",
}  # fmt: skip


@pytest.mark.parametrize("where", ENDINGS)
def test_wherever_python_is(where):
    main = f"def main():\n    exec({ENDINGS[where]!r}, globals())\n    return 0\n"
    process = start(
        "-c", f"import threading, time\nfrom moe_ref import interrupts\ninterrupts.watch()\n{main}interrupts.run(main)"
    )
    assert process.stdout is not None and process.stdout.readline() == b"at\n"
    interrupt(process)


def test_what_is_half_done_is_undone(tmp_path):
    code = """
from moe_ref import interrupts
interrupts.watch()
from moe_ref.command import whole_file
import time
with whole_file("{}") as out:
    out.write(bytes(1 << 20)); print("at", flush=True); time.sleep(30)
"""
    target = tmp_path / "out.bin"
    target.write_text("old")
    process = start("-c", code.format(target))
    assert process.stdout is not None and process.stdout.readline() == b"at\n"
    assert len(list(tmp_path.iterdir())) == 2
    interrupt(process)
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"] and target.read_text() == "old"


def children_of(pid: int) -> list[int]:
    return [
        int(p.parent.name)
        for p in Path("/proc").glob("[0-9]*/stat")
        if f") S {pid} " in _read(p) or f") R {pid} " in _read(p)
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_that_help_are_ended_too():
    routes = str(ROOT / "data" / "moe-40m-routes.npz")
    process = start("-m", "moe_cupy", "replay", "--routes", routes, "--policy", "all", "--jobs", "2")
    assert process.stderr is not None
    select.select([process.stderr], [], [], 60)  # the first result
    helpers = children_of(process.pid)
    assert len(helpers) == 2
    interrupt(process)
    until(lambda: not any(Path(f"/proc/{pid}").exists() and "(python" in _read(Path(f"/proc/{pid}/stat"))
                          and ") Z " not in _read(Path(f"/proc/{pid}/stat")) for pid in helpers), 10)  # fmt: skip


def test_an_interrupt_that_the_caller_ignores_is_ignored():
    """As under ``nohup``, or behind ``&`` in a script."""
    process = start("-m", "moe_ref", "generate", MODEL, "-p", "The", "-n", "6", action=signal.SIG_IGN)
    assert process.stdout is not None
    process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


UNDOING = """
from moe_ref import interrupts
import time
interrupts.watch()
interrupts.undo(lambda: (print("at", flush=True), time.sleep(60)))
print("on", flush=True)
while True:
    time.sleep(0.01)
"""


def test_a_second_interrupt_does_not_wait_for_what_is_being_undone():
    process = start("-c", UNDOING)
    assert process.stdout is not None and process.stdout.readline() == b"on\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"at\n"
    interrupt(process)


INSPECT, RUN = "-m moe_ref inspect MODEL", "-m moe_cupy run MODEL -p The -n 2 -t 2"
CLOSED = [
    *((INSPECT, closed) for closed in ("2>&-", ">&-", "<&-", "<&- >&- 2>&-")),
    (RUN, "2>&-"),
    (RUN, "<&- >&- 2>&-"),
]


@pytest.mark.parametrize(("command", "closed"), CLOSED)
def test_whatever_the_caller_has_closed_a_command_runs(command, closed):
    line = f"{sys.executable} {command.replace('MODEL', MODEL)} {closed}"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (done.stdout == "") == (">&-" in closed.split()), "what goes to stderr must not come on stdout"
    assert "auto chose" not in done.stdout and "Traceback" not in done.stderr
    assert not (">&-" in closed and "2>&-" in closed and done.stderr)
