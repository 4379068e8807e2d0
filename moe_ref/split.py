"""A model in several files, ``NAME-00001-of-0000N.gguf``: the first holds the metadata, each holds some tensors."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from moe_ref.gguf import GGUFFile, open_gguf
from moe_ref.gguf_bytes import GGUFError

MAX_PARTS = 10_000
NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class SplitGGUF(GGUFFile):
    """All parts as one file: the first's metadata, everybody's tensors (``offset`` counts in the part of each)."""

    is_whole = True

    def __init__(self, parts: list[GGUFFile]):
        first = parts[0]
        self.path, self.version, self.metadata = first.path, first.version, first.metadata
        self.alignment, self.data_offset, self._source = first.alignment, first.data_offset, first._source
        self._spans = first._spans
        self.parts = parts
        self._part_of = {name: part for part in parts for name in part.tensors}
        self.tensors = {name: info for part in parts for name, info in part.tensors.items()}

    def read(self, name: str, start: int = 0, nbytes: int | None = None) -> np.ndarray:
        """Raw bytes of a tensor, as ``GGUFFile.read``."""
        return self._part_of.get(name, self.parts[0]).read(name, start, nbytes)

    def close(self) -> None:
        for part in self.parts:
            part.close()


def part_paths(path: Path, count: int) -> list[Path]:
    """Where the parts of a model lie whose first part is ``path``; raises GGUFError if that is not its name."""
    match = NUMBERED.fullmatch(path.name)
    if not match or int(match[3]) != count or int(match[2]) != 1:
        first = f"{match[1]}-00001-of-{count:05}.gguf" if match else f"NAME-00001-of-{count:05}.gguf"
        raise GGUFError(f"{path}: split.count: one part of {count}; open the first, named {first}")
    return [path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]


def open_model(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file, and with the first part of a split one all others; raises GGUFError, and nothing else."""
    with ExitStack() as opened:
        first = opened.enter_context(open_gguf(path))
        count = first.get("split.count", 1)
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_PARTS:
            raise GGUFError(f"{path}: split.count: found {count!r}; accepted: 0 to {MAX_PARTS}")
        parts = [first]
        if count > 1:
            parts += [opened.enter_context(open_gguf(p)) for p in part_paths(first.path, count)[1:]]
            _check_parts(parts, count)
        opened.pop_all()
        return SplitGGUF(parts) if count > 1 else first


def _check_parts(parts: list[GGUFFile], count: int) -> None:
    for number, part in enumerate(parts):
        if (part.get("split.no"), part.get("split.count")) != (number, count):
            found = f"part {part.get('split.no')} of {part.get('split.count')}"
            raise GGUFError(f"{part.path}: split.no: found {found}; its name says {number} of {count}")
    names = [name for part in parts for name in part.tensors]
    wanted = parts[0].get("split.tensors.count", len(names))
    if len(set(names)) != len(names) or len(names) != wanted:
        raise GGUFError(
            f"{parts[0].path}: split.tensors.count: found {len(names)} tensors ({len(set(names))} names) in "
            f"{count} parts; accepted: {wanted}, each once; download all parts of one model"
        )
