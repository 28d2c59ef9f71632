"""Parameters of the learn_masks stage."""

from dataclasses import fields
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tvaprune.options import baselines, gates
from tvaprune.options.axes import Axis
from tvaprune.options.masks import METHOD_OPTIONS, MaskRequest
from tvaprune.params.loading import StageParams


class LearnMasksParams(StageParams):
    section = "learn_masks"
    shared: ClassVar[tuple[str, ...]] = ("sparsity", "seed")

    sparsity: float = Field(description="Share of the decoder layers' parameters to remove.", gt=0, lt=1)
    seed: int = Field(description="Seed of initialisation, noise and random scores.", ge=0)
    method: Literal[
        "tva", "paper", "grasprune", "random", "magnitude", "wanda_sp", "flap", "llm_pruner", "nirvana", "bonsai",
        "loraprune", "osscar", "depth",
    ] = Field(description="What finds the masks; its options are in the section of its name.")  # fmt: skip
    axes: tuple[Axis, ...] = Field(description="Axes that may be pruned; the others stay whole.", min_length=1)
    budget: Literal["params", "latency"] = Field(
        description="What masks are learned for: `sparsity`, or with tva `latency`; then `sparsity` has no effect."
    )
    latency: gates.LatencyGoal | None = Field(
        description="For budget latency, else null: phase (prefill, decode, request) and ratio to the dense latency."
    )
    gradient_checkpointing: bool = Field(description="Recompute activations in the backward: less memory, more time.")
    means_steps: int = Field(
        description="Steps that train means on a baseline's masks as tva does, in place of its biases; 0: none.",
        ge=0,
    )
    tva: gates.TvaOptions = Field(description="The method of this project.")
    paper: gates.PaperOptions = Field(description="The paper's own training.")
    grasprune: gates.GraspruneOptions = Field(description="GRASPrune.")
    random: baselines.RandomOptions = Field(description="Random scores.")
    magnitude: baselines.MagnitudeOptions = Field(description="Sums of squared weights.")
    wanda_sp: baselines.WandaSpOptions = Field(description="Wanda-sp.")
    flap: baselines.FlapOptions = Field(description="FLAP.")
    llm_pruner: baselines.LlmPrunerOptions = Field(description="LLM-Pruner.")
    nirvana: baselines.NirvanaOptions = Field(description="NIRVANA.")
    bonsai: baselines.BonsaiOptions = Field(description="Bonsai.")
    loraprune: baselines.LoraPruneOptions = Field(description="LoRAPrune.")
    osscar: baselines.OsscarOptions = Field(description="OSSCAR.")
    depth: baselines.DepthOptions = Field(description="ShortGPT and PruneMe: whole layers.")

    @classmethod
    def declared(cls) -> list[str]:
        """A change of one method's options does not rerun another method."""
        own = [
            f"{cls.section}.{name}"
            for name in ("method", "axes", "budget", "latency", "gradient_checkpointing", "means_steps")
        ]
        return [*own, f"{cls.section}.${{{cls.section}.method}}", *cls.shared]

    def request(self) -> MaskRequest:
        return MaskRequest(
            self.method, getattr(self, self.method), self.sparsity, self.axes, self.seed, self.gradient_checkpointing,
            self.means_steps, self.latency,
        )  # fmt: skip

    def used(self) -> dict[str, Any]:
        """Without the options of other methods than the one in use, and with one budget."""
        budget = {"sparsity"} if self.latency is None else {"budget", "latency"}
        values = self.model_dump(mode="json", include={*budget, "seed", "method", "axes", self.method})
        if not self.request().trains_gates and self.means_steps:
            values["means_steps"] = self.means_steps
        if self.method == "tva" and self.tva.ablation == "deterministic":
            values["tva"] = {name: value for name, value in values["tva"].items() if not name.startswith("curvature_")}
        return {self.section: values}

    @field_validator(*METHOD_OPTIONS, mode="before")
    @classmethod
    def _complete(cls, value: Any, info: ValidationInfo) -> Any:
        """The options have defaults for use from Python; params.yaml gives every value."""
        names = [field.name for field in fields(METHOD_OPTIONS[str(info.field_name)])]
        if isinstance(value, dict) and (missing := [name for name in names if name not in value]):
            unknown = [name for name in value if name not in names]
            raise ValueError(f"missing: {', '.join(missing)}" + (f"; unknown: {', '.join(unknown)}" if unknown else ""))
        return value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.budget == "latency") != (self.latency is not None):
            raise ValueError(
                f"latency = {self.latency} with budget = {self.budget}: budget latency needs a goal such as "
                "{phase: decode, ratio: 0.7}, budget params null"
            )
        self.request()  # raises where the method cannot do what is asked
        return self

    @model_validator(mode="after")
    def _axes_of_the_method(self) -> Self:
        try:
            METHOD_OPTIONS[self.method].check_axes(self.axes)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{self.section}.")) from None
        return self

    @field_validator("axes", mode="before")
    @classmethod
    def _distinct(cls, axes: Any) -> Any:
        if isinstance(axes, list) and len(set(map(str, axes))) != len(axes):
            raise ValueError("name each axis at most once")
        return axes
