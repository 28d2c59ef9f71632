"""Parameters of the eval_zeroshot stage."""

from typing import Any, Self

from pydantic import Field, model_validator

from tvaprune.options.inputs import TaskName
from tvaprune.params.loading import StageParams


class EvalZeroshotParams(StageParams):
    section = "eval_zeroshot"

    tasks: list[TaskName] = Field(min_length=1, description="tasks to score")
    mean_of: list[TaskName] = Field(min_length=1, description="those of them that the mean is over")
    limit: int | None = Field(ge=2, description="rows of each task, spread evenly over it; null for all")
    batch_size: int = Field(ge=1, description="sequences in one forward; changes speed and memory only")

    def measured(self) -> dict[str, Any]:
        """What a model's accuracies depend on, as JSON values."""
        return self.model_dump(mode="json", include={"tasks", "limit"})

    @model_validator(mode="after")
    def _the_mean_is_over_what_is_scored(self) -> Self:
        if unscored := sorted(set(self.mean_of) - set(self.tasks)):
            raise ValueError(f"mean_of names {', '.join(unscored)}, which tasks does not")
        if len(set(self.mean_of)) < len(self.mean_of):
            raise ValueError("mean_of names a task twice")
        return self
