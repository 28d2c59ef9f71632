"""Options that several stages have alike."""

from pathlib import Path
from typing import Annotated

from typer import Option

Model = Annotated[Path, Option(help="The dense model's directory.")]
Config = Annotated[Path, Option(help="The dense model's directory; only its config is read.")]
Compact = Annotated[Path, Option(help="The pruned model's directory.")]
Finetuned = Annotated[Path, Option(help="The fine-tuned model's directory; skipped if it holds no model.")]
Windows = Annotated[Path, Option(help="Artifact with windows of token ids, int32 [windows, tokens].")]
Heldout = Annotated[Path, Option(help='Directory of held-out text, JSONL files of {"id", "text"}.')]
Zeroshot = Annotated[Path, Option(help="Directory of one JSONL file a task.")]
Reference = Annotated[Path, Option(help="The dense model's figures; measured here where they are of other inputs.")]
Metrics = Annotated[Path, Option(help="JSON to write.")]
Curve = Annotated[Path, Option(help="CSV of the training by step to write.")]
Marker = Annotated[Path, Option(help="Marker to write; always the same, so nothing after it reruns.")]
ParamsFile = Annotated[Path, Option("--params", help="YAML file with the parameters.")]
