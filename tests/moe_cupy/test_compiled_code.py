"""Compiled code that is kept on disk: damaged, stale or nowhere to be kept, it never changes what a run does."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numba
import pytest

from moe_cupy import numba_cache
from moe_cupy.kernels.cuda.emulation import build
from moe_cupy.kernels.host.simd import compiler, isa
from moe_cupy.kernels.host.simd.rows import row_kernel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("damage", [lambda code: b"", lambda code: code[:999], lambda code: code[:-1] + b"\0\1"])
def test_a_damaged_row_kernel_is_compiled_again(folder, damage):
    one = isa.chosen()
    text = row_kernel("Q8_0", one, 1)
    assert compiler.load(text, one)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert ctypes.CFUNCTYPE(None)(compiler.load(text, one))
    assert file.read_bytes() == whole


def test_what_numba_keeps_is_removed_where_it_is_cut_short_or_older_than_a_source(tmp_path, monkeypatch):
    kept, sources = tmp_path / "kept", tmp_path / "sources"
    for path in (kept, sources):
        path.mkdir()
    (sources / "a.py").write_text("")
    monkeypatch.setattr(numba_cache, "kept_in", lambda folder: kept)
    for name, content in (("a.nbi", b"x."), ("old.nbi", b"x."), ("cut.nbi", b"x"), ("a.nbc", b"x."), ("no.nbc", b"")):
        (kept / name).write_bytes(content)
    os.utime(kept / "old.nbi", (1, 1))
    assert numba_cache.tidy(sources) == [kept / "a.nbi"]
    assert sorted(path.name for path in kept.iterdir()) == ["a.nbc", "a.nbi"]


def test_a_run_that_compiles_says_so_and_another_says_nothing():
    told, silent = io.StringIO(), io.StringIO()
    with numba_cache.compilation_told(told):
        numba.njit("i8(i8)")(lambda x: x + 1)
        until = time.monotonic() + 300
        while not told.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    with numba_cache.compilation_told(silent):
        time.sleep(0.5)
    first, last = told.getvalue().splitlines()
    assert first == "compiling host kernels (first run only, about a minute)"
    assert last.startswith("compiled the host kernels in ") and last.endswith("(1 function); they are kept on disk")
    assert silent.getvalue() == ""


NOWHERE = """
from pathlib import Path
from numba.core import caching
for value in vars(caching).values():
    if hasattr(value, "_locator_classes"):
        value._locator_classes = [c for c in value._locator_classes if "UserProvided" in c.__name__]
from moe_cupy import numba_cache
print(numba_cache.kept_in(Path(numba_cache.__file__).parent / "kernels" / "host"))
"""


RELEASED = """
import sys
from pathlib import Path

from moe_cupy.compiled import echo
from moe_cupy.device import open_device
from moe_cupy.device.host import HostDevice
from moe_cupy.kernels.host import compiled

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

before = anonymous()
print(compiled.forget_sources(), before - anonymous())
print(compiled.forget_sources())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_numba_holds_beside_machine_code_is_given_back_once():
    for _ in range(2):  # the first process may be the one that compiles
        text = subprocess.run([sys.executable, "-c", RELEASED], capture_output=True, text=True, check=True).stdout
    released, kilobytes, again = map(int, text.split())
    assert released > 20 and again == 0
    assert kilobytes > 10_000


def test_without_a_folder_that_can_be_written_kernels_are_kept_for_the_process():
    env = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", NOWHERE], capture_output=True, text=True, env=env, timeout=600)
    assert "moe_cupy-" in done.stdout, done.stderr
    assert not Path(done.stdout.strip()).exists()


def test_a_cache_folder_of_the_emulated_kernels_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_CUPY_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match=f"{tmp_path}/file.*MOE_CUPY_CACHE"):
        build.build()


def test_an_interrupt_ends_the_compilers_and_leaves_no_half_written_object(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_CUPY_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: "sleep")
    popen, compilers = subprocess.Popen, []

    def endless(command, **how):
        compilers.append(popen(["sh", "-c", "sleep 600; true"], **how))
        return compilers[-1]

    monkeypatch.setattr(subprocess, "Popen", endless)
    waiting, result = threading.Event(), Future.result
    monkeypatch.setattr(Future, "result", lambda self, timeout=None: (waiting.set(), result(self, timeout))[1])

    def interrupt() -> None:
        while not (waiting.is_set() and build._RUNNING):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # where it is ignored, as in a shell's background
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            build.build(stems=("argmax", "attention_combine"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert compilers and all(each.returncode == -signal.SIGKILL for each in compilers)
    assert not list(build.cache_folder().iterdir())


def test_processes_that_compile_the_same_do_not_share_the_source(tmp_path, monkeypatch):
    """One that writes the text again would empty it under the compiler of the other."""
    monkeypatch.setenv("MOE_CUPY_CACHE", str(tmp_path))
    build.cache_folder().mkdir(parents=True)
    sources = []
    monkeypatch.setattr(build, "compiler", lambda: "g++")
    monkeypatch.setattr(build, "_run", lambda command, target: sources.append(command[-1]))
    for _ in range(2):
        build._object("argmax", "text", [], build.FAST)
    assert len(set(sources)) == 2 and not list(build.cache_folder().iterdir())


FULL_DISK = """
import resource
import sys

from moe_cupy import numba_cache
from numba import njit
from moe_cupy.kernels.host.simd import compiler, isa
from moe_cupy.kernels.host.simd.rows import row_kernel

if "full" in sys.argv:  # the kernel refuses to let a file grow, as a full disk and a quota do
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))

def double(n):
    return 2 * n

if "full" in sys.argv:
    double.__module__ = "moe_cupy.kernels.made_up"
double = njit("i8(i8)", cache=True)(double)
one = isa.chosen()
assert compiler.load(row_kernel("Q8_0", one, 1), one)
print(double(4))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX's")
def test_a_full_disk_under_the_cache_costs_the_cache_and_one_line(tmp_path):
    script, kept = tmp_path / "script.py", tmp_path / "kept"
    script.write_text(FULL_DISK)
    kept.mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(kept)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *words], env=env, capture_output=True, text=True, timeout=120)

    full = run("full")
    assert (full.returncode, full.stdout) == (0, "8\n"), full.stderr
    assert full.stderr.count("compiled kernels cannot be kept on disk (File too large)") == 1
    assert not [path for path in kept.rglob("*") if path.is_file()], "nothing half written stays"
    for _ in range(2):
        assert (run().stdout, run().stderr) == ("8\n", ""), "once there is room"
    assert len([path for path in kept.rglob("*") if path.suffix in (".nbi", ".nbc", ".o")]) == 3


def test_without_any_folder_kernels_are_compiled_and_not_kept():
    code = NOWHERE.replace("print(", "def none(**_): raise OSError(28, 'No space left on device')\n"
                           "numba_cache.tempfile.TemporaryDirectory = none\nprint(")  # fmt: skip
    code += "\nimport numba\nprint(numba.njit('i8(i8)', cache=True)(lambda n: n + 1)(1))"
    env = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.split() == ["None", "2"], done.stderr
    assert done.stderr.count("cannot be kept on disk (No space left on device)") == 1


def test_code_older_than_a_source_goes_and_so_does_what_was_begun_long_ago(tmp_path, monkeypatch):
    """A process that ended between a new index and its code would leave the index with the code of before."""
    kept, sources = tmp_path / "kept", tmp_path / "sources"
    for path in (kept, sources):
        path.mkdir()
    monkeypatch.setattr(numba_cache, "kept_in", lambda folder: kept)
    for name in ("a.nbi", "a.1.nbc", "b.nbi", "b.1.nbc", "a.nbi.tmp.1", "a.nbi.tmp.2"):
        (kept / name).write_bytes(b"x.")
    os.utime(kept / "a.1.nbc", (1, 1))
    os.utime(kept / "a.nbi.tmp.1", (1, 1))
    (sources / "a.py").write_text("")
    os.utime(sources / "a.py", (2, 2))
    numba_cache.tidy(sources)
    assert sorted(path.name for path in kept.iterdir()) == ["a.nbi", "a.nbi.tmp.2", "b.1.nbc", "b.nbi"]
