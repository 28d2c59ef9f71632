"""Write the golden checkpoints of this version: `python -m tests.golden`, once, before its release."""

import sys

from tests.golden.writing import write_version

if __name__ == "__main__":
    try:
        folder = write_version()
    except FileExistsError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {folder}")
