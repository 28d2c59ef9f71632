"""Run the rows of docs/results.yaml one after another, and save the metrics of each as metrics/results/NAME.json.

A row is params.yaml with the values in its `set`. Stages that a row shares with an earlier one come from DVC's cache.
params.yaml is as before afterwards; `dvc repro` then brings the outputs back to it.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from typer import Argument, Option, echo

from stages._command import command
from tools.saved_runs import Run, check_name, save, saved_path
from tvaprune.params.everything import check_everything
from tvaprune.params.loading import ParameterError, read_yaml

DEFINITIONS = Path("docs/results.yaml")
PARAMS = Path("params.yaml")
SCRATCH = Path(".dvc/tmp")
ENDING = (signal.SIGTERM, signal.SIGHUP)
GRACE_S = 30  # for a stage to end when it is asked to


class Row(BaseModel):
    """One run: what it changes in params.yaml, and the stages that measure it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    set: dict[str, Any] = Field(default={}, description="Dotted keys of params.yaml and their values.")
    target: str | list[str] = Field(default="eval_perplexity", description="Stages to reproduce.")

    @property
    def targets(self) -> list[str]:
        return [self.target] if isinstance(self.target, str) else self.target

    def settings(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.set.items())


class Rows(Row):
    """One row, or one for each combination of values."""

    each: dict[str, list[Any]] = Field(
        default={}, description="Keys with their values; {key} in a name, if it has no dot."
    )

    def by_name(self, template: str) -> Iterator[tuple[str, Row]]:
        """Raises ValueError for a {key} that is not in `each`."""
        for values in product(*self.each.values()):
            given = dict(zip(self.each, values, strict=True))
            try:
                name = template.format(**given)
            except KeyError as error:
                raise ValueError(f"{{{error.args[0]}}} is no key of `each`") from None
            yield name, Row(set={**given, **self.set}, target=self.target)


def read_definitions(path: Path = DEFINITIONS) -> dict[str, Row]:
    """The rows by name. Raises ValueError for a name, key or stage that is wrong."""
    rows: dict[str, Row] = {}
    stages = read_yaml(Path("dvc.yaml"))["stages"]
    for template, content in (read_yaml(path).get("rows") or {}).items():
        try:
            found = list(Rows.model_validate(content).by_name(str(template)))
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise ValueError(f"{path}: {template}: {'; '.join(problems)}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {template}: {error}") from None
        for name, row in found:
            check_name(name)
            if name in rows:
                raise ValueError(f"{path}: {template}: a second row is named {name}")
            if unknown := [stage for stage in row.targets if stage not in stages]:
                raise ValueError(f"{path}: {name}: no stage {', '.join(unknown)} in dvc.yaml")
            rows[name] = row
    return rows


def with_values(params: str, row: Row) -> str:
    """The text of params.yaml with the row's values. Raises ValueError for a key in a section that does not exist."""
    yaml, out = YAML(), StringIO()
    content = yaml.load(params)
    for key, value in row.set.items():
        *sections, last = key.split(".")
        place = content
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ValueError(f"{key}: params.yaml has no section {'.'.join(sections)}")
        place[last] = value
    yaml.dump(content, out)
    return out.getvalue()


def check_rows(params: str, rows: dict[str, Row]) -> dict[str, str]:
    """The text of params.yaml for each row. Raises ValueError with the problems of all rows, before anything runs."""
    texts, problems = {}, []
    with tempfile.TemporaryDirectory() as work:
        for name, row in rows.items():
            path = Path(work) / name
            try:
                texts[name] = with_values(params, row)
                path.write_text(texts[name])
                check_everything(path)
            except (ParameterError, ValueError) as error:
                problems.append(f"{name}: " + str(error).replace(f"{path}: ", ""))
    if problems:
        raise ValueError("\n".join(problems))
    return texts


@contextmanager
def params_restored() -> Iterator[None]:
    """Put params.yaml back as it was, also after an interrupt or SIGTERM, and after a kill at the next start.

    Raises BlockingIOError if rows run in this directory already.
    """
    SCRATCH.mkdir(parents=True, exist_ok=True)
    before, unfinished = SCRATCH / "params-before-rows.yaml", SCRATCH / "params-before-rows.unfinished"
    try:
        with FileLock(SCRATCH / "rows.lock", timeout=0):
            if before.is_file():
                echo(f"{PARAMS} is restored: the last run of rows was killed", err=True)
                before.replace(PARAMS)
            shutil.copy2(PARAMS, unfinished)
            unfinished.replace(before)  # whole: a kill while it is written leaves none
            usual = {each: signal.signal(each, lambda number, _: sys.exit(128 + number)) for each in ENDING}
            try:
                yield
            finally:
                before.replace(PARAMS)
                for each, handler in usual.items():
                    signal.signal(each, handler)
    except Timeout:
        raise BlockingIOError("rows are being run in this directory already") from None


def reproduce(targets: list[str]) -> int:
    """The exit status of `dvc repro TARGETS`. Interrupted, it ends DVC and its stage first."""
    dvc = subprocess.Popen([sys.executable, "-m", "dvc", "repro", *targets], stdin=subprocess.DEVNULL, process_group=0)
    try:
        return dvc.wait()
    finally:
        if dvc.poll() is None:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(dvc.pid, signal.SIGTERM)
                dvc.wait(GRACE_S)
            with suppress(ProcessLookupError):
                os.killpg(dvc.pid, signal.SIGKILL)
            dvc.wait()


def run_row(name: str, row: Row, params: str) -> str | None:
    """Run a row and save it; what went wrong, or None."""
    PARAMS.write_text(params)
    if status := reproduce(row.targets):
        return f"dvc repro ended with {status}"
    try:
        save(name, Run.of_workspace(), row.targets)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


@command
def main(
    names: Annotated[list[str] | None, Argument(help="Rows to run.")] = None,
    missing: Annotated[
        bool, Option("--missing", help="Run all rows that have no file yet; with names, of those.")
    ] = False,
    show: Annotated[bool, Option("--list", help="Print the rows, whether each is saved, and its settings.")] = False,
) -> None:
    """Reads docs/results.yaml and params.yaml; writes metrics/results/NAME.json for each row."""
    rows = read_definitions()
    if unknown := sorted(set(names or ()) - set(rows)):
        raise ValueError(f"{DEFINITIONS} has no row {', '.join(unknown)}")
    chosen = {name: rows[name] for name in names or rows}
    if missing:
        chosen = {name: row for name, row in chosen.items() if not saved_path(name).is_file()}
    if show:
        for name, row in chosen.items():
            echo(f"{'saved  ' if saved_path(name).is_file() else 'missing'} {name}: {row.settings()}")
        return
    if not names and not missing:
        raise ValueError("name the rows to run, or use --missing or --list")
    failed = 0
    with params_restored():
        texts = check_rows(PARAMS.read_text(), chosen)
        for number, (name, row) in enumerate(chosen.items(), start=1):
            started = time.monotonic()
            problem = run_row(name, row, texts[name])
            failed += problem is not None
            minutes, seconds = divmod(round(time.monotonic() - started), 60)
            echo(f"[{number}/{len(chosen)}] {name}: {problem or 'saved'}, {minutes} min {seconds:02} s", err=True)
    if failed:
        raise ValueError(f"{failed} of {len(chosen)} rows failed")
