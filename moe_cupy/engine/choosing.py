"""What a sampler has to see of the logits, and the token that it takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_cupy.kernels.cuda.launches import MOST_RANKS
from moe_ref.sampling import Sampler


class Offer(NamedTuple):
    """Logits to choose from: all of them, or the largest, best first, with their ids."""

    logits: np.ndarray  # [n]
    ids: np.ndarray | None = None  # int32 [n]; None: 0, 1, 2, ...

    def taken(self, sampler: Sampler) -> int:
        """The token that ``sampler`` chooses."""
        at = int(sampler.sample(self.logits))
        return at if self.ids is None else int(self.ids[at])


def deciding(sampler: Sampler, vocab_size: int) -> int:
    """How many of the largest logits decide what ``sampler`` chooses; 0: all, or more than a kernel finds."""
    if type(sampler) is not Sampler:
        return 0
    count = 1 if sampler.temp <= 0 else sampler.top_k
    return count if 0 < count <= min(MOST_RANKS, vocab_size) else 0
