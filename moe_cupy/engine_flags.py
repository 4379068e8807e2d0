"""The flags of every command that runs a model: how to run, in llama.cpp's spellings."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from moe_cupy.cache import POLICIES
from moe_cupy.device import CHOICES
from moe_cupy.plan_flags import add_placement
from moe_cupy.prefetch import PREFETCHERS
from moe_ref.command import add_model, number

CACHE_TYPES = "f32 (default), f16, bf16, q8_0, q4_0"


def add_engine(parser: argparse.ArgumentParser, act: str, threads: Any = int, several: bool = False) -> None:
    """How to run; ``act`` is the default of --act, ``threads`` reads the value of -t, ``several`` allows lists."""
    add_model(parser, several)
    _add_context(parser.add_argument_group("model and context"))
    _add_computing(parser.add_argument_group("computing"), act, threads)
    _add_experts(parser.add_argument_group("experts in memory"), several)
    add_placement(parser)


def _add_context(group: Any) -> None:
    add = group.add_argument
    add("-c", "--ctx-size", type=int, default=0, metavar="N", help="context; 0: the model's, at most 4096 (default)")
    add("-ub", "--ubatch-size", type=int, default=512, metavar="N", help="prompt tokens at a time")
    add("-b", "--batch-size", type=number(1), metavar="N", help="bounds -ub, as in llama.cpp")
    add("-ctk", "--cache-type-k", default="f32", metavar="TYPE", help=f"type of cached keys: {CACHE_TYPES}")
    add("-ctv", "--cache-type-v", default="f32", metavar="TYPE", help=f"type of cached values: {CACHE_TYPES}")


def _add_computing(group: Any, act: str, threads: Any) -> None:
    add = group.add_argument
    add("-dev", "--device", type=device_called, choices=CHOICES, default="auto", help="where to compute")
    add("-t", "--threads", type=threads, default=None, metavar="N", help="threads for compute (default: all cores)")
    add("--act", choices=("f32", "q8"), default=act, help="activations where they meet quantized weights: exact, or "
        "rounded to 8 bits as llama.cpp does, several times faster")  # fmt: skip
    add(
        "--decode",
        choices=["host", "device"],
        default="host",
        help="where missing experts are chosen: by the host, or by kernels on the GPU",
    )
    add("-v", "--verbose", "--log-verbose", action="store_true", help="list every tensor with its place and why")


def several_of(table: Iterable[str]) -> dict[str, Any]:
    """For add_argument: names of ``table`` with commas between."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if wrong := [name for name in names if name not in table]:
            raise argparse.ArgumentTypeError(f"{wrong[0][:40]!r} is unknown; accepted: {', '.join(table)}")
        return names

    return {"type": parse}


def _add_experts(group: Any, several: bool) -> None:
    add, lists = group.add_argument, " (with commas between, each is measured)" if several else ""
    one_of: Any = several_of if several else lambda table: {"choices": list(table)}
    cache: Any = {"type": lambda text: text.split(",")} if several else {}
    add("--cache", default="auto", metavar="SIZE", **cache,
        help=f"expert memory: 2GiB, 25%%, slots:N or auto (default){lists}")  # fmt: skip
    add("--host-cache", default="auto", metavar="SIZE",
        help="experts in page-locked RAM before a GPU: 2GiB, 25%%, slots:N or auto (default)")  # fmt: skip
    add("--policy", **one_of(POLICIES), default="echo", metavar="NAME",
        help=f"which expert is evicted (default echo): {', '.join(POLICIES)}{lists}")  # fmt: skip
    add("--prefetch", **one_of(PREFETCHERS), default="none", metavar="NAME",
        help=f"which experts are read ahead (default none): {', '.join(PREFETCHERS)}{lists}")  # fmt: skip
    add("--store", metavar="STORE", help="read experts from this file, made by repack (default: from the model)")
    add("--no-direct-io", dest="direct_io", action="store_false", help="read through the page cache")
    add("--reads", dest="reads_in_flight", type=number(1, 256), default=4, metavar="N", help="expert reads in flight")


def device_called(name: str) -> str:
    """One of CHOICES, also by llama.cpp's name. Raises ArgumentTypeError for a second card."""
    if name == "none":
        return "host"
    if name in ("CUDA0", "ROCm0"):
        return "cuda"
    if name.startswith("CUDA") and name not in CHOICES:
        raise argparse.ArgumentTypeError(f"{name[:40]}: one GPU is used, the first that is visible; "
                                         "CUDA_VISIBLE_DEVICES=1 makes the second the first")  # fmt: skip
    return name
