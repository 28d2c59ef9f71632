"""What the options of all methods have in common."""

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from tvaprune.options.axes import AXES, Axis

FORBID_EXTRA = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=FORBID_EXTRA)
class MethodOptions:
    """Options of one way to find masks, in a section of its name.

    Construction raises pydantic's ValidationError, a ValueError, for a value out of range and for an unknown key.
    """

    method: ClassVar[str]  # value of learn_masks.method
    axes: ClassVar[tuple[Axis, ...]] = AXES  # those that it prunes; the others it leaves whole
    keeps_one_unit: ClassVar[bool] = False  # of each of those axes, in every layer
    refits: ClassVar[bool] = False  # the matrices that read pruned units, to the widths that it chose
    uniform_share: ClassVar[bool] = False  # the same share of units goes in every layer and on every axis

    @classmethod
    def check_axes(cls, axes: tuple[Axis, ...]) -> None:
        """Raise a ValueError where an axis is none that the method prunes."""
        if not axes or not set(axes) <= set(cls.axes):
            raise ValueError(
                f"learn_masks.axes = {list(axes)}: {cls.method} prunes {', '.join(cls.axes)}; name some of these alone"
            )


def check_sparsity(target: float) -> None:
    """Raise a ValueError for a target that is no share."""
    if not 0 <= target < 1:
        raise ValueError(f"sparsity = {target}: must be at least 0 and below 1")
