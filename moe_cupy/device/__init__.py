"""Devices: where ops run and bytes lie. ``open_device`` picks one and never falls back silently."""

from __future__ import annotations

from typing import Any

from moe_cupy.device.base import Device, DeviceError

CHOICES = ("auto", "cuda", "host", "emulated")
EXTRA = "moe-offload[cuda%d]"


def open_device(choice: str, threads: int | None = None, act: str = "f32") -> tuple[Device, str]:
    """The device asked for and a sentence that says why it. Raises DeviceError if it cannot be had."""
    if choice == "host":
        return (device := _host(threads, act)), f"host device, as asked: {device.how}"
    if choice == "auto":
        return _auto(threads, act, missing_for_cuda())
    if choice == "cuda":
        if reason := missing_for_cuda():
            raise DeviceError(f"--device cuda: {reason}; or use --device host")
        return _cuda(act), "cuda device, as asked" + _rounding(act)
    if choice == "emulated":
        from moe_cupy.device.emulated import EmulatedDevice

        return EmulatedDevice(act), "emulated device: the CUDA kernels on the CPU, for tests" + _rounding(act)
    raise DeviceError(f"--device {choice}: unknown; use one of {', '.join(CHOICES)}")


def missing_for_cuda() -> str:
    """What stands between this machine and ``--device cuda``, and what to do about it; empty if it is usable."""
    try:
        import cupy
    except ImportError:
        return f"CuPy is not installed: pip install '{EXTRA % 13}' (or '{EXTRA % 12}' for a CUDA 12 driver)"
    from moe_cupy.device.cuda import missing

    return missing(cupy)


def _auto(threads: int | None, act: str, reason: str) -> tuple[Device, str]:
    if reason:
        return (device := _host(threads, act)), f"auto chose the host device ({device.how}): {reason}"
    return _cuda(act), "auto chose the cuda device: a GPU is here" + _rounding(act)


def _rounding(act: str) -> str:
    return "" if act == "f32" else "; activations rounded to 8 bits in blocks of 32 where they meet quantized weights"


def _cuda(act: str) -> Device:
    import cupy

    from moe_cupy.device.cuda import CudaDevice

    return CudaDevice(cupy, act)


def _host(threads: int | None, act: str) -> Any:
    from moe_cupy.device.host import HostDevice
    from moe_cupy.kernels.host.compiled import forget_sources

    forget_sources()
    return HostDevice(threads, act)
