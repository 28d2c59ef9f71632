"""Recover quality after pruning: LoRA on the compact model, distilled from the dense one, and merged."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from stages._launch import join_processes, run
from tvaprune.artifacts import read_artifact, write_json
from tvaprune.checkpoint.loading import load
from tvaprune.export.seal import OWN_FILES, certify_retrained, require
from tvaprune.params.finetune_lora import FinetuneLoraParams
from tvaprune.proof.certificate import read_certificate
from tvaprune.recovery.lora import merge_adapter, save_adapter, save_like
from tvaprune.recovery.report import write_curve
from tvaprune.recovery.training import finetune


def main(
    compact: Annotated[Path, typer.Option(help="The pruned model's directory.")] = Path("artifacts/compact"),
    dense: Annotated[Path, typer.Option(help="The dense model's directory: the teacher.")] = Path("data/model"),
    calibration: Annotated[
        Path, typer.Option(help="Artifact with finetune_ids and finetune_validation_ids, int32 [windows, tokens].")
    ] = Path("artifacts/calibration"),
    lora: Annotated[Path, typer.Option(help="Adapter to write, in PEFT's format.")] = Path("artifacts/lora"),
    finetuned: Annotated[Path, typer.Option(help="Merged model to write.")] = Path("artifacts/finetuned"),
    metrics: Annotated[Path, typer.Option(help="JSON to write.")] = Path("metrics/finetune.json"),
    curve: Annotated[Path, typer.Option(help="CSV of the losses by step to write.")] = Path("metrics/finetune.csv"),
    params_file: Annotated[
        Path, typer.Option("--params", help="Parameters; section finetune_lora, and the top-level seed.")
    ] = Path("params.yaml"),
) -> None:
    """Fine-tune the compact model.

    Reads artifacts/compact, data/model and artifacts/calibration; writes artifacts/lora, artifacts/finetuned,
    metrics/finetune.json and metrics/finetune.csv.
    """
    with clear_errors(), join_processes() as process:
        params = FinetuneLoraParams.load(params_file)
        if process.world.is_main:
            for directory in (lora, finetuned):
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(parents=True)
        if not params.enabled:
            if process.world.is_main:
                write_json(finetuned / "meta.json", {"kind": "finetuned", "enabled": False})
                write_json(metrics, {"enabled": 0})
                write_curve(curve, [])
                typer.echo("finetune_lora.enabled is false: nothing was fine-tuned")
            return
        read_certificate(compact)  # before the work, because the new certificate needs it
        ids, _ = read_artifact(calibration, "calibration")
        with process.saved("finetune_lora", params.model_dump(), [compact, dense, calibration]) as saved:
            result = finetune(
                load(compact, dtype=process.dtype),
                load(dense, dtype=process.dtype),
                ids["finetune_ids"],
                ids["finetune_validation_ids"],
                params.options,
                process,
                saved,
            )
            if not process.world.is_main:
                return
            save_adapter(result.model, lora, base_model=compact.as_posix())
            # Merged into the weights as stored on disk, not as rounded for this device.
            merged = merge_adapter(load(compact), lora)
            save_like(merged, compact, finetuned, leave=OWN_FILES)
            write_json(metrics, {"enabled": 1, **result.metrics})
            write_curve(curve, result.curve)
            nll = result.metrics["validation"]
            require(finetuned, certify_retrained(finetuned, merged, compact, params.used(), nll))
    typer.echo(f"validation nll {nll['nll_start']:.3f} -> {nll['nll_best']:.3f}, dense {nll['nll_teacher']:.3f}")


if __name__ == "__main__":
    run(main)
