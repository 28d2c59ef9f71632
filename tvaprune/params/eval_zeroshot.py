"""Parameters of the eval_zeroshot stage."""

from typing import ClassVar, Literal

from pydantic import Field

from tvaprune.params.loading import StageParams

TaskName = Literal["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"]


class EvalZeroshotParams(StageParams):
    """Which tasks are scored, and on how many rows."""

    section: ClassVar[str] = "eval_zeroshot"

    tasks: list[TaskName] = Field(min_length=1, description="tasks to score; mean_acc is over these")
    limit: int | None = Field(ge=2, description="rows of each task, spread evenly over it; null for all")
    batch_size: int = Field(ge=1, description="sequences in one forward; changes speed and memory only")
