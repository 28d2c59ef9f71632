"""Find objects in DVC's cache whose content is not that of their name.

    python -m tools.check_cache --remove && dvc repro

DVC takes its read-only files as right and hashes none of them again: it copies an object that a disk or a program has
damaged into the workspace, and `dvc status` sees no change. An object that was removed is fetched or made again.
"""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from ruamel.yaml import YAML
from typer import Exit, Option, echo

from stages._command import command

OBJECTS = Path("files", "md5")


def damaged_objects(cache: Path) -> list[Path]:
    """Files of a cache directory whose MD5 is not their name, sorted."""
    files = sorted(path for path in (cache / OBJECTS).glob("[0-9a-f][0-9a-f]/*") if path.is_file())
    return [path for path in files if _md5(path) != f"{path.parent.name}{path.name}".removesuffix(".dir")]


def copies(root: Path, cache: Path, damaged: list[Path]) -> list[Path]:
    """Outputs in dvc.lock that should have the content of a damaged object, and have another, sorted."""
    hashes = {f"{path.parent.name}{path.name}" for path in damaged}
    found = [path for path, md5 in _outputs(root, cache) if md5 in hashes and path.is_file() and _md5(path) != md5]
    return sorted(found)


def _outputs(root: Path, cache: Path) -> Iterator[tuple[Path, str]]:
    """The files that dvc.lock names, alone or through the listing of their directory, and their MD5."""
    lock = root / "dvc.lock"
    stages = YAML(typ="safe", pure=True).load(lock)["stages"] if lock.is_file() else {}
    for out in (out for stage in stages.values() for out in stage.get("outs", [])):
        path, md5 = root / out["path"], str(out["md5"])
        yield path, md5
        if md5.endswith(".dir"):
            try:
                listing = json.loads((cache / OBJECTS / md5[:2] / md5[2:]).read_text())
            except (OSError, ValueError):
                continue  # absent, or damaged itself
            yield from ((path / entry["relpath"], entry["md5"]) for entry in listing)


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@command
def main(
    remove: Annotated[
        bool, Option("--remove", help="Remove them, with the outputs that were copied from them.")
    ] = False,
) -> None:
    """Read the cache of the repository in the current directory; exit status 1 where anything is left damaged."""
    shown = subprocess.run(["dvc", "cache", "dir"], capture_output=True, text=True)
    if shown.returncode:
        raise ValueError(f"dvc cache dir: {shown.stderr.strip()}")
    cache = Path(shown.stdout.strip())
    objects = damaged_objects(cache)
    found = [*objects, *copies(Path.cwd(), cache, objects)]
    for path in found:
        if remove:
            path.unlink()
        echo(f"{path}: {'removed' if remove else 'damaged'}")
    echo(f"{len(objects)} damaged objects in {cache}")
    raise Exit(bool(found) and not remove)
