"""Parameters of the learn_masks stage."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tvaprune.options.baselines import BASELINE_OPTIONS
from tvaprune.params.loading import StageParams

AxisName = Literal["hidden", "intermediate", "kv_heads"]


class PerAxis(BaseModel):
    """One number an axis."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    hidden: float
    intermediate: float
    kv_heads: float


class GateParams(BaseModel):
    """How gates are trained; the fields are explained in tvaprune.gates.state.GateTraining."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: int = Field(description="Optimiser steps.", ge=1)
    batch_size: int = Field(description="Windows a step.", ge=1)
    constraint: Literal["budget", "lagrangian"] = Field(description="Exact budget, or the paper's penalty.")
    ramp: float = Field(description="Share of the steps over which the target rises.", ge=0, le=1)
    init: Literal["curvature", "constant"] = Field(description="Where log_var starts.")
    init_log_var: float = Field(description="The constant, for init: constant.", ge=-20, le=20)
    curvature_windows: int = Field(description="Windows for init: curvature.", ge=1)
    curvature_tokens: int | None = Field(
        description="Tokens whose gradients are summed before they are squared; null = a window's.", ge=1
    )
    log_var: Literal["tracked", "trained"] = Field(description="Kept at the stationary point, or by gradient.")
    head_start: PerAxis = Field(description="Added to log_alpha at the start.")
    log_var_lr: float = Field(description="Learning rate of log_var.", ge=0)
    mu_lr: float = Field(description="Learning rate of mu; 0 keeps it at 1.", ge=0)
    lambda_lr: float = Field(description="Learning rate of the Lagrangian's multipliers.", ge=0)
    channel_means: bool = Field(description="Means by channel and layer too, where one gate spans several.")
    noise: float = Field(description="Share of sigma that is sampled, 0 to 1.", ge=0, le=1)
    kl_weight: PerAxis = Field(description="Weight of the KL.")
    ce_weight: float = Field(description="Weight of the cross-entropy on the text.", ge=0)
    distillation_weight: float = Field(description="Weight of the KL to the dense model's predictions.", ge=0)
    slope: tuple[float, float] = Field(description="Slope of the sigmoid, at the start and at the end.")
    clip: float | None = Field(description="Gradient norm at most; null = not clipped.", gt=0)
    clip_ratio: float | None = Field(
        description="Gradient norm at most so many times its running mean; null = not clipped.", gt=1
    )

    @model_validator(mode="after")
    def _objective(self) -> "GateParams":
        if self.ce_weight + self.distillation_weight == 0:
            raise ValueError("ce_weight and distillation_weight are both 0: there is nothing to learn from")
        return self

    @model_validator(mode="after")
    def _tracked_from_curvature(self) -> "GateParams":
        if self.log_var == "tracked" and (self.constraint, self.init) != ("budget", "curvature"):
            raise ValueError(
                f"log_var = tracked needs constraint: budget and init: curvature, found {self.constraint} and "
                f"{self.init}; use log_var: trained"
            )
        return self


class BaselineParams(BaseModel):
    """What the baselines leave open; explained in tvaprune.options.baselines."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    windows: int = Field(description="Calibration windows to use, spread evenly.", ge=1)
    flap_allocation: Literal["adaptive", "uniform"] = Field(description="One threshold over layers, or one share each.")
    flap_bias: bool = Field(description="Replace dropped inputs by their mean, as biases.")
    protect_first: int = Field(description="Layers that llm_pruner and loraprune leave whole at the start.", ge=0)
    protect_last: int = Field(description="Layers that llm_pruner and loraprune leave whole at the end.", ge=0)
    nirvana_objective: Literal["logits", "loss"] = Field(description="What NIRVANA differentiates.")
    nirvana_mlp_to_attention: float = Field(description="Share of units over share of heads dropped.", gt=0)
    nirvana_candidates: int = Field(description="Calibration sets to choose among by KL; 1 = no choice.", ge=1)
    nirvana_kl_windows: int = Field(description="Windows the choice is measured on.", ge=1)
    nirvana_layers_at_once: int | None = Field(description="Layers with gradients in memory; null = all.", ge=1)
    bonsai_rounds: int = Field(description="Rounds of pruning.", ge=1)
    bonsai_submodels: int = Field(description="Random sub-models a round; even.", ge=2, multiple_of=2)
    bonsai_windows: int = Field(description="Windows a sub-model's loss is measured on.", ge=1)
    bonsai_prior_windows: int = Field(description="Windows of the activation prior.", ge=1)
    bonsai_ridge: float = Field(description="Strength of the ridge.", gt=0)
    loraprune_steps: int = Field(description="Steps of tuning.", ge=1)
    loraprune_rank: int = Field(description="LoRA rank.", ge=1)
    loraprune_alpha: float = Field(description="LoRA alpha.", gt=0)
    loraprune_lr: float = Field(description="Learning rate.", gt=0)
    loraprune_decay: float = Field(description="Decay of the moving average of importance.", ge=0, lt=1)
    loraprune_prune_every: int = Field(description="Steps between two prunings.", ge=1)
    depth_contiguous: bool = Field(description="One block of adjacent layers (PruneMe), or any (ShortGPT).")


class LearnMasksParams(StageParams):
    section = "learn_masks"
    shared: ClassVar[tuple[str, ...]] = ("sparsity", "seed")

    sparsity: float = Field(description="Share of the decoder layers' parameters to remove.", gt=0, lt=1)
    seed: int = Field(description="Of initialisation, noise and random scores.", ge=0)
    method: Literal[
        "tva", "deterministic", "vtrans", "random", "magnitude", "wanda_sp", "flap", "llm_pruner", "nirvana", "bonsai",
        "loraprune", "depth",
    ] = Field(description="What finds the masks.")  # fmt: skip
    axes: tuple[AxisName, ...] = Field(description="Axes in play; the others stay whole.", min_length=1)
    gradient_checkpointing: bool = Field(description="Recompute activations in the backward: less memory, more time.")
    gates: GateParams = Field(description="For tva, deterministic and vtrans.")
    baseline: BaselineParams = Field(description="For the other methods.")

    def baseline_options(self) -> Any:
        """The options of the baseline in use, or None."""
        if self.method not in BASELINE_OPTIONS:
            return None
        kind, given = BASELINE_OPTIONS[self.method], self.baseline
        names = {"submodel_windows": "bonsai_windows"}
        return kind(
            **{
                key: getattr(given, names.get(key, key if hasattr(given, key) else f"{self.method}_{key}"))
                for key in kind.__dataclass_fields__  # type: ignore[attr-defined]
            }
        )

    def used(self) -> dict[str, Any]:
        """Without the options of other methods than the one in use."""
        values = self.model_dump(mode="json", exclude={"gradient_checkpointing"})
        if self.method in ("tva", "deterministic", "vtrans"):
            values.pop("baseline")
            of_curvature = {"curvature_windows", "curvature_tokens"}
            idle = of_curvature if self.gates.init == "constant" else {"init_log_var"}
            if self.gates.constraint == "budget":
                idle |= {"lambda_lr"}
            if self.gates.log_var == "tracked":
                idle |= {"log_var_lr", "slope"}
            if self.method == "deterministic":  # has no noise and no KL, starts at the constant and is trained
                idle -= {"init_log_var", "log_var_lr", "slope"}
                idle |= {"noise", "kl_weight", "init", "log_var"} | of_curvature
            values["gates"] = {key: value for key, value in values["gates"].items() if key not in idle}
        else:
            values.pop("gates")
            own: list[str] = [self.method]
            if self.method not in ("random", "magnitude"):
                own += ["windows"]
            if self.method in ("llm_pruner", "loraprune"):
                own += ["protect_"]
            options = {key: value for key, value in values["baseline"].items() if key.startswith(tuple(own))}
            values["baseline"] = options
        return {self.section: values}

    @model_validator(mode="before")
    @classmethod
    def _distinct_axes(cls, values: Any) -> Any:
        axes = values.get("axes") if isinstance(values, dict) else None
        if isinstance(axes, list) and len(set(map(str, axes))) != len(axes):
            raise ValueError(f"axes = {axes}: each axis at most once")
        return values
