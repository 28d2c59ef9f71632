"""Measure on a GPU all that the documentation says of one, in parts that go on after a kill.

    python -m tools.measure_gpu DIRECTORY

runs the parts one after another, each in a process of its own with a time limit, and renews DIRECTORY/PART.json after
every step. Run again, it goes on: what is done is not repeated. At its end it prints the tables, in Markdown. It needs
this repository, an otherwise idle machine, and the packages of requirements.lock; a part whose package is missing is
recorded as not run. No DVC, network or trained weights are needed: weights and text are random.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, echo

from stages._command import command
from tools.gpu.parts import PARTS, Settings, work
from tools.gpu.resumable import DONE, NOT_RUN, Results, run_part
from tools.gpu.tables import tables
from tvaprune.measures import markdown


def listed(results: list[Results]) -> str:
    """What is done, what is left, and the minutes that it took or may take."""
    rows = []
    for each in results:
        part, count = each.part, sum(each.state_of(step) == DONE for step in each.part.steps)
        minutes = f"{each.seconds / 60:.1f} taken" if each.state == DONE else f"about {part.minutes:g}"
        rows.append([part.name, each.state, f"{count} of {len(part.steps)}", minutes, part.about])
    return markdown.table(["part", "state", "steps", "minutes", ""], rows)


@command
def main(
    directory: Annotated[Path, Argument(help="Where the results are; another for another runtime or other code.")],
    names: Annotated[list[str] | None, Argument(metavar="[PART]...", help="Parts to run; default: all.")] = None,
    show: Annotated[bool, Option("--list", help="Only print what is done, what is left, and minutes.")] = False,
    only_tables: Annotated[bool, Option("--tables", help="Only print the tables of what is there.")] = False,
    limit: Annotated[float, Option(help="Seconds that a part may take in one call.", min=1)] = 480,
    total: Annotated[float | None, Option(help="Seconds that the call may take.", min=1)] = None,
    runtime: Annotated[str, Option(help="auto, eager, packed (CPU), graphs (CUDA) or compile.")] = "auto",
    models: Annotated[Path | None, Option(help="Where part whole keeps 45 GB; default: the system's /tmp.")] = None,
    vllm: Annotated[
        Path | None, Option(envvar="TVAPRUNE_VLLM_PYTHON", help="Interpreter of an environment that has vLLM.")
    ] = None,
    tiny: Annotated[bool, Option("--tiny", help="Tiny shapes and few rounds, on any machine: a trial.")] = False,
) -> None:
    """Writes DIRECTORY/PART.json; prints the tables. Fails where a part is not done, after the others have run."""
    if unknown := sorted(set(names or ()) - set(PARTS)):
        raise ValueError(f"no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    scratch = models or Path(tempfile.gettempdir()) / "tvaprune-measure-gpu"
    settings = Settings(tiny, runtime, scratch.absolute(), vllm)
    chosen = [part for part in PARTS.values() if part.name in (names or PARTS)]
    started = time.monotonic()
    for number, part in enumerate(chosen if not (show or only_tables) else (), start=1):
        before = Results(directory, part, settings.recorded())
        seconds = limit if total is None else min(limit, total - (time.monotonic() - started))
        if before.state != DONE and seconds > 0:
            echo(f"[{number}/{len(chosen)}] {part.name}: {len(before.left())} steps", err=True)
            after = run_part(directory.absolute(), part, settings, work, seconds)
            echo(f"[{number}/{len(chosen)}] {part.name}: {after.state}, {after.seconds:.0f} s in all", err=True)
    results = [Results(directory, part, settings.recorded()) for part in PARTS.values()]
    if show:
        echo(listed(results))
        return
    echo(tables(results))
    open_parts = [each.part.name for each in results if each.part in chosen and each.state not in (DONE, NOT_RUN)]
    if open_parts and not only_tables:
        raise ValueError(f"not done: {', '.join(open_parts)}; run it again to go on")
