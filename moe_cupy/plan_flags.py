"""The flags of ``plan``, and llama.cpp's placement flags, which commands that run a model share with it."""

from __future__ import annotations

import argparse
from typing import Any

from moe_cupy.plan.flag_table import ON_OFF
from moe_cupy.plan.tables import ENGINES, KV_TYPES, PlanError
from moe_ref.command import add_model, decimal, number

MOST_GB = 1e6  # of memory, and of its bandwidth a second
SUMMARY = "Where every tensor goes, how fast it will be and why, what would help, and the equivalent commands."


class AddOverrides(argparse.Action):
    """The rules of all flags that place tensors in one list, in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        from moe_cupy.plan.rules import cpu_moe, n_cpu_ffn, n_cpu_moe, parse_overrides

        rules = list(namespace.overrides)
        try:
            if option in ("-ot", "--override-tensor"):
                in_bench = getattr(parser, "gives_switches_values", False)  # llama-bench parts rules by semicolons
                rules += parse_overrides(values.replace(";", ",") if in_bench else values)
            elif option in ("-cmoe", "--cpu-moe"):
                rules += cpu_moe()
            else:
                rules += (n_cpu_ffn if option in ("-ncffn", "--n-cpu-ffn") else n_cpu_moe)(values)
        except PlanError as error:
            parser.error(str(error))
        namespace.overrides = rules


def add_placement(parser: argparse.ArgumentParser) -> None:
    """llama.cpp's placement flags; ``overrides`` holds the rules of all of them."""
    parser.set_defaults(overrides=[])
    add = parser.add_argument_group("places (of no effect where there is one memory)").add_argument
    add("-ngl", "--gpu-layers", "--n-gpu-layers", dest="n_gpu_layers", metavar="N",
        help="layers on the GPU: N, auto (default), all")  # fmt: skip
    add("-ot", "--override-tensor", action=AddOverrides, metavar="RULES", help="regex=device,…; the first match wins")
    add("-cmoe", "--cpu-moe", action=AddOverrides, nargs=0, help="all experts in host memory")
    add("-ncmoe", "--n-cpu-moe", action=AddOverrides, type=number(0, 4096), metavar="N",
        help="experts of the first N layers in host memory")  # fmt: skip
    add("-ncffn", "--n-cpu-ffn", action=AddOverrides, type=number(0, 4096), metavar="N",
        help="dense networks of the first N layers in host memory")  # fmt: skip
    add(
        "-fit",
        "--fit",
        type=on_or_off,
        choices=["on", "off"],
        default="on",
        help="choose the places that are not given (default on)",
    )
    add(
        "-fitt",
        "--fit-target",
        "--fit-margin",
        type=number(0, 10**6),
        default=1024,
        metavar="MIB",
        help="VRAM to leave free",
    )
    add("-fitc", "--fit-ctx", type=number(1), default=4096, metavar="N", help="smallest context to choose")


def add_plan(commands: Any) -> None:
    """The command line of ``plan``."""
    sub = commands.add_parser("plan", help=SUMMARY, description=SUMMARY)
    sub.set_defaults(run=_run, model="")  # not None, which run_command refuses: --from-command names one
    add_model(sub)
    _add_machine(sub.add_argument_group("the machine"))
    _add_request(sub.add_argument_group("what is to run"))
    add_placement(sub)
    _add_outputs(sub.add_argument_group("what is shown"))


def _run(args: argparse.Namespace) -> None:
    from moe_cupy.plan_commands import cmd_plan

    cmd_plan(args)


def _add_machine(group: Any) -> None:
    add = group.add_argument
    add("--hardware", default=None, metavar="NAME",
        help="a machine or GPU of the table, or a profile.toml (default: this machine)")  # fmt: skip
    add("--vram", type=decimal(0, MOST_GB), metavar="GIB", help="memory of the GPU; 0: no GPU")
    add("--ram", type=decimal(0.001, MOST_GB), metavar="GB", help="host memory")
    add("--ram-bw", type=decimal(0.001, MOST_GB), metavar="GB/S", help="its bandwidth")
    add("--pcie", help="link such as 4x16")
    add("--cores", type=number(1, 4096), metavar="N", help="cores that compute")


def _add_request(group: Any) -> None:
    add = group.add_argument
    add("--quant", help="quantization of a preset, such as Q4_K_M")
    add("-c", "--ctx-size", type=number(0, 10**12), default=None, metavar="N", help="context; 0: the model's own")
    add("-ub", "--ubatch-size", type=number(1), default=512, metavar="N", help="prompt tokens at a time")
    for letter, what in (("k", "keys"), ("v", "values")):
        add(f"-ct{letter}", f"--cache-type-{letter}", choices=KV_TYPES, default="f16", help=f"type of cached {what}")
    add("--depth", type=number(0), default=1024, metavar="N", help="context already used by the predicted token")
    add("--mode", choices=["best", "cache", "static"], default="best",
        help="an expert cache, fixed places, or the best")  # fmt: skip
    add("--routes", help="route trace (.npz): replay it for the hit rate instead of the fitted curve")
    add("--from-command", metavar="LINE", help="explain a llama-server line (@FILE reads it from a file)")


def _add_outputs(group: Any) -> None:
    add = group.add_argument
    add("--explain", action="store_true", help="show the arithmetic of every figure")
    add("--tensors", action="store_true", help="list every tensor with its place and why")
    add("--emit", choices=ENGINES, help="print only this engine's command")
    add("--windows", action="store_true", help="commands quoted for cmd and PowerShell")
    add("--plot", metavar="PNG", help="predicted speed against cache size, as a picture")
    add("--json", action="store_true", help="one JSON object as the last line of stdout")


def on_or_off(text: str) -> str:
    """llama.cpp's words for either, as "on" and "off"; another word as it is."""
    return ON_OFF.get(text, text)
