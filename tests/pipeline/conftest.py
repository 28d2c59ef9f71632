"""The pipeline run once on tiny inputs, for all workers; every test works in a copy of it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

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
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # of all workers of this session
    with FileLock(shared / "finished.lock"):
        root, making = shared / "finished", shared / "making"
        if not root.exists():
            shutil.rmtree(making, ignore_errors=True)
            workspace = Workspace.create(making)
            write_inputs(making / "inputs")
            write_small_params(making / "params.yaml")
            workspace.commit()
            workspace.repro()
            workspace.commit()
            making.rename(root)
    return Workspace(root)


@pytest.fixture
def workspace(finished: Workspace, tmp_path: Path) -> Workspace:
    return finished.copy(tmp_path / "workspace")
