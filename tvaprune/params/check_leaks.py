"""Parameters of the check_leaks stage."""

from typing import ClassVar

from pydantic import Field

from tvaprune.params.loading import StageParams


class CheckLeaksParams(StageParams):
    """How text is compared, and how much may be shared."""

    section: ClassVar[str] = "check_leaks"

    ngram: int = Field(ge=2, description="Words in a gram; shorter texts are not judged.")
    max_overlap: float = Field(
        ge=0, le=1, description="Largest share of an evaluation set's grams that the windows learned from may hold."
    )
