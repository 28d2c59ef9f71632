"""The whole pipeline through DVC: it ends, it is idle when nothing changed, and its outputs are what others read."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoTokenizer

from tests.pipeline.workspace import REPOSITORY, Workspace, environment, stages_run
from tvaprune import load
from tvaprune.measures.zeroshot import TASKS

MODELS = ("dense", "compact", "finetuned")
TEXTS = ("validation.stories", "test.stories", "test.more_letters")
KEYS = {
    "leaks": ["ngram", "largest_overlap", "finetuning.same_kind.stories"],
    "masks": [
        "target_sparsity", "sparsity_decoder", "sparsity_model", "params_dense", "params_kept", "steps", "seconds",
        "hidden_kept", "peak_memory_bytes",
    ],
    "adapt": ["sparsity_before", "sparsity_decoder", "hidden_before", "hidden_after"],
    "compact": [
        "sparsity_decoder", "sparsity_model", "params_kept", "bytes_dense", "bytes_compact", "max_abs_logit_diff",
        "fold_mean_kl", "seconds", "peak_memory_bytes", "proof_peak_memory_bytes",
    ],
    "finetune": ["enabled", "steps", "seconds"],
    "speed": [
        *(f"{phase}.{model}.{figure}" for phase in ("prefill", "decode") for model in ("dense", "compact")
          for figure in ("tokens_per_s", "iqr_ms")),
        "prefill.speedup", "decode.speedup", "batch", "prefill_tokens", "decode_prompt_tokens", "decode_tokens",
        "dtype_bits", "device_is_cuda", "threads",
    ],
    "perplexity": [
        "window",
        *(f"tokens.{text}" for text in TEXTS),
        *(f"{model}.{text}.ppl" for model in MODELS for text in TEXTS),
        *(f"{model}.{name}_ratio" for model in MODELS[1:] for name in ("validation", "test")),
    ],
    "zeroshot": [
        "limit",
        *(f"{model}.{task}.{figure}" for model in MODELS for task in TASKS for figure in ("acc", "acc_stderr")),
        *(f"{model}.{task}.acc_norm" for model in MODELS for task in ("hellaswag", "piqa", "arc_easy")),
        *(f"{model}.mean" for model in MODELS),
    ],
}  # fmt: skip
POSITIVE = ("masks.seconds", "masks.peak_memory_bytes", "speed.prefill.speedup", "speed.decode.speedup")


def numbers(content: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings, with dotted names."""
    if not isinstance(content, dict):
        yield name, content
        return
    for key, value in content.items():
        yield from numbers(value, f"{name}.{key}")


def metrics(workspace: Workspace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in (workspace.root / "metrics").glob("*.json"):
        found.update(numbers(json.loads(path.read_text()), path.stem))
    return found


@pytest.mark.warm
def test_a_second_repro_runs_nothing_and_status_is_clean(workspace: Workspace) -> None:
    assert workspace.repro() == set()
    assert workspace.dvc("status", "--json").stdout.strip() == "{}"


def test_metrics_have_the_keys_that_others_read_and_finite_numbers(finished: Workspace) -> None:
    found = metrics(finished)
    wanted = {f"{file}.{key}" for file, keys in KEYS.items() for key in keys}
    assert wanted - set(found) == set()
    strange = {name: value for name, value in found.items() if not isinstance(value, int | float) or value != value}
    assert strange == {}
    assert all(math.isfinite(value) for value in found.values())
    assert all(found[name] > 0 for name in POSITIVE)
    for path, columns in {"mask_training": "step,loss", "widths": "layer,intermediate_kept,kv_heads_kept"}.items():
        lines = (finished.root / "metrics" / f"{path}.csv").read_text().splitlines()
        assert lines[0].startswith(columns)
        assert len(lines) > 3


def test_metrics_agree_with_each_other(finished: Workspace) -> None:
    """What one stage says of another's output is what that stage says of it."""
    found = metrics(finished)
    masks_kept, dense = found["masks.params_kept"], found["masks.params_dense"]
    assert found["masks.sparsity_model"] == pytest.approx(1 - masks_kept / dense)
    assert found["masks.sparsity_decoder"] >= found["masks.target_sparsity"]
    assert found["adapt.sparsity_before"] == pytest.approx(found["masks.sparsity_decoder"])
    assert found["adapt.sparsity_decoder"] == pytest.approx(found["compact.sparsity_decoder"])
    saved = load(finished.root / "artifacts" / "compact")
    assert sum(weight.numel() for weight in saved.parameters()) == found["compact.params_kept"] < dense
    assert found["compact.max_rel_logit_diff"] <= 1e-4


def test_every_stage_takes_part_and_metrics_are_shown(finished: Workspace) -> None:
    stages = YAML(typ="safe").load(finished.root / "dvc.yaml")["stages"]
    locked = YAML(typ="safe").load(finished.root / "dvc.lock")["stages"]
    assert set(stages) == set(locked)
    dag = finished.dvc("dag", "--dot").stdout
    assert all(f'"{stage}"' in dag for stage in stages)
    shown = json.loads(finished.dvc("metrics", "show", "--json").stdout)[""]["data"]
    assert {f"metrics/{name}.json" for name in KEYS} <= set(shown)


@pytest.mark.parametrize("name", ["compact", "finetuned"])
def test_the_pruned_model_generates_in_a_process_without_this_project(
    finished: Workspace, tmp_path: Path, name: str
) -> None:
    """From another directory, with transformers alone: same logits, and the cache changes nothing."""
    directory = finished.root / "artifacts" / name
    script = f"""
import importlib.util, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert importlib.util.find_spec("tvaprune") is None
model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True).eval()
ids = AutoTokenizer.from_pretrained({str(directory)!r})("the old stone", return_tensors="pt")["input_ids"]
cached, plain = (model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False))
assert torch.equal(cached, plain) and cached.shape[1] > ids.shape[1]
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[1])
"""
    saved = tmp_path / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", script, str(saved)], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ids = AutoTokenizer.from_pretrained(directory)("the old stone", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        here = load(directory)(ids).logits
    torch.testing.assert_close(torch.load(saved), here, rtol=1e-5, atol=1e-5)


@pytest.mark.warm
def test_a_wrong_parameter_stops_before_any_stage_works(workspace: Workspace) -> None:
    """The mistake is in the last stage's section; the first stage would have something to do."""
    workspace.forget("fetch_inputs")
    workspace.set_param("eval_zeroshot.limit", 1)
    done = workspace.dvc("repro", check=False)
    assert done.returncode != 0
    assert "eval_zeroshot.limit = 1" in done.stderr
    assert stages_run(done.stdout) == {"check_params"}
    assert not (workspace.root / "data" / "model").exists()


@pytest.mark.warm
def test_what_the_model_cannot_have_stops_before_the_learning(workspace: Workspace) -> None:
    workspace.set_param("adapt_dimensions.multiple", 7)
    workspace.set_param("sparsity", 0.31)
    done = workspace.dvc("repro", check=False)
    assert done.returncode != 0
    assert "adapt_dimensions.multiple.hidden = 7" in done.stderr
    assert stages_run(done.stdout) == {"check_params", "check_model"}


def test_artifacts_name_no_place_of_this_machine(finished: Workspace) -> None:
    """Absolute paths would change hashes from one clone to the next."""
    places = [str(finished.root), str(REPOSITORY)]
    for folder in ("artifacts", "data"):
        for path in sorted((finished.root / folder).rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                assert [place for place in places if place.encode() in content] == [], path
