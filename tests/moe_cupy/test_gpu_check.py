"""gpu-check runs whole on the emulated device, survives what fails in it, and says in one line that there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cupy import CUDARuntimeError, Cupy

from moe_cupy.__main__ import main
from moe_cupy.device import open_device
from moe_cupy.device.base import DeviceError
from moe_cupy.kernels.cuda.sources import kernels, stems
from moe_cupy.tools import check, machine
from moe_cupy.tools.gpu_check import page, runner, sanitizer, sections, speed
from moe_cupy.tools.gpu_check.runner import OK, Request, run_apart, run_here, wrongs
from moe_cupy.tools.gpu_check.sections import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
HOST = Request("host", small=True)
PROPERTIES = {"name": b"Card", "totalGlobalMem": 16 << 30, "major": 12, "minor": 0, "l2CacheSize": 64 << 20}


def with_a_card() -> Cupy:
    """The stand-in for CuPy, with what it says of a GPU."""
    cupy = Cupy()
    vars(cupy.cuda.runtime).update(
        getDeviceProperties=lambda _: PROPERTIES, runtimeGetVersion=lambda: 12090, deviceGetPCIBusId=lambda _: "0:1:0.0"
    )
    return cupy


LIMITS = {name: seconds for name, (_, seconds) in SECTIONS.items()}


@pytest.fixture(scope="module", autouse=True)
def no_limits() -> Iterator[None]:
    """Sections end when they are done, however slow the machine is today."""
    with pytest.MonkeyPatch.context() as patch:
        for name, (section, _) in SECTIONS.items():
            patch.setitem(SECTIONS, name, (section, 1e6))
        yield


@pytest.fixture(scope="module")
def emulated() -> None:
    try:
        open_device("emulated")[0].close()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def checked(emulated, tmp_path_factory) -> tuple[dict, str, int]:
    """(report, page, exit code) of the whole flow in small."""
    prefix = tmp_path_factory.mktemp("checked") / "out"
    code = main(["gpu-check", "--backend", "emulated", "--small", "--here", "-o", str(prefix)])
    return json.loads(prefix.with_suffix(".json").read_text()), prefix.with_suffix(".md").read_text(), code


def test_the_whole_flow_runs_and_nothing_is_wrong(checked):
    report, _, code = checked
    assert {name: section["status"] for name, section in report["sections"].items()} == dict.fromkeys(SECTIONS, OK)
    assert list(wrongs(report)) == [] and code == 0
    assert all(section["rows"] for section in report["sections"].values())


def test_it_runs_on_the_cuda_device_over_a_stand_in_for_cupy(emulated, monkeypatch, tmp_path, capsys):
    """The lines that only a GPU would run, but for the GPU."""
    monkeypatch.setitem(sys.modules, "cupy", with_a_card())
    names = ["machine", "bandwidth", "kernels", "speed", "overlap", "models"]
    code = main(["gpu-check", "--small", "--here", "--only", ",".join(names), "-o", str(tmp_path / "x")])
    report = json.loads((tmp_path / "x.json").read_text())
    assert {name: section["status"] for name, section in report["sections"].items()} == dict.fromkeys(names, OK)
    assert code == 0 and report["backend"] == "cuda"
    text = (tmp_path / "x.md").read_text()
    assert "Written by `make gpu-check`" in text and "| right |" in text


def test_every_kernel_of_the_formats_asked_for_has_cases(checked):
    report, _, _ = checked
    seen = {kernel for row in report["sections"]["kernels"]["rows"] for kernel in row["kernels"]}
    formats = ("", "F16", "Q8_0", "Q4_K", "F32")
    missing = {k for k, v in kernels().items() if v.unit.format in formats} - seen
    assert {kernels()[k].unit.format for k in missing} <= {"F32"}, missing


def test_what_is_measured_is_sane(checked):
    rows = {name: section["rows"] for name, section in checked[0]["sections"].items()}
    assert all(row["GB/s"] > 0 for row in rows["bandwidth"])
    assert all(0 < row["efficiency"] < 2 for row in rows["overlap"])
    assert all(row.get("GB/s", row.get("10^12 op/s")) > 0 for row in rows["speed"])
    assert {"gemv_q8_Q4_K", "attention_decode_F16", "gemm_pipelined_Q8_0"} <= {row["name"] for row in rows["speed"]}
    model, *caches = rows["replay"]
    assert model["GB"] > 0.01 and len(caches) == 2
    assert all(row["tok/s"] > 0 and 0 <= row["hit rate"] <= 1 for row in caches)
    assert all(row["same with fewest slots"] and row["evictions"] for row in rows["models"])


def test_the_page_says_of_every_kernel_that_it_did_not_run_on_a_gpu(checked):
    text = checked[1]
    lines = [line for line in text.splitlines() if line.startswith("| ") and line.endswith(f"| {page.NOT_RUN} |")]
    assert {line.split(" | ")[0].removeprefix("| ") for line in lines} == set(kernels())
    assert "**None of this ran on a GPU**" in text and "## replay" in text


def test_a_gpus_page_tells_right_from_wrong_and_lists_what_failed():
    rows = [
        {"name": "a case", "kernels": ["argmax"], "share": 0.25, "ok": True},
        {"name": "another", "kernels": ["top_k"], "share": 3.5, "ok": False},
    ]
    failed = {"status": "failed: x", "seconds": 1, "rows": []}
    parts = {"kernels": {"status": OK, "seconds": 1, "rows": rows}, "speed": failed}
    report = {"made": "now", "version": "1", "commit": "", "backend": "cuda", "sections": parts}
    text = page.page(report)
    assert "| argmax | 1 | 0.25 | a case | right |" in text and "| top_k | 1 | 3.5 | another | **WRONG** |" in text
    assert f"| router | 0 | 0 |  | {page.NOT_RUN} |" in text
    assert list(wrongs(report)) == ["kernels: another: off by 3.5", "speed: failed: x"]


def test_the_committed_page_names_every_kernel():
    text = (ROOT / "docs" / "gpu-status.md").read_text("utf-8")
    assert [kernel for kernel in kernels() if f"\n| {kernel} | " not in text] == []


def test_sections_together_take_less_than_eight_minutes():
    assert sum(LIMITS.values()) < 8 * 60


def test_without_a_gpu_it_says_so_in_one_line(capsys, tmp_path):
    if machine.has_gpu():
        pytest.skip("there is a GPU here")
    assert main(["gpu-check", "-o", str(tmp_path / "x")]) == 2
    [said] = capsys.readouterr().err.strip().splitlines()
    assert "--device" not in said and "--backend emulated" in said, "it names a flag that this command has"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--only", "speed,no"], "no: unknown; the sections are"), (["-o", "/no/such/folder/x"], "no/such/folder")],
)
def test_a_wrong_request_is_refused_before_anything_runs(capsys, arguments, says):
    assert main(["gpu-check", "--backend", "emulated", *arguments]) == 2
    assert says in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# what fails


def raising(bench):
    yield {"name": "first"}
    raise RuntimeError("illegal\naddress")


def endless(bench):
    while True:
        yield {"name": "again"}


def test_a_section_that_fails_is_recorded_and_one_that_is_late_is_stopped(monkeypatch):
    monkeypatch.setitem(SECTIONS, "speed", (raising, 1e6))
    monkeypatch.setitem(SECTIONS, "overlap", (endless, 0.05))
    report = runner.run_all(Request("host", ("speed", "overlap", "machine"), small=True, here=True), lambda _: None)
    speed_part, overlap_part, machine_part = report["sections"].values()
    assert speed_part["status"] == "failed: RuntimeError: illegal address" and speed_part["rows"] == [{"name": "first"}]
    assert overlap_part["status"] == "stopped after 0 s" and overlap_part["rows"]
    assert machine_part["status"] == OK
    assert list(wrongs(report)) == ["speed: failed: RuntimeError: illegal address"]


def test_a_section_runs_in_a_process_of_its_own(emulated):
    rows, end = run_apart("machine", Request("emulated", small=True))
    assert end == OK and {"device", "device memory"} <= {row["name"] for row in rows}


def once_it_has_found(command, timeout, **how):
    """A command whose time is over as soon as it has written a row, however long it takes to start."""
    with subprocess.Popen(command, env=how["env"]) as process:
        while not Path(command[-1]).read_text().endswith("\n"):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    raise subprocess.TimeoutExpired(command, timeout)


@pytest.mark.parametrize(
    ("code", "ends"),
    [("sys.exit('no memory')", "failed: exit status 1: no memory"), ("time.sleep(900)", "ended by force after 600 s")],
)
def test_what_a_dying_process_had_found_is_kept(monkeypatch, code, ends):
    script = "import sys, time; open(sys.argv[1], 'w').write('{\"name\": \"found\"}\\n'); " + code
    monkeypatch.setattr(runner.Request, "command", lambda self, _, rows: [sys.executable, "-c", script, str(rows)])
    monkeypatch.setattr(runner, "GRACE", 600.0)
    monkeypatch.setitem(SECTIONS, "speed", (speed.speed, 0.0))
    if "sleep" in code:
        monkeypatch.setattr(subprocess, "run", once_it_has_found)
    assert run_apart("speed", HOST) == ([{"name": "found"}], ends)


def test_a_wrong_kernel_is_found(emulated, monkeypatch):
    bench = sections.Workbench("emulated", HOST.sizes)
    honest = bench.run
    every = sections.all_cases
    monkeypatch.setattr(sections, "all_cases", lambda *_: (c for c in every(128, ()) if c.label == "softcap"))

    def wrong(launch):
        honest(launch)
        if launch.kernel == "softcap":
            launch.args[0][0] += np.float32(1e-3)

    for run, expected in ((honest, {True}), (wrong, {False})):
        bench.run = run
        assert {row["ok"] for row in sections.kernels(bench) if row["kernels"] == ["softcap"]} == expected
    bench.close()


def test_the_sanitizer_is_run_where_there_is_one(monkeypatch, tmp_path):
    bench = SimpleNamespace(choice="cuda")
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [row["finding"] for row in sanitizer.sanitizer(bench)] == ["not run: compute-sanitizer is not on PATH"]
    tool.write_text("#!/bin/sh\necho $2 $6 $7 $9\n[ $2 = memcheck ] || exit 9\n")
    tool.chmod(0o755)
    memory, races = sanitizer.sanitizer(bench)
    assert memory["ok"] and memory["finding"].startswith("memcheck -m moe_cupy")
    assert races["ok"] is False
    tool.write_text("#!/bin/sh\necho begun\nexec /bin/sleep 600\n")
    monkeypatch.setattr(sanitizer, "SECONDS", 0.2)
    assert "stopped after 0 s" in next(sanitizer.sanitizer(bench))["finding"]


# ---------------------------------------------------------------------------------------------------------
# doctor


def test_the_facts_of_a_gpu(monkeypatch, tmp_path):
    runtime = SimpleNamespace(
        getDeviceProperties=lambda _: PROPERTIES, driverGetVersion=lambda: 13020, runtimeGetVersion=lambda: 12090,
        deviceGetPCIBusId=lambda _: "0000:0A:00.0", CUDARuntimeError=CUDARuntimeError,
    )  # fmt: skip
    cuda = SimpleNamespace(is_available=lambda: True, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, __version__="14"))
    found = dict(machine.facts_of_gpu())
    assert found["GPU"] == "Card, compute 12.0, 16.0 GiB, L2 64 MiB"
    assert found["CUDA"] == "driver for 13.2, runtime 12.9, CuPy 14"
    assert found["PCIe"].startswith("0000:0A:00.0; this system does not say")
    (tmp_path / "0000:0a:00.0").mkdir()
    for name, text in (("current_link_speed", "2.5 GT/s PCIe\n"), ("current_link_width", "8\n"),
                       ("max_link_speed", "32.0 GT/s PCIe\n"), ("max_link_width", "16\n")):  # fmt: skip
        (tmp_path / "0000:0a:00.0" / name).write_text(text)
    assert machine.pcie_link("0000:0A:00.0", tmp_path) == "0000:0A:00.0, now 2.5 GT/s x8, at most 32.0 GT/s x16"


def test_doctor_tests_the_kernels_of_the_gpu_too(emulated, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "cupy", with_a_card())
    whole, asked = check.check_ops, []

    def a_few(device, kinds):
        asked.append((device.name, kinds))
        return whole(device, ("Q8_0",))

    monkeypatch.setattr(check, "check_ops", a_few)
    assert main(["doctor", "--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    expected = ("Card, compute 12.0", "kernels of the host device", "of the cuda device", "MOE_CUPY_SIMD=NAME")
    assert all(words in said for words in expected)
    assert [name for name, _ in asked] == ["host", "cuda"] and "IQ2_XS" in asked[1][1] and "WRONG" not in said


def test_heads_say_what_is_expected_of_the_kernels_that_are_timed():
    names = ("gemv_Q4_K", "expert_down_q8_Q4_K", "gemm_Q8_0", "embed_F16")
    assert {name: speed.expectation(name) for name in names} == {
        "gemv_Q4_K": "60-80 % of the copy bandwidth where cols >= 2048",
        "expert_down_q8_Q4_K": "50-70 % of the copy bandwidth",
        "gemm_Q8_0": "a third of the dp4a peak",
        "embed_F16": "a quarter of the bandwidth",
    }
    assert speed.expectation("rms_norm") == "" and "rms_norm" in stems()


def test_run_here_reports_a_device_that_cannot_be_opened():
    if machine.has_gpu():
        pytest.skip("there is a GPU here")
    assert run_here("machine", Request("cuda"), print).startswith("failed: DeviceError: --device cuda:")
