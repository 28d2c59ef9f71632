"""The rules of the house that a machine can check: layers, code dependencies, help, parameters, no places."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from pydantic import BaseModel, TypeAdapter
from ruamel.yaml import YAML
from typer.testing import CliRunner

import stages
import tvaprune
from stages._command import application
from tools.dvc_deps import ALWAYS, code_dependencies, import_graph
from tools.lock_hashes import LOCKS, pins
from tvaprune.options.masks import METHOD_OPTIONS
from tvaprune.params.everything import SECTIONS

REPOSITORY = Path(__file__).resolve().parents[2]
DVC_STAGES: dict[str, dict[str, Any]] = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
STAGES = sorted(path.stem for path in (REPOSITORY / "stages").glob("[!_]*.py"))
TOOLS = sorted(path.stem for path in (REPOSITORY / "tools").glob("[!_]*.py") if "def main" in path.read_text())


def tracked(pattern: str = "*") -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", pattern]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [REPOSITORY / name for name in filter(None, listed.split("\0")) if (REPOSITORY / name).is_file()]


def test_every_stage_script_is_in_the_pipeline() -> None:
    assert set(STAGES) == set(DVC_STAGES)


def paths(entries: list[Any]) -> set[str]:
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


def value_at(content: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


@pytest.mark.parametrize("stage", STAGES)
def test_the_lock_file_is_of_this_pipeline(stage: str) -> None:
    """What a clone pulls was made by these commands with these parameters: run `make repro` and commit dvc.lock."""
    entry, locked = DVC_STAGES[stage], YAML(typ="safe").load(REPOSITORY / "dvc.lock")["stages"][stage]
    assert locked["cmd"] == entry["cmd"]
    assert {dep["path"] for dep in locked["deps"]} == paths(entry["deps"])
    written = [out for kind in ("outs", "metrics", "plots") for out in entry.get(kind, [])]
    assert {out["path"] for out in locked["outs"]} == paths(written)
    content = YAML(typ="safe", pure=True).load(REPOSITORY / "params.yaml")
    method = content["learn_masks"]["method"]
    keys = [key.replace("${learn_masks.method}", method) for key in entry.get("params", [])]
    assert locked.get("params", {}).get("params.yaml", {}) == {key: value_at(content, key) for key in keys}


def test_the_readme_draws_the_pipeline() -> None:
    """Every arrow of the picture is a dependency, and every stage that it names exists."""
    (drawn,) = re.findall(r"```mermaid\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    outputs = {
        stage: paths([out for kind in ("outs", "metrics") for out in entry.get(kind, [])])
        for stage, entry in DVC_STAGES.items()
    }
    arrows = set()
    for line in drawn.splitlines()[1:]:
        groups = [group.split(" & ") for group in line.strip().split(" --> ")]
        arrows |= {(one, other) for left, right in pairwise(groups) for one in left for other in right}
    assert len(arrows) > 10
    for one, other in arrows:
        assert any(
            dep == out or dep.startswith(f"{out}/") for dep in DVC_STAGES[other]["deps"] for out in outputs[one]
        ), f"{other} does not depend on {one}"


@pytest.fixture(scope="module")
def graph() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        return import_graph()


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_the_import_closure(stage: str, graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few serve stale results, too many retrain gates for a comment: `python -m tools.dvc_deps` writes them."""
    monkeypatch.chdir(REPOSITORY)
    declared = [dep for dep in DVC_STAGES[stage]["deps"] if dep.endswith(".py")]
    assert declared == code_dependencies(stage, graph)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_as_a_module_with_its_default_paths(stage: str) -> None:
    """Parameters in `cmd` would hide from `-S`; a `wdir` would miss the copy that an experiment runs in."""
    assert DVC_STAGES[stage]["cmd"] == f"python -m stages.{stage}"
    assert "wdir" not in DVC_STAGES[stage]
    for kind in ("outs", "metrics", "plots"):
        for out in DVC_STAGES[stage].get(kind, []):
            options = next(iter(out.values())) if isinstance(out, dict) else {}
            assert not options.get("persist")
            assert kind != "outs" or options.get("cache", True), "outs without a cache lose the stage's run-cache"


def shown_help(module: str) -> tuple[typer.Typer, str]:
    app = application(importlib.import_module(module).main)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert shown.exit_code == 0
    return app, " ".join(shown.output.split())


@pytest.mark.parametrize("stage", STAGES)
def test_help_says_what_the_stage_reads_and_writes(stage: str) -> None:
    app, text = shown_help(f"stages.{stage}")
    assert re.search(r"\breads\b", text, re.IGNORECASE)
    assert re.search(r"\bwrites\b", text, re.IGNORECASE)
    sections = {section.section: section.shared for section in SECTIONS}
    for key in (stage, *sections[stage]) if stage in sections else ():
        assert re.search(rf"params\.yaml \([^)]*\b{key}\b", text), f"{stage}: help names no {key}"
    for parameter in typer.main.get_command(app).params:
        assert getattr(parameter, "help", None), f"{stage}: option {parameter.name} has no help"


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_the_docstrings_and_every_options_help_whole(stage: str) -> None:
    """With square brackets: rich would take those of shapes for markup."""
    app, text = shown_help(f"stages.{stage}")
    module = importlib.import_module(f"stages.{stage}")
    texts = [module.__doc__, module.main.__doc__, *(each.help for each in typer.main.get_command(app).params)]  # type: ignore[attr-defined]
    for written in texts:
        assert " ".join(written.split()) in text


def test_help_shows_the_shape_of_the_windows() -> None:
    assert "int32 [windows, tokens]." in shown_help("stages.learn_masks")[1]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_has_a_help(tool: str) -> None:
    app, _ = shown_help(f"tools.{tool}")
    for parameter in typer.main.get_command(app).params:
        assert getattr(parameter, "help", None), f"{tool}: option {parameter.name} has no help"


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_and_inputs_in_dvc_yaml_are_the_scripts_defaults(stage: str) -> None:
    """Every path that DVC knows is an option's default, or lies in a directory that is."""
    app = application(importlib.import_module(f"stages.{stage}").main)
    defaults = {str(parameter.default) for parameter in typer.main.get_command(app).params}
    entry = DVC_STAGES[stage]
    declared = [dep for dep in entry["deps"] if not dep.endswith(".py") and not dep.endswith(".ok")]
    for kind in ("outs", "metrics", "plots"):
        declared += [next(iter(out)) if isinstance(out, dict) else out for out in entry.get(kind, [])]
    for path in declared:
        assert {path, str(Path(path).parent)} & defaults, f"{stage}: {path} is no option's default"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.section)
def test_declared_parameters_are_those_that_the_stage_reads(section: Any) -> None:
    """An undeclared key reruns nothing; a superfluous one reruns too much."""
    assert sorted(DVC_STAGES[section.section]["params"]) == sorted(section.declared())


def test_check_params_watches_every_parameter() -> None:
    content = YAML(typ="safe").load(REPOSITORY / "params.yaml")
    assert sorted(DVC_STAGES["check_params"]["params"]) == sorted(content)


def keys(kind: Any, seen: set[type]) -> Iterator[tuple[type, dict[str, str | None], Any]]:
    """The models and option classes below an annotation: their fields with descriptions, and what extra keys do."""
    if isinstance(kind, type) and kind not in seen and (issubclass(kind, BaseModel) or is_dataclass(kind)):
        seen.add(kind)
        if issubclass(kind, BaseModel):
            described = {name: field.description for name, field in kind.model_fields.items()}
            yield kind, described, kind.model_config.get("extra")
        else:
            schema = TypeAdapter(kind).json_schema()["properties"]
            described = {field.name: schema[field.name].get("description") for field in fields(kind)}
            yield kind, described, getattr(kind, "__pydantic_config__", {}).get("extra")
        for hint in get_type_hints(kind, include_extras=False).values():
            yield from keys(hint, seen)
    for part in getattr(kind, "__args__", ()):
        yield from keys(part, seen)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.section)
def test_every_parameter_is_described_and_unknown_ones_are_refused(section: Any) -> None:
    for kind, described, extra in keys(section, set()):
        assert extra == "forbid", kind
        # In a class whose fields are the axes, or the kind of source, the names say all.
        named = {"hidden", "intermediate", "kv_heads", "source"}
        assert [name for name, description in described.items() if not description and name not in named] == [], kind


def test_options_have_the_defaults_of_params_yaml() -> None:
    """Python's `tvaprune.prune` and the pipeline start from the same values."""
    content = YAML(typ="safe", pure=True).load(REPOSITORY / "params.yaml")["learn_masks"]
    for method, kind in METHOD_OPTIONS.items():
        assert TypeAdapter(kind).validate_python(content[method]) == kind(), method


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in tracked("*.py"):
        if path.relative_to(REPOSITORY).parts[0] in {"stages", "tvaprune", "tools"}:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    yield f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}", node


def test_functions_are_short_and_take_few_parameters() -> None:
    """60 lines without the docstring, 8 parameters; command lines and transformers' own signatures are exempt."""
    for where, node in functions():
        first = node.body[0]
        documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        length = node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)  # type: ignore[operator]
        assert length <= 60, f"{where}: {length} lines"
        arguments = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in arguments if name not in ("self", "cls", "ctx")])
        exempt = node.name in ("main", "forward") or where.startswith("tvaprune/commands.py")
        assert count <= 8 or exempt, f"{where}: {count} parameters"


def test_sub_packages_hold_a_docstring_alone() -> None:
    """Code in them would be a dependency that dvc.yaml does not list; it lists those in ALWAYS."""
    listed = {REPOSITORY / name for name in ALWAYS}
    paths = {path for package in ("stages", "tvaprune") for path in (REPOSITORY / package).rglob("__init__.py")}
    assert listed < paths
    for path in paths - listed:
        body = ast.parse(path.read_text()).body
        assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path
        assert isinstance(body[0].value, ast.Constant), path


def test_scripts_wire_and_do_not_compute() -> None:
    """A stage is one function around one call into the core; logic in scripts gets copied."""
    for stage in STAGES:
        source = (REPOSITORY / "stages" / f"{stage}.py").read_text()
        functions = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        assert functions == ["main"], stage
        assert len(source.splitlines()) <= 90, stage


@pytest.mark.parametrize("module", [f"stages/{name}" for name in STAGES] + [f"tools/{name}" for name in TOOLS])
def test_main_ends_its_module(module: str) -> None:
    """Its decorator runs it where it stands, so what it calls has to be above it."""
    last = ast.parse((REPOSITORY / f"{module}.py").read_text()).body[-1]
    assert isinstance(last, ast.FunctionDef)
    assert last.name == "main"
    assert [ast.unparse(each) for each in last.decorator_list] in (["command"], ["process_command"])


def test_a_tool_runs_as_a_module_and_reports_wrong_input_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.try_steps", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'none.yaml'}: no such file")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_its_packages_says_in_one_line_what_to_do(stage: str) -> None:
    """As when .venv is not activated: -S leaves out site-packages."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", f"stages.{stage}"],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    named = rf"error: \w+ is not installed in this Python \({re.escape(sys.executable)}\); activate the environment "
    assert re.fullmatch(named + r"with `source \.venv/bin/activate`, or create it with `make repro`\n", done.stderr)


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'tvaprune.gone'", name="tvaprune.gone"), ValueError("wrong")]
)
def test_other_errors_of_a_stage_keep_their_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    stages._report_missing_package(type(error), error, None)
    assert capsys.readouterr().err == f"{type(error).__name__}: {error}\n"


def test_importing_the_stages_leaves_the_interpreters_hook_alone() -> None:
    assert sys.excepthook is not stages._report_missing_package


GUARD = "import sys; sys.path.insert(0, {root!r}); import tvaprune"


def test_stages_that_load_no_model_start_without_transformers_model_classes() -> None:
    """They take seconds to import."""
    names = ("check_params", "sample_calibration", "check_leaks", "adapt_dimensions", "update_weights")
    program = f"import sys; from stages import {', '.join(names)}; print('transformers.modeling_utils' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("in_stage", "own", "allowed"), [(True, True, True), (True, False, False), (False, False, True)]
)
def test_a_stage_refuses_the_core_of_another_checkout(tmp_path: Path, in_stage: bool, own: bool, allowed: bool) -> None:
    (tmp_path / "tvaprune").mkdir()
    environment = {"PATH": "/usr/bin:/bin", **({"DVC_STAGE": "learn_masks"} if in_stage else {})}
    done = subprocess.run(
        [sys.executable, "-c", GUARD.format(root=str(REPOSITORY))],
        cwd=REPOSITORY if own else tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) is allowed, done.stderr
    if not allowed:
        assert "ImportError: tvaprune was imported from" in done.stderr


@pytest.mark.parametrize(("version", "allowed"), [(None, True), (tvaprune.__version__, True), ("0.0.1", False)])
def test_an_installed_core_serves_a_pipeline_of_its_own_version(
    tmp_path: Path, version: str | None, allowed: bool
) -> None:
    if version is not None:
        (tmp_path / tvaprune.VERSION_FILE).write_text(f"{version}\n")
    done = subprocess.run(
        [sys.executable, "-c", GUARD.format(root=str(REPOSITORY))],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "DVC_STAGE": "learn_masks"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) is allowed, done.stderr
    if not allowed:
        assert "ImportError: this pipeline is of tvaprune 0.0.1, but" in done.stderr


# Spelt in parts, or this file would be its own finding.
PLACES = re.compile(
    "|".join(
        [
            r"/" + r"home/\w",
            r"/" + r"Users/\w",
            r"/" + r"root/",
            r"/" + r"work/(?:main|shared)",
            r"(?<![\w.])/" + r"tmp/",
            r"files\." + r"pythonhosted",
            r"pypi\." + r"org",
            r"download\." + r"pytorch",
            r"--(?:extra-)?" + r"index-url",
        ]
    )
)
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".lock", ".json", ".csv", ".txt", ".cfg", ".sh", ""}


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path.suffix in TEXT
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if PLACES.search(line)
    ]
    assert found == []


def test_the_lock_pins_every_direct_dependency_to_what_is_installed() -> None:
    """Exact, no local build suffix, with the hashes of its files."""
    import tomllib
    from importlib.metadata import version

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    locked: dict[str, str] = {}
    for path in LOCKS:
        text = (REPOSITORY / path).read_text()
        for package, pinned in pins(text.splitlines()):
            if path.name != "requirements-vllm.lock":  # an environment of its own
                assert package not in locked, package
                locked[package] = pinned
        packages = re.findall(
            r"^\S+==\S+(?: ; .+?)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+$", text, flags=re.MULTILINE
        )
        assert len(packages) == len(pins(text.splitlines())), f"{path}: a pin without a hash"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(text)
        pinned = locked[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(pinned), wanted
        assert version(wanted.name).split("+")[0] == pinned, wanted


VIOLATIONS = {
    "tvaprune/architecture/topology.py": "import tvaprune.gates.paper",
    "tvaprune/measures/latency.py": "import tvaprune.recovery.lora",
    "tvaprune/params/compact.py": "import tvaprune.architecture.parameter_counts",
    "tvaprune/masks/adapt.py": "import ruamel.yaml",
    "tvaprune/gates/paper.py": "import typer",
    "tvaprune/losses.py": "import stages._command",
    "stages/compact.py": "import stages.learn_masks",
}


def test_the_linter_accepts_the_layers_as_they_are(tmp_path: Path) -> None:
    done = lint(copied(tmp_path))
    assert done.returncode == 0, done.stdout


def test_the_linter_refuses_every_kind_of_violation(tmp_path: Path) -> None:
    """A contract that cannot fail is a defect: each violation has to show in the report."""
    root = copied(tmp_path)
    for name, line in VIOLATIONS.items():
        path = root / name
        path.write_text(path.read_text() + f"\n{line}\n")
    (root / "tvaprune" / "new_module.py").write_text('"""In no layer."""\n')
    done = lint(root)
    assert done.returncode != 0
    report = " ".join(done.stdout.split())
    for name, line in VIOLATIONS.items():
        importer, imported = name.removesuffix(".py").replace("/", "."), line.removeprefix("import ").split(".yaml")[0]
        assert re.search(rf"{re.escape(importer)} -> {re.escape(imported)}", report), (importer, imported)
    assert "new_module" in report


def copied(directory: Path) -> Path:
    for path in tracked():
        name = path.relative_to(REPOSITORY)
        if name.parts[0] in {"stages", "tvaprune", "tools", "tests"} or str(name) == "pyproject.toml":
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, directory / name)
    return directory


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)
