"""Where a test names no machine, it plans for one whose parts are known."""

import pytest

from moe_cupy import plan_commands
from moe_cupy.plan.hardware import machine_called


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    monkeypatch.setattr(plan_commands, "this_machine", lambda: (machine_called("rtx5080-128g"), ""))
