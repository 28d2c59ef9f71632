"""Options that several stages have alike."""

from pathlib import Path
from typing import Annotated

import typer

Dense = Annotated[Path, typer.Option(help="Model directory before pruning.")]
Compact = Annotated[Path, typer.Option(help="Model directory after pruning.")]
Finetuned = Annotated[Path, typer.Option(help="Model directory after fine-tuning; skipped if empty.")]
