"""Parameters of the check_leaks stage."""

from pydantic import Field

from tvaprune.params.loading import StageParams


class CheckLeaksParams(StageParams):
    section = "check_leaks"

    ngram: int = Field(ge=2, description="Words in an n-gram; shorter texts are not judged.")
    max_overlap: float = Field(ge=0, le=1, description="Largest share of an evaluation set's n-grams in the windows.")
