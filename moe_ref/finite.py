"""A number that is not finite (NaN or infinite) is refused where it first appears, by the name of what it came from.

Otherwise it may vanish: no comparison with NaN is true, so a router never chooses that expert and a clamp returns its
limit; a softmax gives minus infinity no weight; rounding to 8 bits makes a NaN an ordinary number.
"""

from __future__ import annotations

import numpy as np

FILE_IS_DAMAGED = "the file is damaged: download or convert it again"
OVERFLOW = "weights too large for float32 arithmetic, or a wrong key in the file"


class NonFiniteError(RuntimeError):
    """A weight or a result is NaN or infinite: what follows from it would not be what the model says."""


def check_finite(x: np.ndarray, what: str, remedy: str = OVERFLOW) -> np.ndarray:
    """``x``, of any shape, as it is; raises NonFiniteError that names ``what`` unless every number in it is finite."""
    fine = np.isfinite(x)
    if fine.all():
        return x
    first = tuple(np.argwhere(~fine)[0].tolist())
    found = f"{fine.size - np.count_nonzero(fine)} of {fine.size} numbers not finite, the first is {x[first]}"
    raise NonFiniteError(f"{what}: {found} at {list(first)}; {remedy}")


def nan_unless_finite(x: np.ndarray) -> np.ndarray:
    """``x`` with NaN in place of infinities, which a root, a limit or a softmax could turn into ordinary numbers."""
    return np.where(np.isfinite(x), x, x.dtype.type(np.nan))
