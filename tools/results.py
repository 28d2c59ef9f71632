"""The tables of README.md and docs/*.md, from metrics/*.json (the default run) and metrics/results/*.json (saved runs).

docs/results.yaml defines the tables. A page holds one between `<!-- table: NAME -->` and `<!-- end of table -->`.
The table `default` is that of the workspace's own run, which `tvaprune results` prints; `stages` is what
`tools.time_stages` measured, `vllm_speed` what `tools.vllm_speed` did, and `serving` what `tvaprune verify --vllm` did.
To add a row, define it in docs/results.yaml, run `python -m tools.run_rows NAME`, name it in a table, and run `python
-m tools.results --write`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typer import Option, echo

from stages._command import command
from tools import saved_runs, time_stages, vllm_speed
from tools.run_rows import DEFINITIONS, Row, read_definitions
from tools.saved_runs import SAVED, Run
from tvaprune.measures import markdown
from tvaprune.measures.columns import ROW_TYPE, SavedRun, cell, column, value_at
from tvaprune.params.loading import read_yaml
from tvaprune.results import WORKSPACE, own_table, sentences, workspace_run

# Tables of files that a command other than the pipeline's wrote.
MEASUREMENTS = {
    "stages": ([time_stages.MEASURED], time_stages.table),
    "vllm_speed": ([vllm_speed.MEASURED], vllm_speed.table),
    "serving": (list(vllm_speed.SERVING), lambda *found: vllm_speed.agreement([each["vllm"] for each in found])),
}
MARKED = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end of table -->", re.DOTALL)


class TableRow(BaseModel):
    """A label and the saved runs it shows: a name, several (mean ± deviation), or those by group of columns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str = Field(description="First cell.")
    saved: str | list[str] | dict[str, str | list[str]] = Field(
        description="Names of saved runs; in a name, {group} is the group of columns."
    )
    model: Literal["dense", "compact", "finetuned"] = Field(default="compact", description="Whose figures.")
    type: str = Field(default="", description="Of quantize, or `stored`: what stands for {type} in columns' names.")

    def names(self, group: str = "") -> list[str]:
        """Of a group of columns; without a group, of the row's first."""
        found = self.saved
        if isinstance(found, dict):
            found = found.get(group, []) if group else next(iter(found.values()))
        return [name.replace("{group}", group) for name in ([found] if isinstance(found, str) else found)]


class Table(BaseModel):
    """Columns by name, some in groups: {"0.2": [validation, seconds]} takes the saved runs that a row has for 0.2."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    columns: list[str | dict[str, list[str]]]
    rows: list[TableRow]
    notes: list[Literal["sizes", "texts", "zeroshot", "learning", "machine"]] = Field(
        default=[], description="Sentences under the table, about its first run; `machine` is about all."
    )

    def flat(self) -> list[tuple[str, str]]:
        """Group and name of each column; no group is ''."""
        grouped = [{"": [each]} if isinstance(each, str) else each for each in self.columns]
        return [(group, name) for part in grouped for group, names in part.items() for name in names]

    def names(self) -> list[str]:
        """The saved runs that the table shows, each once."""
        groups = {group for group, _ in self.flat()}
        return list(dict.fromkeys(name for row in self.rows for group in sorted(groups) for name in row.names(group)))


@dataclass
class Results:
    """What docs/results.yaml defines, and the runs that it is about."""

    rows: dict[str, Row]
    tables: dict[str, Table]
    runs: dict[str, SavedRun] = field(default_factory=dict)

    @classmethod
    def read(cls) -> "Results":
        """Raises ValueError for a definition or column that is wrong."""
        tables = {}
        for name, content in (read_yaml(DEFINITIONS).get("tables") or {}).items():
            try:
                tables[name] = Table.model_validate(content)
            except ValidationError as error:
                places = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
                raise ValueError(f"{DEFINITIONS}: table {name}: {'; '.join(places)}") from None
            for _, each in tables[name].flat():
                column(each)
        return cls(read_definitions(), tables, {WORKSPACE: workspace_run(), **saved_runs.read_saved(SAVED)})

    def render(self, table: Table) -> str:
        """The table in Markdown. Runs without a file are left out, and so are rows without any figure."""
        head = [""] + [f"{group}: {column(name).head}" if group else column(name).head for group, name in table.flat()]
        rows = []
        for row in table.rows:
            cells = []
            for group, name in table.flat():
                runs = [self.runs[each] for each in row.names(group) if each in self.runs]
                cells.append(cell(column(name.replace(ROW_TYPE, row.type)), runs, row.model))
            if any(cells):
                rows.append([row.label, *cells])
        shown = [self.runs[name] for name in table.names() if name in self.runs]
        notes = [note for kind in table.notes if shown for note in sentences(kind, shown)]
        return "\n\n".join([markdown.table(head, rows), *([" ".join(notes)] if notes else [])])

    def text(self, name: str) -> str:
        """The table of a name, that of the workspace's run included. Raises ValueError for one that is not defined."""
        if name == WORKSPACE:
            return own_table(self.runs[WORKSPACE])
        if name in MEASUREMENTS:
            files, rendered = MEASUREMENTS[name]
            return rendered(*(json.loads(file.read_text()) for file in files))
        if name not in self.tables:
            raise ValueError(f"{DEFINITIONS} has no table {name}")
        return self.render(self.tables[name])

    def problems(self) -> Iterator[str]:
        """Rows without a file, files without a row in a table, and files that are not of their row."""
        used = set()
        for name, table in self.tables.items():
            used |= set(table.names())
            yield from (
                f"table {name}: {SAVED}/{each}.json is missing" for each in table.names() if each not in self.runs
            )
        yield from (f"{SAVED}/{name}.json is in no table" for name in self.runs if name not in used | {WORKSPACE})
        for name in sorted(set(self.rows) & set(self.runs)):
            run = self.runs[name]
            params = {**run["params"], "seed": run["seed"]}
            for key, value in self.rows[name].set.items():
                if value_at(params, key, value) != value:  # a key that its stages did not read is not there
                    yield f"{SAVED}/{name}.json was run with another {key} than {DEFINITIONS} has"


def pages() -> list[Path]:
    return [Path("README.md"), *sorted(Path("docs").glob("*.md"))]


def rewritten(results: Results, page: str) -> str:
    """A page's text with its tables made anew. Raises ValueError for a table that is not defined."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{results.text(match[1])}\n<!-- end of table -->"

    return MARKED.sub(table, page)


def check(results: Results) -> list[str]:
    """What is wrong with the files and the pages; nothing if every table is what the files give."""
    problems = list(results.problems())
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    placed = {match[1] for text in texts.values() for match in MARKED.finditer(text)}
    problems += [f"table {name} is on no page" for name in results.tables if name not in placed]
    for page, text in texts.items():
        if len(re.findall("<!-- table: ", text)) != len(MARKED.findall(text)):
            problems.append(f"{page}: a table has no end")
        for match in MARKED.finditer(text):
            if rewritten(results, match[0]) != match[0]:
                problems.append(
                    f"{page}: table {match[1]} is not what the files give; run `python -m tools.results --write`"
                )
    return problems


@command
def main(
    write: Annotated[bool, Option("--write", help="Rewrite the tables of README.md and docs/*.md.")] = False,
    checked: Annotated[bool, Option("--check", help="Fail if a table or a saved run is not as it should be.")] = False,
    save: Annotated[str | None, Option(help="Save the last run's metrics as metrics/results/NAME.json.")] = None,
    experiment: Annotated[str | None, Option(help="With --save: an experiment of `dvc exp run` in its place.")] = None,
) -> None:
    """Reads metrics/, metrics/results/ and docs/results.yaml; writes or checks the pages, or saves a run."""
    if experiment and not save:
        raise ValueError("--experiment needs --save NAME")
    if save:
        path, left_out = saved_runs.save(save, Run.of_experiment(experiment) if experiment else Run.of_workspace())
        echo(str(path))
        for metrics, reason in left_out.items():
            echo(f"{metrics} left out: {reason}", err=True)
        return
    if not write and not checked:
        raise ValueError("nothing to do; use --write, --check or --save NAME. `tvaprune results` prints your own run")
    results = Results.read()
    if write:
        for page in pages():
            page.write_text(rewritten(results, page.read_text(encoding="utf-8")), encoding="utf-8")
    if problems := check(results):
        raise ValueError("\n".join(problems))
