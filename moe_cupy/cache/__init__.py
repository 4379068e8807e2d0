"""Slots and replacement policies as pure integers: no arrays, no device, replayable."""

from moe_cupy.cache.budget import BudgetError, Request, SizeClass, allot, parse_cache
from moe_cupy.cache.policies import POLICIES, Policy
from moe_cupy.cache.pool import Counters, ExpertCache, Load, Plan, Pool

__all__ = [
    "POLICIES",
    "BudgetError",
    "Counters",
    "ExpertCache",
    "Load",
    "Plan",
    "Policy",
    "Pool",
    "Request",
    "SizeClass",
    "allot",
    "parse_cache",
]
