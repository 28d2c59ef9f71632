"""Before anything imports torch: one thread, no network, and the core's shapes and types checked as it runs."""

import os
from pathlib import Path

# Tiny tensors are quicker on one thread, and sums come out the same on every machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook finds it by name)

# Where tensors are: parameters are pydantic's to check, and the losses check their own shapes.
# The modeling file is left out: servers and torch.compile trace it, and it has no types of shapes.
CHECKED = (
    "architecture",
    "baselines",
    "checkpoint",
    "export",
    "gates",
    "inputs",
    "masks",
    "measures",
    "proof",
    "recovery",
    "runtime",
)
ROOMS = Path(__file__).parents[1] / "tvaprune"
install_import_hook(
    [
        f"tvaprune.{room}.{path.stem}"
        for room in CHECKED
        for path in (ROOMS / room).glob("*.py")
        if path.stem not in ("__init__", "modeling_tvaprune")
    ],
    "tests.typecheck.checked",
)

for name in ("TVAPRUNE_DEVICE", "TVAPRUNE_DTYPE", "DVC_STAGE", "DVC_ROOT"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, which have a time limit of their own: else they end alone, on one worker."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)
