"""This machine for ``plan``: as ``doctor --write`` measured it, otherwise what can be seen of it, the rest assumed."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from moe_cupy.device.memory import free_and_total
from moe_cupy.plan.hardware import GIB, Gpu, Machine, gpu_called, machine_called, machine_from
from moe_cupy.plan.tables import PlanError

NAME = "this machine"
ASSUMED = {"ram": "DDR4-3200", "channels": 2, "disk": "nvme-gen3"}  # cautious: what is faster shows when it is measured
QUERY = ["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
OTHERS = "plan for another with --hardware NAME"


def profile_path() -> Path:
    """Where ``doctor --write`` puts the profile, and ``plan`` looks for it, when neither is told a file."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "moe_cupy" / "this-machine.toml"


def this_machine() -> tuple[Machine, str]:
    """The machine, and a sentence on what is known of it."""
    if profile_path().is_file():
        machine = replace(machine_called(str(profile_path())), name=NAME)
        return machine, f"planned for this machine as measured in {profile_path()}; {OTHERS}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    row = {**ASSUMED, "ram_gb": free_and_total()[1] / 1e9, "cores": cores}
    gpu, remark = found_gpu()
    machine = replace(machine_from(row, NAME, NAME), gpu=gpu, ram_kind=f"assumed: {ASSUMED['ram']} x 2")
    return machine, (f"planned for this machine, found: {cores} cores, {row['ram_gb']:.0f} GB of RAM, {remark}; "
                     f"assumed: {ASSUMED['ram']} in two channels, a disk of {machine.disk_read / 1e9:g} GB/s; "
                     f"measure it with `moe-cupy doctor --write`, or {OTHERS}")  # fmt: skip


def found_gpu() -> tuple[Gpu | None, str]:
    """The first card that nvidia-smi lists, with the memory that it says, and how to call what was found."""
    line = first_card()
    if not line:
        return None, "no NVIDIA GPU"
    name, _, mib = line.rpartition(",")
    try:
        gpu = gpu_called(name)
    except PlanError:
        return None, f"a GPU ({name.strip()}) that is not in the table and is left out"
    return replace(gpu, vram_bytes=round(int(mib) / 1024) * GIB), gpu.name


def first_card() -> str:
    """``NVIDIA GeForce RTX 5080, 16303``, or nothing where there is no driver or no card."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, *QUERY], capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    first = done.stdout.strip().split("\n")[0]
    return first if done.returncode == 0 and first.rpartition(",")[2].strip().isdecimal() else ""
