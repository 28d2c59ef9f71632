"""Artifacts shared through a remote: pushed to an S3 server or a directory, pulled in other clones."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import s3_servers
from tests.pipeline.s3_servers import KEY, REGION
from tests.pipeline.workspace import Workspace, environment


@pytest.fixture(params=[s3_servers.moto, pytest.param(s3_servers.seaweedfs, marks=pytest.mark.slow)])
def endpoint(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", s3_servers.HOST)
    server: Any = request.param
    with server(tmp_path / "server") as url:
        s3_servers.create_bucket(url, "artifacts")
        yield url


def clone_of(workspace: Workspace, root: Path) -> Workspace:
    subprocess.run(["git", "clone", "-q", str(workspace.root), str(root)], env=environment(), check=True)
    clone = replace(workspace, root=root)
    assert not (root / "artifacts").exists()
    return clone


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.warm
def test_pushed_artifacts_are_pulled_in_another_clone(workspace: Workspace, tmp_path: Path, endpoint: str) -> None:
    """Byte for byte, and no stage runs: neither where all is pulled, nor where nothing is there yet."""
    workspace.dvc("remote", "add", "--default", "shared", "s3://artifacts/tvaprune")
    options = {"endpointurl": endpoint, "access_key_id": KEY, "secret_access_key": KEY, "region": REGION}
    for option, value in options.items():
        workspace.dvc("remote", "modify", "shared", option, value)
    workspace.commit()
    workspace.dvc("push")

    whole = clone_of(workspace, tmp_path / "whole")
    whole.dvc("pull")
    assert whole.dvc("status", "--json").stdout.strip() == "{}"
    assert whole.repro() == set()

    bare = clone_of(workspace, tmp_path / "bare")
    assert bare.repro("--pull", "--allow-missing") == set()
    bare.dvc("pull", "compact")
    for clone in (whole, bare):
        assert files(clone.root / "artifacts/compact") == files(workspace.root / "artifacts/compact")


@pytest.mark.warm
@pytest.mark.slow
def test_the_pruned_model_is_got_by_name_and_version(workspace: Workspace, tmp_path: Path) -> None:
    """`artifacts:` of dvc.yaml and GTO's tag: without a clone, and the version that the tag names."""
    workspace.dvc("remote", "add", "--default", "shared", str(tmp_path / "remote"))
    workspace.commit()
    workspace.dvc("push")
    tag = ["git", "tag", "-a", "pruned@v1.0.0", "-m", "20% of the decoder"]
    subprocess.run(tag, cwd=workspace.root, env=environment(), check=True)
    elsewhere = replace(workspace, root=tmp_path)
    elsewhere.dvc("artifacts", "get", str(workspace.root), "pruned", "--rev", "v1.0.0", "-o", "got")
    assert files(tmp_path / "got") == files(workspace.root / "artifacts/compact")
    done = elsewhere.dvc("artifacts", "get", str(workspace.root), "pruned", "--rev", "v2.0.0", check=False)
    assert done.returncode != 0
