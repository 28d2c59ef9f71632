"""Sample windows of tokens for mask learning, for fine-tuning, and to validate each, from disjoint documents."""

from pathlib import Path
from typing import Annotated

from typer import Option, echo

from stages._command import command
from stages._options import ParamsFile
from tvaprune.artifacts import write_artifact
from tvaprune.inputs.calibration import WindowSet, load_tokenizer, sample_calibration
from tvaprune.inputs.documents import load_documents
from tvaprune.params.sample_calibration import SampleCalibrationParams


@command
def main(
    texts: Annotated[Path, Option(help="Directory of calibration text, .jsonl files.")] = Path("data/calibration"),
    model: Annotated[Path, Option(help="Directory of the tokenizer.")] = Path("data/model"),
    out: Annotated[Path, Option(help="Artifact of the windows to write.")] = Path("artifacts/calibration"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads data/calibration, the tokenizer in data/model and params.yaml (sample_calibration, seed); writes
    artifacts/calibration.
    """
    params = SampleCalibrationParams.load(params_file)
    mix, finetune_mix = params.mix, params.mix if params.finetune_mix is None else params.finetune_mix
    length, finetune_length = params.seq_len, params.finetune_seq_len
    sets = [
        WindowSet("input_ids", params.samples, length, mix),
        WindowSet("validation_ids", params.validation_samples, length, mix),
        WindowSet("finetune_ids", params.finetune_samples, finetune_length, finetune_mix),
        WindowSet("finetune_validation_ids", params.finetune_validation_samples, finetune_length, finetune_mix),
    ]
    documents, tokenizer = load_documents(texts), load_tokenizer(model)
    windows, meta = sample_calibration(documents, tokenizer, sets, packing=params.packing, seed=params.seed)
    write_artifact(out, "calibration", windows, **meta)
    for name, tensor in windows.items():
        echo(f"{out}: {name} {tensor.shape[0]:,} windows of {tensor.shape[1]:,} tokens")
