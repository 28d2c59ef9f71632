"""Parameters of the eval_perplexity stage."""

from typing import Any

from pydantic import Field

from tvaprune.options.choices import WindowCounts
from tvaprune.params.loading import StageParams


class EvalPerplexityParams(StageParams):
    section = "eval_perplexity"

    window: int = Field(ge=2, description="tokens in a window; perplexities at different lengths are not comparable")
    validation: WindowCounts = Field(
        min_length=1,
        description="held-out text -> windows for decisions, such as the choice of a parameter, spread evenly over it",
    )
    test: WindowCounts = Field(
        description="held-out text -> windows for the report, not decisions; of documents without validation windows"
    )
    batch_size: int = Field(ge=1, description="windows in one forward; changes speed and memory only")

    def measured(self) -> dict[str, Any]:
        """What the figures depend on, as JSON values."""
        return self.model_dump(mode="json", exclude={"batch_size"})
