"""The GGUF reader agrees with gguf-py on good files, and refuses bad ones with GGUFError, naming the field, cheaply."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import shared_files
from gguf_checks import everything, plain, same_as_gguf_py
from gguf_writer import SAMPLE, SAMPLE_METADATA, SAMPLE_TENSORS, array_head, header, string, value_bytes, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ref import gguf_bytes as lower
from moe_ref.gguf import GGUFArray, GGUFError, open_gguf
from moe_ref.quants.types import BY_NAME


def written(tmp_path: Path, raw: bytes) -> Path:
    (tmp_path / "m.gguf").write_bytes(raw)
    return tmp_path / "m.gguf"


QUICK = ("archs/*.gguf", "quants/*.gguf", "split/*.gguf", "vocab/*-spm.gguf")
FILES = shared_files("data/trained/*.gguf", *(f"data/golden/{p}" for p in QUICK))
SLOW_FILES = shared_files("data/golden/vocab/*[!m].gguf", marks=pytest.mark.slow)  # gguf-py: seconds each


@pytest.mark.parametrize("path", FILES + SLOW_FILES)
def test_shared_files_read_as_gguf_py_reads_them(path: Path) -> None:
    same_as_gguf_py(path)


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type_reads_back(tmp_path: Path, version: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", SAMPLE_METADATA, SAMPLE_TENSORS, version, alignment=64)
    same_as_gguf_py(path)
    with open_gguf(str(path)) as gguf:
        assert everything(gguf) == {k: plain(v) for k, v in SAMPLE_METADATA.items()}
        assert (gguf.version, gguf.alignment, gguf.path) == (version, 64, path)
        assert {n: (t.type, t.shape, gguf.read(n).tobytes()) for n, t in gguf.tensors.items()} == SAMPLE_TENSORS
        assert (gguf.get("absent"), gguf.get("absent", 7), gguf.get("flag")) == (None, 7, True)


def test_arrays_are_sequences(tmp_path: Path) -> None:
    with open_gguf(written(tmp_path, SAMPLE)) as gguf:
        for key in ("tokens", "scores", "types", "flags"):
            array, expected = gguf.metadata[key], plain(SAMPLE_METADATA[key])
            assert isinstance(array, GGUFArray) and len(array) == len(expected) and list(array) == expected
            assert array[1] == expected[1] and array[-1] == expected[-1] and array[::-2] == expected[::-2]
            assert expected[2] in array and type(array[0]) is type(expected[0])
            with pytest.raises(IndexError):
                array[len(expected)]
        assert [gguf.metadata[k].element_type for k in ("tokens", "scores", "none")] == ["STRING", "FLOAT32", "FLOAT32"]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAME = TEXT.filter(lambda text: text not in ("", "general.alignment"))
SCALARS = [st.integers(-(2**31), 2**32 - 1), st.integers(2**32, 2**64 - 1), st.floats(width=32), st.booleans(), TEXT]
LISTS = [st.lists(s, max_size=5) for s in (st.integers(-(2**63), 2**63 - 1), *SCALARS[1:])]


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    out = {}
    for name in draw(st.lists(NAME, unique=True, max_size=4)):
        kind = draw(st.sampled_from(list(BY_NAME.values())))
        shape = (*draw(st.lists(st.integers(1, 3), max_size=3)), kind.block_elements * draw(st.integers(1, 2)))
        out[name] = (
            kind.name,
            shape,
            draw(st.randoms()).randbytes(int(np.prod(shape[:-1])) * kind.row_bytes(shape[-1])),
        )
    return out


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAME, st.one_of(*SCALARS, *LISTS)), tensor_sets(), st.sampled_from([8, 32, 4096]))
def test_random_valid_files_round_trip(tmp_path: Path, metadata: dict, tensors: dict, alignment: int) -> None:
    with open_gguf(write_gguf(tmp_path / "m.gguf", metadata, tensors, alignment=alignment)) as gguf:
        assert gguf.alignment == alignment
        got = {k: v for k, v in everything(gguf).items() if k != "general.alignment"}
        assert repr(got) == repr(metadata)
        assert {n: (t.type, t.shape, gguf.read(n).tobytes()) for n, t in gguf.tensors.items()} == tensors


def test_lazy_elements_are_checked_when_read(tmp_path: Path) -> None:
    raw = header(
        keys=2, body=string("tok") + value_bytes(["ok", b"\xff"]) + string("bits") + array_head(7, 2) + b"\1\2"
    )
    with open_gguf(written(tmp_path, raw)) as gguf:
        assert gguf.metadata["tok"][0] == "ok"
        with pytest.raises(GGUFError, match=r"tok\[1\]"):
            gguf.metadata["tok"].tolist()
        with pytest.raises(GGUFError, match=r"bits\[1\]: found the bool 2"):
            gguf.metadata["bits"][0]


@pytest.fixture(params=["preadv", "seek and read"])
def either_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "preadv":
        monkeypatch.setattr(lower, "_PREADV", None)


@pytest.mark.usefixtures("either_read")
def test_reads_outside_a_tensor_or_a_closed_file_name_it(tmp_path: Path) -> None:
    name = "token_embd.weight"
    with open_gguf(written(tmp_path, SAMPLE)) as gguf:
        assert gguf.read(name, 3, 5).tolist() == [3, 4, 5, 6, 7] and gguf.read(name, 128).size == 0
        assert gguf.read(name, 120).flags.writeable
        for start, nbytes in ((-1, None), (0, 129), (129, None), (120, 9), (0, -1), (2**70, 1)):
            with pytest.raises(GGUFError, match=f"tensor {name}: found a read of"):
                gguf.read(name, start, nbytes)
        with pytest.raises(GGUFError, match=r"tensor nope: found no such tensor"):
            gguf.read("nope")
    gguf.close()
    for late in (lambda: gguf.read(name), lambda: gguf.metadata["tokens"][0]):
        with pytest.raises(GGUFError, match=r"(tensor token_embd.weight|tokens): found the file closed"):
            late()


@pytest.mark.usefixtures("either_read")
def test_file_cut_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = written(tmp_path, SAMPLE)
    with open_gguf(path) as gguf:
        os.truncate(path, gguf.data_offset + 64)
        with pytest.raises(GGUFError, match=r"tensor token_embd.weight: found the file ending at byte"):
            gguf.read("token_embd.weight")
        os.truncate(path, 30)
        with pytest.raises(GGUFError, match="scores: found the file ending at byte"):
            gguf.metadata["scores"].tolist()


@pytest.mark.usefixtures("either_read")
def test_threads_read_their_own_bytes(tmp_path: Path) -> None:
    tensors = {f"t{i}": ("I8", (4096,), bytes([i]) * 4096) for i in range(8)}
    wrong: list[str] = []
    with open_gguf(write_gguf(tmp_path / "m.gguf", {}, tensors)) as gguf:

        def check(name: str) -> None:
            wrong.extend(name for _ in range(100) if gguf.read(name).tobytes() != tensors[name][2])

        threads = [threading.Thread(target=check, args=(name,)) for name in tensors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
