"""What commands do before they run a model: the kernels are made ready, the engine is opened, and both are said."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

from moe_ref.command import counted
from moe_ref.console import Settings, note, warn


def with_kernels(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Run a command once the kernels are there; that they are compiled is said where it has to be done."""
    for remark in getattr(args, "remarks", ()):
        note(remark)
    with compilation_said():
        import_module("moe_cupy.engine")
        if getattr(args, "device", "host") != "cuda":
            import_module("moe_cupy.device.host")  # and with it all kernels of the CPU, so that this is said once
    return run(args)


def compilation_said() -> AbstractContextManager[None]:
    """Says that kernels are compiled, if any are, and how long that took; nothing with ``--quiet``."""
    from moe_cupy.numba_cache import compilation_told

    return nullcontext() if Settings.quiet else compilation_told(sys.stderr)


def open_engine(args: argparse.Namespace) -> Any:
    """The engine that the flags describe; says on stderr which device and placement were chosen."""
    from moe_cupy.engine import Engine, Options
    from moe_cupy.engine.spelling import flags
    from moe_cupy.plan_commands import placement_lines

    for line in placement_lines(args):
        note(line)
    names = Options.__dataclass_fields__
    options = {name: value for name, value in vars(args).items() if name in names}
    options["ubatch_size"] = min(args.ubatch_size, args.batch_size or args.ubatch_size)  # as llama.cpp bounds it
    with flags(), compilation_said():  # a GPU may leave experts to the CPU
        engine = Engine(args.model, **{"progress": True} | options)
    note("\n".join([engine.device_reason, *engine.placement.lines(), engine.kv.line()]))
    if args.verbose:
        from moe_cupy.tools.report import tensor_lines

        note("\n".join(tensor_lines(engine)))
    if engine.kv.capacity > engine.config.context_length:
        warn(f"-c {engine.kv.capacity}: this model was made for {engine.config.context_length} tokens; "
             "what it writes beyond them is not to be trusted")  # fmt: skip
    if args.threads:
        from moe_cupy.device.host import usable_cores

        if args.threads > usable_cores():
            cores = counted(usable_cores(), "core")
            note(f"-t {args.threads}: this machine has {cores}; more threads than that are slower")
    return engine
