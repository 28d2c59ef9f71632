"""Options of the methods that train gates: `tva` with its ablations, `paper` and `grasprune`."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tvaprune.options.axes import UNIT_AXES
from tvaprune.options.choices import Latency
from tvaprune.options.method import FORBID_EXTRA, MethodOptions


@dataclass(frozen=True, config=FORBID_EXTRA)
class PerAxis:
    """One number an axis."""

    hidden: float
    intermediate: float
    kv_heads: float


@dataclass(frozen=True, config=FORBID_EXTRA)
class LatencyGoal:
    """What gates are learned for where the budget is latency."""

    phase: Annotated[
        Latency,
        Field(description="Whose latency; request: a prefill and profile_hardware.decode_tokens steps."),
    ]
    ratio: Annotated[float, Field(gt=0, lt=1, description="Share of the dense model's latency to stay below.")]


@dataclass(frozen=True, config=FORBID_EXTRA)
class TvaOptions(MethodOptions):
    """Gates under an exact budget: means by gradient, scores in closed form (`tvaprune.gates.closed_form`)."""

    method = "tva"
    ablation: Annotated[
        Literal["deterministic", "vtrans"] | None,
        Field(description="deterministic: scores by gradient, not in closed form; vtrans: without folding the means."),
    ] = None
    steps: Annotated[int, Field(ge=1, description="Optimizer steps.")] = 200
    batch_size: Annotated[int, Field(ge=1, description="Windows a step.")] = 1
    ramp: Annotated[float, Field(ge=0, le=1, description="Share of the steps over which the sparsity rises.")] = 0.7
    curvature_windows: Annotated[
        int, Field(ge=1, description="Windows that the curvature of the dense model is measured on.")
    ] = 32
    curvature_tokens: Annotated[
        int | None,
        Field(ge=1, description="Tokens in a block whose gradients are summed before squaring; null: a whole window."),
    ] = 32
    head_start: Annotated[
        PerAxis,
        Field(description="Added to the scores of an axis, in standard deviations of the intermediate scores."),
    ] = field(default=PerAxis(hidden=3.0, intermediate=0.0, kv_heads=0.0))
    mean_lr: Annotated[
        float | None,
        Field(
            ge=0,
            description="Learning rate of the means; 0 keeps them at 1; null: 0.01 times the share to remove.",
        ),
    ] = None
    channel_means: Annotated[
        bool, Field(description="Learn a mean per channel and layer where one gate multiplies several channels.")
    ] = True
    uniform_layers: Annotated[
        bool, Field(description="Keep as many units in every layer, at every step: for compact.layout = uniform.")
    ] = False
    clip_ratio: Annotated[
        float | None,
        Field(
            gt=1, description="Largest gradient norm as a multiple of its running root mean square; null: not clipped."
        ),
    ] = 4.0

    def __post_init__(self) -> None:
        if self.uniform_layers and self.ablation == "deterministic":
            raise ValueError("uniform_layers: true needs scores in closed form; set ablation: null")


@dataclass(frozen=True, config=FORBID_EXTRA)
class PaperOptions(MethodOptions):
    """The paper's own training: sampled noise, KL and a Lagrangian (`tvaprune.gates.paper`)."""

    method = "paper"
    steps: Annotated[int, Field(ge=1, description="Optimizer steps.")] = 4000
    batch_size: Annotated[int, Field(ge=1, description="Windows a step.")] = 1
    ramp: Annotated[float, Field(ge=0, le=1, description="Share of the steps over which the sparsity rises.")] = 0.1
    init_log_var: Annotated[float, Field(ge=-20, le=20, description="Mean of the initial log-variance.")] = -9.0
    lr: Annotated[float, Field(ge=0, description="Learning rate of mean and log-variance.")] = 0.05
    lambda_lr: Annotated[float, Field(ge=0, description="Learning rate of the Lagrange multipliers.")] = 0.1
    kl_weight: Annotated[PerAxis, Field(description="Weight of the KL term.")] = field(
        default=PerAxis(hidden=9.4e-5, intermediate=1e-6, kv_heads=2.56e-4)
    )
    slope: Annotated[float, Field(gt=0, description="Slope s of the keep probability sigmoid(s * log_alpha).")] = 10.0
    clip: Annotated[float | None, Field(gt=0, description="Largest gradient norm; null: not clipped.")] = 1.0


@dataclass(frozen=True, config=FORBID_EXTRA)
class GraspruneOptions(MethodOptions):
    """GRASPrune: masks by straight-through scores, then scales (`tvaprune.gates.grasprune`)."""

    method = "grasprune"
    axes = UNIT_AXES
    keeps_one_unit = True
    mask_steps: Annotated[
        int, Field(ge=1, description="Steps that learn the masks; published 4 epochs of 512 windows.")
    ] = 2048
    scale_steps: Annotated[
        int,
        Field(ge=0, description="Steps after them that learn scales of kept units; published 1 epoch, at most 512."),
    ] = 512
    batch_size: Annotated[int, Field(ge=1, description="Windows a step.")] = 1
    temperature: Annotated[
        float, Field(gt=0, description="Temperature of the sigmoid that turns a score into a soft mask.")
    ] = 1.5
    lr: Annotated[float, Field(ge=0, description="Learning rate of scores and of scales.")] = 0.01
    scale_range: Annotated[float, Field(gt=0, lt=1, description="Largest distance of a scale from 1.")] = 0.5

    @property
    def steps(self) -> int:
        return self.mask_steps + self.scale_steps


GateOptions = TvaOptions | PaperOptions | GraspruneOptions
