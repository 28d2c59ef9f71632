"""The reference of all parameters, from the classes that validate params.yaml.

`python -m tools.parameters_page --write` writes docs/parameters.md: key, type with its range, value in params.yaml and
description, from the pydantic schema. Without `--write` it exits with status 1 where the page is not current.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from typer import Option, echo

from stages._command import command
from tvaprune.params.everything import SECTIONS
from tvaprune.params.loading import StageParams, read_yaml

Schema = dict[str, Any]
Row = tuple[str, Schema, Any, Schema]  # key, its schema, its value, the schema that `$ref` points into
PAGE = Path("docs/parameters.md")
HEAD = """# Parameters

<!-- Written by `python -m tools.parameters_page --write`. Do not edit. -->

All hyper-parameters are in `params.yaml`: `sparsity` and `seed` at the top level, and one section a stage. Every key of
a section must be there, and an unknown key is an error. `check_params` checks all sections before any work starts.
"Value" is that of the default run. `dvc exp run -S section.key=value` changes a key for one experiment.

This page is generated from the classes that check the file (`tvaprune/params`, `tvaprune/options`).
"""
TOP = ("sparsity", "seed")
BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
NAMES = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text", "null": "null"}


def page(params: Path) -> str:
    """The page in Markdown, with the values of this file."""
    content = read_yaml(params)
    schemas = {stage: stage.model_json_schema() for stage in SECTIONS}
    sources = {
        name: found
        for schema in schemas.values()
        for name, found in schema.get("$defs", {}).items()
        if _is_source(found)
    }
    parts = [HEAD, _table("Top level", [_shared(key, content[key], schemas) for key in TOP])]
    parts += [_table(f"`{stage.section}`", list(_rows(stage, content[stage.section]))) for stage in SECTIONS]
    parts.append(
        "## Sources\n\nWhat `fetch_inputs` reads a model, texts or tasks from. `source` says which kind it is.\n"
    )
    for name, schema in sorted(sources.items()):
        defs = {"$defs": sources}
        rows = [(key, field, field.get("default", ""), defs) for key, field in schema["properties"].items()]
        parts.append(_table(f"{name}", rows, level=3, value="Default"))
    return "\n".join(parts)


def _shared(key: str, value: Any, schemas: dict[type[StageParams], Schema]) -> Row:
    """A key of several stages, with what each of them says of it."""
    fields = [schema["properties"][key] for stage, schema in schemas.items() if key in stage.shared]
    said = dict.fromkeys(field["description"] for field in fields)
    return key, {**fields[0], "description": " ".join(said)}, value, {}


def _rows(stage: type[StageParams], values: dict[str, Any]) -> Iterator[Row]:
    """Every key of the section; of a mapping with known keys, each of those."""
    root = stage.model_json_schema()
    shared = {key.rpartition(".")[2] for key in stage.shared}
    for key, field in root["properties"].items():
        if key not in shared:
            yield from _nested(key, field, values[key], root)


def _nested(key: str, field: Schema, value: Any, root: Schema) -> Iterator[Row]:
    whole = _resolved(field, root)
    if "properties" in whole and not _is_source(whole):
        for name, inner in whole["properties"].items():
            inner = {"description": field.get("description", ""), **inner}
            if name in value:
                yield from _nested(f"{key}.{name}", inner, value[name], root)
    else:
        yield key, field, value, root


def _table(title: str, rows: list[Row], level: int = 2, value: str = "Value") -> str:
    lines = [f"{'#' * level} {title}", "", f"| Key | Type | {value} | Description |", "|---|---|---|---|"]
    for key, field, found, root in rows:
        description = field.get("description") or _resolved(field, root).get("description", "")
        cells = [f"`{key}`", _type(field, root), _value(found), " ".join(description.split()).replace("|", r"\|")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _type(field: Schema, root: Schema) -> str:
    if "$ref" in field:
        whole = _resolved(field, root)
        if "properties" not in whole:
            return _type(whole, root)
        return "a source" if _is_source(whole) else f"mapping {{{', '.join(whole['properties'])}}}"
    for choice in ("anyOf", "oneOf"):
        if choice in field:
            return " or ".join(dict.fromkeys(_type(one, root) for one in field[choice]))
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        items = field.get("items") or {"anyOf": field.get("prefixItems", [])}
        return f"list of {_type(items, root)}"
    if field["type"] == "object":
        return f"mapping of text to {_type(field['additionalProperties'], root)}"
    limits = [f"{sign} {field[name]:g}" for name, sign in BOUNDS if name in field]
    limits += [f"multiple of {field['multipleOf']:g}"] if "multipleOf" in field else []
    return f"{NAMES[field['type']]} {', '.join(limits)}".strip()


def _value(value: Any) -> str:
    if value == "":
        return ""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return f"{len(value)} sources"
    if isinstance(value, dict) and "source" in value:
        return f"a `{value['source']}`"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _resolved(field: Schema, root: Schema) -> Schema:
    return root["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else field


def _is_source(schema: Schema) -> bool:
    return "source" in schema.get("properties", {})


@command
def main(
    write: Annotated[bool, Option("--write", help="Write the page instead of comparing it.")] = False,
    params: Annotated[Path, Option(help="The values to show.")] = Path("params.yaml"),
) -> None:
    expected = page(params)
    if write:
        PAGE.write_text(expected, encoding="utf-8")
        echo(f"wrote {PAGE}")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != expected:
        raise ValueError(f"{PAGE}: not what the classes say; run python -m tools.parameters_page --write")
