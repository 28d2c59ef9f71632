"""Artifacts shared through a remote: pushed to an S3 server, pulled in another clone."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.pipeline.workspace import Workspace, environment


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket="artifacts")
    yield url
    server.stop()


def test_pushed_artifacts_are_pulled_in_another_clone(workspace: Workspace, tmp_path: Path, endpoint: str) -> None:
    workspace.dvc("remote", "add", "--default", "shared", "s3://artifacts/tvaprune")
    options = {"endpointurl": endpoint, "access_key_id": "test", "secret_access_key": "test", "region": "us-east-1"}
    for option, value in options.items():
        workspace.dvc("remote", "modify", "shared", option, value)
    workspace.commit()
    workspace.dvc("push")
    clone = Workspace(tmp_path / "clone")
    subprocess.run(["git", "clone", "-q", str(workspace.root), str(clone.root)], env=environment(), check=True)
    assert not (clone.root / "artifacts").exists()
    clone.dvc("pull")
    assert clone.dvc("status", "--json").stdout.strip() == "{}"
    assert clone.repro() == set()
    name = "artifacts/compact/model.safetensors"
    assert (clone.root / name).read_bytes() == (workspace.root / name).read_bytes()
