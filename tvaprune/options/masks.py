"""What `learn_masks` is asked for: one method with its options."""

from dataclasses import dataclass
from typing import Any, Literal

from tvaprune.options.baselines import BASELINE_OPTIONS
from tvaprune.options.gates import GateOptions, GraspruneOptions, LatencyGoal, PaperOptions, TvaOptions

METHOD_OPTIONS: dict[str, type] = {
    "tva": TvaOptions,
    "paper": PaperOptions,
    "grasprune": GraspruneOptions,
    **BASELINE_OPTIONS,
}


@dataclass(frozen=True)
class MaskRequest:
    """A method with its options, and what it is to reach. Axes outside of `axes` stay whole."""

    method: str  # a key of METHOD_OPTIONS
    options: Any  # an instance of the method's class there
    sparsity: float  # share of the decoder layers' parameters to remove
    axes: tuple[Literal["hidden", "intermediate", "kv_heads"], ...] = ("hidden", "intermediate", "kv_heads")
    seed: int = 0  # of initialisation, noise and random scores
    gradient_checkpointing: bool = False  # recompute activations in the gates' backward
    means_steps: int = 0  # steps that train means on a baseline's masks, by the defaults of TvaOptions; 0: none
    latency: LatencyGoal | None = None  # the budget in place of sparsity; for tva

    @property
    def trains_gates(self) -> bool:
        return isinstance(self.options, GateOptions)
