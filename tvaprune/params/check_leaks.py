"""Parameters of the check_leaks stage."""

from typing import ClassVar

from pydantic import Field

from tvaprune.params.loading import StageParams


class CheckLeaksParams(StageParams):
    """How texts are compared, and how much they may share."""

    section: ClassVar[str] = "check_leaks"

    ngram: int = Field(ge=2, description="Words in an n-gram; shorter texts are not judged.")
    max_overlap: float = Field(
        ge=0, le=1, description="Largest allowed share of an evaluation set's n-grams that are in the windows."
    )
