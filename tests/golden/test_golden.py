"""This version reads what earlier releases wrote, and computes the same."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tvaprune
from tests.golden.writing import GOLDEN, GOLDEN_FAMILIES, LAYOUTS, write_version
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.config import load_config
from tvaprune.masks.masks import read_masks
from tvaprune.masks.update import read_update
from tvaprune.proof.parity import compact_logits, compare

VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name[0].isdigit())
CASES = sorted(path.parent for path in GOLDEN.glob("*/*/*/prompt.safetensors"))
BOUND = 1e-4


def recorded(case: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts and the logits that the release computed for them."""
    content = load_file(case / "prompt.safetensors")
    return content["input_ids"], content["logits"]


def test_every_family_and_layout_of_this_version_is_there() -> None:
    assert tvaprune.__version__ in VERSIONS, "write them before a release: python -m tests.golden"
    for version in VERSIONS:
        names = {f"{case.parent.name}/{case.name}" for case in CASES if case.parents[1].name == version}
        assert names >= {f"{family}/{layout}" for family in GOLDEN_FAMILIES for layout in LAYOUTS}, version
        assert sum(path.stat().st_size for path in (GOLDEN / version).rglob("*") if path.is_file()) < 500_000, version


@pytest.mark.parametrize("case", CASES, ids=lambda case: "/".join(case.parts[-3:]))
def test_a_checkpoint_of_a_release_computes_what_it_computed(case: Path) -> None:
    input_ids, logits = recorded(case)
    assert compare(logits, compact_logits(case / "compact", input_ids)).max_rel_logit_diff < BOUND


@pytest.mark.parametrize("case", CASES, ids=lambda case: "/".join(case.parts[-3:]))
def test_masks_and_updates_of_a_release_give_its_checkpoint(case: Path, tmp_path: Path) -> None:
    dense = case.parent / "dense"
    topology = Topology.of(load_config(dense))
    masks, update = read_masks(case / "masks", topology), read_update(case.parent / "update", topology)
    compact(dense, masks, update, tmp_path / "out", case.name)  # type: ignore[arg-type]
    input_ids, logits = recorded(case)
    assert compare(logits, compact_logits(tmp_path / "out", input_ids)).max_rel_logit_diff < BOUND


@pytest.mark.parametrize("version", VERSIONS)
def test_the_modeling_file_of_a_release_still_loads_its_checkpoints(version: str, tmp_path: Path) -> None:
    """As a user does, with transformers alone."""
    script = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for case in sorted(Path(sys.argv[1]).glob("*/*")):
    if not (case / "prompt.safetensors").is_file():
        continue
    prompt = load_file(case / "prompt.safetensors")
    model = AutoModelForCausalLM.from_pretrained(case / "compact", trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(prompt["input_ids"]).logits
    print(case.name, float((logits - prompt["logits"]).abs().max() / prompt["logits"].abs().max()))
assert "tvaprune" not in sys.modules
"""
    environment = {"HF_HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(GOLDEN / version)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    differences = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(differences) >= len(GOLDEN_FAMILIES) * len(LAYOUTS)
    assert max(differences) < BOUND


def test_a_release_is_written_once(tmp_path: Path) -> None:
    folder = write_version(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"is what that release wrote, and is not written again"):
        write_version(tmp_path)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
