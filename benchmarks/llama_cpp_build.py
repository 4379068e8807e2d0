"""llama.cpp as llama-cpp-python on PyPI has it, built for this machine, outside the project's own dependencies."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zlib
from dataclasses import dataclass
from pathlib import Path

VERSION = "0.3.36"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moe-offload"
HERE = Path(__file__).resolve().parent
CMAKE = ("-GNinja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
         "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_TOOLS=OFF",
         "-DBUILD_SHARED_LIBS=ON")  # fmt: skip


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """Where llama.cpp's sources and libraries are."""

    source: Path  # with include/llama.h
    libraries: Path  # with libllama.so


def from_pypi(cache: Path = CACHE) -> LlamaCpp:
    """Download and build, once; takes some ten minutes on two cores and needs g++."""
    folder = cache / f"llama-cpp-python-{VERSION}"
    built = LlamaCpp(folder / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp", folder / "build" / "bin")
    if (built.libraries / "libllama.so").exists():
        return built
    folder.mkdir(parents=True, exist_ok=True)
    venv.create(folder / "venv", with_pip=True)
    tools = folder / "venv" / "bin"
    _run(tools / "pip", "install", "--quiet", "cmake", "ninja")
    _run(tools / "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python",
         "--dest", folder, f"llama-cpp-python=={VERSION}")  # fmt: skip
    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    _run(tools / "cmake", "-S", built.source, "-B", folder / "build", *CMAKE, env=os.environ | {"PATH": path})
    _run(tools / "cmake", "--build", folder / "build", "--target", "llama", env=os.environ | {"PATH": path})
    return built


def driver(llama: LlamaCpp, cache: Path = CACHE) -> Path:
    """``forced_decode``, built from forced_decode.cpp with these libraries; again whenever one of them is newer."""
    source, library = HERE / "forced_decode.cpp", llama.libraries / "libllama.so"
    program = cache / f"forced_decode-{zlib.crc32(str(llama.libraries.resolve()).encode()):08x}"
    if program.exists() and program.stat().st_mtime > max(source.stat().st_mtime, library.stat().st_mtime):
        return program
    cache.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{llama.source / folder / 'include'}" for folder in (".", "ggml")]
    _run("g++", "-O2", "-std=c++17", source, *includes, f"-L{llama.libraries}", "-lllama", "-lggml", "-lggml-base",
         f"-Wl,-rpath,{llama.libraries.resolve()}", "-o", program)  # fmt: skip
    return program


def _run(*command: object, env: dict[str, str] | None = None) -> None:
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run([str(word) for word in command], check=True, env=env, stdout=sys.stderr)
