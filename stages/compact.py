"""Cut the model down to the kept units, and prove that the result is the masked model."""

from pathlib import Path
from typing import Annotated

import torch
from transformers import AutoTokenizer
from typer import Option, echo

from stages._command import command
from stages._options import Metrics, Model, ParamsFile
from tvaprune.architecture.topology import EMBEDDING, Topology
from tvaprune.artifacts import read_artifact, write_json
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.report import measured, sizes
from tvaprune.checkpoint.tensor_files import Checkpoint
from tvaprune.cost import peak_memory_bytes
from tvaprune.export.card import Base, Provenance
from tvaprune.export.gguf import write_gguf
from tvaprune.export.seal import certify, require
from tvaprune.masks.masks import read_masks
from tvaprune.masks.update import read_update
from tvaprune.params.compact import CompactParams
from tvaprune.proof.certificate import GGUF, Reference, prompt_ids
from tvaprune.proof.checks import against_gates, against_reference
from tvaprune.proof.parity import compact_logits, gated_logits, masked_dense_logits


@command
def main(
    model: Model = Path("data/model"),
    adapted: Annotated[Path, Option(help="Adapted masks.")] = Path("artifacts/adapted"),
    update: Annotated[Path, Option(help="Weight update.")] = Path("artifacts/update"),
    out: Annotated[Path, Option(help="Model directory to write.")] = Path("artifacts/compact"),
    metrics: Metrics = Path("metrics/compact.json"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads data/model, artifacts/adapted, artifacts/update and params.yaml (compact); writes artifacts/compact, a
    Hugging Face directory with its certificate and model card, and metrics/compact.json. Fails where compact and masked
    logits differ by more than compact.max_rel_logit_diff, here or in a fresh process; where they differ by more than
    rounding from those of the gates over the dense weights; and where llama.cpp runs model.gguf and finds it further
    off than its type allows.
    """
    params = CompactParams.load(params_file)
    topology = Topology.of(load_config(model))
    masks, folded = read_masks(adapted, topology), read_update(update, topology)
    size, cost = measured(lambda: compact(model, masks, folded, out, params.layout))
    if params.gguf:
        write_gguf(out, out / GGUF, params.gguf)
    input_ids = prompt_ids(AutoTokenizer.from_pretrained(model), params.prompt_tokens)
    reference = Reference("masked dense model", input_ids, masked_dense_logits(model, masks, folded, input_ids))
    bound, report = params.max_rel_logit_diff, sizes(topology, masks, size)
    logits = compact_logits(out, input_ids)
    parity = against_reference("masked = compact", reference, logits, bound)
    stored = Checkpoint.of(model).info[EMBEDDING].dtype
    folded_right = against_gates(gated_logits(model, masks, folded, input_ids), logits, stored)
    proof = {
        **parity.figures,
        "fold_mean_kl": folded_right.figures["mean_kl"],
        "proof_peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),  # of the process, cutting included
    }
    write_json(metrics, {**report, **proof, **cost})
    _, meta = read_artifact(adapted, "masks")
    _, folded_meta = read_artifact(update, "update")
    made_with = meta["made_with"] | folded_meta["made_with"] | params.used()
    figures = report | {f"validation_ppl_{name}": ppl for name, ppl in folded_meta["validation_ppl"].items()}
    made = Provenance(Base.of(model), params.layout, meta["widths"], made_with, figures)
    checks = certify(out, reference, bound, made, [parity, folded_right])
    require(out, checks)
    echo(f"{report['params_kept']} parameters")
    for check in checks:
        echo(check)
