"""Check the parameters that only the model and the held-out text can judge, before anything is learned."""

from pathlib import Path

from typer import secho

from stages._command import command
from stages._options import Heldout, Marker, Model, ParamsFile
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.config import check_context, load_config
from tvaprune.checkpoint.layouts import check_biases
from tvaprune.export.gguf import check_export
from tvaprune.export.widths import check_group_heads, check_group_multiples, check_types, check_widths
from tvaprune.inputs.calibration import load_tokenizer
from tvaprune.inputs.documents import load_texts
from tvaprune.masks.adapt import check_multiples
from tvaprune.measures.perplexity import heldout_windows
from tvaprune.methods import check_request
from tvaprune.options.quantize import TORCHAO
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams
from tvaprune.params.benchmark_speed import BenchmarkSpeedParams
from tvaprune.params.compact import CompactParams
from tvaprune.params.eval_perplexity import EvalPerplexityParams
from tvaprune.params.learn_masks import LearnMasksParams
from tvaprune.params.quantize import QuantizeParams
from tvaprune.params.sample_calibration import SampleCalibrationParams


@command
def main(
    model: Model = Path("data/model"),
    heldout: Heldout = Path("data/heldout"),
    out: Marker = Path("artifacts/model.ok"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads the config and the tokenizer of data/model, data/heldout and params.yaml (learn_masks, adapt_dimensions,
    sparsity, seed, quantize, the lengths of windows and prompts, and the windows of eval_perplexity); writes
    artifacts/model.ok. A sparsity that no mask reaches, axes that the method cannot prune, biases that the model or the
    layout cannot hold, a multiple that does not divide a width or does not fit a quantised type, a model that GGUF
    cannot hold, a length beyond the model's context, or too little held-out text stops `dvc repro` here, not after the
    learning.
    """
    learn, adapt = LearnMasksParams.load(params_file), AdaptDimensionsParams.load(params_file)
    windows, cut = SampleCalibrationParams.load(params_file), CompactParams.load(params_file)
    speed, perplexity = BenchmarkSpeedParams.load(params_file), EvalPerplexityParams.load(params_file)
    quantised = QuantizeParams.load(params_file)
    config = load_config(model)
    lengths = {
        "sample_calibration.seq_len": windows.seq_len,
        "sample_calibration.finetune_seq_len": windows.finetune_seq_len,
        "compact.prompt_tokens": cut.prompt_tokens,
        "benchmark_speed.prefill_tokens": speed.prefill_tokens,
        "benchmark_speed.decode_prompt_tokens + decode_tokens": speed.decode_prompt_tokens + speed.decode_tokens,
        "eval_perplexity.window": perplexity.window,
    }
    if quantised.enabled:
        lengths |= {
            "quantize.window": quantised.window,
            "quantize.prefill_tokens": quantised.prefill_tokens,
            "2 x quantize.decode_tokens": 2 * quantised.decode_tokens,  # a prompt of as many
        }
    check_context(config, lengths)
    topology = Topology.of(config)
    check_request(learn.request(), topology)
    if learn.method == "flap" and learn.flap.bias:
        check_biases(config.model_type, adapt.layout)
    if multiples := adapt.multiples():
        check_multiples(topology, *multiples)
    if quantised.enabled:
        check_types(quantised.types)
        check_widths("dense", config, quantised.types)
        own = zip(("hidden", "intermediate"), multiples or (), strict=False)  # measured widths: in the stage
        check_group_multiples(quantised.types, {axis: multiple for axis, multiple in own if axis in learn.axes})
        if "kv_heads" in learn.axes:
            check_group_heads(quantised.types, topology.query_rows)
    if adapt.layout == "uniform" and learn.method == "tva" and not learn.tva.uniform_layers:
        secho(
            "warning: compact.layout = uniform with masks learned for layers of different widths loses quality; set "
            "learn_masks.tva.uniform_layers to true, or compact.layout to uneven or padded",
            fg="yellow",
            err=True,
        )
    if cut.gguf or (quantised.enabled and set(quantised.types) - set(TORCHAO)):
        check_export(model, cut.layout)
    texts, tokenizer = load_texts(heldout), load_tokenizer(model)
    for measured in (perplexity, quantised) if quantised.enabled else (perplexity,):
        heldout_windows(texts, tokenizer, measured.window, measured.validation, measured.test)  # raises if too short
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("the parameters fit the model\n")
