"""A copy of the repository in a temporary directory, driven through DVC's own command line."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 560


@dataclass(frozen=True)
class Workspace:
    """A git and DVC repository with the pipeline in it.

    Attributes:
        variables: what its commands find in their environment, beside `environment()`.
        timeout_s: how long one command of DVC may take.
    """

    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    timeout_s: float = TIMEOUT_S

    @classmethod
    def create(cls, root: Path) -> "Workspace":
        """The tracked and the new files of this repository, without its outputs."""
        listed = _run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], REPOSITORY).stdout
        for name in filter(None, listed.split("\0")):
            source, target = REPOSITORY / name, root / name
            if source.is_file() and not name.startswith("metrics/") and name != "dvc.lock":
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        _run([sys.executable, "-m", "tools.plots_page"], root)
        _run(["git", "init", "-q", "-b", "main"], root)
        return cls(root)

    def copy(self, root: Path) -> "Workspace":
        shutil.copytree(self.root, root, symlinks=True)
        return Workspace(root)

    def commit(self) -> None:
        _run(["git", "add", "-A"], self.root)
        _run(["git", "commit", "-qm", "state"], self.root)

    def dvc(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return _run(["dvc", *arguments], self.root, check, self.variables, self.timeout_s)

    def run_queue(self, *options: str, timeout_s: float = 900) -> None:
        """Start the queue, and wait until each of its experiments has succeeded.

        The worker keeps the output open, so a pipe would wait for it as well.
        """
        variables = environment() | self.variables
        command = ["dvc", "queue", "start", *options]
        subprocess.run(command, cwd=self.root, env=variables, stdout=subprocess.DEVNULL, check=True)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self.dvc("queue", "status").stdout
            assert "Failed" not in status, status
            if "Running" not in status and "Queued" not in status:
                assert "Success" in status, status
                return
            time.sleep(2)
        pytest.fail("the queue did not end")

    def repro(self, *arguments: str) -> set[str]:
        """Run `dvc repro`; the names of the stages that it ran."""
        return stages_run(self.dvc("repro", *arguments).stdout)

    def set_param(self, key: str, value: Any) -> None:
        yaml, path = YAML(), self.root / "params.yaml"
        content = yaml.load(path)
        *sections, name = key.split(".")
        place = content
        for section in sections:
            place = place[section]
        place[name] = value
        yaml.dump(content, path)

    def hashes(self) -> dict[str, str]:
        """Output -> hash, from dvc.lock, without the JSON metrics and the report: they hold timings."""
        locked = YAML(typ="safe").load(self.root / "dvc.lock")["stages"]
        outs = [out for stage in locked.values() for out in stage.get("outs", [])]
        return {out["path"]: out["md5"] for out in outs if not out["path"].endswith((".json", "artifacts/report"))}

    def forget(self, stage: str) -> None:
        """As if the stage had never run: no lock entry, no outputs, no cached runs."""
        yaml, path = YAML(typ="safe"), self.root / "dvc.lock"
        content = yaml.load(path)
        for out in content["stages"].pop(stage)["outs"]:
            place = self.root / out["path"]
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink()
        yaml.dump(content, path)
        shutil.rmtree(self.root / ".dvc" / "cache" / "runs", ignore_errors=True)

    @contextmanager
    def running(self, stage: str, reached: Callable[[Path], bool]) -> Iterator[psutil.Process]:
        """`dvc repro STAGE` without DVC: it was killed as soon as `reached(root)`, its stage lives on, suspended."""
        with self._started(stage, reached) as dvc:
            orphan = _stage_process(dvc.pid, stage)
            dvc.kill()
            dvc.wait(TIMEOUT_S)
            # Only now: what is stopped when its group is orphaned is hung up by the kernel.
            orphan.suspend()
            yield orphan

    def kill_during(self, stage: str, reached: Callable[[Path], bool], *, dvc_too: bool) -> None:
        """Start `dvc repro STAGE`; SIGKILL the stage, or DVC and the stage, as soon as `reached(root)`."""
        with self._started(stage, reached) as dvc:
            if dvc_too:
                os.killpg(dvc.pid, signal.SIGKILL)
            else:
                _stage_process(dvc.pid, stage).kill()
            assert dvc.wait(TIMEOUT_S) != 0

    def kill_rank(self, stage: str, reached: Callable[[Path], bool], rank: int) -> str:
        """Start `dvc repro STAGE` on several processes; SIGKILL one of them; what DVC and the stage then say."""
        with self._started(stage, reached) as dvc:
            _stage_process(dvc.pid, stage, {"RANK": str(rank)}).kill()
            assert dvc.wait(60) != 0
        return (self.root / "started.log").read_text()

    @contextmanager
    def started(self, stage: str) -> Iterator[subprocess.Popen[bytes]]:
        """`dvc repro STAGE`, logged in started.log, in a process group that does not outlive the block."""
        with (self.root / "started.log").open("w") as log:
            dvc = subprocess.Popen(
                ["dvc", "repro", stage],
                cwd=self.root,
                env=environment() | self.variables,
                stdout=log,
                stderr=log,
                process_group=0,
            )
            try:
                yield dvc
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(dvc.pid, signal.SIGKILL)
                dvc.wait(TIMEOUT_S)

    @contextmanager
    def _started(self, stage: str, reached: Callable[[Path], bool]) -> Iterator[subprocess.Popen[bytes]]:
        """`started` once `reached(root)`."""
        with self.started(stage) as dvc:
            while not reached(self.root):
                if dvc.poll() is not None:
                    raise AssertionError((self.root / "started.log").read_text())
                time.sleep(0.001)
            yield dvc


def stages_run(output: str) -> set[str]:
    """The stages that `dvc repro` says it ran; not those skipped or taken from the cache."""
    return set(re.findall(r"^Running stage '([^']+)'", output, re.MULTILINE))


def environment() -> dict[str, str]:
    """One thread, no GPU, no network, and nobody's own settings."""
    ours = ("DVC_", "GIT_", "TVAPRUNE_", "PYTHON", "HF_", "AWS_", "PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    scratch = Path(os.environ["TVAPRUNE_TEST_SCRATCH"])
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TVAPRUNE_DEVICE": "cpu",
        "TVAPRUNE_DTYPE": "float32",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf"),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(scratch / "dvc"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        **{f"GIT_{role}_{field}": "test@localhost" for role in ("AUTHOR", "COMMITTER") for field in ("NAME", "EMAIL")},
    }


def _stage_process(ancestor: int, stage: str, variables: dict[str, str] | None = None) -> psutil.Process:
    """The Python process of the stage, below DVC and its shell; the first with these variables."""
    for child in psutil.Process(ancestor).children(recursive=True):
        if f"stages.{stage}" in child.cmdline() and (variables or {}).items() <= child.environ().items():
            return child
    raise AssertionError(f"{stage} runs no more")


def _run(
    command: list[str],
    directory: Path,
    check: bool = True,
    variables: dict[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=directory, env=environment() | (variables or {}), timeout=timeout_s,
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def git(directory: Path, *arguments: str) -> str:
    """What git prints, run in a directory."""
    return _run(["git", *arguments], directory).stdout
