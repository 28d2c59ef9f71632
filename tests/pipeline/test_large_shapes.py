"""Many layers and a large vocabulary, at tiny widths: the stages' memory stays in proportion to the model."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.pipeline.tiny_inputs import SMALL, write_inputs, write_small_params
from tests.pipeline.workspace import Workspace, environment
from tvaprune.proof.certificate import PROMPTS

LAYERS, VOCABULARY = 200, 262_144
PROMPT_TOKENS = SMALL["compact"]["prompt_tokens"]
TIMEOUT_S = 3600
# Prints the peak resident set of a command, in bytes.
PEAK = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, *sys.argv[1:]], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(done.returncode)
"""


def peak_bytes(directory: Path, *arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments],
        cwd=directory, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def deep(scratch: None, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """After `dvc repro compact`."""
    workspace = replace(Workspace.create(tmp_path_factory.mktemp("deep") / "workspace"), timeout_s=TIMEOUT_S)
    write_inputs(workspace.root / "inputs")
    write_small_params(workspace.root / "params.yaml")
    model = workspace.root / "inputs" / "model"
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers, config.vocab_size = LAYERS, VOCABULARY
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    workspace.set_param("learn_masks.tva.steps", 12)
    workspace.commit()
    workspace.repro("compact")
    return workspace


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_memory_is_in_proportion_to_the_model_and_its_logits(deep: Workspace) -> None:
    """Beside what the imports take. With 92 MB of weights the most was 2.6, 4.9 and 4.7 times weights and logits."""
    (model,) = (deep.root / "data/model").glob("*.safetensors")
    logits = len(PROMPTS) * PROMPT_TOKENS * VOCABULARY * 4  # of the proof, float32; learn_masks has fewer at a time
    imports = peak_bytes(deep.root, "-c", "import stages.learn_masks, stages.compact")
    masks, compact = (json.loads((deep.root / f"metrics/{name}.json").read_text()) for name in ("masks", "compact"))
    peaks = {
        "learn_masks": masks["peak_memory_bytes"],
        "compact": compact["proof_peak_memory_bytes"],
        "verify": peak_bytes(deep.root, "-m", "tvaprune", "verify", "artifacts/compact"),
    }
    times = {name: (peak - imports) / (model.stat().st_size + logits) for name, peak in peaks.items()}
    assert max(times.values()) < 6, times
