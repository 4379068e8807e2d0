"""Results of replays as tables and pictures that a person can read who has never seen the project."""

from __future__ import annotations

from typing import Any


def pyplot() -> Any:
    """matplotlib without a window. Raises RuntimeError, naming the remedy, where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
