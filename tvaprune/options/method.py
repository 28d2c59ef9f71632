"""What the options of all methods have in common."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from tvaprune.options.axes import AXES, Axis

FORBID_EXTRA = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class MethodOptions:
    """Options of one way to find masks, in a section of its name; pydantic refuses unknown keys."""

    __pydantic_config__ = FORBID_EXTRA
    method: ClassVar[str]  # value of learn_masks.method
    axes: ClassVar[tuple[Axis, ...]] = AXES  # those that it prunes; the others it leaves whole
    keeps_one_unit: ClassVar[bool] = False  # of each of those axes, in every layer
