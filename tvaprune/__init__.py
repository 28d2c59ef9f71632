"""TVA-Prune: structured pruning of grouped-query-attention decoder models.

Dutta, Gupta, Agarwal, "Efficient LLM Pruning with Token-Dependency Awareness and Hardware-Adapted Inference"
(ES-FoMo II workshop, ICML 2024).

This file is imported by every stage, so it holds nothing that a stage's result depends on.
"""

import importlib
import os
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _refuse_another_checkout() -> None:
    """Stop a stage that would run the core of another checkout than its own.

    `dvc exp run --temp` and `--queue` run in a copy of the workspace. A package from elsewhere (an editable install, a
    PYTHONPATH) would compute with the wrong code, and the result would then be served from the run-cache.
    """
    if "DVC_STAGE" not in os.environ:
        return
    imported_from = Path(__file__).resolve().parent.parent
    if imported_from != Path.cwd().resolve():
        raise ImportError(
            f"tvaprune was imported from {imported_from}, but the stage runs in {Path.cwd()}. "
            "Run stages as `python -m stages.NAME` from the repository root, and uninstall any "
            "installed copy of tvaprune from this environment."
        )


_refuse_another_checkout()


# Where the front door is; imported when it is used, so that `import tvaprune` stays quick and free of torch.
_OFFERED = {"load": "tvaprune.checkpoint.loading", "prune": "tvaprune.pruning"}


def __getattr__(name: str) -> Any:
    if name in _OFFERED:
        return getattr(importlib.import_module(_OFFERED[name]), name)
    raise AttributeError(f"module 'tvaprune' has no attribute {name!r}")
