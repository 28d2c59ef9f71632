"""Parameters of the adapt_dimensions stage."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
            raise ValueError("give one whole number, or one an axis: {hidden: 32, intermediate: 64}")
        return value


class AdaptDimensionsParams(StageParams):
    section = "adapt_dimensions"
    shared: ClassVar[tuple[str, ...]] = ("sparsity", "compact.layout")

    sparsity: float = Field(description="Share of the decoder layers' parameters to remove.", gt=0, lt=1)
    multiple: Multiple = Field(description="T: widths become multiples of it; one number, or one an axis.")
    rounding: Literal["nearest", "budget"] = Field(description="Each width by itself, or all within the target.")

    layout: Literal["uneven", "uniform", "padded"] = Field(
        description="compact.layout: a config for all layers alike takes some widths only."
    )

    def multiple_of(self, axis: Literal["hidden", "intermediate"]) -> int:
        return getattr(self.multiple, axis)
