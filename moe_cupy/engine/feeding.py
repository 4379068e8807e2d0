"""How a prompt is fed: some tokens at a time, and how far it is shown where that takes long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_ref.console import progress


def in_steps(ids: np.ndarray, size: int, forward: Any, is_shown: bool) -> Iterator[np.ndarray]:
    """``ids`` [T], at most ``size`` at a time; ``forward`` says when a layer is done."""
    steps = [ids[i : i + size] for i in range(0, len(ids), size)]
    if not is_shown:
        yield from steps
        return
    with progress("prompt", len(ids) * len(forward.config.layers)) as forward.progress:
        try:
            yield from steps
        finally:
            forward.progress = None
