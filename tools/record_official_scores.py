"""Scores that a method's published code gives a tiny random Llama, recorded for the tests.

    git clone https://github.com/CASIA-IVA-Lab/FLAP clone
    python -m tools.record_official_scores --method flap --clone clone

The published functions run as they are. What is replaced around them, because they want a GPU, a download or another
transformers, is listed in the record. Nothing of their code is in this repository.
"""

import json
from pathlib import Path
from typing import Annotated

from typer import Option

from stages._command import command
from tools.official.bonsai import BONSAI
from tools.official.flap import FLAP, WANDA_SP
from tools.official.grasprune import GRASPRUNE
from tools.official.llm_pruner import LLM_PRUNER, MAGNITUDE
from tools.official.loraprune import LORAPRUNE
from tools.official.nirvana import NIRVANA
from tools.official.osscar import OSSCAR

PUBLISHED = {
    "flap": FLAP,
    "wanda_sp": WANDA_SP,
    "llm_pruner": LLM_PRUNER,
    "magnitude": MAGNITUDE,
    "bonsai": BONSAI,
    "nirvana": NIRVANA,
    "loraprune": LORAPRUNE,
    "grasprune": GRASPRUNE,
    "osscar": OSSCAR,
}


@command
def main(
    method: Annotated[str, Option(help="The baseline.")],
    clone: Annotated[Path, Option(help="A clone of its published repository, without changes.")],
    out: Annotated[Path, Option(help="Directory of the records.")] = Path("tests/official"),
) -> None:
    """Reads the clone; writes METHOD.json with the scores, the repository, the commit and the settings."""
    if method not in PUBLISHED:
        raise ValueError(f"--method {method}: use one of {', '.join(PUBLISHED)}")
    record = PUBLISHED[method].record(clone.resolve())
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{method}.json").write_text(json.dumps(record) + "\n")
