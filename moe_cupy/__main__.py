"""``python -m moe_cupy``."""

import sys


def main() -> int:
    """Entry point; returns the exit code. Imports within, so that Ctrl-C while they load is no traceback either."""
    try:
        from moe_cupy.cli import main as command
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
