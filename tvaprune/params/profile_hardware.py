"""Parameters of the profile_hardware stage."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from tvaprune.params.loading import StageParams


class ProfileHardwareParams(StageParams):
    section = "profile_hardware"
    shared: ClassVar[tuple[str, ...]] = ("adapt_dimensions.multiple", "learn_masks.budget")

    hidden_step: int = Field(ge=1, description="hidden widths are multiples of it, and the dense one")
    intermediate_step: int = Field(ge=1, description="intermediate widths are multiples of it, and the dense one")
    narrowest_hidden: float = Field(gt=0, le=1, description="share of the dense hidden width; none below it is timed")
    batch_size: int = Field(ge=1, description="sequences at once")
    prefill_tokens: int = Field(ge=1, description="prompt length of the prefill timing")
    decode_prompt_tokens: int = Field(ge=1, description="prompt length before the timed decoding")
    decode_tokens: int = Field(ge=1, description="greedy steps timed after that prompt, and those of a request")
    repeats: int = Field(ge=3, description="rounds that are measured; each times every width once")
    max_warmup: int = Field(ge=2, description="most warm-up rounds; fewer once two in a row differ by at most 5%")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(description="auto: what the device multiplies fastest")
    threads: int | None = Field(ge=1, description="CPU threads of torch; null: torch's default, every physical core")
    runtime: Literal["auto", "eager", "packed", "graphs"] = Field(description="as in benchmark_speed, without compile")
    multiple: Any = Field(description="adapt_dimensions.multiple; `measured` needs the table")
    budget: Any = Field(description="learn_masks.budget; `latency` needs the table; nothing is timed where none does")

    @property
    def learns(self) -> bool:
        """Whether learn_masks needs the table."""
        return bool(self.budget == "latency")

    @property
    def enabled(self) -> bool:
        return self.learns or self.multiple == "measured"
