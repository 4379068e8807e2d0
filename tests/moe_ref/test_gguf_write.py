"""The GGUF writer gives back what the reader read, byte for byte, whatever the types."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import shared_files
from gguf_checks import same_as_gguf_py
from gguf_writer import SAMPLE, gguf_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ref.gguf import GGUFFile, open_gguf
from moe_ref.gguf_write import header, padding, tensor_bytes, uint32


def rewritten(file: GGUFFile) -> bytes:
    """The file's metadata and tensors through our writer."""
    metadata = {key: file.value_bytes(key) for key in file.metadata}
    out = io.BytesIO(header(metadata, ((t.name, t.type, t.shape) for t in file.tensors.values()), file.alignment))
    out.seek(0, io.SEEK_END)
    for t in file.tensors.values():
        assert tensor_bytes(t.type, t.shape) == t.nbytes
        out.write(file.read(t.name).tobytes() + padding(t.nbytes, file.alignment))
    return out.getvalue()


def round_trip(path: Path) -> None:
    with open_gguf(path) as file:
        again = rewritten(file)
    whole = path.read_bytes()
    assert again == whole[: len(again)] and not any(whole[len(again) :])


NUMBERS = st.sampled_from([np.dtype(c) for c in "bBhHiIqQfd?"])
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


@st.composite
def values(draw):
    """One metadata value of any type: a number, a text, or an array of either, possibly empty."""
    if draw(st.booleans()):
        return draw(TEXT) if draw(st.booleans()) else draw(st.lists(TEXT, min_size=1, max_size=4))
    dtype, count = draw(NUMBERS), draw(st.integers(0, 5))
    raw = draw(st.binary(min_size=8 * 5, max_size=8 * 5))
    array = np.frombuffer(raw[: max(count, 1) * dtype.itemsize], "u1" if dtype == "?" else dtype)
    array = array % 2 == 1 if dtype == "?" else array
    return array[:count] if count else array[0] if draw(st.booleans()) else array[:0]


TENSOR = st.tuples(st.sampled_from(["F32", "Q4_0", "Q4_K", "I8"]), st.lists(st.integers(1, 3), max_size=3))


@given(
    metadata=st.dictionaries(TEXT.filter(lambda k: k and k != "general.alignment"), values(), max_size=6),
    tensors=st.dictionaries(TEXT.filter(bool), TENSOR, max_size=4),
    alignment=st.sampled_from([8, 32, 64, 256]),
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_metadata_and_tensors_come_back_to_the_byte(tmp_path, metadata, tensors, alignment):
    made = {}
    for i, (name, (kind, batch)) in enumerate(tensors.items()):
        shape = (*batch, 256)
        made[name] = (kind, shape, bytes(j % (251 - i) for j in range(tensor_bytes(kind, shape))))
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(metadata, made, alignment=alignment))
    round_trip(path)


def test_every_type_of_the_sample_comes_back_and_gguf_py_reads_it(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(SAMPLE)
    with open_gguf(path) as file:
        (tmp_path / "again.gguf").write_bytes(rewritten(file))
    same_as_gguf_py(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == SAMPLE


@pytest.mark.parametrize("path", shared_files("data/golden/archs/*.gguf"))
def test_files_of_llama_cpp_come_back_to_the_byte(path: Path):
    round_trip(path)


def test_a_new_number_reads_back(tmp_path):
    (tmp_path / "m.gguf").write_bytes(header({"a": uint32(2**32 - 1)}, [("w", "F16", (2, 4))], 32) + bytes(16))
    with open_gguf(tmp_path / "m.gguf") as file:
        assert file.metadata == {"a": 2**32 - 1}
        assert file.tensors["w"].shape == (2, 4) and file.data_offset % 32 == 0
    with pytest.raises(ValueError, match=r"Q4_K: a row of 100 elements is not a multiple"):
        header({}, [("w", "Q4_K", (2, 100))], 32)
