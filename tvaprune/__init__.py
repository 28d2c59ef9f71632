"""TVA-Prune: structured pruning of grouped-query-attention decoder models.

Dutta, Gupta, Agarwal, "Efficient LLM Pruning with Global Token-Dependency Awareness and Hardware-Adapted Inference"
(ES-FoMo II workshop, ICML 2024).

This file is imported by every stage, so it holds nothing that a stage's result depends on.
"""

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


VERSION_FILE = ".tvaprune-version"  # in a pipeline that `tvaprune init` made: the version that its results are of


def _refuse_other_code() -> None:
    """Stop a stage that would run other code than its pipeline's hashes are of.

    `dvc exp run --temp` and `--queue` run in a copy of the workspace. Where that is a clone, with a `tvaprune/` of its
    own, a package from elsewhere (an editable install, a PYTHONPATH) would compute with the wrong code, and the result
    would then be served from the run-cache. A pipeline without code of its own names the version that it was made with.
    """
    if "DVC_STAGE" not in os.environ:
        return
    imported_from, here = Path(__file__).resolve().parent.parent, Path.cwd()
    if imported_from != here.resolve() and (here / "tvaprune").is_dir():
        raise ImportError(
            f"tvaprune was imported from {imported_from}, but the stage runs in {here}. "
            "Run stages as `python -m stages.NAME` from the repository root, and uninstall any "
            "installed copy of tvaprune from this environment."
        )
    made_with = here / VERSION_FILE
    if made_with.is_file() and (version := made_with.read_text().strip()) != __version__:
        raise ImportError(
            f"this pipeline is of tvaprune {version}, but {__version__} is installed. Install that version, or run "
            "`tvaprune init --renew .`, after which every stage runs again."
        )


def states_directory() -> Path:
    """Where stages keep their states and locks: .resume/ of the repository, also for a queued run's copy of it."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()) / ".resume"


def quiet_libraries() -> None:
    """Silence what libraries say at every start and what no user can act on. To be called before they are imported."""
    logging.getLogger("torchao").addFilter(lambda record: "Failed to load" not in record.getMessage())
    enums = logging.getLogger("torch.utils._pytree")
    enums.addFilter(lambda record: "is an Enum subclass" not in record.getMessage())
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    if not sys.stderr.isatty():  # a bar of transformers would fill a log with carriage returns
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


_refuse_other_code()
if sys.argv[:1] == ["-m"]:  # `python -m tvaprune`, not a program that imports it
    quiet_libraries()


# Where the front door is; imported when it is used, so that `import tvaprune` stays quick and free of torch.
_OFFERED = {"load": "tvaprune.checkpoint.loading", "prune": "tvaprune.pruning"}


def __getattr__(name: str) -> Any:
    if name in _OFFERED:
        return getattr(importlib.import_module(_OFFERED[name]), name)
    raise AttributeError(f"module 'tvaprune' has no attribute {name!r}")
