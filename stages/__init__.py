"""One script a stage, run as `python -m stages.NAME` from the repository root.

Python imports this file before a stage's own imports, so a missing package is reported from here.
"""

import sys
from typing import Any


def _report_missing_package(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """One line for a missing package, usually because .venv is not activated, or for another core than the pipeline's.

    Other errors keep their traceback.
    """
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if type(error) is ImportError and package == "":  # of tvaprune/__init__.py, which says what to do
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError) and package not in ("", "stages", "tvaprune"):
        print(
            f"error: {package} is not installed in this Python ({sys.executable}); activate the environment with "
            "`source .venv/bin/activate`, or create it with `make repro`",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.argv[0] == "-m":  # a stage runs; nothing else that imports this package is changed
    sys.excepthook = _report_missing_package

    from tvaprune import quiet_libraries

    quiet_libraries()
