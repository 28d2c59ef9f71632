"""A second, real model through the same code: configs/glassllm.yaml, with few steps and the texts of small packages."""

import json
import math
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.pipeline.tiny_inputs import write_inputs
from tests.pipeline.workspace import Workspace


def metrics(workspace: Workspace, name: str) -> dict:
    return json.loads((workspace.root / "metrics" / f"{name}.json").read_text())


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_glassllm_is_pruned_recovered_and_better_than_by_chance(tmp_path: Path) -> None:
    workspace = Workspace.create(tmp_path / "workspace")
    write_inputs(workspace.root / "inputs")
    yaml = YAML()
    content = yaml.load(workspace.root / "configs" / "glassllm.yaml")
    texts = {source["label"]: source for source in content["fetch_inputs"]["calibration"]["sources"]}
    content["fetch_inputs"]["calibration"]["sources"] = [texts["speeches"]]
    content["fetch_inputs"]["heldout"]["sources"] = [texts["encyclopedia"]]
    content["fetch_inputs"]["zeroshot"] = {"source": "local", "path": "inputs/zeroshot"}
    content["sample_calibration"].update(samples=64, finetune_samples=64)
    content["learn_masks"]["tva"].update(steps=60, curvature_windows=8)
    content["finetune_lora"].update(steps=20)
    content["eval_perplexity"].update(validation={"encyclopedia": 32}, test={})
    yaml.dump(content, workspace.root / "params.yaml")
    workspace.commit()

    workspace.repro("eval_perplexity")
    compacted, learned = metrics(workspace, "compact"), metrics(workspace, "perplexity")
    assert compacted["max_rel_logit_diff"] <= 1e-4
    assert compacted["sparsity_decoder"] >= 0.2
    assert metrics(workspace, "masks")["sparsity_decoder"] == pytest.approx(0.2, abs=0.01)
    for model in ("dense", "compact", "finetuned"):
        assert math.isfinite(learned[model]["validation"]["encyclopedia"]["ppl"])

    workspace.set_param("learn_masks.method", "random")
    workspace.repro("eval_perplexity")
    chance = metrics(workspace, "perplexity")
    assert chance["dense"] == learned["dense"]
    assert learned["compact"]["validation_ratio"] < chance["compact"]["validation_ratio"]
