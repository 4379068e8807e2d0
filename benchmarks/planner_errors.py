"""Predictions against figures that others measured, one by one: python benchmarks/planner_errors.py [--terms]

Rows are in planner_measured.toml, which was seen while constants were chosen, and in planner_heldout.toml, which was
not; efficiencies are the planner's own and the same for all.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_cupy.plan.explain import term_lines
from moe_cupy.plan.hardware import machine_from
from moe_cupy.plan.memory import MIB
from moe_cupy.plan.planner import Plan, Request, cached_plan, static_plan
from moe_cupy.plan.rules import n_cpu_moe, parse_overrides
from moe_cupy.plan.shapes import preset
from moe_cupy.plan.tables import read_toml

HERE = Path(__file__).parent
FILES = {"measured elsewhere": HERE / "planner_measured.toml", "held out": HERE / "planner_heldout.toml"}


def rows(kind: str = "row", path: Path = FILES["measured elsewhere"]) -> list[dict[str, Any]]:
    """Rows of decoding speeds, or with "prompt" of prompts."""
    return list(read_toml(str(path))[kind])


def predict(row: dict[str, Any]) -> Plan:
    """The plan of a row, with the flags that were used."""
    model = preset(row["model"], row["quant"])
    machine = machine_from(row["machine"], row["name"], row["name"])
    rules = [*n_cpu_moe(min(row.get("n_cpu_moe", 0), model.layers)),
             *(parse_overrides(row["overrides"]) if "overrides" in row else ())]  # fmt: skip
    request = Request(
        ctx=row.get("ctx", 4096), overrides=tuple(rules), fit_target=row.get("fit_target", 1024) * MIB,
        depth=row.get("depth", row.get("prompt", 512)), ubatch=row.get("ubatch", 512), ctk=row.get("kv", "f16"),
        ctv=row.get("kv", "f16"), pageable=row.get("pageable", False),
    )  # fmt: skip
    if row.get("mode") == "cache":
        slots = round(row["share"] * model.experts) if "share" in row else None
        return cached_plan(model, machine, request, None, slots, row["way"], row["misses"])
    return static_plan(model, machine, request)


def report(what: str, kind: str, speed: Callable[[Plan], float], with_terms: bool) -> None:
    """A table of one kind of row, and the median error."""
    errors = []
    print(f"| {what} ({kind}) | tok/s | predicted | error | assumed | where |\n|---|--:|--:|--:|---|---|")
    for row in rows({"decode": "row"}.get(kind, kind), FILES[what]):
        plan = predict(row)
        errors.append(speed(plan) / row["measured"] - 1)
        print(f"| {row['name']} | {row['measured']:g} | {speed(plan):.3g} | {errors[-1]:+.0%} "
              f"| {row.get('assumed', '')} | {row['source']} |")  # fmt: skip
        if with_terms:
            print(
                "\n".join(
                    term_lines(plan.terms, 1)
                    if kind == "decode"
                    else term_lines(plan.prompt_terms, plan.settings.ubatch)
                )
            )
    median = statistics.median(map(abs, errors))
    within = sum(abs(error) <= 0.25 for error in errors)
    print(f"\n{what}, {kind}: {len(errors)} rows, median |error| {median:.0%}, {within} within 25 %\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--terms", action="store_true", help="show the arithmetic of every row")
    args = parser.parse_args()
    for what in FILES:
        report(what, "decode", lambda plan: plan.decode_tok_s, args.terms)
        report(what, "prompt", lambda plan: plan.prefill_tok_s, args.terms)


if __name__ == "__main__":
    main()
