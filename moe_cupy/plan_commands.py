"""``plan``: where every tensor should go on a machine, how fast that will be, and the command that does it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_cupy.plan import PlanError
from moe_cupy.plan.advice import advise
from moe_cupy.plan.choose import best_static, make_plan
from moe_cupy.plan.cost import size_text
from moe_cupy.plan.emit import command
from moe_cupy.plan.hardware import GB, Machine, machine_called, pcie_bytes_s
from moe_cupy.plan.hits import Curve, replayed
from moe_cupy.plan.llama_command import Command, read_command
from moe_cupy.plan.memory import MIB
from moe_cupy.plan.names import model_named, spelled
from moe_cupy.plan.planner import Plan, Request, cached_plan, static_plan
from moe_cupy.plan.report import as_json, no_plan, tensor_lines, text
from moe_cupy.plan.rules import gpu_layers
from moe_cupy.plan.shapes import Model, from_file, preset
from moe_cupy.plan.tables import DoesNotFit, table
from moe_cupy.this_machine import this_machine
from moe_ref.command import read_text
from moe_ref.console import note, print_json

WAYS: dict[str, Any] = {"cache": cached_plan, "static": best_static}  # of --mode


def cmd_plan(args: argparse.Namespace) -> None:
    """Plan, and show it as asked."""
    check_from_command(args)
    said = read_line(args.from_command) if args.from_command is not None else None
    if said and not (said.model or args.model):
        raise PlanError("--from-command: the line names no model; it needs -m FILE.gguf or -hf OWNER/NAME:QUANT, "
                        "or name one before --from-command")  # fmt: skip
    model = model_called(said.model if said and not args.model else args.model, args.quant)
    machine, found = machine_of(args)
    request = replace(said.request, depth=args.depth, overfull=True) if said else request_of(args)
    if said:
        machine = replace(machine, cores=args.cores or said.threads or machine.cores)
        if said.model and not args.model and said.model.endswith(".gguf"):
            model = replace(model, file=said.model)
        model = replace(model, repository=said.repository if not args.model else ())
        if said.request.used:
            model = replace(model, expert_used_count=min(said.request.used, model.expert_count))
        args.windows |= said.windows
    curve = curve_from(args.routes, model) if args.routes else None
    try:
        plan = planned(model, machine, request, curve, "as given" if said else args.mode)
    except DoesNotFit as error:
        if args.json:
            print_json(no_plan(model, machine, str(error)))
        raise
    plan = replace(plan, warnings=(*filter(None, [found]), *plan.warnings))
    if said:
        refused = (f"llama.cpp refuses this line: {why}" for why in said.refused)
        plan = replace(plan, warnings=(*refused, *plan.warnings, *said.remarks))
    elif request.is_manual:
        note("note: placement flags given by hand: --fit is off" if args.fit == "on" else "note: --fit is off")
    if args.plot:
        from moe_cupy.plan.plot import plot_sizes

        plot_sizes(model, machine, request, args.plot, curve)
        note(f"{args.plot}: predicted speed against cache size")
    show(args, plan, curve)
    if said and said.refused:
        raise PlanError(f"llama.cpp refuses this line: {'; '.join(said.refused)}")
    if plan.too_full:
        raise DoesNotFit(plan.too_full)


def check_from_command(args: argparse.Namespace) -> None:
    """Raise PlanError for flags beside --from-command that its line has to say itself."""
    usual: dict[str, tuple[str, Any]] = {
        "-c": ("ctx_size", None), "-ub": ("ubatch_size", 512), "-ctk": ("cache_type_k", "f16"),
        "-ctv": ("cache_type_v", "f16"), "-ngl": ("n_gpu_layers", None), "--fit": ("fit", "on"),
        "-ot, --cpu-moe, --n-cpu-moe": ("overrides", []), "--fit-target": ("fit_target", 1024),
        "--fit-ctx": ("fit_ctx", 4096), "--mode": ("mode", "best"),
    }  # fmt: skip
    given = [flag for flag, (name, value) in usual.items() if getattr(args, name) != value]
    if args.from_command is not None and given:
        raise PlanError(f"--from-command with {', '.join(given)}: the line alone says what is explained; put it there")


def show(args: argparse.Namespace, plan: Plan, curve: Curve | None) -> None:
    if args.emit and not args.json:
        print(command(plan, args.emit, args.windows))
        for warning in plan.warnings:
            note(f"warning: {warning}")
        return
    if not args.json or args.tensors or args.explain:
        if args.tensors or args.from_command:
            print("\n".join(tensor_lines(plan)) + "\n")
        advice = () if plan.too_full else advise(plan, curve, way=WAYS.get(args.mode, make_plan))
        print(text(plan, advice, args.explain, windows=args.windows))
    if args.json:
        print_json(as_json(plan, args.windows))


def read_line(line: str) -> Command:
    return read_command(read_text(line[1:]) if line.startswith("@") else line)


def model_called(name: str | None, quant: str | None) -> Model:
    """A GGUF file (the first part of a split one stands for all), or a preset."""
    if not name:
        raise PlanError("no model: give a GGUF file or a preset; presets: " + ", ".join(sorted(table("models"))))
    if os.path.exists(name):
        from moe_ref.split import open_readable

        file, remarks = open_readable(name)
        with file:
            model = from_file(file)
        if quant:
            remarks = [*remarks, f"--quant {quant}: a file has the types that it has; it is planned as it is"]
        return replace(model, remarks=(*model.remarks, *remarks))
    found, said = model_named(name)
    model = preset(found, quant or said)
    if name.endswith(".gguf"):
        remark = f"{name}: no such file here; planned as {found} {model.quant}"
    elif spelled(name) != found.lower():
        remark = f"{name}: planned as {found} {model.quant}"
    else:
        return model
    return replace(model, remarks=(*model.remarks, remark))


def machine_of(args: argparse.Namespace) -> tuple[Machine, str]:
    """The machine of --hardware, or this one and a sentence about it, changed by what the other flags say."""
    machine, found = (machine_called(args.hardware), "") if args.hardware else this_machine()
    return changed_by(args, machine), found


def changed_by(args: argparse.Namespace, machine: Machine) -> Machine:
    """A card is asked for by --vram above 0."""
    changed = {"ram_bytes": args.ram and int(args.ram * GB), "ram_bandwidth": args.ram_bw and args.ram_bw * GB,
               "cores": args.cores}  # fmt: skip
    machine = replace(machine, **{name: value for name, value in changed.items() if value})
    if args.vram == 0:
        return replace(machine, gpu=None, name=f"{machine.name} without GPU")
    if (args.vram or args.pcie is not None) and machine.gpu is None:
        raise PlanError(f"--vram, --pcie: {machine.name} has no GPU; name one with --hardware, such as rtx5080-128g")
    if args.vram and machine.gpu:
        machine = replace(machine, gpu=replace(machine.gpu, vram_bytes=int(args.vram * 2**30)))
    if args.pcie is not None and machine.gpu:
        pcie_bytes_s(args.pcie)
        machine = replace(machine, gpu=replace(machine.gpu, pcie=args.pcie, link_measured=0.0))
    return machine


def request_of(args: argparse.Namespace) -> Request:
    """The flags as a request. Raises PlanError for flags that contradict each other."""
    threshold = os.environ.get("GGML_OP_OFFLOAD_MIN_BATCH", "32")
    if not threshold.isdecimal():
        raise PlanError(f"GGML_OP_OFFLOAD_MIN_BATCH={threshold}: expected a whole number")
    check_flags(args)
    return Request(
        ctx=args.ctx_size, ctk=args.cache_type_k, ctv=args.cache_type_v, ubatch=args.ubatch_size, depth=args.depth,
        ngl=args.n_gpu_layers, overrides=tuple(args.overrides), fit=args.fit == "on", fit_target=args.fit_target * MIB,
        fit_ctx=args.fit_ctx, threshold=int(threshold),
    )  # fmt: skip


def check_flags(args: argparse.Namespace) -> None:
    """Raise PlanError for placement flags of which one makes another meaningless."""
    flags = {rule.flag for rule in args.overrides}
    if {"--cpu-moe", "--n-cpu-moe"} <= flags:
        raise PlanError("--cpu-moe and --n-cpu-moe contradict each other: all experts, or those of the first N layers")
    if args.n_gpu_layers == "0" and flags & {"--cpu-moe", "--n-cpu-moe"}:
        raise PlanError("-ngl 0 with --cpu-moe or --n-cpu-moe: nothing is on the GPU that could be kept off it; "
                        "drop -ngl 0, or the other")  # fmt: skip
    if getattr(args, "mode", "") == "cache" and (args.overrides or args.n_gpu_layers not in (None, "auto")):
        raise PlanError("--mode cache with placement flags: the cache moves experts itself; drop one of them")


def planned(model: Model, machine: Machine, request: Request, curve: Curve | None, mode: str) -> Plan:
    return (WAYS | {"best": make_plan, "as given": static_plan})[mode](model, machine, request, curve)


def curve_from(path: str, model: Model) -> Curve:
    """Hit rates of the default policy replayed on a trace, at the shares between which lines are drawn."""
    from moe_cupy.lab.runs import Job, run
    from moe_cupy.lab.trace import read_trace

    trace = read_trace(path)
    theirs, ours = (trace.n_experts, trace.shape[2]), (model.expert_count, model.expert_used_count)
    if theirs != ours:
        raise PlanError(f"--routes {path}: of a model with {theirs[0]} experts of which {theirs[1]} are used; "
                        f"{model.name} has {ours[0]} and uses {ours[1]}: record a trace of this model")  # fmt: skip
    shares = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
    least = model.used_share / max(1, len(model.moe_layers))
    points = [(s, float(run(Job(path, "echo", "none", s))["hit_rate"])) for s in shares if s >= least]
    return replayed([*points, (1.0, 1.0)], f"policy echo on {Path(path).name}")


def placement_lines(args: argparse.Namespace) -> list[str]:
    """What llama.cpp's placement flags find in a model that is about to be run; [] without any.

    Raises PlanError for flags that contradict each other, before a model is loaded.
    """
    if not args.overrides and args.n_gpu_layers in (None, "auto"):
        return []
    check_flags(args)
    model = model_called(args.model, None)
    gpu_layers(args.n_gpu_layers, model.layers)
    lines = ["placement flags given by hand: --fit is off"] if args.fit == "on" else []
    rule_of = {t.name: next((r for r in args.overrides if r.found_in(t.name)), None) for t in model.tensors}
    found: dict[str, list[int]] = {}
    for rule in args.overrides:  # those of --n-cpu-moe differ in the layer alone: one line
        called = f"{rule.flag} {rule.pattern}={rule.device}" if rule.flag == "-ot" else rule.flag
        found.setdefault(called, []).extend(t.nbytes for t in model.tensors if rule_of[t.name] is rule)
    return lines + [f"{called}: {counted(sizes)}" for called, sizes in found.items()]


def counted(sizes: Sequence[int]) -> str:
    """Tensors of these bytes, as a person reads them."""
    return f"{len(sizes)} tensor{'s' * (len(sizes) != 1)}, {size_text(sum(sizes))}"
