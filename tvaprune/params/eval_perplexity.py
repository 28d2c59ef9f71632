"""Parameters of the eval_perplexity stage."""

from typing import ClassVar

from pydantic import Field

from tvaprune.params.loading import StageParams


class EvalPerplexityParams(StageParams):
    """Which held-out windows are measured, and how many at once."""

    section: ClassVar[str] = "eval_perplexity"

    window: int = Field(ge=2, description="tokens in a window; perplexities at different lengths are not comparable")
    windows: int = Field(ge=2, description="number of windows, spread evenly over the held-out text")
    batch_size: int = Field(ge=1, description="windows in one forward; changes speed and memory only")
