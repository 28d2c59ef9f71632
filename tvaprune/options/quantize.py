"""What the quantize stage is asked for, and which widths each type needs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from tvaprune.options.choices import WindowCounts

FileType = Literal["bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "int8_wo"]
TORCHAO = ("int8_wo",)  # model directories in the Hugging Face format; the others are GGUF files
# Weights that share a scale, along a matrix's rows: each width must be a multiple. 1: any width.
GROUPS: dict[str, int] = {"bf16": 1, "q8_0": 32, "q5_1": 32, "q5_0": 32, "q4_1": 32, "q4_0": 32, "int8_wo": 1}
INT4_REFUSED = (
    "int4_wo is not offered: torchao 0.18 has no int4 weights for a CPU (its packings need CUDA or the package mslk), "
    "and none was tested on a GPU; use int8_wo, or q4_1 and q4_0 for four bits"
)


def _refuse_int4(kind: object) -> object:
    if kind in ("int4_wo", "int4_weight_only"):
        raise ValueError(INT4_REFUSED)
    return kind


@dataclass(frozen=True)
class QuantizeOptions:
    """Types of files, and the text that they are measured on."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    types: Annotated[
        list[Annotated[FileType, BeforeValidator(_refuse_int4)]],
        Field(min_length=1, description="Types to write, each for every model; int8_wo by torchao, the others GGUF."),
    ]
    window: Annotated[int, Field(ge=2, description="Tokens in a window of the text.")]
    validation: Annotated[WindowCounts, Field(min_length=1, description="Held-out text -> windows for decisions.")]
    test: Annotated[
        WindowCounts, Field(description="Held-out text -> windows for the final report; use them for no decision.")
    ]
    prefill_tokens: Annotated[int, Field(ge=1, description="Prompt length of the prefill timing.")]
    decode_tokens: Annotated[
        int, Field(ge=2, description="Greedy steps timed after a prompt of as many tokens; the prompt gives the first.")
    ]
    repeats: Annotated[int, Field(ge=3, description="Rounds that are measured; each times every file once.")]
