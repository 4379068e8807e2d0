"""The kernels have no race and touch nothing beyond their buffers; and whoever planted such a bug is found out."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from moe_cupy.cache import Geometry
from moe_cupy.cache.ranked import POWERS
from moe_cupy.cache.tabled import RULES
from moe_cupy.compiled.echo import CompiledEcho
from moe_cupy.engine.echo_memory import parts
from moe_cupy.kernels.cuda import launches, sources
from moe_cupy.kernels.cuda.cases import Case
from moe_cupy.kernels.cuda.check import all_cases
from moe_cupy.kernels.cuda.emulation.build import BOUNDS, FAST, RACES, BuildError, Flavour, build, compiler
from moe_cupy.kernels.cuda.emulation.library import LaunchError, Library, run_program
from moe_cupy.kernels.cuda.launches import BY_KEY, STATE, Halt, Launch, Pointers, Residency
from tests.slow_shares import mostly_slow

# The formats differ in how a lane decodes, not in what lanes share.
FEW_FORMATS = ("F32", "F16", "Q8_0", "Q4_K", "IQ2_S")

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module", autouse=True)
def needs_a_compiler() -> None:
    try:
        compiler()
    except BuildError as error:
        pytest.skip(str(error))


def other_launches() -> Iterator[Launch]:
    """Three events of a pool of 5 slots under each rule: kernels whose expectation is in other tests."""
    held, experts = (Pointers([np.zeros(70, np.uint8) for _ in range(n)]) for n in (5, 12))
    echo = parts(CompiledEcho(Geometry(5, 1, 12)))
    for number, echo_or_none in [(rule.number, None) for rule in RULES.values()] + [(0, echo)]:
        by_key, state = np.zeros((12, len(BY_KEY)), np.int64), np.zeros(len(STATE), np.int64)
        by_key[:, 0] = -1
        r = Residency(state, by_key, np.full(5, -1, np.int32), np.array(POWERS, np.int64), number, echo_or_none)
        halt = Halt(np.arange(12).astype(np.uint64) // 11, np.zeros(4, np.int32), np.zeros(50, np.int32))
        for ids in ([3, 1, 4], [1, 5, 9], [2, 6, 4]):
            got, loads, ahead = np.zeros(3, np.int32), np.zeros(10, np.int32), np.zeros(10, np.int32)
            yield launches.resolve(got, loads, np.array(ids, np.int32), r, 0, 12, ahead=ahead, block=64)
            yield launches.fill(held, experts, loads, 70, blocks=2, block=32)
            yield launches.resolve_ahead(ahead, np.array(ids, np.int32) + 1, r, 0, 2, block=64)
        yield launches.resolve(got, loads, np.array([2, 3, 4], np.int32), r, 0, 12, halt=halt, block=64)


def few_of_each(cases: Iterable[Case], most: int) -> list[Case]:
    """Cases with a kernel that fewer than ``most`` of the cases before it had."""
    seen, kept = Counter[str](), []
    for case in cases:
        if any(seen[one.kernel] < most for one in case.launches):
            seen.update({one.kernel for one in case.launches})
            kept.append(case)
    return kept


def run_all(flavour: Flavour, formats: tuple[str, ...], most: int = 1000) -> None:
    cases = few_of_each(all_cases(64, formats), most)
    every = [*other_launches(), *(one for case in cases for one in case.launches)]
    kernels = {k for k, v in sources.kernels().items() if v.unit.format in ("", *formats)}
    assert {one.kernel for one in every} == kernels, "a kernel without a case is not checked"
    said = run_program(build(flavour, formats=formats), every, timeout=3600)  # a guard against waiting for ever
    assert not said, said[-6000:]
    for case in cases:
        assert case.worst() <= 1, case.label


@pytest.mark.slow(seconds=50)
def test_no_kernel_touches_anything_beyond_its_buffers():
    """Address and undefined-behaviour sanitizers; every buffer is an allocation of its exact size."""
    run_all(BOUNDS, FEW_FORMATS)


@pytest.mark.slow(seconds=60)
def test_no_kernel_has_a_race():
    """Thread sanitizer; every CUDA thread is an OS thread. Four cases of each kernel here, all in the slow test."""
    run_all(RACES, FEW_FORMATS, most=4)


@pytest.mark.slow(seconds=200)
@pytest.mark.parametrize("flavour", [BOUNDS, RACES], ids=lambda f: f.name)
def test_all_formats_under_the_sanitizers(flavour):
    run_all(flavour, sources.FORMATS)


# ---------------------------------------------------------------------------------------------------------
# planted bugs


@dataclass(frozen=True)
class Bug:
    """Replace the ``which``-th ``old`` in a file; ``stem`` is whose kernels are run."""

    stem: str
    old: str
    new: str
    seen_by: str  # numbers, deadlock, races, bounds
    which: int = 0
    file: str = ""

    @property
    def id(self) -> str:
        return f"{self.stem}-{self.old[:12]}-{self.which}-{self.seen_by}"


SYNC, NONE = "__syncthreads();", ""
BUGS = [
    Bug("attention_decode", SYNC, NONE, "numbers"),
    Bug("attention_decode", "position - first + 1", "position - first + 2", "numbers"),
    Bug("attention_prefill", SYNC, NONE, "numbers"),  # the next tile overwrites what others still read
    Bug("attention_prefill", SYNC, NONE, "races"),
    Bug("attention_prefill", "__syncwarp();", NONE, "races"),
    Bug("resolve", SYNC, NONE, "races"),  # between the warps' candidates and the choice among them
    Bug("resolve", SYNC, NONE, "races", which=3),  # between one expert's slot and the next one's
    Bug("resolve", "n_slots; s +=", "n_slots + 1; s +=", "bounds"),
    Bug("resolve_echo", SYNC, NONE, "races", which=1),  # between who leaves and whose slot it was
    Bug("resolve_echo", SYNC, NONE, "races", which=3, file="echo.cuh"),  # between the slices and how many there are
    Bug("rms_norm", SYNC, NONE, "races", which=1, file="prelude.cuh"),  # block_sum's scratch is used again at once
    Bug("router", SYNC, NONE, "races", which=6),  # after the best has been taken
    Bug("delta_net", SYNC, NONE, "races", which=2),  # before the answers' partial sums are overwritten
    Bug("group_by_expert", SYNC, NONE, "numbers"),
    Bug("argmax", SYNC, "if (threadIdx.x < 32) __syncthreads();", "deadlock"),
    Bug("kv_store", "i >= width", "i > width", "numbers"),
    Bug("gemv", "row >= rows", "row > rows", "bounds"),
    Bug("gemm", "if (work.is_row(tid)) out.w", "out.w", "bounds", file="tiles.cuh"),
    Bug("expert_down", "d >= width", "d > width", "bounds"),
    Bug("embed", "g >= (cols", "g > (cols", "bounds"),
    Bug("argmax", "i < n; i +=", "i <= n; i +=", "bounds"),
    Bug("top_k", SYNC, NONE, "races", which=2),  # the next round may see a number that is taken
    Bug("top_k", "i < count; i += blockDim.x) left", "i <= count; i += blockDim.x) left", "bounds"),
    Bug("gemm_float", SYNC, NONE, "numbers", which=1),
    Bug("gemm_float", "i < here ?", "i <= here ?", "bounds"),
    Bug("gemm_pipelined", SYNC, NONE, "races", which=1),  # the next tile lands while others still multiply this one
    Bug("gemm_pipelined", "g + 1 < steps) next", "g < steps) next", "bounds"),
    Bug("gemm_mma", SYNC, NONE, "races"),
    Bug("gemm_mma", "pair = 8 * n + 2 * t;", "pair = 8 * n + t;", "numbers"),
    Bug("embed", "b[74 + part]", "b[75 + part]", "numbers", file="gridformats.cuh"),
    Bug("attention_prefill", "m < 32; m *= 2) sum", "m < 16; m *= 2) sum", "numbers"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """A folder for changed sources and what is built from them."""
    return tmp_path_factory.mktemp("planted")


def changed(bug: Bug, bench: Path) -> Path:
    folder = bench / str(len(list(bench.iterdir())))
    folder.mkdir()
    for path in [*sources.HERE.glob("*.cuh"), *sources.HERE.glob("*.cu")]:
        shutil.copy(path, folder)
    target = folder / (bug.file or f"{bug.stem}.cu")
    parts = target.read_text("utf-8").split(bug.old)
    assert len(parts) > bug.which + 1, f"{target.name} has no {bug.old!r} number {bug.which}: the test is out of date"
    joints = [bug.new if i == bug.which else bug.old for i in range(len(parts) - 1)] + [""]
    target.write_text("".join(part + joint for part, joint in zip(parts, joints, strict=True)), "utf-8")
    return folder


def cases_of(stem: str) -> list[Case]:
    """Cases with a kernel of this file."""
    table = sources.kernels()
    return [
        case
        for case in all_cases(64, FEW_FORMATS)
        if any(table[one.kernel].unit.stem == stem for one in case.launches)
        and all(table[one.kernel].unit.format in ("", *FEW_FORMATS) for one in case.launches)
    ]


def findings(bug: Bug, folder: Path) -> str:
    """What the suite says of a changed kernel; empty if nothing."""
    cases = cases_of(bug.stem)
    every = [one for case in cases for one in case.launches]
    every = every or [one for one in other_launches() if sources.kernels()[one.kernel].unit.stem == bug.stem]
    stems = tuple(sorted({sources.kernels()[one.kernel].unit.stem for one in every}))
    flavour = {"races": RACES, "bounds": BOUNDS}.get(bug.seen_by, FAST)
    program = build(flavour, stems, folder, FEW_FORMATS)
    if flavour is not FAST:
        return run_program(program, every)
    library = Library(program)
    if bug.seen_by == "numbers":
        return ", ".join(case.label for case in cases if not case.run(library.launch) <= 1)
    try:
        for case in cases:
            case.run(library.launch)
    except LaunchError as error:
        return str(error)
    return ""


# One of each sign, in the files that compile quickest.
QUICK = ("kv_store-i >= width-0-numbers", "argmax-__syncthread-0-deadlock", "argmax-i < n; i +=-0-bounds",
         "rms_norm-__syncthread-1-races")  # fmt: skip
SIGNS = {"races": "data race", "bounds": "heap-buffer-overflow", "deadlock": "deadlock", "numbers": ""}


@pytest.mark.parametrize("bug", mostly_slow(BUGS, *(bug for bug in BUGS if bug.id in QUICK)), ids=lambda bug: bug.id)
def test_planted_bugs_are_caught(bug, bench, monkeypatch):
    monkeypatch.setenv("MOE_CUPY_CACHE", str(bench / "cache"))
    said = findings(bug, changed(bug, bench))
    assert said and SIGNS[bug.seen_by] in said, f"{bug}: not caught; the suite says {said!r}"


@pytest.mark.parametrize("seen_by", SIGNS)
def test_the_same_search_finds_nothing_in_sources_that_are_as_they_should_be(seen_by, bench, monkeypatch):
    monkeypatch.setenv("MOE_CUPY_CACHE", str(bench / "cache"))
    unchanged = Bug("argmax", SYNC, SYNC, seen_by)
    assert not findings(unchanged, changed(unchanged, bench))
