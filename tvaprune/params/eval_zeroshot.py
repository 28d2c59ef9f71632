"""Parameters of the eval_zeroshot stage."""

from pydantic import Field

from tvaprune.options.inputs import TaskName
from tvaprune.params.loading import StageParams


class EvalZeroshotParams(StageParams):
    section = "eval_zeroshot"

    tasks: list[TaskName] = Field(min_length=1, description="tasks to score; mean_acc is over these")
    limit: int | None = Field(ge=2, description="rows of each task, spread evenly over it; null for all")
    batch_size: int = Field(ge=1, description="sequences in one forward; changes speed and memory only")
