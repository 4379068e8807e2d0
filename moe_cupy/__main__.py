"""``python -m moe_cupy``, and the script ``moe-cupy``."""

from __future__ import annotations

from collections.abc import Sequence

from moe_ref import interrupts

if __name__ == "__main__":
    interrupts.watch()  # before anything large is imported


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    from moe_cupy.cli import main as command

    return command(argv)


def script() -> None:
    """Entry point of the script, which ends the process."""
    interrupts.watch()
    interrupts.run(main)


if __name__ == "__main__":
    interrupts.run(main)
