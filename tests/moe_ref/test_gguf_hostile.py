"""Hostile GGUF files open correctly or are refused with GGUFError naming the field, in bounded time and memory."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import shared_files
from gguf_checks import everything, same_as_gguf_py
from gguf_writer import (
    SAMPLE,
    array_head,
    header,
    published_size,
    string,
    tensor_entry,
    value_bytes,
    with_key,
    with_tensors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ref import gguf_bytes
from moe_ref.gguf import MAX_KEYS, MAX_TENSORS, GGUFError, open_gguf

U64_MAX = 2**64 - 1
REFUSED: dict[str, tuple[bytes, str, str]] = {  # case: (file, what the message must name, what it found)
    "empty file": (b"", "magic", "4 bytes"),
    "not gguf": (b"GGML" + bytes(60), "magic", "b'GGML'"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "magic", "Git LFS"),
    **{f"version {v}": (header(version=v), "version", f"found {v}") for v in (0, 1, 4, 2**32 - 1)},
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version", "big-endian"),
    "2^63 tensors": (header(tensors=2**63), "tensor_count", str(2**63)),
    "2^63 keys": (header(keys=2**63), "metadata_kv_count", str(2**63)),
    "tensors past the cap": (header(tensors=MAX_TENSORS + 1, data=1 << 22), "tensor_count", str(MAX_TENSORS + 1)),
    "keys past the cap": (header(keys=MAX_KEYS + 1, data=1 << 20), "metadata_kv_count", str(MAX_KEYS + 1)),
    "more tensors than fit": (header(tensors=9, data=64), "tensor_count", "found 9"),
    "more keys than fit": (header(keys=9, data=64), "metadata_kv_count", "found 9"),
    "zero-filled keys": (header(keys=9, data=999), "metadata key 1 of 9", "empty"),
    "zero-filled tensors": (header(tensors=9, data=999), "tensor 1 of 9", "empty"),
    "key too long": (with_key(value_bytes(1), "k" * 65_536), "metadata key 1 of 1", "65536"),
    "key not utf-8": (with_key(value_bytes(1), b"\xff\xfe"), "metadata key 1 of 1", "0xff"),
    "key twice": (header(keys=2, body=2 * (string("a.key") + value_bytes(1))), "a.key", "second time"),
    "value type 13": (with_key(struct.pack("<I", 13)), "some.key", "13"),
    "string not utf-8": (with_key(value_bytes(b"ab\x80")), "some.key", "0x80"),
    "string past the end": (with_key(struct.pack("<IQ", 8, 1000)), "some.key", "1000 bytes"),
    "1 GB string": (with_key(struct.pack("<IQ", 8, 1 << 30)), "some.key", str(1 << 30)),
    "2^64 string": (with_key(struct.pack("<IQ", 8, U64_MAX)), "some.key", str(U64_MAX)),
    "bool 2": (with_key(struct.pack("<IB", 7, 2)), "some.key", "bool 2"),
    "array of arrays": (with_key(array_head(9, 1) + array_head(9, 1)), "some.key", "an array of ARRAY"),
    "array of type 99": (with_key(array_head(99, 1)), "some.key", "99"),
    "2^63 numbers": (with_key(array_head(4, 2**63)), "some.key", str(2**63)),
    "2^63 strings": (with_key(array_head(8, 2**63)), "some.key", str(2**63)),
    "numbers past the end": (with_key(array_head(10, 100)), "some.key", "800 bytes"),
    "array string past the end": (
        with_key(array_head(8, 2) + string("a") + struct.pack("<Q", 2**63)),
        "some.key[1]",
        "",
    ),
    "array ends early": (with_key(array_head(8, 500)), "some.key[", "8 bytes"),
    "alignment 0": (with_key(value_bytes(0), "general.alignment"), "general.alignment", "found 0"),
    "alignment 48": (with_key(value_bytes(48), "general.alignment"), "general.alignment", "found 48"),
    "alignment u64": (with_key(value_bytes(np.uint64(32)), "general.alignment"), "general.alignment", "UINT64"),
    "alignment text": (with_key(value_bytes("32"), "general.alignment"), "general.alignment", "STRING"),
    "tensor twice": (with_tensors(("t.w", 0, (8,), 0), ("t.w", 0, (8,), 32)), "tensor t.w", "second time"),
    "tensor not utf-8": (with_tensors((b"\xc3", 0, (8,), 0)), "tensor 1 of 1", "0xc3"),
    "no dimensions": (with_tensors(("t.w", 0, (), 0)), "tensor t.w", "0 dimensions"),
    "5 dimensions": (with_tensors(("t.w", 0, (1,) * 5, 0)), "tensor t.w", "5 dimensions"),
    "dimension 0": (with_tensors(("t.w", 0, (0, 4), 0)), "tensor t.w", "(0, 4)"),
    "2^64 products": (with_tensors(("t.w", 0, (2**63, 2**63, 4), 0)), "tensor t.w", str(2**130)),
    "type 4": (with_tensors(("t.w", 4, (32,), 0)), "tensor t.w", "type id 4"),
    "half a block": (with_tensors(("t.w", 12, (2, 128), 0)), "tensor t.w", "128"),
    "misaligned": (with_tensors(("t.w", 0, (8,), 4)), "tensor t.w", "offset 4"),
    "past the end": (with_tensors(("t.w", 0, (65,), 0)), "tensor t.w", "260 bytes"),
    "offset past the end": (with_tensors(("t.w", 0, (1,), 2**64 - 32)), "tensor t.w", str(2**64 - 32)),
    "overlap": (with_tensors(("a.w", 0, (16,), 0), ("b.w", 0, (8,), 32)), "tensor b.w", "a.w"),
    "same place": (with_tensors(("a.w", 0, (8,), 32), ("b.w", 0, (8,), 32)), "tensor b.w", "a.w"),
}


def written(tmp_path: Path, raw: bytes) -> Path:
    (tmp_path / "m.gguf").write_bytes(raw)
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_field_found_and_accepted(tmp_path: Path, case: str) -> None:
    raw, field, found = REFUSED[case]
    with pytest.raises(GGUFError) as caught:
        open_gguf(written(tmp_path, raw)).close()
    message = str(caught.value)
    assert f": {field}" in message and found in message and "accepted: " in message, message


CAPPED = {  # cap: (small value, two values that pass it only together)
    "MAX_TEXT_BYTES": (20, value_bytes("x" * 8)),
    "MAX_ARRAY_ITEMS": (5, value_bytes([1, 2, 3])),
    "MAX_ARRAY_STRINGS": (5, value_bytes(["x", "y", "z"])),
    "MAX_HEADER_BYTES": (100, value_bytes("x" * 30)),
}


@pytest.mark.parametrize("cap", CAPPED)
def test_caps_hold_over_the_whole_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cap: str) -> None:
    small, value = CAPPED[cap]
    path = written(tmp_path, header(keys=2, body=string("a.key") + value + string("b.key") + value, data=99))
    open_gguf(path).close()
    monkeypatch.setattr(gguf_bytes, cap, small)
    with pytest.raises(GGUFError, match=r": b.key: found .*; accepted: at most"):
        open_gguf(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for n in range(len(SAMPLE)):
        with pytest.raises(GGUFError, match=": found "):
            open_gguf(written(tmp_path, SAMPLE[:n])).close()
    open_gguf(written(tmp_path, SAMPLE)).close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes and /dev are POSIX")
def test_special_and_missing_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for path in ("pipe", "/dev/zero"):
        with pytest.raises(GGUFError, match="accepted: a regular file"):
            open_gguf(tmp_path / path)
    for path in ("empty", "missing", "", "nul\0byte", "empty/below", "n" * 5000):
        with pytest.raises(GGUFError):
            open_gguf(tmp_path / path)
    for odd in (None, 3.5):
        with pytest.raises(GGUFError):
            open_gguf(odd)  # type: ignore[arg-type]


def opens(path: Path) -> bool:
    """True if the file opens, and then agrees with gguf-py; False if it is refused in the promised form."""
    try:
        open_gguf(path).close()
    except GGUFError as error:
        assert re.fullmatch(r".+?: .+: found .+; accepted: .+; .+", str(error), re.DOTALL), error
        return False
    same_as_gguf_py(path)
    return True


NUMBERS = [0, 1, 4, 5, 8, 9, 13, 255, 65_536, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """One to three random faults of the kinds that transfers, converters and attackers make."""
    out = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(out)), rng.randrange(len(out))
        match rng.randrange(6):
            case 0 | 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                out[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
            case 3:
                out[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
            case 4:
                out[at:at] = out[other : other + rng.randint(1, 40)]
            case 5:
                del out[at : at + rng.randint(1, 40)]
    return bytes(out[: rng.randrange(len(out))] if rng.random() < 0.05 else out)


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_random_faults_open_correctly_or_are_refused(tmp_path: Path, count: int) -> None:
    opened = 0
    for seed in range(count):
        path = written(tmp_path, mutated(SAMPLE, random.Random(seed)))
        try:
            opened += opens(path)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert count // 50 < opened < count // 2, f"{opened} of {count} opened: the faults test nothing"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE)), st.integers(0, 8), st.binary(max_size=12)), min_size=1))
def test_any_edits_open_correctly_or_are_refused(tmp_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    raw = SAMPLE
    for at, cut, new in edits:
        raw = raw[:at] + new + raw[at + cut :]
    opens(written(tmp_path, raw))


@pytest.mark.parametrize("path", shared_files("data/golden/archs/*.gguf", "data/golden/quants/*Q4_K_M.gguf"))
def test_faults_in_real_headers_open_or_are_refused(tmp_path: Path, path: Path) -> None:
    with open_gguf(path) as gguf:
        head, size = path.read_bytes()[: gguf.data_offset], path.stat().st_size
    rng = random.Random(path.name)
    for _ in range(40):
        bad = written(tmp_path, mutated(head, rng))
        os.truncate(bad, size)
        try:
            with open_gguf(bad) as gguf:
                everything(gguf)
        except GGUFError as error:
            assert ": found " in str(error)


BIG = 4 << 30
WIDE = ("\N{ROCKET}" + "a" * ((16 << 20) - 64)).encode()  # 4 bytes per character once decoded
KEYS = b"".join(string(f"key{i}") + array_head(8, 0) for i in range(MAX_KEYS))
ENTRIES = b"".join(tensor_entry(f"tensor{i}", 0, (1,), 32 * i) for i in range(MAX_TENSORS))
COSTLY: dict[str, tuple[Callable[[], bytes], int]] = {  # case: (header of a 4 GB sparse file, limit in MiB)
    "as published": (published_size, 60),
    "zero-filled strings, allowed": (lambda: with_key(array_head(8, 1 << 21)), 60),
    "zero-filled strings, refused": (lambda: with_key(array_head(8, BIG // 8 - 64)), 10),
    "many numbers": (lambda: with_key(array_head(0, BIG - 4096)), 10),
    "1 GB string": (lambda: with_key(struct.pack("<IQ", 8, 1 << 30)), 10),
    "wide text": (lambda: with_key(value_bytes(WIDE)), 150),
    "most keys": (lambda: header(keys=MAX_KEYS, body=KEYS), 60),
    "most tensors": (lambda: header(tensors=MAX_TENSORS, body=ENTRIES), 60),
    "everything": (lambda: header(tensors=MAX_TENSORS, keys=MAX_KEYS, body=KEYS + ENTRIES), 100),
    "zero-filled counts": (lambda: header(tensors=MAX_TENSORS, keys=MAX_KEYS), 10),
}
MEASURE = """
import sys
from moe_ref.gguf import GGUFError, open_gguf
def kib(field): return int(open("/proc/self/status").read().split(field + ":")[1].split()[0])
before = kib("VmRSS")
try:
    kept = open_gguf(sys.argv[1]) if sys.argv[1] else bytearray(100 << 20)
except GGUFError:
    pass
print((kib("VmHWM") - before) // 1024)
"""


def added_mib(path: str) -> int:
    """Peak memory that opening adds in a fresh process; without a path, of a buffer of 100 MiB."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", MEASURE, path], cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("case", COSTLY)
def test_opening_a_4_gb_file_stays_small(tmp_path: Path, case: str) -> None:
    make, limit = COSTLY[case]
    path = written(tmp_path, make())
    os.truncate(path, BIG)
    added = added_mib(str(path))
    assert added <= limit, f"{case}: {added} MiB added, limit {limit}"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_the_memory_measurement_sees_100_mib() -> None:
    assert 100 <= added_mib("") <= 110
