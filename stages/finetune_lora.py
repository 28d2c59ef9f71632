"""Recover quality after pruning: LoRA on the compact model, distilled from the dense one, and merged."""

import shutil
from pathlib import Path
from typing import Annotated

from typer import Option, echo

from stages._launch import join_processes, process_command
from stages._options import Compact, Curve, Metrics, Model, ParamsFile, Windows
from tvaprune.artifacts import read_windows, write_json
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.loading import load
from tvaprune.device import require_trainable
from tvaprune.export.seal import OWN_FILES, certify_retrained, require
from tvaprune.params.finetune_lora import FinetuneLoraParams
from tvaprune.proof.certificate import read_certificate
from tvaprune.proof.parity import model_logits
from tvaprune.recovery.lora import merge_adapter, save_adapter, save_like
from tvaprune.recovery.report import write_curve
from tvaprune.recovery.training import finetune


@process_command
def main(
    compact: Compact = Path("artifacts/compact"),
    dense: Model = Path("data/model"),
    calibration: Windows = Path("artifacts/calibration"),
    lora: Annotated[Path, Option(help="Adapter to write, in PEFT's format.")] = Path("artifacts/lora"),
    finetuned: Annotated[Path, Option(help="Merged model to write.")] = Path("artifacts/finetuned"),
    metrics: Metrics = Path("metrics/finetune.json"),
    curve: Curve = Path("metrics/finetune.csv"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads artifacts/compact, data/model, artifacts/calibration (finetune_ids, finetune_validation_ids) and
    params.yaml (finetune_lora, seed); writes artifacts/lora, artifacts/finetuned, metrics/finetune.json and
    metrics/finetune.csv.
    """
    with join_processes() as process:
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
                echo("finetune_lora.enabled is false: nothing was fine-tuned")
            return
        certificate = read_certificate(compact)  # before the work, because the new certificate needs it
        require_trainable(process.dtype)
        vocabulary = load_config(dense).vocab_size
        ids = read_windows(calibration, vocabulary, "finetune_ids", "finetune_validation_ids")
        with process.saved("finetune_lora", params.model_dump(), [compact, dense, calibration]) as saved:
            student, teacher = (load(path, dtype=process.dtype) for path in (compact, dense))
            train, validation = ids["finetune_ids"], ids["finetune_validation_ids"]
            result = finetune(student, teacher, train, validation, params.options, process, saved)
            if not process.world.is_main:
                return
            save_adapter(result.model, lora, base_model=compact.as_posix())
            write_json(metrics, {"enabled": 1, **result.metrics})
            write_curve(curve, result.curve)
            nll = result.metrics["validation"]
            del student, teacher, result  # the checks load the model in float32, in a process of their own
            # Merged into the weights as stored on disk, not as rounded for this device.
            merged = merge_adapter(load(compact), lora)
            save_like(merged, compact, finetuned, leave=OWN_FILES)
            logits = model_logits(merged.float(), certificate.reference.input_ids)
            del merged
            require(finetuned, certify_retrained(finetuned, logits, compact, params.used(), nll))
    echo(f"validation nll {nll['nll_start']:.3f} -> {nll['nll_best']:.3f}, dense {nll['nll_teacher']:.3f}")
