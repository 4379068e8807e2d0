"""Where every tensor of a model should go on a machine, how fast it will be, and the command that does it."""

from moe_cupy.plan.tables import PlanError

__all__ = ["PlanError"]
