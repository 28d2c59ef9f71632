"""Options of the baselines: one class a method, each field with its type, range, default and description."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

Baseline = Literal["random", "magnitude", "wanda_sp", "flap", "llm_pruner", "nirvana", "bonsai", "loraprune", "depth"]
Objective = Literal["logits", "loss"]
Allocation = Literal["adaptive", "uniform"]
Importance = Literal["param_first", "vectorize"]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
First = Annotated[int, Field(ge=0, description="Layers to leave whole at the start.")]
Last = Annotated[int, Field(ge=0, description="Layers to leave whole at the end.")]
LayersAtOnce = Annotated[Count | None, Field(description="Layers with gradients in memory; null = all.")]


class MethodOptions:
    """What all have in common: pydantic refuses unknown keys."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class RandomOptions(MethodOptions):
    protect_first: First = 4
    protect_last: Last = 2


@dataclass(frozen=True)
class MagnitudeOptions(MethodOptions):
    protect_first: First = 4
    protect_last: Last = 2


@dataclass(frozen=True)
class CalibratedOptions(MethodOptions):
    windows: Annotated[Count, Field(description="Calibration windows to use, spread evenly over those given.")] = 64


@dataclass(frozen=True)
class ProtectingOptions(CalibratedOptions):
    protect_first: First = 0
    protect_last: Last = 0


@dataclass(frozen=True)
class WandaSpOptions(CalibratedOptions):
    sequential: Annotated[bool, Field(description="Score a layer where all before it are pruned; published.")] = True


@dataclass(frozen=True)
class FlapOptions(CalibratedOptions):
    # adaptive is the published AL-AM, uniform the UL-UM.
    allocation: Annotated[Allocation, Field(description="One threshold over layers, or one share each.")] = "adaptive"
    bias: Annotated[bool, Field(description="Add the mean of what dropped inputs contributed, as biases.")] = True


@dataclass(frozen=True)
class LlmPrunerOptions(ProtectingOptions):
    # As published: of 32 layers, the first four and the last two stay whole.
    protect_first: First = 4
    protect_last: Last = 2
    importance: Annotated[Importance, Field(description="abs of each weight's product, or of a row's sum.")] = (
        "param_first"
    )
    layers_at_once: LayersAtOnce = None


@dataclass(frozen=True)
class NirvanaOptions(CalibratedOptions):
    objective: Annotated[Objective, Field(description="What is differentiated; logits is published.")] = "logits"
    mlp_to_attention: Annotated[Positive, Field(description="gamma, share of units over share of heads dropped.")] = 1.0
    candidates: Annotated[Count, Field(description="Calibration sets to choose among by KL; 1 = no choice.")] = 1
    kl_windows: Annotated[Count, Field(description="Windows that the KL is measured on.")] = 8
    layers_at_once: LayersAtOnce = None


@dataclass(frozen=True)
class BonsaiOptions(CalibratedOptions):
    rounds: Annotated[Count, Field(description="Rounds of pruning.")] = 4
    submodels: Annotated[int, Field(ge=2, multiple_of=2, description="Random sub-models a round; even.")] = 32
    submodel_windows: Annotated[Count, Field(description="Windows that a sub-model's loss is measured on.")] = 1
    prior_windows: Annotated[Count, Field(description="Windows of the activation prior in each round.")] = 8
    ridge: Annotated[Positive, Field(description="Ridge penalty, relative to the design's mean square.")] = 1.0


@dataclass(frozen=True)
class LoraPruneOptions(ProtectingOptions):
    steps: Annotated[Count, Field(description="Optimizer steps, one window each.")] = 64
    rank: Annotated[Count, Field(description="LoRA rank.")] = 8
    alpha: Annotated[Positive, Field(description="LoRA alpha.")] = 16.0
    lr: Annotated[Positive, Field(description="Learning rate.")] = 1e-4
    decay: Annotated[float, Field(ge=0, lt=1, description="Decay of the moving average of importance.")] = 0.9
    prune_every: Annotated[Count, Field(description="Steps between two prunings; the last step always prunes.")] = 4


@dataclass(frozen=True)
class DepthOptions(CalibratedOptions):
    contiguous: Annotated[bool, Field(description="Drop adjacent layers (PruneMe), or any (ShortGPT).")] = False


BASELINE_OPTIONS: dict[str, type] = {
    "random": RandomOptions,
    "magnitude": MagnitudeOptions,
    "wanda_sp": WandaSpOptions,
    "flap": FlapOptions,
    "llm_pruner": LlmPrunerOptions,
    "nirvana": NirvanaOptions,
    "bonsai": BonsaiOptions,
    "loraprune": LoraPruneOptions,
    "depth": DepthOptions,
}
