"""An environment with vLLM, made once per lock file and kept in the user's cache."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

LOCK_FILE = Path(__file__).parents[1] / "requirements-vllm.lock"
OPTIONS = ("--require-hashes", "--no-deps", "--only-binary", ":all:")  # the files of the lock, and no code of theirs
TORCH_BUILD = Path(sys.prefix) / "torch.txt"  # constraint to the CPU build, where the Makefile found it in the index
LIMIT_S = 180  # of an install that takes 110 s on two cores with some other work; CI has no more time


def vllm_python() -> Path:
    """The environment's interpreter: TVAPRUNE_VLLM_PYTHON if set. Skips the test where the index cannot serve it."""
    if given := os.environ.get("TVAPRUNE_VLLM_PYTHON"):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tvaprune"
    cache.mkdir(parents=True, exist_ok=True)
    name = f"vllm-{hashlib.sha256(LOCK_FILE.read_bytes()).hexdigest()[:12]}-{sys.version_info[0]}.{sys.version_info[1]}"
    home, done = cache / name, cache / name / "installed"
    python = home / "bin" / "python"
    with FileLock(cache / f"{name}.lock"):
        if not done.is_file():
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
            build = ["-c", str(TORCH_BUILD)] if TORCH_BUILD.is_file() else []
            install = [*pip, "install", "-q", *OPTIONS, *build, "-r", str(LOCK_FILE)]
            try:
                subprocess.run(install, capture_output=True, text=True, check=True, timeout=LIMIT_S)
                # A CUDA build of torch has further packages, which are not in the lock.
                subprocess.run([str(python), "-c", "import torch"], capture_output=True, text=True, check=True)
            except subprocess.TimeoutExpired:
                pytest.skip(f"the package index did not serve {LOCK_FILE.name} within {LIMIT_S} s")
            except subprocess.CalledProcessError as error:
                lines = error.stderr.strip().splitlines() or ["no message"]
                pytest.skip(f"the package index cannot serve {LOCK_FILE.name}: {lines[-1]}")
            done.touch()
    return python
