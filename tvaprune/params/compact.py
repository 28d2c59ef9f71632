"""Parameters of the compact stage."""

from pydantic import Field

from tvaprune.params.loading import StageParams


class CompactParams(StageParams):
    section = "compact"

    max_abs_logit_diff: float = Field(description="The stage fails when masked and compact differ by more.", gt=0)
    prompt_tokens: int = Field(description="Tokens of the prompts that the two are compared on.", ge=2)
