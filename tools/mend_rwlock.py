"""Remove DVC's file `.dvc/tmp/rwlock` where it was left cut off.

    python -m tools.mend_rwlock && dvc repro

DVC writes this list of its running commands in place. A kill at that moment, or a full disk, leaves it empty or cut
off, and every later command ends with "Unable to read RWLock-file". The list only matters while a command runs, and a
command rewrites it only under the lock rwlock.lock, which this takes as well.
"""

import fcntl
import json
from pathlib import Path

from typer import echo

from stages._command import command


def mend(root: Path) -> bool:
    """Remove the file of the repository at `root` if it is no JSON; whether it was removed."""
    path = root / ".dvc" / "tmp" / "rwlock"
    if not path.is_file():
        return False
    with path.with_suffix(".lock").open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        try:
            json.loads(path.read_text())
        except FileNotFoundError:
            return False
        except ValueError:
            path.unlink()
            return True
    return False


@command
def main() -> None:
    """Mend the repository in the current directory."""
    if mend(Path.cwd()):
        echo("removed .dvc/tmp/rwlock, which a killed DVC had left cut off")
