"""Before anything imports torch: one thread, no network, and the core's shapes and types checked as it runs."""

import os
from collections.abc import Iterator
from pathlib import Path

# Tiny tensors are quicker on one thread, and sums come out the same on every machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook finds it by name)
from tests.faults.warm import Warm, warm_programs

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
    """The longest first: those with a time limit of their own, then the slow ones. Else they end alone."""
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("timeout", "slow")])


@pytest.fixture(scope="session", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where DVC and the hub's client put what they keep outside a workspace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVAPRUNE_TEST_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        yield


@pytest.fixture(scope="session")
def warm(scratch: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Programs that start in a moment. Importing the libraries takes most of a tiny stage's time."""
    with warm_programs(tmp_path_factory.mktemp("warm")) as programs:
        yield programs
