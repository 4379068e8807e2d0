"""What must hold of any GGUF file that opens, and how it compares with gguf-py's reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as gguf_py

from moe_ref.gguf import GGUFError, GGUFFile, open_gguf


def plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def everything(gguf: GGUFFile) -> dict[str, Any]:
    """Decode all metadata and read all tensors; what cannot be decoded must be GGUFError, and is left out."""
    out: dict[str, Any] = {}
    for key, value in gguf.metadata.items():
        try:
            out[key] = plain(value)
        except GGUFError as error:
            assert key in str(error) or repr(key[:100])[1:-1] in str(error), f"{key!r} not named by: {error}"
    end = gguf.data_offset
    for info in sorted(gguf.tensors.values(), key=lambda t: t.offset):
        assert info.offset >= end and info.offset % gguf.alignment == 0, info
        end = info.offset + info.nbytes
        assert len(gguf.read(info.name)) == info.nbytes
    assert not gguf.tensors or end <= gguf.path.stat().st_size
    return out


def same_as_gguf_py(path: Path) -> None:
    theirs = gguf_py.GGUFReader(path)
    with open_gguf(path) as ours:
        assert ours.alignment == theirs.alignment
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            info = ours.tensors[t.name]
            assert info.shape == tuple(reversed(t.shape.tolist())), t.name
            assert (info.type, info.offset, info.nbytes) == (t.tensor_type.name, t.data_offset, t.n_bytes), t.name
            assert ours.read(t.name).tobytes() == t.data.tobytes(), t.name
        decoded = everything(ours)
        fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields)
        for key in decoded:
            if decoded[key] != []:  # gguf-py gives None for an empty array
                assert repr(decoded[key]) == repr(fields[key].contents()), key
