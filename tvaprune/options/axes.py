"""The three axes that are pruned."""

from typing import Literal

Axis = Literal["hidden", "intermediate", "kv_heads"]
AXES: tuple[Axis, ...] = ("hidden", "intermediate", "kv_heads")
UNIT_AXES: tuple[Axis, ...] = ("intermediate", "kv_heads")  # those whose units belong to one layer
