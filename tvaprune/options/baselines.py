"""Options of the baselines: one class a method, each field with its type, range, default and description."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tvaprune.options.axes import UNIT_AXES, Axis
from tvaprune.options.method import FORBID_EXTRA, MethodOptions

Objective = Literal["logits", "loss"]
Allocation = Literal["adaptive", "uniform"]
Importance = Literal["param_first", "vectorize"]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
First = Annotated[int, Field(ge=0, description="Layers to leave whole at the start.")]
Last = Annotated[int, Field(ge=0, description="Layers to leave whole at the end.")]
LayersAtOnce = Annotated[Count | None, Field(description="Layers with gradients in memory; null = all.")]


@dataclass(frozen=True, config=FORBID_EXTRA)
class RandomOptions(MethodOptions):
    method = "random"
    uniform_share = True
    protect_first: First = 4
    protect_last: Last = 2


@dataclass(frozen=True, config=FORBID_EXTRA)
class MagnitudeOptions(MethodOptions):
    method = "magnitude"
    uniform_share = True
    protect_first: First = 4
    protect_last: Last = 2


@dataclass(frozen=True, config=FORBID_EXTRA)
class CalibratedOptions(MethodOptions):
    windows: Annotated[Count, Field(description="Calibration windows to use, spread evenly over those given.")] = 64


@dataclass(frozen=True, config=FORBID_EXTRA)
class WandaSpOptions(CalibratedOptions):
    method = "wanda_sp"
    uniform_share = True
    axes = UNIT_AXES
    sequential: Annotated[bool, Field(description="Score a layer where all before it are pruned; published.")] = True


@dataclass(frozen=True, config=FORBID_EXTRA)
class FlapOptions(CalibratedOptions):
    method = "flap"
    axes = UNIT_AXES
    # adaptive is the published AL-AM, uniform the UL-UM.
    allocation: Annotated[Allocation, Field(description="One threshold over layers, or one share each.")] = "adaptive"
    bias: Annotated[bool, Field(description="Add the mean of what dropped inputs contributed, as biases.")] = True


@dataclass(frozen=True, config=FORBID_EXTRA)
class LlmPrunerOptions(CalibratedOptions):
    method = "llm_pruner"
    uniform_share = True
    # As published: of 32 layers, the first four and the last two stay whole.
    protect_first: First = 4
    protect_last: Last = 2
    importance: Annotated[Importance, Field(description="abs of each weight's product, or of a row's sum.")] = (
        "param_first"
    )
    layers_at_once: LayersAtOnce = None


@dataclass(frozen=True, config=FORBID_EXTRA)
class NirvanaOptions(CalibratedOptions):
    method = "nirvana"
    keeps_one_unit = True
    objective: Annotated[Objective, Field(description="What is differentiated; logits is published.")] = "logits"
    mlp_to_attention: Annotated[
        Positive,
        Field(
            description="gamma: fraction of units over fraction of heads dropped; published 3.0 for 3B, 3.36 for 8B."
        ),
    ] = 3.0
    # 64 windows of 512 tokens make 8 sets of 4096, as large as the published one.
    candidates: Annotated[Count, Field(description="Calibration sets to choose among by KL; 1 = no choice.")] = 8
    kl_windows: Annotated[Count, Field(description="Windows that the KL is measured on; published 8192 tokens.")] = 16
    layers_at_once: LayersAtOnce = None


@dataclass(frozen=True, config=FORBID_EXTRA)
class BonsaiOptions(CalibratedOptions):
    method = "bonsai"
    axes = UNIT_AXES
    prune_frac: Annotated[
        float, Field(gt=0, le=0.5, description="Share of the parameters to drop in a round; published 0.05.")
    ] = 0.05
    submodels: Annotated[
        int, Field(ge=10, multiple_of=10, description="Random sub-models a round, for 5 folds of pairs; published 200.")
    ] = 200
    submodel_windows: Annotated[
        Count, Field(description="Windows that a sub-model's perplexity is measured on; published 32 of 4096 tokens.")
    ] = 2
    prior_windows: Annotated[Count, Field(description="Windows of the prior in each round; published 32.")] = 32


@dataclass(frozen=True, config=FORBID_EXTRA)
class LoraPruneOptions(CalibratedOptions):
    method = "loraprune"
    uniform_share = True
    axes = UNIT_AXES
    protect_first: Annotated[
        int, Field(ge=0, description="Layers to leave whole at the start; published 10%, 3 of 30 to 39.")
    ] = 3
    protect_last: Annotated[int, Field(ge=0, description="Layers to leave whole at the end; published 1.")] = 1
    steps: Annotated[Count, Field(description="Optimizer steps; published 2 epochs of LaMini, about 40,000.")] = 100
    batch_size: Annotated[Count, Field(description="Windows in a step; published 128.")] = 4
    rank: Annotated[Count, Field(description="LoRA rank.")] = 8
    alpha: Annotated[Positive, Field(description="LoRA alpha.")] = 16.0
    lr: Annotated[Positive, Field(description="First learning rate; it falls linearly to 0.")] = 1e-4
    decay: Annotated[float, Field(ge=0, lt=1, description="Decay of the moving average of importance.")] = 0.9
    prune_every: Annotated[
        Count, Field(description="Steps between two prunings, published 10; the end of the ramp always prunes.")
    ] = 10


@dataclass(frozen=True, config=FORBID_EXTRA)
class OsscarOptions(CalibratedOptions):
    method = "osscar"
    uniform_share = True
    refits = True
    axes = UNIT_AXES
    # 512 windows of 512 tokens are as many tokens as the published 128 of 2048.
    windows: Annotated[Count, Field(description="Calibration windows to use, spread evenly over those given.")] = 512
    damping: Annotated[Positive, Field(description="Added to the diagonal of XᵀX, as a share of its mean.")] = 0.01
    units_at_once: Annotated[Count, Field(description="Intermediate units that a layer drops in a round.")] = 10
    heads_at_once: Annotated[Count, Field(description="Key-value heads that a layer drops in a round.")] = 2


@dataclass(frozen=True, config=FORBID_EXTRA)
class DepthOptions(CalibratedOptions):
    method = "depth"
    axes = UNIT_AXES
    contiguous: Annotated[bool, Field(description="Drop adjacent layers (PruneMe), or any (ShortGPT).")] = False

    @classmethod
    def check_axes(cls, axes: tuple[Axis, ...]) -> None:
        if set(axes) != set(cls.axes):
            raise ValueError(f"learn_masks.axes = {list(axes)}: depth drops whole layers; set it to {list(cls.axes)}")


BASELINE_OPTIONS: dict[str, type[MethodOptions]] = {
    kind.method: kind
    for kind in (
        RandomOptions, MagnitudeOptions, WandaSpOptions, FlapOptions, LlmPrunerOptions, NirvanaOptions, BonsaiOptions,
        LoraPruneOptions, OsscarOptions, DepthOptions,
    )
}  # fmt: skip
