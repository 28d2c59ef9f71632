"""Parameters of the adapt_dimensions stage."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from tvaprune.params.loading import StageParams


class Multiple(BaseModel):
    """T for each axis, in units."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    hidden: int = Field(ge=1)
    intermediate: int = Field(ge=1)


class AdaptDimensionsParams(StageParams):
    section = "adapt_dimensions"
    shared: ClassVar[tuple[str, ...]] = ("sparsity",)

    sparsity: float = Field(description="Share of the decoder layers' parameters to remove.", gt=0, lt=1)
    multiple: int | Multiple = Field(description="T: widths become multiples of it; one number, or one an axis.")
    rounding: Literal["nearest", "budget"] = Field(description="Each width by itself, or all within the target.")

    def multiple_of(self, axis: Literal["hidden", "intermediate"]) -> int:
        return self.multiple if isinstance(self.multiple, int) else getattr(self.multiple, axis)
