"""S3 servers on this machine: moto, which imitates the protocol, and SeaweedFS, which people store data in."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from moto.server import ThreadedMotoServer

KEY = "test"
REGION = "us-east-1"
HOST = "127.0.0.1"
PORTS = ("master.port", "volume.port", "filer.port", "s3.port")  # each has a second one, for gRPC
READY_S = 60


@contextmanager
def moto(directory: Path) -> Iterator[str]:
    """The address of a server that keeps its objects in memory."""
    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def seaweedfs(directory: Path) -> Iterator[str]:
    """The address of a server that keeps its objects below the directory and asks for KEY."""
    directory.mkdir()
    credentials = [{"accessKey": KEY, "secretKey": KEY}]
    identity = {"name": KEY, "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = dict(
        zip([name for port in PORTS for name in (port, f"{port}.grpc")], _free_ports(2 * len(PORTS)), strict=True)
    )
    command = [str(Path(sys.executable).parent / "weed"), "server", f"-dir={directory}", f"-ip={HOST}", "-s3"]
    command += [f"-s3.config={directory / 's3.json'}", "-volume.max=8", "-master.telemetry=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # their default ports are not free everywhere
    command += [f"-{name}={port}" for name, port in ports.items()]
    with (directory / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            yield f"http://{HOST}:{ports['s3.port']}"
        finally:
            server.kill()
            server.wait()


def create_bucket(endpoint: str, name: str) -> None:
    """Wait until the server answers, and make the bucket."""
    keys: Any = {"aws_access_key_id": KEY, "aws_secret_access_key": KEY, "region_name": REGION}
    client = boto3.client("s3", endpoint_url=endpoint, **keys)
    deadline = time.monotonic() + READY_S
    while True:
        try:
            client.create_bucket(Bucket=name)
            return
        except (BotoCoreError, ClientError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
