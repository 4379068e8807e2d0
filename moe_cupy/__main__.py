"""``python -m moe_cupy``."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. Imports within, so that Ctrl-C while they load is no traceback either."""
    try:
        from moe_cupy.cli import main as command
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return command(argv)


if __name__ == "__main__":
    sys.exit(main())
