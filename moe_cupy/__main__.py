"""``python -m moe_cupy``."""

import sys

from moe_cupy.cli import main

if __name__ == "__main__":
    sys.exit(main())
