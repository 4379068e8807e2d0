"""One kernel from a text, to try things out: compiled for the CPU, run, and watched by the sanitizers."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from moe_cupy.kernels.cuda import sources
from moe_cupy.kernels.cuda.emulation.build import BOUNDS, FAST, RACES, BuildError, Flavour, build, cache_folder
from moe_cupy.kernels.cuda.emulation.library import Library, run_program
from moe_cupy.kernels.cuda.launches import Launch

STEM = "sketch"


class Sketch:
    """A kernel ``KERNEL(name)(parameters) {…}``; it may use all that the package's headers have.

    Call it with grid (one number, or three), threads of a block, and the arguments: NumPy arrays, ints, floats, None.
    Raises BuildError for a text that holds no kernel or does not compile.
    """

    def __init__(self, text: str):
        found = sources.kernels_of(sources.Unit(STEM), text)
        if len(found) != 1:
            raise BuildError(f"a sketch is one KERNEL(name)(parameters) {{…}}; this text has {len(found)}")
        self.kernel = found[0]
        self._folder = _folder(text)
        self._fast = self._built(FAST)

    def __call__(self, grid: Any, block: int, *args: Any, shared_bytes: int = 0, seed: int = 0) -> None:
        """Run to the end; ``seed`` above 0 runs the lanes in a random order that it determines. Raises LaunchError."""
        Library(self._fast, seed, self._known()).launch(self._launch(grid, block, args, shared_bytes))

    def races(self, grid: Any, block: int, *args: Any, shared_bytes: int = 0) -> str:
        """What the thread sanitizer says; empty if nothing."""
        return self._watched(RACES, self._launch(grid, block, args, shared_bytes))

    def bounds(self, grid: Any, block: int, *args: Any, shared_bytes: int = 0) -> str:
        """What the address and undefined-behaviour sanitizers say; empty if nothing."""
        return self._watched(BOUNDS, self._launch(grid, block, args, shared_bytes))

    def _known(self) -> dict[str, sources.Kernel]:
        return {self.kernel.name: self.kernel}

    def _built(self, flavour: Flavour) -> Path:
        return build(flavour, (STEM,), self._folder)

    def _launch(self, grid: Any, block: int, args: tuple[Any, ...], shared_bytes: int) -> Launch:
        x, y, z = grid if isinstance(grid, tuple) else (grid, 1, 1)
        return Launch(self.kernel.name, (x, y, z), block, args, shared_bytes)

    def _watched(self, flavour: Flavour, launch: Launch) -> str:
        return run_program(self._built(flavour), [launch], known=self._known())


def _folder(text: str) -> Path:
    """Where the sketch lies beside the package's headers; one place for each text."""
    headers = sorted(sources.HERE.glob("*.cuh"))
    parts = [text, *(path.read_text("utf-8") for path in headers)]
    folder = cache_folder() / f"sketch-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in headers:
        if not (folder / path.name).exists():
            shutil.copy(path, folder)
    (folder / f"{STEM}.cu").write_text(text, "utf-8")
    return folder
