"""What `learn_masks` is asked for: one method with its options."""

from dataclasses import dataclass
from typing import Any

from tvaprune.options.axes import AXES, Axis
from tvaprune.options.baselines import BASELINE_OPTIONS
from tvaprune.options.gates import GateOptions, GraspruneOptions, LatencyGoal, PaperOptions, TvaOptions
from tvaprune.options.method import MethodOptions

METHOD_OPTIONS: dict[str, type[MethodOptions]] = {
    **{kind.method: kind for kind in (TvaOptions, PaperOptions, GraspruneOptions)},
    **BASELINE_OPTIONS,
}


def method_options(method: str) -> type[MethodOptions]:
    """The class of a method's options. Raises a ValueError with the methods that there are."""
    if method not in METHOD_OPTIONS:
        raise ValueError(f"learn_masks.method = {method!r}: use one of {', '.join(METHOD_OPTIONS)}")
    return METHOD_OPTIONS[method]


@dataclass(frozen=True)
class MaskRequest:
    """A method with its options, and what it is to reach. Axes outside of `axes` stay whole."""

    method: str  # a key of METHOD_OPTIONS
    options: Any  # an instance of the method's class there
    sparsity: float  # share of the decoder layers' parameters to remove
    axes: tuple[Axis, ...] = AXES
    seed: int = 0  # of initialisation, noise and random scores
    gradient_checkpointing: bool = False  # recompute activations in the gates' backward
    means_steps: int = 0  # steps that train means on a baseline's masks, by the defaults of TvaOptions; 0: none
    latency: LatencyGoal | None = None  # the budget in place of sparsity; for tva

    def __post_init__(self) -> None:
        """Raises a ValueError where the method cannot do what is asked."""
        if self.means_steps and self.trains_gates:
            raise ValueError(
                f"means_steps = {self.means_steps} with method = {self.method}: for baselines; set it to 0"
            )
        if self.latency is None:
            return
        if not isinstance(self.options, TvaOptions):
            raise ValueError(f"budget = latency with method = {self.method}: only tva learns for a latency")
        if self.options.ablation == "deterministic":
            raise ValueError("budget = latency with tva.ablation = deterministic: needs scores in closed form")
        if self.options.uniform_layers:
            raise ValueError("budget = latency with tva.uniform_layers = true: prices are by layer; set it to false")

    @property
    def trains_gates(self) -> bool:
        return isinstance(self.options, GateOptions)
