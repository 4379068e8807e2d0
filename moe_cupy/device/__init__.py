"""Devices: where ops run and bytes lie. ``open_device`` picks one and never falls back silently."""

from __future__ import annotations

from typing import Any

from moe_cupy.device.base import Device, DeviceError

CHOICES = ("auto", "cuda", "host", "emulated")


def open_device(choice: str, threads: int | None = None, act: str = "f32") -> tuple[Device, str]:
    """The device asked for and a sentence that says why it. Raises DeviceError if it cannot be had."""
    if choice == "host":
        return (device := _host(threads, act)), f"host device, as asked: {device.how}"
    if choice == "auto":
        device = _host(threads, act)
        return device, f"auto chose the host device, as there is no CUDA device in this version: {device.how}"
    if choice == "cuda":
        raise DeviceError(f"--device cuda: {missing_for_cuda()}")
    if choice == "emulated":
        raise DeviceError("--device emulated: not in this version; use --device host")
    raise DeviceError(f"--device {choice}: unknown; use one of {', '.join(CHOICES)}")


def missing_for_cuda() -> str:
    """What stands between this machine and ``--device cuda``, and what to do about it."""
    try:
        import cupy
    except ImportError:
        found = "and CuPy is not installed"
    else:
        found = "though a GPU is here" if cupy.cuda.is_available() else "and CuPy finds no GPU or no driver"
    return f"there is no CUDA device in this version yet ({found}); use --device host"


def _host(threads: int | None, act: str) -> Any:
    from moe_cupy.device.host import HostDevice

    return HostDevice(threads, act)
