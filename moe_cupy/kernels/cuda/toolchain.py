"""NVRTC and ptxas without a GPU: kernel text to PTX and machine code, and what each kernel needs of a multiprocessor.

Both come from pip wheels (``nvidia-cuda-nvrtc``, ``nvidia-cuda-nvcc``; see scripts/cuda_gates.sh) or from an
installed toolkit; NVRTC is called through ctypes, so CuPy is not needed.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from moe_cupy.kernels.cuda import sources

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # Turing to Blackwell


class ToolchainError(RuntimeError):
    """NVRTC or ptxas is not here, or refused a kernel; says which and why."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas says of one kernel; bytes of spills are stores plus loads."""

    kernel: str
    registers: int
    spill_bytes: int
    stack_bytes: int


def _wheel_folders() -> Iterator[Path]:
    """Folders of CUDA wheels: given by MOE_CUPY_CUDA_WHEELS (a site-packages folder), or of this interpreter."""
    if os.environ.get("MOE_CUPY_CUDA_WHEELS"):
        yield Path(os.environ["MOE_CUPY_CUDA_WHEELS"]) / "nvidia"
    spec = find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield Path(place)


def _nvrtc_library() -> str:
    for folder in _wheel_folders():
        for path in sorted(folder.glob("*/lib/libnvrtc.so.*")):
            return str(path)
    return "libnvrtc.so"


def ptxas_path() -> str:
    """The assembler; raises ToolchainError if there is none."""
    for folder in _wheel_folders():
        for path in sorted(folder.glob("*/bin/ptxas")):
            return str(path)
    found = shutil.which("ptxas")
    if found is None:
        raise ToolchainError("ptxas is neither in a wheel nor on PATH; run scripts/cuda_gates.sh, which installs it")
    return found


class NVRTC:
    """The run-time compiler of CUDA C++."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_nvrtc_library())
        except OSError as error:
            raise ToolchainError(f"NVRTC is not installed ({error}); run scripts/cuda_gates.sh, which does") from None

    def version(self) -> tuple[int, int]:
        """(major, minor)."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def ptx(self, text: str, name: str, architecture: int) -> str:
        """PTX of a program; raises ToolchainError with the compiler's log."""
        program = ctypes.c_void_p()
        self._library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        try:
            options = (f"-arch=compute_{architecture}".encode(), b"--std=c++17")
            status = self._library.nvrtcCompileProgram(
                program, len(options), (ctypes.c_char_p * len(options))(*options)
            )
            if status:
                raise ToolchainError(f"{name} for compute_{architecture}: {self._text(program, 'ProgramLog')[:3000]}")
            return self._text(program, "PTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> str:
        size = ctypes.c_size_t()
        getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self._library, f"nvrtcGet{what}")(program, buffer)
        return buffer.value.decode()


def whole_program(stem: str, folder: Path = sources.HERE) -> str:
    """The text of all units of a file as one program, a namespace for each format."""
    formats = [unit.format for unit in sources.units(stem)]
    parts = [text + path.read_text("utf-8") for path, text in sources.headers(stem, formats, folder)]
    for unit in sources.units(stem):
        parts += [f"#define {name} {value}" for name, value in unit.defines.items()]
        parts += [f"namespace unit_{unit.format} {{", sources.text_of(stem, folder), "}"]
        parts += [f"#undef {name}" for name in unit.defines]
    return "\n".join(parts)


_PTXAS_LINES = re.compile(
    r"Function properties for (\w+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*?Used (\d+) registers"
)


def assemble(ptx: str, architecture: int) -> list[Resources]:
    """Make machine code of PTX and report the resources of every kernel; raises ToolchainError."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernels.ptx")
        source.write_text(ptx)
        command = [ptxas_path(), "-v", f"-arch=sm_{architecture}", str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not source.with_suffix(".cubin").stat().st_size:
            raise ToolchainError(f"ptxas for sm_{architecture}: {done.stderr[:3000]}")
    return [
        Resources(name, int(registers), int(stores) + int(loads), int(stack))
        for name, stack, stores, loads, registers in _PTXAS_LINES.findall(done.stderr)
    ]
