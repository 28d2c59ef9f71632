"""What the quantize stage is asked for."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

FileType = Literal["bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
Windows = dict[str, Annotated[int, Field(ge=2)]]


@dataclass(frozen=True)
class QuantizeOptions:
    """Types of GGUF files, and the text that they are measured on."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    types: Annotated[list[FileType], Field(min_length=1, description="GGUF types to write, each for every model.")]
    window: Annotated[int, Field(ge=2, description="Tokens in a window of the text.")]
    validation: Annotated[Windows, Field(min_length=1, description="Held-out text -> windows for decisions.")]
    test: Annotated[Windows, Field(description="Held-out text -> windows that no decision looks at.")]
    prefill_tokens: Annotated[int, Field(ge=1, description="Prompt length of the prefill timing.")]
    decode_tokens: Annotated[int, Field(ge=1, description="Greedy steps timed after a prompt of as many tokens.")]
    repeats: Annotated[int, Field(ge=3, description="Rounds that are measured; each times every file once.")]
