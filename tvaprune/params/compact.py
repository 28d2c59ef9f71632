"""Parameters of the compact stage."""

from typing import Any, Literal

from pydantic import Field

from tvaprune.options.choices import Layout
from tvaprune.params.loading import StageParams


class CompactParams(StageParams):
    section = "compact"

    layout: Layout = Field(
        description="uneven: each layer as wide as its mask; uniform, padded: the base family's own config."
    )
    gguf: Literal["f32", "f16", "bf16", "q8_0"] | None = Field(
        description="Type of model.gguf to write; null: none. The stage quantize writes smaller types."
    )
    max_rel_logit_diff: float = Field(
        description="Largest difference of the masked and the compact logits, as a share of the largest logit.", gt=0
    )
    prompt_tokens: int = Field(description="Tokens in each prompt of that comparison.", ge=2)

    def used(self) -> dict[str, Any]:
        """Without the parameters of the check, which the certificate records."""
        return {self.section: self.model_dump(mode="json", include={"layout", "gguf"})}
