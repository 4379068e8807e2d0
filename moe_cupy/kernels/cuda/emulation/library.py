"""Launches the emulated kernels: in this process, or in a program that a sanitizer watches."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moe_cupy.kernels.cuda.emulation.build import build
from moe_cupy.kernels.cuda.launches import Launch, Pointers
from moe_cupy.kernels.cuda.sources import Kernel, kernels

MAX_BLOCK = 256  # threads; the kernels are compiled for no more
TROUBLE_BYTES = 300
_SCALARS: dict[str, Any] = {"int": ctypes.c_int, "long long": ctypes.c_longlong, "float": ctypes.c_float}


class LaunchError(RuntimeError):
    """A kernel was launched wrongly, or its threads wait for each other for ever."""


def check(launch: Launch, known: dict[str, Kernel]) -> None:
    """Raise LaunchError for a launch that a GPU would refuse or misread."""
    kernel = known.get(launch.kernel)
    if kernel is None:
        raise LaunchError(f"{launch.kernel}: no such kernel; there are {', '.join(sorted(known))}")
    if launch.block % 32 or not 0 < launch.block <= MAX_BLOCK:
        raise LaunchError(f"{launch.kernel}: {launch.block} threads; a block is a multiple of 32 up to {MAX_BLOCK}")
    if min(launch.grid) < 1:
        raise LaunchError(f"{launch.kernel}: grid {launch.grid}; all three must be at least 1")
    if len(launch.args) != len(kernel.parameters):
        raise LaunchError(f"{launch.kernel}: {len(launch.args)} arguments; it takes {len(kernel.parameters)}")
    for (name, kind), value in zip(kernel.parameters, launch.args, strict=True):
        _check_argument(f"{launch.kernel}: argument {name}", kind, value)


def _check_argument(where: str, kind: str, value: Any) -> None:
    is_array = isinstance(value, np.ndarray)
    if is_array and not value.flags.c_contiguous:
        raise LaunchError(f"{where} is not contiguous: shape {value.shape}, strides {value.strides}")
    if (value is None or is_array or isinstance(value, Pointers)) != (kind == "pointer"):
        raise LaunchError(f"{where} is a {type(value).__name__}; the kernel takes a {kind}")
    if kind == "int" and not -(2**31) <= value < 2**31:
        raise LaunchError(f"{where} = {value} does not fit in 32 bits")


def _addresses(pointers: Pointers) -> Any:
    return (ctypes.c_void_p * len(pointers.arrays))(*(array.ctypes.data for array in pointers.arrays))


def _value(kind: str, value: Any) -> Any:
    """The ctypes object that holds one argument."""
    if kind != "pointer":
        return _SCALARS[kind](value)
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_void_p(value.ctypes.data)


class Library:
    """The compiled kernels. ``seed`` 0 runs lanes in order; another in a random order that it determines.

    ``known`` are the kernels of a library that is not the package's.
    """

    def __init__(self, path: Path, seed: int = 0, known: dict[str, Kernel] | None = None) -> None:
        self.seed, self.known = seed, known or kernels()
        self._call = ctypes.CDLL(str(path)).emulation_launch
        self._call.argtypes = [
            ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p,
            ctypes.c_char_p, ctypes.c_size_t,
        ]  # fmt: skip

    def launch(self, launch: Launch) -> None:
        """Run a kernel to its end; raises LaunchError."""
        check(launch, self.known)
        parameters = self.known[launch.kernel].parameters
        tables = [_addresses(value) if isinstance(value, Pointers) else None for value in launch.args]
        values = [
            _value(kind, value) if table is None else ctypes.cast(table, ctypes.c_void_p)
            for (_, kind), value, table in zip(parameters, launch.args, tables, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        trouble = ctypes.create_string_buffer(TROUBLE_BYTES)
        grid = (ctypes.c_uint * 3)(*launch.grid)
        name = launch.kernel.encode()
        if self._call(name, grid, launch.block, launch.shared_bytes, self.seed, pointers, trouble, TROUBLE_BYTES):
            raise LaunchError(f"{launch.kernel}, grid {launch.grid} x {launch.block}: {trouble.value.decode()}")


@cache
def emulated(seed: int = 0) -> Library:
    """All kernels of the package; compiles them at the first use. Raises BuildError."""
    return Library(build(), seed)


def _number(n: int) -> bytes:
    return struct.pack("<q", n)


def _buffer(data: bytes) -> bytes:
    return _number(len(data)) + data


def _argument(kind: str, value: Any, index: dict[int, int]) -> bytes:
    if isinstance(value, Pointers):
        return b"".join(map(_number, (ord("p"), len(value.arrays), *(index[id(array)] for array in value.arrays))))
    if isinstance(value, np.ndarray):
        return _number(ord("b")) + _number(index[id(value)])
    return _number(ord("s")) + bytes(_value(kind, value)).ljust(8, b"\0")


def _encode(launch: Launch, seed: int, index: dict[int, int], known: dict[str, Kernel]) -> Iterator[bytes]:
    check(launch, known)
    yield _buffer(launch.kernel.encode())
    yield from map(_number, (*launch.grid, launch.block, launch.shared_bytes, seed, len(launch.args)))
    for (_, kind), value in zip(known[launch.kernel].parameters, launch.args, strict=True):
        yield _argument(kind, value, index)


def arrays_of(launch: Launch) -> Iterator[np.ndarray]:
    """All arrays among the arguments, those of tables of addresses included."""
    for value in launch.args:
        yield from value.arrays if isinstance(value, Pointers) else [value] if isinstance(value, np.ndarray) else []


def run_program(
    program: Path, launches: Sequence[Launch], seed: int = 0, timeout: float = 300,
    known: dict[str, Kernel] | None = None,
) -> str:  # fmt: skip
    """Run launches on copies of their arrays in a program of ``build``; the arrays then get what it wrote.

    Returns what the program said, empty if all went well; raises subprocess.TimeoutExpired.
    """
    arrays = list({id(array): array for launch in launches for array in arrays_of(launch)}.values())
    index = {id(array): i for i, array in enumerate(arrays)}
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "launches"), Path(folder, "buffers")
        with given.open("wb") as file:
            file.writelines([_number(len(arrays)), *(_buffer(array.tobytes()) for array in arrays)])
            file.write(_number(len(launches)))
            for launch in launches:
                file.writelines(_encode(launch, seed, index, known or kernels()))
        done = subprocess.run([program, given, result], capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            return f"exit status {done.returncode}\n{done.stderr}"
        with result.open("rb") as file:
            for array in arrays:
                array[...] = np.frombuffer(file.read(array.nbytes), array.dtype).reshape(array.shape)
    return ""
