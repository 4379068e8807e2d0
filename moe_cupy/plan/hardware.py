"""Machines: read from the tables or a profile, changed by flags, and what they reach in practice."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_cupy.plan.tables import PlanError, read_toml, table

GB, GIB = 10**9, 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. Bandwidths in bytes/s, throughput in operations/s; ``pcie`` such as "5x16"."""

    name: str
    vram_bytes: int
    bandwidth: float
    tensor: float
    pcie: str
    compute: str = ""
    source: str = ""
    link_measured: float = 0.0  # bytes/s; 0: what PCIe promises times the table's efficiency

    @property
    def link_theoretical(self) -> float:
        return pcie_bytes_s(self.pcie)

    @property
    def link_practical(self) -> float:
        return self.link_measured or practical(self.link_theoretical)


@dataclass(frozen=True, slots=True)
class Machine:
    """A computer; ``ram_bandwidth`` and ``disk_read`` in bytes/s as the data sheet says or as measured."""

    name: str
    gpu: Gpu | None
    ram_bytes: int
    ram_bandwidth: float
    ram_kind: str
    cores: int
    disk_read: float
    disk_latency: float = 80e-6
    sockets: int = 1
    disk_is_known: bool = True
    measured: Mapping[str, Any] = field(default_factory=dict)  # of a profile that doctor wrote

    @property
    def ram_practical(self) -> float:
        """Bytes/s at which the CPU reads matrices."""
        return self.ram_bandwidth * table("engines")["cpu"]["bandwidth_efficiency"] * self.socket_factor

    @property
    def socket_factor(self) -> float:
        extra: float = table("engines")["cpu"]["second_socket"]
        return 1 + extra * (self.sockets - 1)

    @property
    def disk_practical(self) -> float:
        """Bytes/s of reads as large as an expert."""
        return self.disk_read * table("engines")["disk"]["efficiency"]


def pcie_bytes_s(text: str) -> float:
    """Theoretical bytes/s each way of "5x16" (or 4.0x8). Raises PlanError for what is no such link."""
    tab = table("hardware")["pcie"]
    match = re.fullmatch(r"(?:gen)?(\d)(?:\.0)?\s*x\s*(\d+)", text.strip().lower())
    if not match or match[1] not in tab["gigatransfers"] or int(match[2]) not in tab["lanes"]:
        gens = ", ".join(tab["gigatransfers"])
        raise PlanError(f"--pcie {text}: expected generation x lanes such as 4x16 (generations {gens}; lanes 1 to 16)")
    sent, of = tab["code"]
    return float(tab["gigatransfers"][match[1]] * 1e9 / 8 * sent / of * int(match[2]))


def practical(theoretical: float) -> float:
    """Bytes/s that copies out of page-locked memory reach of a PCIe link."""
    efficiency: float = table("engines")["link"]["efficiency"]
    return theoretical * efficiency


def ram_bytes_s(kind: str, channels: int) -> float:
    """Theoretical bytes/s of memory such as "DDR5-5600". Raises PlanError naming the nearest kind."""
    tab = table("hardware")["ram"]
    known = [name for name in tab if name.startswith("DDR")]
    if kind.upper() not in known:
        near = difflib.get_close_matches(kind.upper(), known, 3, 0.3)
        raise PlanError(f"--ram-type {kind}: unknown; nearest: {', '.join(near or known)}")
    return float(tab[kind.upper()] * 1e6 * tab["bytes"] * channels)


def gpu_called(name: str) -> Gpu:
    """A card of the table, whatever the case and the spaces. Raises PlanError naming the nearest."""
    cards = table("hardware")["gpu"]
    short = {_squeezed(key): key for key in cards}
    key = short.get(_squeezed(name)) or short.get("rtx" + _squeezed(name))
    if key is None:
        near = [short[s] for s in difflib.get_close_matches(_squeezed(name), short, 3, 0.4)]
        raise PlanError(f"GPU {name}: unknown; nearest: {', '.join(near) or 'none'}; all: {', '.join(cards)}")
    row = cards[key]
    return Gpu(key, row["vram"] * GIB, row["bandwidth"] * 1e9, row["tensor"] * 1e12, row["pcie"], row["compute"],
               row["source"])  # fmt: skip


def _squeezed(name: str) -> str:
    return re.sub(r"(\d)gi?b$", r"\1g", re.sub(r"[\s_-]|nvidia|geforce", "", name.lower()))


def machine_called(name: str) -> Machine:
    """A machine of the table, a profile (a path that ends in .toml), or a card with 64 GB of DDR5-5600 beside it."""
    if name.endswith(".toml"):
        return machine_from(read_toml(name), Path(name).stem, name)
    rows = table("hardware")["machine"]
    if name.lower() in rows:
        return machine_from(rows[name.lower()], name.lower(), name)
    try:
        gpu = gpu_called(name)
    except PlanError:
        near = difflib.get_close_matches(name.lower(), rows, 3, 0.4)
        raise PlanError(
            f"--hardware {name}: unknown; nearest: {', '.join(near or list(rows))}; or a GPU of the table, or a "
            f"profile.toml of `doctor --write`; machines: {', '.join(rows)}"
        ) from None
    row = {"ram": "DDR5-5600", "channels": 2, "ram_gb": 64, "cores": 8, "disk": "nvme-gen4"}
    return replace(machine_from(row, gpu.name, name), gpu=gpu)


FIELDS: dict[str, Any] = {
    "gpu": str, "ram": str, "channels": int, "ram_gb": (int, float), "cores": int, "disk": str, "what": str,
    "sockets": int, "pcie": str, "vram_gb": (int, float), "gpu_bandwidth": (int, float), "link": (int, float),
    "gpu_tensor": (int, float), "ram_bandwidth": (int, float), "disk_read": (int, float), "measured": dict,
    "disk_latency_us": (int, float),
}  # fmt: skip


def machine_from(row: Mapping[str, Any], name: str, where: str) -> Machine:
    """A machine out of a table's row or a profile. Raises PlanError naming the field that is wrong or missing."""
    for key, value in row.items():
        if key not in FIELDS:
            near = difflib.get_close_matches(key, FIELDS, 1, 0.5)
            raise PlanError(f"{where}: {key}: unknown{f'; did you mean {near[0]}' if near else ''}; fields: "
                            f"{', '.join(FIELDS)}")  # fmt: skip
        positive = not isinstance(value, (int, float)) or value > 0
        if not isinstance(value, FIELDS[key]) or isinstance(value, bool) or not positive:
            raise PlanError(f"{where}: {key} = {value!r}: expected {_kind(FIELDS[key])}")
    for key in ("ram_gb", "cores"):
        if key not in row:
            raise PlanError(f"{where}: {key}: missing; a machine has at least ram_gb, cores and ram or ram_bandwidth")
    read, latency = _disk(row, where)
    return Machine(
        name=name, gpu=_gpu(row), ram_bytes=int(row["ram_gb"] * GB), ram_bandwidth=_ram(row, where),
        ram_kind=f"{row['ram']} x {row.get('channels', 2)}" if "ram" in row else "measured", cores=row["cores"],
        disk_read=read, disk_latency=latency, sockets=row.get("sockets", 1),
        disk_is_known="disk" in row or "disk_read" in row, measured=row.get("measured", {}),
    )  # fmt: skip


def _kind(kind: Any) -> str:
    return {str: "text", int: "a whole number above 0", dict: "a table"}.get(kind, "a number above 0")


def _gpu(row: Mapping[str, Any]) -> Gpu | None:
    if "gpu" not in row:
        return None
    gpu = gpu_called(row["gpu"])
    if "pcie" in row:
        pcie_bytes_s(row["pcie"])
        gpu = replace(gpu, pcie=row["pcie"])
    return replace(
        gpu,
        vram_bytes=int(row["vram_gb"] * GIB) if "vram_gb" in row else gpu.vram_bytes,
        bandwidth=row.get("gpu_bandwidth", gpu.bandwidth / GB) * GB,
        tensor=row.get("gpu_tensor", gpu.tensor / 1e12) * 1e12,
        link_measured=row.get("link", 0.0) * GB,
    )


def _ram(row: Mapping[str, Any], where: str) -> float:
    if "ram_bandwidth" in row:
        return float(row["ram_bandwidth"] * GB)
    if "ram" not in row:
        raise PlanError(f'{where}: ram or ram_bandwidth: missing; such as ram = "DDR5-5600" with channels = 2')
    return ram_bytes_s(row["ram"], row.get("channels", 2))


def _disk(row: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Bytes/s and seconds of latency."""
    disks = table("hardware")["disk"]
    kind = row.get("disk", "nvme-gen3")
    if kind not in disks:
        raise PlanError(f"{where}: disk = {kind!r}: unknown; use one of {', '.join(disks)}")
    read = row.get("disk_read", disks[kind]["read"]) * GB
    return float(read), row.get("disk_latency_us", disks[kind]["latency_us"]) * 1e-6
