"""Parameters of the adapt_dimensions stage."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from tvaprune.options.choices import Latency, Layout, Rounding
from tvaprune.options.gates import LatencyGoal
from tvaprune.params.loading import StageParams


class Multiple(BaseModel):
    """T for each axis, in units."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    hidden: int = Field(description="Of hidden dimensions.", ge=1)
    intermediate: int = Field(description="Of each layer's intermediate units.", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _one_for_both(cls, value: Any) -> Any:
        if isinstance(value, int):
            return {"hidden": value, "intermediate": value}
        if not isinstance(value, dict):
            raise ValueError("give one whole number, or one an axis: {hidden: 32, intermediate: 64}, or measured")
        return value


def _kind(value: Any) -> str:
    return "measured" if value == "measured" else "number"


class AdaptDimensionsParams(StageParams):
    section = "adapt_dimensions"
    shared: ClassVar[tuple[str, ...]] = ("sparsity", "compact.layout", "learn_masks.latency")

    sparsity: float = Field(description="Share of the decoder layers' parameters to remove.", gt=0, lt=1)
    multiple: Annotated[
        Annotated[Multiple, Tag("number")] | Annotated[Literal["measured"], Tag("measured")], Discriminator(_kind)
    ] = Field(
        description="T: widths become multiples of it; one whole number, or one an axis; measured: by profile_hardware."
    )
    rounding: Rounding = Field(description="Each width by itself, or all within the target; `measured` ignores it.")
    latency_phase: Latency = Field(
        description="Whose latency `measured` uses; request: a prefill and profile_hardware.decode_tokens steps."
    )
    slack: float = Field(
        description="Importance that `measured` may give up for speed, a share of the least loss within the budget.",
        ge=0,
    )

    layout: Layout = Field(description="compact.layout: a config for all layers alike takes some widths only.")

    latency: LatencyGoal | None = Field(description="learn_masks.latency: learned widths, which are multiples, stay.")

    @model_validator(mode="after")
    def _learned_for_latency(self) -> Self:
        if self.latency is not None:
            if self.multiple == "measured":
                raise ValueError(
                    "multiple = measured with learn_masks.budget = latency, which chooses measured widths itself; "
                    "set multiple to a number"
                )
            if self.layout != "uneven":
                raise ValueError(
                    f"compact.layout = {self.layout} with learn_masks.budget = latency, which learns for layers of "
                    "different widths; set it to uneven"
                )
        return self

    def used(self) -> dict[str, Any]:
        """Without the goal of the learning, which says itself what it was; it replaces the sparsity."""
        without = {"latency"} if self.latency is None else {"latency", "sparsity", "latency_phase", "slack", "rounding"}
        return {self.section: self.model_dump(mode="json", exclude=without)}

    def multiples(self) -> tuple[int, int] | None:
        """T of hidden and of intermediate; None: measured."""
        return (self.multiple.hidden, self.multiple.intermediate) if isinstance(self.multiple, Multiple) else None

    @classmethod
    def _describe(cls, problem: Any) -> str:
        return super()._describe(problem | {"loc": tuple(part for part in problem["loc"] if part != "number")})
