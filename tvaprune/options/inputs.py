"""Names that params.yaml and the inputs share."""

from typing import Literal

Packing = Literal["auto", "documents", "packed"]
TaskName = Literal["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"]
