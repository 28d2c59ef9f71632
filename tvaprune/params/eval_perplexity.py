"""Parameters of the eval_perplexity stage."""

from pydantic import Field

from tvaprune.params.loading import StageParams


class EvalPerplexityParams(StageParams):
    section = "eval_perplexity"

    window: int = Field(ge=2, description="tokens in a window; perplexities at different lengths are not comparable")
    windows: int = Field(ge=2, description="number of windows, spread evenly over the held-out text")
    batch_size: int = Field(ge=1, description="windows in one forward; changes speed and memory only")
