"""Names that params.yaml and the inputs share."""

from typing import Literal

Packing = Literal["auto", "documents", "packed"]
TaskName = Literal["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"]

# The metric in which a task is reported: in tables, and in the mean over tasks.
TASK_METRICS: dict[TaskName, Literal["acc", "acc_norm"]] = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
}

# Accuracy of a choice at random: one over the number of choices, which is four in nearly all rows of ARC.
GUESSING: dict[TaskName, float] = {
    "boolq": 0.5,
    "piqa": 0.5,
    "hellaswag": 0.25,
    "winogrande": 0.5,
    "arc_easy": 0.25,
    "arc_challenge": 0.25,
}

# In tables, in this order.
TASK_TITLES: dict[TaskName, str] = {
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-easy",
    "arc_challenge": "ARC-challenge",
    "winogrande": "WinoGrande",
    "boolq": "BoolQ",
}
