"""Parameters of the benchmark_speed stage."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tvaprune.params.loading import StageParams


class BenchmarkSpeedParams(StageParams):
    """What is timed, how often, and on what."""

    section: ClassVar[str] = "benchmark_speed"

    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="sequences at once; metrics of the first are prefill and decode, of others batch_N"
    )
    prefill_tokens: int = Field(ge=1, description="prompt length of the prefill timing")
    decode_prompt_tokens: int = Field(ge=1, description="prompt length before the timed decoding")
    decode_tokens: int = Field(ge=1, description="greedy steps timed after that prompt")
    repeats: int = Field(ge=3, description="rounds that count; each times every model once")
    max_warmup: int = Field(ge=2, description="rounds before, at most; they end once two agree within 5%")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(description="auto: what the device multiplies fastest")
    threads: int | None = Field(
        ge=1,
        description="CPU threads of torch; null for its own choice, every physical core; "
        "a number also keeps them to as many processors",
    )
    runtime: Literal["auto", "eager", "packed", "graphs", "compile"] = Field(
        description="how every model alike runs; auto: packed on a CPU, graphs on CUDA"
    )
