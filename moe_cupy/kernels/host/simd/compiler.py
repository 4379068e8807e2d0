"""From LLVM text to a function's address, with what was compiled kept on disk.

The key of the cache is the text itself with the CPU it is compiled for, so nothing stale can be found in it. A file
begins with the SHA-256 of the rest: what a crash or a full disk has cut short is compiled again, not jumped into.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
from llvmlite import binding

from moe_cupy.kernels.host.simd.isa import Portable, chosen
from moe_cupy.kernels.host.simd.rows import row_kernel
from moe_cupy.numba_cache import not_kept, remove_begun

DIGEST = 32  # bytes
_KEPT: list[Any] = []  # engines: their code lives as long as they do


def folders() -> list[Path]:
    """Where compiled code may be kept: beside the sources as Numba does, or in the user's cache."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    beside = Path(__file__).with_name("__pycache__")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_cupy"
    return [Path(given)] if given else [beside, home]


def _stored(name: str) -> bytes | None:
    for folder in folders():
        try:
            kept = (folder / name).read_bytes()
        except OSError:
            continue
        if hashlib.sha256(kept[DIGEST:]).digest() == kept[:DIGEST]:
            return kept[DIGEST:]
    return None


def _store(name: str, code: bytes) -> None:
    """Write whole or not at all, into the first folder that can be written; a warning where none can."""
    for folder in folders():
        try:
            _write(folder, name, hashlib.sha256(code).digest() + code)
            return
        except OSError as error:
            failure = error
    not_kept(failure)


def _write(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_begun(folder.glob("rows-*.begun"))
    with tempfile.NamedTemporaryFile(dir=folder, prefix="rows-", suffix=".begun", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, folder / name)
        except OSError:
            os.unlink(file.name)
            raise


@cache
def _machine(cpu: str, features: str) -> binding.TargetMachine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    binding.initialize_native_asmparser()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=3, jit=True)


def _compiled(text: str, isa: Portable) -> bytes:
    """Object code of LLVM text."""
    machine = _machine(isa.cpu, isa.features)
    module = binding.parse_assembly(text)
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return machine.emit_object(module)


def load(text: str, isa: Portable) -> int:
    """The address of the function ``rows`` of LLVM text."""
    words = (text, isa.name, isa.cpu, isa.features, llvmlite.__version__, binding.get_default_triple())
    name = f"rows-{isa.name}-{hashlib.sha256(repr(words).encode()).hexdigest()[:24]}.o"
    code = _stored(name)
    if code is None:
        code = _compiled(text, isa)
        _store(name, code)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine(isa.cpu, isa.features))
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _KEPT.append(engine)
    return engine.get_function_address("rows")


@cache
def rows_address(kind: str, columns: int, isa: Portable | None = None) -> int:
    """Address of the row kernel of a format for this many columns."""
    isa = isa or chosen()
    return load(row_kernel(kind, isa, columns), isa)
