"""Sample windows of tokens to learn masks and to fine-tune on."""

from pathlib import Path

import typer

from stages._errors import clear_errors
from tvaprune.artifacts import write_artifact
from tvaprune.inputs.calibration import WindowSet, load_tokenizer, sample_calibration
from tvaprune.inputs.documents import load_documents
from tvaprune.params.sample_calibration import SampleCalibrationParams


def main(
    params: Path = typer.Option(Path("params.yaml"), help="YAML file with the section sample_calibration."),
    texts: Path = typer.Option(Path("data/calibration"), help="Reads the calibration text here, as .jsonl."),
    model: Path = typer.Option(Path("data/model"), help="Reads the tokenizer here."),
    out: Path = typer.Option(Path("artifacts/calibration"), help="Writes the windows here."),
) -> None:
    """Sample windows of tokens for mask learning, for fine-tuning, and to validate each, from disjoint documents.

    Reads params.yaml (sample_calibration, seed), data/calibration and the tokenizer in data/model.
    Writes artifacts/calibration.
    """
    with clear_errors():
        settings = SampleCalibrationParams.load(params)
        mix, finetune_mix = settings.mix, settings.mix if settings.finetune_mix is None else settings.finetune_mix
        sets = [
            WindowSet("input_ids", settings.samples, settings.seq_len, mix),
            WindowSet("validation_ids", settings.validation_samples, settings.seq_len, mix),
            WindowSet("finetune_ids", settings.finetune_samples, settings.finetune_seq_len, finetune_mix),
            WindowSet(
                "finetune_validation_ids", settings.finetune_validation_samples, settings.finetune_seq_len, finetune_mix
            ),
        ]
        windows, meta = sample_calibration(
            load_documents(texts), load_tokenizer(model), sets, packing=settings.packing, seed=settings.seed
        )
    write_artifact(out, "calibration", windows, **meta)
    for name, tensor in windows.items():
        typer.echo(f"{out}: {name} {tensor.shape[0]:,} windows of {tensor.shape[1]:,} tokens")


if __name__ == "__main__":
    typer.run(main)
