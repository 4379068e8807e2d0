"""The runtime: dense weights resident, experts through the cache, decode and prefill loops."""

from moe_cupy.engine.engine import Engine
from moe_cupy.engine.options import Options
from moe_cupy.engine.stats import Stats

__all__ = ["Engine", "Options", "Stats"]
