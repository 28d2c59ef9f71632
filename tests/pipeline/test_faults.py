"""Faults of the machine: one line where a run cannot go on; the next `dvc repro` makes the undisturbed files."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.kills import Undisturbed, contents, different, forget
from tests.pipeline.workspace import TIMEOUT_S, Workspace, environment
from tools.mend_dvc import mend

YEAR_S = 365 * 24 * 3600
nightly = pytest.mark.nightly


@pytest.fixture(scope="module")
def undisturbed(finished: Workspace) -> Undisturbed:
    return Undisturbed(finished, contents(finished))


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line in which a stage says why it failed; else DVC's own, of which it writes one a file."""
    assert done.returncode != 0
    lines = (done.stdout + done.stderr).splitlines()
    assert not any("Traceback" in line for line in lines)
    said = [line for line in lines if line.startswith("error: ")]
    assert len(said) <= 1
    return said[0] if said else "\n".join(line for line in lines if line.startswith("ERROR: "))


def started_by(directory: Path, script: str) -> dict[str, str]:
    """Variables with which a stage's `python` first runs these lines of a shell."""
    directory.mkdir()
    (directory / "python").write_text(f'#!/bin/sh\n{script}\nexec {sys.executable} "$@"\n')
    (directory / "python").chmod(0o755)
    return {"PATH": f"{directory}{os.pathsep}{environment()['PATH']}"}


# The kernel then asks root for the rights of files as it asks anybody. 1 and 2: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH.
LIKE_ANYBODY = """
import ctypes, os, sys
if os.geteuid() == 0:
    for capability in (1, 2):
        assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""


def as_anybody(workspace: Workspace, *arguments: str) -> subprocess.CompletedProcess[str]:
    """DVC as a user whom the rights of files bind."""
    return subprocess.run(
        [sys.executable, "-c", LIKE_ANYBODY, "dvc", *arguments],
        cwd=workspace.root, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip


@pytest.mark.parametrize(
    "stage", ["adapt_dimensions", pytest.param("learn_masks", marks=nightly), pytest.param("compact", marks=nightly)]
)
def test_a_stage_without_room_for_its_files(
    workspace: Workspace, undisturbed: Undisturbed, stage: str, tmp_path: Path
) -> None:
    """A limit on a file's size stands for the disk's: a process can have that to itself."""
    workspace.forget(stage)
    limited = replace(workspace, variables=started_by(tmp_path / "bin", "ulimit -f 1"))
    assert "File too large" in complaint(limited.dvc("repro", stage, check=False))
    assert workspace.repro(stage) == {stage}
    assert different(workspace, undisturbed) == []


@contextmanager
def disk_with(directory: Path, free_bytes: int, content: Path) -> Iterator[Path]:
    """A copy of `content` on a disk of its own with so much room left. Needs the right to mount."""
    size = sum(path.lstat().st_size + 4096 for path in content.rglob("*"))
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * size + (8 << 20)}", "tmpfs", directory], check=True)
    try:
        root = directory / "workspace"
        shutil.copytree(content, root, symlinks=True)
        with (directory / "filling").open("wb") as filling:
            os.posix_fallocate(filling.fileno(), 0, shutil.disk_usage(directory).free - free_bytes)
        yield root
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@nightly
@pytest.mark.parametrize("free_kib", [0, 64, 256, 512, 768])
def test_a_full_disk(workspace: Workspace, undisturbed: Undisturbed, free_kib: int, tmp_path: Path) -> None:
    """With so little room the stage fails, or DVC after it, or what it cannot copy into its cache stays out of it."""
    forget(workspace, "compact")  # its objects too: 440 KiB, once in the workspace and once in the cache
    with disk_with(tmp_path / "disk", free_kib << 10, workspace.root) as root:
        full = Workspace(root)
        done = full.dvc("repro", "compact", check=False)
        line = complaint(done) if done.returncode else done.stderr  # DVC only logs a failed copy, and exits with 0
        assert "No space left on device" in line or "database or disk is full" in line
        assert done.returncode or "failed to transfer" in line
        (root.parent / "filling").unlink()
        if mend(root) or done.returncode:  # docs/troubleshooting.md: DVC cut its own file off
            full.repro("compact")
        else:
            assert "artifacts/compact/" in not_in_cache(full)
        full.dvc("commit", "--force", "compact")
        assert not_in_cache(full) == []
        assert different(full, undisturbed) == []


def not_in_cache(workspace: Workspace) -> list[str]:
    found = json.loads(workspace.dvc("data", "status", "--json").stdout)
    return found.get("not_in_cache", [])


@pytest.mark.parametrize(
    "closed",
    [
        ".resume",
        pytest.param("metrics", marks=nightly),
        pytest.param("artifacts", marks=nightly),
        pytest.param(".dvc/cache/files/md5", marks=nightly),
    ],
)
def test_a_directory_that_cannot_be_written(workspace: Workspace, undisturbed: Undisturbed, closed: str) -> None:
    workspace.forget("adapt_dimensions")
    for lock in (workspace.root / ".resume").iterdir():
        lock.unlink()
    place = workspace.root / closed
    every = [place, *(path for path in place.rglob("*") if path.is_dir())]
    for path in every:
        path.chmod(0o555)
    line = complaint(as_anybody(workspace, "repro", "adapt_dimensions"))
    assert "Permission denied" in line
    assert closed in line
    for path in every:
        path.chmod(0o755)
    workspace.repro("adapt_dimensions")
    assert different(workspace, undisturbed) == []


def cut(path: Path) -> None:
    _replace(path, path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = path.read_bytes()
    _replace(path, content[:-1] + bytes([content[-1] ^ 1]))


def _replace(path: Path, content: bytes) -> None:
    """In place, as a disk would: also where the file is read-only, which it stays."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)


@pytest.mark.warm
@pytest.mark.parametrize("spoil", [cut, pytest.param(flip, marks=nightly)])
def test_a_damaged_artifact_and_a_damaged_metrics_file_come_from_the_cache(
    workspace: Workspace, undisturbed: Undisturbed, spoil: object
) -> None:
    for name in ("artifacts/adapted/tensors.safetensors", "metrics/adapt.json"):
        spoil(workspace.root / name)  # type: ignore[operator]
    assert workspace.repro() == set()
    assert different(workspace, undisturbed) == []
    assert (workspace.root / "metrics/adapt.json").read_bytes() == (
        undisturbed.workspace.root / "metrics/adapt.json"
    ).read_bytes()


@pytest.mark.warm
@pytest.mark.parametrize("years", [-1, pytest.param(1, marks=nightly)])
def test_a_clock_that_was_set_reruns_nothing(workspace: Workspace, undisturbed: Undisturbed, years: int) -> None:
    """All files are older, or newer, than when DVC saw them."""
    for path in workspace.root.rglob("*"):
        if ".git" not in path.parts and path.is_file() and not path.is_symlink():
            then = path.stat().st_mtime + years * YEAR_S
            os.utime(path, (then, then))
    assert workspace.repro() == set()
    workspace.forget("adapt_dimensions")  # its inputs are now from another year than its outputs
    assert workspace.repro("adapt_dimensions") == {"adapt_dimensions"}
    assert different(workspace, undisturbed) == []


def test_two_runs_at_once(workspace: Workspace, undisturbed: Undisturbed) -> None:
    """One makes the stage; the other waits, or ends with a line that says so."""
    workspace.forget("adapt_dimensions")
    with workspace.started("adapt_dimensions") as first:
        running = workspace.root / ".dvc" / "tmp" / "rwlock"
        while first.poll() is None and (not running.is_file() or "artifacts/adapted" not in running.read_text()):
            time.sleep(0.01)
        second = workspace.dvc("repro", "adapt_dimensions", check=False)
        assert first.wait(TIMEOUT_S) == 0
    line = complaint(second)
    assert "is busy, it is being blocked by" in line or "Unable to acquire lock" in line
    assert workspace.repro() == set()
    assert different(workspace, undisturbed) == []


@pytest.mark.warm
def test_a_damaged_object_of_the_cache_is_found_and_made_again(workspace: Workspace, undisturbed: Undisturbed) -> None:
    """DVC itself copies it into the workspace, and sees nothing."""
    masks = workspace.root / "artifacts/adapted/tensors.safetensors"
    md5 = hashlib.md5(masks.read_bytes()).hexdigest()
    damaged = workspace.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    flip(damaged)
    shutil.rmtree(masks.parent)
    assert workspace.repro("adapt_dimensions") == set()
    assert different(workspace, undisturbed) == ["artifacts/adapted/tensors.safetensors"]
    assert check_cache(workspace).splitlines()[:2] == [f"{damaged}: damaged", f"{masks}: damaged"]
    check_cache(workspace, "--remove")
    assert workspace.repro("adapt_dimensions") == {"adapt_dimensions"}
    assert different(workspace, undisturbed) == []
    assert check_cache(workspace).startswith("0 damaged objects in ")


def check_cache(workspace: Workspace, *options: str) -> str:
    command = [sys.executable, "-m", "tools.check_cache", *options]
    done = subprocess.run(command, cwd=workspace.root, env=environment(), capture_output=True, text=True)
    assert done.returncode == int("damaged\n" in done.stdout), done.stderr
    return done.stdout
