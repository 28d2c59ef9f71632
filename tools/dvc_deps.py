"""Make dvc.yaml's code dependencies those that each stage really imports.

Too few would serve stale results from the cache, too many would retrain gates for a comment elsewhere.
`python -m tools.dvc_deps` rewrites dvc.yaml; the tests compare.
"""

from pathlib import Path

import grimp
from ruamel.yaml import YAML

from stages._command import command

PACKAGES = ("stages", "tvaprune")
# Every stage imports these. The other __init__ files hold a docstring alone.
ALWAYS = {"stages/__init__.py", "tvaprune/__init__.py"}


def code_dependencies(stage: str, graph: grimp.ImportGraph) -> list[str]:
    """Source files that running `python -m stages.STAGE` imports from this repository, sorted."""
    module = f"stages.{stage}"
    closure = {module} | graph.find_upstream_modules(module)
    files = {path for name in closure if (path := _source(name)) is not None}
    return sorted(files | ALWAYS)


def import_graph() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def _source(module: str) -> str | None:
    path = Path(*module.split("."))
    return None if (path / "__init__.py").is_file() else str(path.with_suffix(".py"))


@command
def main() -> None:
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 118, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    path = Path("dvc.yaml")
    content = yaml.load(path)
    graph = import_graph()
    for name, stage in content["stages"].items():
        data = [dep for dep in stage.get("deps", []) if not str(dep).endswith(".py")]
        stage["deps"] = [*data, *code_dependencies(name, graph)]
    yaml.dump(content, path)
