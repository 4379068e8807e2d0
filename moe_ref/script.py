"""The script ``moe-ref``."""

from __future__ import annotations

from moe_ref import interrupts


def main() -> int:
    """Entry point; returns the exit code."""
    from moe_ref.__main__ import main as command

    return command()


def script() -> None:
    """Entry point of the script, which ends the process; NumPy is imported after Ctrl-C is heard."""
    interrupts.watch()
    interrupts.run(main)
