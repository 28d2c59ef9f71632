"""The pipeline run once on tiny inputs, for all workers; every test works in a copy of it."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from tests.faults.warm import Warm
from tests.pipeline.tiny_inputs import write_inputs, write_small_params
from tests.pipeline.workspace import Workspace


@pytest.fixture(scope="session")
def finished(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """After one `dvc repro`, committed. Not to be changed: take `workspace` for that."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # of all workers of this session
    with FileLock(shared / "finished.lock"):
        root, making = shared / "finished", shared / "making"
        if not root.exists():
            shutil.rmtree(making, ignore_errors=True)
            workspace = replace(Workspace.create(making), variables=warm.variables())
            write_inputs(making / "inputs")
            write_small_params(making / "params.yaml")
            workspace.commit()
            workspace.repro()
            workspace.commit()
            making.rename(root)
    return Workspace(root)


@pytest.fixture
def workspace(request: pytest.FixtureRequest, finished: Workspace, warm: Warm, tmp_path: Path) -> Workspace:
    """Stages start as a user's do; in a test marked `warm`, as in the run that it is a copy of."""
    copy = finished.copy(tmp_path / "workspace")
    return replace(copy, variables=warm.variables()) if request.node.get_closest_marker("warm") else copy
