"""What `learn_masks` is asked for: one method with its options."""

from dataclasses import dataclass
from typing import Any, Literal

from tvaprune.options.baselines import BASELINE_OPTIONS
from tvaprune.options.gates import PaperOptions, TvaOptions

METHOD_OPTIONS: dict[str, type] = {"tva": TvaOptions, "paper": PaperOptions, **BASELINE_OPTIONS}


@dataclass(frozen=True)
class MaskRequest:
    """A method with its options, and what it is to reach.

    Attributes:
        method: a key of METHOD_OPTIONS.
        options: an instance of the method's class there.
        sparsity: share of the decoder layers' parameters to remove.
        axes: axes in play; the others stay whole.
        seed: of initialisation, noise and random scores.
        gradient_checkpointing: recompute activations in the gates' backward.
    """

    method: str
    options: Any
    sparsity: float
    axes: tuple[Literal["hidden", "intermediate", "kv_heads"], ...] = ("hidden", "intermediate", "kv_heads")
    seed: int = 0
    gradient_checkpointing: bool = False

    @property
    def trains_gates(self) -> bool:
        return isinstance(self.options, TvaOptions | PaperOptions)
