"""The repacked store holds the model's experts, is refused where it is not of the model, and is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from moe_cupy.cli import main
from moe_cupy.device.host import HostDevice
from moe_cupy.engine import Engine
from moe_cupy.store import MATRICES, ExpertStore, StoreError, StoreMismatch, arrange, open_repacked
from moe_cupy.store.experts import PIECE
from moe_cupy.store.repacked import PREFIX
from moe_cupy.tools import repack as tool
from moe_ref.gguf import open_gguf
from tests.models import Shape, tiny_moe

ROOT = Path(__file__).resolve().parents[2]
TRAINED = ROOT / "data" / "moe-40m-Q4_K_M.gguf"
SHAPE = Shape(layers=3, experts=6, used=2, width=64, inner=32, expert_types=(("Q8_0", "Q4_0", "F16"), ("F32",) * 3))
MODES = pytest.mark.parametrize("direct", [True, False])


def write(model: Path, output: Path, low: str | None = None) -> Path:
    with open_gguf(model) as file:
        steps = list(tool.repack(file, str(output), low))
    assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
    return output


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("m") / "m.gguf", SHAPE, seed=1)


@pytest.fixture
def store(model, tmp_path) -> Path:
    return write(model, tmp_path / "m.store")


def opened(path: Path, model: Path):
    with open_gguf(model) as file:
        return open_repacked(path, file, tool.layout_of(file))


@MODES
@pytest.mark.parametrize("source", ["tiny", "trained"])
def test_every_expert_of_the_store_is_that_of_the_model(model, tmp_path, source, direct):
    model = model if source == "tiny" else TRAINED
    repacked, checksums = opened(write(model, tmp_path / "s"), model)
    reader = ExpertStore(repacked.full, direct, checksums[0])
    with open_gguf(model) as file:
        for key in range(repacked.full.expert_total()):
            layer, expert = divmod(key, repacked.full.expert_count)
            slot = HostDevice(1).alloc(reader.slot_bytes(repacked.full.class_of_layer[layer]))
            reader.read(key, slot)
            for name, view in reader.views(key, slot).items():
                tensor = file.tensors[f"blk.{layer}.ffn_{name}_exps.weight"]
                nbytes = tensor.nbytes // repacked.full.expert_count
                assert np.array_equal(view, file.read(tensor.name, expert * nbytes, nbytes)), (key, name)
                assert (view.ctypes.data - slot.ctypes.data) % 64 == 0
    reader.close()


def test_slabs_lie_at_multiples_of_4096_and_take_one_read_a_mebibyte(tmp_path, monkeypatch):
    repacked, checksums = opened(write(TRAINED, tmp_path / "s"), TRAINED)
    reader = ExpertStore(repacked.full, True, checksums[0])
    assert all(t[0].offset % 4096 == t[0].stride % 4096 == 0 for t in repacked.full.layers)
    slot, real, seen = HostDevice(1).alloc(reader.slot_bytes(0)), os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: seen.append((len(b[0]), at)) or real(fd, b, at))
    reader.read(0, slot)
    nbytes = sum(t.nbytes for t in repacked.full.layers[0])
    assert len(seen) == -(-nbytes // PIECE) == 1
    assert nbytes <= sum(n for n, _ in seen) <= repacked.full.layers[0][0].stride
    assert reader.slot_bytes(0) == repacked.full.layers[0][0].stride, "a slot has room for alignment it does not need"
    reader.close()


def test_smaller_copies_are_what_gguf_makes_of_the_dequantized_experts(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = write(TRAINED, tmp_path / "s", "Q4_0")
    repacked, checksums = opened(path, TRAINED)
    assert {t.type for tensors in repacked.low.layers for t in tensors} <= {"Q4_0", "Q4_K"}
    assert any(t.type == "Q4_0" for tensors in repacked.low.layers for t in tensors)
    reader = ExpertStore(repacked.low, True, checksums[1])
    with open_gguf(TRAINED) as file:
        for key in (0, 37, 191):
            layer, expert = divmod(key, 32)
            slot = HostDevice(1).alloc(reader.slot_bytes(repacked.low.class_of_layer[layer]))
            reader.read(key, slot)
            for name, new in zip(MATRICES, repacked.low.layers[layer], strict=True):
                tensor = file.tensors[new.name]
                raw = file.read(new.name).reshape(32, new.rows, -1)[expert]
                if new.type != tensor.type:
                    kinds = gguf.GGMLQuantizationType
                    raw = gguf.quants.quantize(gguf.quants.dequantize(raw, kinds[tensor.type]), kinds[new.type])
                assert np.array_equal(reader.views(key, slot)[name], raw.ravel()), (key, name)
    reader.close()


@pytest.mark.parametrize("cache", ["100%", "50%", "slots:4"])
@MODES
def test_the_engine_computes_the_same_from_a_store(model, store, cache, direct):
    tokens = np.arange(20)
    with Engine(model, cache=cache) as engine:
        want = engine.logits(tokens)
    with Engine(model, cache=cache, store=str(store), direct_io=direct, prefetch="next-gate") as engine:
        assert np.array_equal(engine.logits(tokens), want)
        assert engine.placement.how_read.startswith("repacked, ")


# ---------------------------------------------------------------------------------------------------------
# What is not a store of this model


def damage(path: Path, at: int, raw: bytes) -> Path:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(raw)
    return path


def with_header(path: Path, description: object, entries: int = 18) -> Path:
    """A header whose checksum is right and whose description is ``description``."""
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    body = text + bytes(4 * entries)
    prefix = PREFIX.pack(b"MOESLABS", 1, zlib.crc32(body), len(text), entries, 0)
    path.write_bytes((prefix + body).ljust(1 << 20, b"\0"))
    return path


HOSTILE = {
    "empty": (lambda p: p.write_bytes(b""), "is no repacked store"),
    "a GGUF": (lambda p: shutil.copy(TRAINED, p), "is no repacked store"),
    "version 2": (lambda p: damage(p, 8, b"\2"), "is a store of version 2, this program reads 1"),
    "header flipped": (lambda p: damage(p, 60, b"\xff"), "its header is damaged"),
    "checksums flipped": (lambda p: damage(p, header_end(p) - 3, b"\xff"), "its header is damaged"),
    "huge description": (lambda p: damage(p, 16, b"\xff" * 8), "its header claims 18446744073709551615"),
    "huge table": (lambda p: damage(p, 24, b"\xff" * 8), "its header claims"),
    "truncated": (lambda p: os.truncate(p, os.path.getsize(p) - 1), "was it truncated"),
    "grown": (lambda p: os.truncate(p, os.path.getsize(p) + 4096), "was it truncated"),
    "only a header": (lambda p: os.truncate(p, header_end(p)), "was it truncated"),
    "no JSON": (lambda p: with_header(p, b"\xff{"), "its description is no JSON"),
    "deep JSON": (lambda p: with_header(p, b"[" * 200_000), "its description is no JSON"),
    "a list": (lambda p: with_header(p, [1]), "its description is a list"),
    "no keys": (lambda p: with_header(p, {}), "'source' differs"),
    "unknown low": (lambda p: with_header(p, {"low": "Q9_Z"}), "its smaller copies are of type 'Q9_Z'"),
    "low no text": (lambda p: with_header(p, {"low": [3]}), r"its smaller copies are of type '\[3\]'"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "cannot be read as a repacked store: Is a directory"),
    "missing": (lambda p: p.unlink(), "cannot be read as a repacked store: No such file"),
}


def header_end(path: Path) -> int:
    _, _, _, text, entries, _ = PREFIX.unpack(path.read_bytes()[: PREFIX.size])
    return PREFIX.size + text + 4 * entries


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_store_of_this_model_is_one_clear_error(model, store, case, capsys):
    spoil, message = HOSTILE[case]
    spoil(store)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StoreMismatch, match=f"^{re.escape(str(store))}: .*{message}"):
        Engine(model, store=str(store))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert main(["run", str(model), "-p", "x", "-n", "1", "--store", str(store)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and str(store) in error[0]


def test_a_store_of_another_model_of_the_same_shape_is_refused(store, tmp_path):
    other = tiny_moe(tmp_path / "other.gguf", SHAPE, seed=2)
    with pytest.raises(StoreMismatch, match=rf"was not made from {other}: 'source' differs; make it again"):
        opened(store, other)


def test_a_copy_of_the_model_under_another_name_takes_the_store(store, model, tmp_path):
    opened(store, shutil.copy(model, tmp_path / "renamed.gguf"))


@pytest.mark.parametrize("which", ["first", "middle", "last"])
def test_a_flipped_byte_is_found_when_its_expert_is_read_and_by_verify(model, store, which, capsys):
    repacked, checksums = opened(store, model)
    layers, count = repacked.full.layers, repacked.full.expert_count
    gate, down = layers[1][0], layers[1][2]
    at = {"first": gate.offset, "middle": gate.offset + 77, "last": down.offset + down.nbytes - 1}[which]
    at += 3 * gate.stride  # expert 3 of layer 1
    damage(store, at, bytes([store.read_bytes()[at] ^ 1]))
    message = r"expert 3 of layer 1 .*the bytes have CRC-32 [0-9a-f]{8}, but [0-9a-f]{8} was written"
    reader = ExpertStore(repacked.full, True, checksums[0])
    slot = HostDevice(1).alloc(max(map(reader.slot_bytes, range(len(repacked.full.classes)))))
    reader.read(count + 2, slot)
    for _ in range(2):
        with pytest.raises(StoreError, match=message):
            reader.read(count + 3, slot)
    reader.close()
    assert main(["repack", str(model), "-o", str(store), "--verify"]) == 1
    assert re.search(message, capsys.readouterr().err)
    with Engine(model, store=str(store), cache="slots:4") as engine, pytest.raises(StoreError, match=message):
        engine.logits(np.arange(60))


def test_an_expert_is_checked_once_and_not_each_time_it_is_read(model, store, monkeypatch):
    repacked, checksums = opened(store, model)
    reader = ExpertStore(repacked.full, True, checksums[0])
    slot, real, count = HostDevice(1).alloc(reader.slot_bytes(0)), zlib.crc32, [0]
    monkeypatch.setattr(zlib, "crc32", lambda raw: count.__setitem__(0, count[0] + 1) or real(raw))
    for _ in range(3):
        reader.read(0, slot)
    assert count == [1]
    reader.close()


def test_verify_passes_what_was_written_smaller_copies_too(model, tmp_path, capsys):
    path = write(model, tmp_path / "s", "Q4_0")
    assert main(["repack", str(model), "-o", str(path), "--verify"]) == 0
    assert "36 experts as written" in capsys.readouterr().err
    damage(path, os.path.getsize(path) - 4096, b"\x55\xaa")
    assert main(["repack", str(model), "-o", str(path), "--verify"]) == 1


# ---------------------------------------------------------------------------------------------------------
# Whole or absent


@pytest.mark.parametrize("named", [False, True], ids=["without a name", "temporary name"])
def test_a_full_disk_leaves_the_old_store_and_nothing_else(model, store, monkeypatch, named):
    before, listed = store.read_bytes(), os.listdir(store.parent)
    if named:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    with open_gguf(model) as file:
        steps = tool.repack(file, str(store), None)
        next(steps)
        real, fsync = os.fsync, []

        def full(fd: int) -> None:
            fsync.append(fd)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=f"{store}.*No space left"):
            list(steps)
        monkeypatch.setattr(os, "fsync", real)
    assert fsync and store.read_bytes() == before and os.listdir(store.parent) == listed


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(model, store, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    listed = os.listdir(store.parent)
    assert main(["repack", str(model), "-o", str(store) + "2"]) == 2
    assert "needs 0 MiB, but its disk has 0 MiB left" in capsys.readouterr().err
    assert os.listdir(store.parent) == listed


def test_what_is_no_regular_file_is_refused_and_not_replaced(model, tmp_path, capsys):
    """Root's `-o /dev/full` must not make a file of the device; a pipe is the same case without the danger."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main(["repack", str(model), "-o", str(pipe)]) == 2
    assert "is no regular file" in capsys.readouterr().err and pipe.is_fifo()
    with open_gguf(model) as file, pytest.raises(ValueError, match="is no regular file"):
        list(tool.repack(file, str(pipe), None))


KILLED = """
import os, signal, sys
from moe_cupy.tools.repack import repack
from moe_ref.gguf import open_gguf
if sys.argv[3] == "limit":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for done, total in repack(open_gguf(sys.argv[1]), sys.argv[2], None):
    if sys.argv[3] == "kill" and done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="no files without names here")
@pytest.mark.parametrize("how", ["kill", "limit"])
def test_a_killed_or_stopped_repack_leaves_the_old_store_and_nothing_else(model, store, how):
    before, listed = store.read_bytes(), os.listdir(store.parent)
    argv = [sys.executable, "-c", KILLED, str(model), str(store), how]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL if how == "kill" else "File too large" in done.stderr
    assert store.read_bytes() == before and os.listdir(store.parent) == listed


def test_repacking_holds_less_than_a_layer(tmp_path):
    shape = Shape(layers=3, experts=16, used=2, width=256, inner=256)
    model = tiny_moe(tmp_path / "wide.gguf", shape, seed=1)
    layer = 16 * 3 * 256 * 256 * 4
    tracemalloc.start()
    write(model, tmp_path / "s")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < layer / 2, f"{peak} bytes at once; a layer's experts have {layer}"


def test_a_dense_model_has_nothing_to_repack_and_the_model_is_not_overwritten(tmp_path, model, capsys):
    assert main(["repack", str(model), "-o", str(model)]) == 2
    assert main(["repack", str(model), "-o", str(tmp_path / "none" / "s")]) == 2
    assert main(["repack", str(model), "-o", str(tmp_path / "s"), "--low", "Q9"]) == 2
    err = capsys.readouterr().err
    assert "there is no folder" in err and "--low: type 'Q9' cannot be written" in err


def test_the_arrangement_depends_on_the_model_and_the_smaller_type_alone(model, tmp_path):
    with open_gguf(model) as a, open_gguf(shutil.copy(model, tmp_path / "b.gguf")) as b:
        one, two = (arrange(f, tool.layout_of(f), "Q4_0", tmp_path / "s") for f in (a, b))
    assert one == two
