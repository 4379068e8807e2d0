"""Expert bytes arrive exactly, however the file is read, and a failure names the file, the range and the reason."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cupy.device.host import HostDevice
from moe_cupy.kernels.samples import random_matrix
from moe_cupy.store import MATRICES, ExpertStore, Layout, RangeFile, StoreError, expert_layout
from moe_cupy.store import experts as store_experts
from moe_cupy.store.layout import Tensor, make_layout
from moe_ref.gguf import GGUFFile, open_gguf
from moe_ref.tensors import View
from tests.gguf_writer import write_gguf

TRAINED = Path(__file__).resolve().parents[2] / "data" / "moe-40m-Q4_K_M.gguf"
SIZES = (1, 511, 4096, 4097, 20_000, 70_001)  # most are no multiple of a block
POISON = 0xA5
MODES = pytest.mark.parametrize("direct", [True, False])


def aligned(nbytes: int) -> np.ndarray:
    """Poisoned page-aligned memory, as the runtime takes it."""
    memory = HostDevice(1).alloc(nbytes)
    memory[:] = POISON
    return memory


def content(size: int) -> bytes:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()


def read(file: RangeFile, offset: int, nbytes: int) -> bytes:
    """A range read into memory of just the room asked for, with a guard behind it."""
    room = file.room(nbytes)
    memory = aligned(room + 4096)
    start = file.read_into(memory[:room], offset, nbytes)
    assert (memory[room:] == POISON).all(), f"{offset}+{nbytes}: written past the room of {room} bytes"
    return memory[start : start + nbytes].tobytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("ranges")
    for size in SIZES:
        (folder / str(size)).write_bytes(content(size))
    return {size: folder / str(size) for size in SIZES}


@pytest.fixture
def path(files) -> Path:
    return files[70_001]


RANGES = st.sampled_from(SIZES).flatmap(
    lambda size: st.tuples(st.just(size), st.integers(0, size), st.integers(0, size), st.booleans())
)


@MODES
@given(wanted=st.lists(RANGES, min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_any_range_equals_a_plain_read(files, direct, wanted):
    for size, a, b, to_the_end in wanted:
        first, last = min(a, b), size if to_the_end else max(a, b)
        file = RangeFile(files[size], direct)
        try:
            got = read(file, first, last - first)
        finally:
            file.close()
        assert got == content(size)[first:last], f"{size} bytes, range {first}..{last}, {file.how}"


def test_how_says_what_was_got(path):
    descriptors = len(os.listdir("/proc/self/fd"))
    buffered, direct = RangeFile(path, direct=False), RangeFile(path, direct=True)
    assert len(os.listdir("/proc/self/fd")) == descriptors + 2, "one each"
    assert (buffered.how, buffered.alignment) == ("buffered reads", 1)
    is_direct = f"O_DIRECT, aligned to {direct.alignment} bytes"
    assert direct.how == is_direct if direct.alignment > 1 else direct.how.startswith("buffered reads (")
    assert buffered.size == direct.size == 70_001
    for file in (buffered, direct, buffered, direct):  # closing is idempotent
        file.close()
        with pytest.raises(StoreError, match=f"{path}: reading"):
            read(file, 0, 10)


@pytest.mark.parametrize("how", ["direct", "buffered", "without preadv"])
def test_several_threads_read_at_once(path, how, monkeypatch):
    if how == "without preadv":
        monkeypatch.delattr(os, "preadv")
    file, want, wrong = RangeFile(path, how == "direct"), content(70_001), []

    def reader(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(50):
            a, b = sorted(rng.integers(0, 70_002, 2).tolist())
            if read(file, a, b - a) != want[a:b]:
                wrong.append((seed, a, b))

    threads = [threading.Thread(target=reader, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a reader hangs"
    file.close()
    assert not wrong


# ---------------------------------------------------------------------------------------------------------
# What goes wrong


@MODES
@pytest.mark.parametrize("keep", [40_000, 38_912, 4096, 1000, 0])
def test_a_truncated_file_is_told_with_its_path_its_end_and_the_range(tmp_path, direct, keep):
    path = tmp_path / "cut.bin"
    path.write_bytes(content(70_001))
    file = RangeFile(path, direct)
    os.truncate(path, keep)
    with pytest.raises(StoreError) as caught:
        read(file, 39_000, 3_000)
    message = rf"{path}: ends at byte (\d+), but bytes 39000\.\.42000 were expected; was it truncated or replaced"
    found = re.match(message, str(caught.value))
    assert found, caught.value
    assert int(found[1]) == keep, f"the file ends at byte {keep}, but: {caught.value}"
    file.close()


@MODES
def test_an_io_error_names_file_range_and_reason(path, direct, monkeypatch):
    file = RangeFile(path, direct)

    def broken(fd: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    start = 5000 // file.alignment * file.alignment
    with pytest.raises(StoreError, match=rf"{path}: reading \d+ bytes at {start} failed: Input/output error"):
        read(file, 5000, 100)
    file.close()


def short_reads(monkeypatch, most: int) -> list[int]:
    """Each read tells of at most ``most`` bytes; what lies behind them in the buffer is poison."""
    real, counts = os.preadv, [0]

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        got = min(real(fd, buffers, offset), most)
        np.frombuffer(buffers[0], np.uint8)[got:] = POISON
        counts[0] += 1
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    return counts


@pytest.mark.parametrize(
    ("direct", "most"),
    [(False, 1), (False, 7), (False, 1000), (True, 4096), (True, 8192), (True, 5000), (True, 6143)],
)
@pytest.mark.parametrize(("first", "last"), [(0, 900), (4000, 13_000), (69_000, 70_001)])
def test_short_reads_are_continued_where_they_ended(path, direct, most, first, last, monkeypatch):
    file = RangeFile(path, direct)
    counts = short_reads(monkeypatch, most)
    assert read(file, first, last - first) == content(70_001)[first:last], file.how
    assert counts[0] >= (last - first) // most
    file.close()


def test_a_direct_read_that_gets_nowhere_is_an_error_and_not_a_loop(path, monkeypatch):
    file = RangeFile(path, direct=True)
    if file.alignment == 1:
        pytest.skip(f"no O_DIRECT here: {file.how}")
    counts = short_reads(monkeypatch, 1)
    with pytest.raises(StoreError, match=str(path)):
        read(file, 1000, 3000)
    assert counts[0] < 10
    file.close()


def refuse_direct_open(monkeypatch) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **names: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **names)

    monkeypatch.setattr(os, "open", refusing)


def refuse_direct_reads(monkeypatch) -> None:
    real = os.preadv

    def refusing(fd: int, buffers: Any, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT to refuse")
@pytest.mark.parametrize(
    ("refuse", "reason"),
    [
        (refuse_direct_open, "buffered reads (the filesystem refuses O_DIRECT: Invalid argument)"),
        (refuse_direct_reads, "buffered reads (O_DIRECT reads fail on this filesystem)"),
        (lambda patch: patch.delattr(os, "O_DIRECT"), "buffered reads (this system has no O_DIRECT)"),
    ],
    ids=["open", "read", "system"],
)
def test_direct_refused_means_buffered_with_the_reason(path, refuse, reason, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    refuse(monkeypatch)
    file = RangeFile(path, direct=True)
    assert (file.how, file.alignment) == (reason, 1)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert read(file, 12_345, 6_789) == content(70_001)[12_345 : 12_345 + 6_789]
    file.close()
    assert len(os.listdir("/proc/self/fd")) == before


@MODES
def test_reads_work_without_preadv(path, direct, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    file = RangeFile(path, direct)
    for first, last in ((0, 1), (12_345, 54_321), (70_000, 70_001)):
        assert read(file, first, last - first) == content(70_001)[first:last], file.how
    with pytest.raises(StoreError, match="ends at byte 70001"):
        read(file, 70_000, 10)
    file.close()


@MODES
def test_a_missing_file_is_a_store_error_with_its_path(tmp_path, direct):
    with pytest.raises(StoreError, match=rf"{tmp_path}/absent\.gguf: cannot be opened: No such file"):
        RangeFile(tmp_path / "absent.gguf", direct)


# ---------------------------------------------------------------------------------------------------------
# Experts

# gate, up, down of each layer: (type, rows, cols); F16 rows of 7 make segments that no block divides
ODD = (
    (("F16", 3, 7), ("F16", 3, 7), ("F32", 7, 3)),
    (("Q4_0", 5, 32), ("Q8_0", 5, 32), ("F16", 32, 5)),
    (("F16", 3, 7), ("F16", 3, 7), ("F32", 7, 3)),
    (("F16", 3, 7), ("F32", 3, 7), ("F32", 7, 3)),
)
EXPERTS = 5


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    rng, tensors = np.random.default_rng(1), {"first": ("F16", (3,), bytes(6))}
    for layer, matrices in enumerate(ODD):
        for name, (kind, rows, cols) in zip(MATRICES, matrices, strict=True):
            raw = random_matrix(rng, kind, EXPERTS * rows, cols).data.tobytes()
            tensors[f"blk.{layer}.ffn_{name}_exps.weight"] = (kind, (EXPERTS, rows, cols), raw)
    path = write_gguf(tmp_path_factory.mktemp("odd") / "odd.gguf", {"general.architecture": "odd"}, tensors)
    with open_gguf(path) as gguf:
        end = max(t.offset + t.nbytes for t in gguf.tensors.values())
    os.truncate(path, end)  # without the writer's padding: the last expert ends with the file
    return path


def layout_of(gguf: GGUFFile, layers: int, experts: int) -> Layout:
    views = {name: View(info, info.shape) for name, info in gguf.tensors.items()}
    return expert_layout(gguf, views, layers, experts)


def check_every_expert(path: Path, layers: int, experts: int, direct: bool) -> None:
    """Each slot of each class holds, after a read, exactly what GGUFFile.read gives, and its neighbours nothing."""
    with open_gguf(path) as gguf:
        store = ExpertStore(layout_of(gguf, layers, experts), direct)
        for layer in range(layers):
            size = store.slot_bytes(store.layout.class_of_layer[layer])
            memory = aligned(3 * size)
            for expert in range(experts):
                key, slot = layer * experts + expert, memory[size : 2 * size]
                store.read(key, slot)
                views = store.views(key, slot)
                for name, view in zip(MATRICES, views.values(), strict=True):
                    tensor = gguf.tensors[f"blk.{layer}.ffn_{name}_exps.weight"]
                    nbytes = tensor.nbytes // experts
                    want = gguf.read(tensor.name, expert * nbytes, nbytes)
                    assert np.array_equal(view, want), f"layer {layer}, expert {expert}, {name}, {store.how}"
            assert (memory[:size] == POISON).all() and (memory[2 * size :] == POISON).all(), f"layer {layer} overflows"
        store.close()


@MODES
def test_views_of_every_expert_of_the_trained_model_are_its_bytes(direct):
    with open_gguf(TRAINED) as gguf:
        arch = gguf.metadata["general.architecture"]
        layers, experts = gguf.metadata[f"{arch}.block_count"], gguf.metadata[f"{arch}.expert_count"]
        types = [tuple(gguf.tensors[f"blk.{i}.ffn_{m}_exps.weight"].type for m in MATRICES) for i in range(layers)]
        layout = layout_of(gguf, layers, experts)
    assert len(set(types)) == len(layout.classes) == 2, "the model must mix formats, or the test says little"
    assert [types.index(t) for t in types] == [layout.class_of_layer.index(c) for c in layout.class_of_layer]
    check_every_expert(TRAINED, layers, experts, direct)


@MODES
def test_views_of_experts_of_odd_sizes_are_their_bytes(odd, direct):
    check_every_expert(odd, len(ODD), EXPERTS, direct)


@MODES
def test_regions_of_a_slot_do_not_overlap_and_fill_no_more_than_the_slot(odd, direct):
    with open_gguf(odd) as gguf:
        store = ExpertStore(layout_of(gguf, len(ODD), EXPERTS), direct)
    for layer in range(len(ODD)):
        slot = aligned(store.slot_bytes(store.layout.class_of_layer[layer]))
        for expert in range(EXPERTS):
            spans = [
                (view.ctypes.data - slot.ctypes.data, view.nbytes)
                for view in store.views(layer * EXPERTS + expert, slot).values()
            ]
            ends = [0, *(start + nbytes for start, nbytes in spans)]
            starts = [*(start for start, _ in spans), slot.nbytes]
            assert all(end <= start for end, start in zip(ends, starts, strict=True)), f"{layer}, {expert}: {spans}"
    store.close()


def test_size_classes_are_those_of_equal_types_and_shapes_in_order_of_appearance(odd):
    with open_gguf(odd) as gguf:
        layout = layout_of(gguf, len(ODD), EXPERTS)
    assert layout.class_of_layer == (0, 1, 0, 2)
    assert [[(t.type, t.rows, t.cols) for t in c] for c in layout.classes] == [list(ODD[i]) for i in (0, 1, 3)]
    # F16 3x7 twice and F32 7x3; Q4_0 5x32 (18 bytes a block), Q8_0 5x32 (34), F16 32x5; F16, F32 3x7, F32 7x3
    sizes = [42 + 42 + 84, 5 * 18 + 5 * 34 + 320, 42 + 84 + 84]
    assert [layout.slab_bytes(i) for i in range(3)] == sizes
    assert [layout.expert_bytes(i) for i in range(4)] == [sizes[i] for i in (0, 1, 0, 2)]
    assert layout.routed_bytes() == EXPERTS * (2 * sizes[0] + sizes[1] + sizes[2])


def test_a_failed_read_names_expert_layer_and_tensor(odd, monkeypatch):
    with open_gguf(odd) as gguf:
        store = ExpertStore(layout_of(gguf, len(ODD), EXPERTS), False)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 0)
    with pytest.raises(StoreError, match=rf"expert 3 of layer 2 \(blk\.2\.ffn_gate_exps\.weight\): {odd}: ends at"):
        store.read(2 * EXPERTS + 3, aligned(store.slot_bytes(0)))
    store.close()


# ---------------------------------------------------------------------------------------------------------
# Several reads for one expert


def test_a_large_segment_is_read_in_equal_pieces_that_fill_it_in_any_order(tmp_path, monkeypatch):
    """Gate, up and down of 70,000, 70,000 and 140,000 bytes in pieces of at most 16 KiB."""
    raw = content(3 * 280_000)
    path = tmp_path / "large"
    path.write_bytes(raw)
    monkeypatch.setattr(store_experts, "PIECE", 16 << 10)
    at = (("gate", 0, 70_000), ("up", 210_000, 70_000), ("down", 420_000, 140_000))
    tensors = tuple(Tensor(n, "F16", 1, size // 2, offset, size, size) for n, offset, size in at)
    store = ExpertStore(make_layout(3, (tensors,), (path,)))
    for key in range(3):
        slot = aligned(store.slot_bytes(0))
        parts = store.parts(key, slot)
        assert len(parts) >= 5 + 5 + 9
        for i in np.random.default_rng(key).permutation(len(parts)):
            parts[i]()
        for view, (_, offset, size) in zip(store.views(key, slot).values(), at, strict=True):
            assert view.tobytes() == raw[offset + key * size : offset + (key + 1) * size], key
    store.close()


@pytest.mark.parametrize("nbytes", [1, 4096, 1 << 20, (1 << 20) + 1, 2_654_208, 10 << 20])
def test_pieces_are_few_equal_and_whole_pages(nbytes):
    step = store_experts.piece_bytes(nbytes)
    assert step % 4096 == 0 and step <= store_experts.PIECE
    pieces = -(-nbytes // step)
    assert pieces == -(-nbytes // store_experts.PIECE)
    assert pieces * (step - 4096) < nbytes


def test_matrices_side_by_side_are_one_run_and_others_are_not():
    def tensor(offset: int, stride: int = 1000, file: int = 0) -> Tensor:
        return Tensor(f"t{offset}", "F16", 1, 50, offset, 100, stride, file)

    def lengths(*tensors: Tensor) -> list[int]:
        return [len(run.tensors) for run in store_experts.runs_of(tensors)]

    assert lengths(tensor(0), tensor(100), tensor(260)) == [3]  # 60 bytes of padding before the third
    assert lengths(tensor(0), tensor(100), tensor(264)) == [2, 1]
    assert lengths(tensor(0), tensor(5000), tensor(9000)) == [1, 1, 1]
    assert lengths(tensor(0), tensor(100, stride=2000), tensor(200)) == [1, 1, 1]
    assert lengths(tensor(0), tensor(100, file=1), tensor(200, file=1)) == [1, 2]
    assert lengths(tensor(100), tensor(0), tensor(100)) == [1, 2]
