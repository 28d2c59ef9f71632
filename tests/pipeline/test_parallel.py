"""Experiments in two workers of one clone, and two clones with one cache: every result is that of a run alone."""

import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.faults.kills import Undisturbed, contents, different
from tests.pipeline.workspace import Workspace, git
from tvaprune.measures.columns import value_at

# Pairs with the same sparsity learn the same masks, and two workers do so at the same time.
SWEEP: dict[str, list[Any]] = {
    "sparsity": [0.3, 0.4],
    "adapt_dimensions.multiple": [8, 16],
    "compact.layout": ["uneven", "padded"],
}


def outputs(lock: str) -> dict[str, str]:
    """Output -> hash of the stages up to compact."""
    stages = YAML(typ="safe").load(lock)["stages"]
    names = ("learn_masks", "adapt_dimensions", "update_weights", "compact")
    outs = [out for name in names for out in stages[name]["outs"]]
    return {out["path"]: out["md5"] for out in outs if out["path"].startswith("artifacts/")}


def values(params: str) -> tuple[Any, ...]:
    content = YAML(typ="safe").load(params)
    return tuple(value_at(content, key) for key in SWEEP)


@pytest.mark.nightly
@pytest.mark.timeout(4 * 3600)
def test_eight_experiments_over_two_workers(workspace: Workspace, finished: Workspace, tmp_path: Path) -> None:
    settings = [f"-S{key}={','.join(map(str, each))}" for key, each in SWEEP.items()]
    workspace.dvc("exp", "run", "--queue", *settings, "compact")
    workspace.run_queue("--jobs", "2", timeout_s=3 * 3600)
    listed = git(workspace.root, "for-each-ref", "refs/exps", "--format=%(refname)")
    refs = re.findall(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/\S+", listed)  # of experiments, not of DVC's own work
    found = {}
    for ref in refs:
        params, lock = (git(workspace.root, "show", f"{ref}:{name}") for name in ("params.yaml", "dvc.lock"))
        found[values(params)] = outputs(lock)
    alone = finished.copy(tmp_path / "alone")
    for combination in itertools.product(*SWEEP.values()):
        for key, value in zip(SWEEP, combination, strict=True):
            alone.set_param(key, value)
        alone.repro("compact")
        assert found.pop(combination) == outputs((alone.root / "dvc.lock").read_text()), combination
    assert found == {}


@pytest.mark.nightly
@pytest.mark.timeout(4 * 3600)
def test_two_clones_fill_one_cache(finished: Workspace, tmp_path: Path) -> None:
    cache, clones = tmp_path / "cache", []
    for name in ("one", "other"):
        git(tmp_path, "clone", "--quiet", str(finished.root), name)
        clone = Workspace(tmp_path / name, timeout_s=3600)
        (clone.root / "dvc.lock").unlink()
        clone.dvc("cache", "dir", "--local", str(cache))
        clones.append(clone)
    with ThreadPoolExecutor(2) as pool:
        ran = list(pool.map(Workspace.repro, clones))
    undisturbed = Undisturbed(finished, contents(finished))
    assert set().union(*ran) == set(YAML(typ="safe").load(finished.root / "dvc.yaml")["stages"])
    for clone in clones:
        assert different(clone, undisturbed) == []
        assert clone.repro() == set()
