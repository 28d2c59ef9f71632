"""The pipeline run once on tiny inputs; every test works in a copy of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.tiny_inputs import write_inputs, write_small_params
from tests.pipeline.workspace import Workspace


@pytest.fixture(scope="session", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where DVC and the hub's client put what they keep outside a workspace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVAPRUNE_TEST_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        yield


@pytest.fixture(scope="session")
def finished(scratch: None, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """After one `dvc repro`, committed. Not to be changed: take `workspace` for that."""
    workspace = Workspace.create(tmp_path_factory.mktemp("pipeline") / "finished")
    write_inputs(workspace.root / "inputs")
    write_small_params(workspace.root / "params.yaml")
    workspace.commit()
    workspace.repro()
    workspace.commit()
    return workspace


@pytest.fixture
def workspace(finished: Workspace, tmp_path: Path) -> Workspace:
    return finished.copy(tmp_path / "workspace")
