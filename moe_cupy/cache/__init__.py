"""Slots and replacement policies as pure integers: no arrays, no device, replayable."""

from moe_cupy.cache.budget import BudgetError, Request, SizeClass, allot, parse_cache
from moe_cupy.cache.catalogue import POLICIES
from moe_cupy.cache.policies import Geometry, Policy, Scores
from moe_cupy.cache.pool import Counters, ExpertCache, Load, Plan, Pool

__all__ = [
    "POLICIES",
    "BudgetError",
    "Counters",
    "ExpertCache",
    "Geometry",
    "Load",
    "Plan",
    "Policy",
    "Pool",
    "Request",
    "Scores",
    "SizeClass",
    "allot",
    "parse_cache",
]
