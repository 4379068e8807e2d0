"""Compiles the kernels for the CPU: one object for each ``.cu`` file, kept by the hash of all that went into it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moe_cupy.kernels.cuda import sources
from moe_ref.interrupts import undoing

HERE = Path(__file__).parent
COMMON = tuple(
    "-std=c++20 -fPIC -pthread -fvisibility=hidden -fno-gnu-unique -fno-strict-aliasing -ffp-contract=off".split()
)
WARNINGS = ("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-strict-aliasing")

_RUNNING: set[subprocess.Popen[str]] = set()  # compilers


class BuildError(RuntimeError):
    """The kernels could not be compiled for the CPU; says what is missing or what the compiler said."""


@dataclass(frozen=True, slots=True)
class Flavour:
    """How to compile: a name, the flags, and whether the result is a program that reads cases (or a library)."""

    name: str
    flags: tuple[str, ...]
    is_program: bool = False


FAST = Flavour("fast", ("-O2",))
RACES = Flavour("races", ("-O1", "-g1", "-DEMULATION_THREADS", "-fsanitize=thread"), is_program=True)
BOUNDS = Flavour("bounds", ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"), is_program=True)


def cache_folder() -> Path:
    """Where compiled kernels are kept: MOE_CUPY_CACHE, or a folder of the user's cache."""
    base = os.environ.get("MOE_CUPY_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moe_cupy" / "emulation"


def compiler() -> str:
    """The C++ compiler; raises BuildError if there is none."""
    found = shutil.which(os.environ.get("CXX") or "g++")
    if found is None:
        raise BuildError(
            "the emulated device compiles its kernels with g++, and there is none on PATH; "
            "install it (Debian, Ubuntu: apt-get install g++) or name a C++20 compiler in CXX"
        )
    return found


def translation_unit(stem: str, folder: Path, formats: tuple[str, ...]) -> str:
    """C++ text that holds every kernel of one file: a namespace for each format, for names may repeat."""
    units = [unit for unit in sources.units(stem) if unit.format in ("", *formats)]
    lines = [f'#include "{HERE / "emulation.h"}"']
    headers = sources.headers(stem, [unit.format for unit in units], folder)
    lines += [f'{text}#include "{path}"' for path, text in headers]
    for unit in units:
        kernels = sources.kernels_of(unit, sources.text_of(stem, folder))
        lines += [f"#define {name} {value}" for name, value in unit.defines.items()]
        lines += [f"namespace unit_{stem}_{unit.format} {{", f'#include "{folder / stem}.cu"']
        lines += [f"REGISTER({kernel.name});" for kernel in kernels] + ["}"]
        lines += [f"#undef {name}" for name in unit.defines]
    return "\n".join(lines) + "\n"


def _digest(flavour: Flavour, parts: list[str]) -> str:
    headers = [path.read_text("utf-8") for path in sorted(HERE.glob("*.h"))]
    return hashlib.sha256("\0".join([compiler(), *COMMON, *flavour.flags, *headers, *parts]).encode()).hexdigest()[:20]


def _run(command: list[str], target: Path) -> None:
    """Run a compiler that writes ``target``, which appears whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, delete=False) as temporary:
        unlink = partial(Path(temporary.name).unlink, missing_ok=True)
    try:
        whole = [*command, "-o", temporary.name]
        process = subprocess.Popen(whole, stderr=subprocess.PIPE, text=True, start_new_session=True)
        _RUNNING.add(process)
        try:
            with undoing(unlink), undoing(partial(_kill, process)):
                errors = process.communicate()[1]
        finally:
            _RUNNING.discard(process)
            _kill(process)
        if process.returncode:
            raise BuildError(f"{target.name}: the C++ compiler failed:\n{errors[-4000:]}")
        os.chmod(temporary.name, 0o755)
        os.replace(temporary.name, target)
    except BaseException:
        unlink()  # a linker that fails removes it
        raise


def _kill(process: subprocess.Popen[str]) -> None:
    """End a compiler that has not ended, and what it started: g++ is several processes."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _object(name: str, text: str, inputs: list[str], flavour: Flavour) -> Path:
    target = cache_folder() / f"{name}-{flavour.name}-{_digest(flavour, [text, *inputs])}.o"
    if not target.exists():
        own = tempfile.TemporaryDirectory(dir=target.parent)  # another process may compile the same
        with own, undoing(own.cleanup):
            source = Path(own.name) / f"{name}.cpp"
            source.write_text(text, "utf-8")
            _run([compiler(), *COMMON, *WARNINGS, *flavour.flags, "-c", str(source)], target)
    return target


def _objects(flavour: Flavour, stems: tuple[str, ...], folder: Path, formats: tuple[str, ...]) -> list[Path]:
    main = HERE / ("main.cpp" if flavour.is_program else "library.cpp")
    jobs = [(s, translation_unit(s, folder, formats), _inputs(s, folder)) for s in stems]
    jobs.append((main.stem, f'#include "{main}"\n', [main.read_text("utf-8")]))
    pool = ThreadPoolExecutor(os.cpu_count())
    with pool, undoing(partial(pool.shutdown, wait=False, cancel_futures=True)):
        made = [pool.submit(_object, name, text, inputs, flavour) for name, text, inputs in jobs]
        try:
            return [each.result() for each in made]
        except BaseException:  # an interrupt does not wait for compilers
            while not all(each.cancel() or each.done() for each in made):
                for process in tuple(_RUNNING):
                    _kill(process)
                time.sleep(0.01)
            raise


def _inputs(stem: str, folder: Path) -> list[str]:
    """All that goes into a file's object besides its translation unit."""
    headers = (*sources.HEADERS, *sources.HEADERS_OF.get(stem, ()))
    return [*((folder / name).read_text("utf-8") for name in headers), sources.text_of(stem, folder)]


def _make_folder() -> None:
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_folder()).close()
    except OSError as error:
        raise BuildError(
            f"compiled kernels cannot be kept in {cache_folder()} ({error.strerror}); "
            "name a folder that can be written in MOE_CUPY_CACHE"
        ) from error


def build(
    flavour: Flavour = FAST,
    stems: tuple[str, ...] | None = None,
    folder: Path = sources.HERE,
    formats: tuple[str, ...] = sources.FORMATS,
) -> Path:
    """The library (or program) of all kernels, or those of the files ``stems``; compiled only if it is not there.

    ``folder`` may hold changed copies of the sources. Raises BuildError.
    """
    _make_folder()
    objects = _objects(flavour, sources.stems() if stems is None else stems, folder, formats)
    suffix, link = ("", []) if flavour.is_program else (".so", ["-shared"])
    target = cache_folder() / f"kernels-{flavour.name}-{_digest(flavour, [o.name for o in objects])}{suffix}"
    if not target.exists():
        _run([compiler(), *COMMON, *flavour.flags, *link, *map(str, objects)], target)
    return target
