"""Write the dense and the pruned models quantised, as GGUF files or with torchao, and measure each."""

import shutil
from pathlib import Path
from typing import Annotated

from transformers import AutoTokenizer
from typer import Option, echo

from stages._command import command
from stages._options import Compact, Finetuned, Heldout, Metrics, Model, ParamsFile
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.config import load_config
from tvaprune.export.quantized import certified, write_files
from tvaprune.export.seal import require
from tvaprune.inputs.documents import load_texts
from tvaprune.measures.comparison import present_models
from tvaprune.measures.perplexity import heldout_windows
from tvaprune.measures.quantized import STORED, describe, measure_files, quantized_metrics, time_files
from tvaprune.params.quantize import QuantizeParams
from tvaprune.proof.quantized import kl_check, write_quantized


@command
def main(
    dense: Model = Path("data/model"),
    compact: Compact = Path("artifacts/compact"),
    finetuned: Finetuned = Path("artifacts/finetuned"),
    heldout: Heldout = Path("data/heldout"),
    quantized: Annotated[Path, Option(help="Directory of quantised models to write.")] = Path("artifacts/quantized"),
    metrics: Metrics = Path("metrics/quantized.json"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads the three model directories, data/heldout and params.yaml (quantize); writes artifacts/quantized, a file
    MODEL-TYPE.gguf or a directory MODEL-TYPE for each model and type, with a certificate, and metrics/quantized.json.
    Fails where a width does not fit a type, before any work, and where predictions differ from those of the
    unquantised model by more than the type allows.
    """
    params = QuantizeParams.load(params_file)
    shutil.rmtree(quantized, ignore_errors=True)
    quantized.mkdir(parents=True)
    if not params.enabled:
        write_json(quantized / "meta.json", {"kind": "quantized", "enabled": False})
        write_json(metrics, {"enabled": 0})
        echo("quantize.enabled is false: nothing was quantised")
        return
    models, tokenizer = present_models(dense, compact, finetuned), AutoTokenizer.from_pretrained(dense)
    windows = heldout_windows(load_texts(heldout), tokenizer, params.window, params.validation, params.test)
    written = write_files(models, params.types, quantized)
    found = {name: measure_files(models[name], own, windows, name) for name, own in written.files.items()}
    names = {f"{name}-{STORED}": directory for name, directory in models.items()}
    names |= {f"{name}-{kind}": file for name, own in written.files.items() for kind, file in own.items()}
    times = time_files(names, load_config(dense).vocab_size, params.options)
    measured = quantized_metrics(found, times, params.prefill_tokens)
    kl = {(name, kind): one.mean_kl for name, own in found.items() for kind, one in own.items() if kind != STORED}
    write_quantized(quantized, certified(written, kl))
    write_json(metrics, {"enabled": 1, "window": params.window, **measured})
    checks = [kl_check(written.files[name][kind].name, kind, nats) for (name, kind), nats in kl.items()]
    require(quantized, [*checks, *written.reloaded.values()])
    for line in describe(measured):
        echo(line)
