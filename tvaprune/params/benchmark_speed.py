"""Parameters of the benchmark_speed stage."""

from typing import Annotated, Literal

from pydantic import Field

from tvaprune.params.loading import StageParams


class BenchmarkSpeedParams(StageParams):
    section = "benchmark_speed"

    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="sequences at once; metrics of the first: prefill, decode; of the others: batch_N"
    )
    prefill_tokens: int = Field(ge=1, description="prompt length of the prefill timing")
    decode_prompt_tokens: int = Field(ge=1, description="prompt length before the timed decoding")
    decode_tokens: int = Field(ge=1, description="greedy steps timed after that prompt")
    repeats: int = Field(ge=3, description="rounds that are measured; each times every model once")
    interleave: bool = Field(
        description="time all models in every round; false: one after another, for models that do not fit together"
    )
    max_warmup: int = Field(ge=2, description="most warm-up rounds; fewer once two in a row differ by at most 5%")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(description="auto: what the device multiplies fastest")
    threads: int | None = Field(ge=1, description="CPU threads, on as many processors; null: every physical core")
    runtime: Literal["auto", "eager", "packed", "graphs", "compile"] = Field(
        description="how every model runs; auto: packed on a CPU, graphs on CUDA"
    )
