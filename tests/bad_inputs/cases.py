"""The cases: one row of docs/bad-inputs.md each."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bad_inputs.workspace import (
    Case,
    both,
    change_tensors,
    cut_short,
    header,
    param,
    remove,
    set_json,
    write,
)

MODEL, WEIGHTS = "inputs/model", "inputs/model/model.safetensors"
DATA, CONFIG = "data/model", "data/model/config.json"
NAN, INF = float("nan"), float("inf")
LETTERS = "fetch_inputs.calibration.sources.0"


def cases() -> list[Case]:
    """Every case, in the order of the stages."""
    return [*_parameters(), *_environment(), *_models(), *_texts(), *_against_the_model(), *_windows(), *_artifacts()]


def _check(what: str, spoil: Callable[[Path], object], named: str) -> Case:
    return Case(what, "stages.check_params", spoil, named)


def _parameters() -> list[Case]:
    return [
        _check("no params.yaml", remove("params.yaml"), "params.yaml"),
        _check("params.yaml is empty", write("params.yaml", ""), "params.yaml"),
        _check("params.yaml is not YAML", write("params.yaml", "seed: [0\n"), "params.yaml"),
        _check("params.yaml is not UTF-8", write("params.yaml", b"seed: \xff\xfe\n"), "params.yaml"),
        _check("params.yaml names a key twice", write("params.yaml", "seed: 0\nseed: 1\n"), "params.yaml"),
        _check("params.yaml is a list", write("params.yaml", "- seed\n"), "params.yaml"),
        _check("a misspelt key", param("sparcity", 0.2), "sparcity"),
        _check("a model where fetch_inputs writes", param("fetch_inputs.model.path", "data/model"),
               "fetch_inputs.model.path = data/model"),
        _check("a section is missing", param("compact", ...), "compact"),
        _check("a section is a number", param("compact", 3), "compact"),
        _check("sparsity of 1", param("sparsity", 1.0), "sparsity"),
        _check("sparsity is NaN", param("sparsity", NAN), "sparsity"),
        _check("seed beyond 2^31", param("seed", 2**70), "seed"),
        _check("a Lagrangian for tva", param("learn_masks.tva.constraint", "lagrangian"), "learn_masks.tva.constraint"),
        _check("another start for tva", param("learn_masks.tva.init", "curvature"), "learn_masks.tva.init"),
        _check("an unknown method", param("learn_masks.method", "magic"), "learn_masks.method"),
        _check("no axes", param("learn_masks.axes", []), "learn_masks.axes"),
        _check("an infinite learning rate", param("learn_masks.tva.mean_lr", INF), "learn_masks.tva.mean_lr"),
        _check("an infinite head start", param("learn_masks.tva.head_start.hidden", INF), "head_start.hidden"),
        _check("an infinite rate in fine-tuning", param("finetune_lora.learning_rate", INF), "learning_rate"),
        _check("nothing to learn from", both(
            param("finetune_lora.ce_weight", 0), param("finetune_lora.distillation_weight", 0)
        ), "ce_weight"),
        _check("a mix of unknown sources", param("sample_calibration.mix", {"poems": 1}), "sample_calibration.mix"),
        _check("a mix of zeros", param("sample_calibration.mix", {"letters": 0, "notes": 0}), "sample_calibration.mix"),
        _check("an unknown held-out text", param("eval_perplexity.test", {"poems": 4}), "eval_perplexity.test"),
        _check("blocks that do not divide a window", param("learn_masks.tva.curvature_tokens", 24), "curvature_tokens"),
        _check("int4 of torchao", param("quantize.types", ["int4_wo"]), "int4_wo is not offered"),
        _check("steps and epochs both", param("finetune_lora.epochs", 2), "epochs"),
        _check("LoRA on lm_head", param("finetune_lora.targets", ["lm_head"]), "targets"),
        _check("LoRA on a module that no model has", param("finetune_lora.targets", ["x_proj"]), "targets"),
        _check("masks of FLAP for a latency", both(
            param("learn_masks.budget", "latency"), param("learn_masks.latency", {"phase": "decode", "ratio": 0.7}),
            param("learn_masks.method", "flap"),
        ), "learn_masks"),
        _check("two sources of one name", param("fetch_inputs.calibration.sources.1.label", "letters"), "label"),
        _check("a name that is a path", param(f"{LETTERS}.label", "../letters"), "label"),
        _check("a hash that is none", param("fetch_inputs.model", {
            "source": "package", "name": "a", "version": "1", "sha256": "abc", "format": "gguf", "member": "a.gguf",
            "license": "MIT",
        }), "sha256"),
        _check("an unknown kind of source", param("fetch_inputs.model.source", "web"), "fetch_inputs.model.source"),
        _check("a password in a repository's name", param("fetch_inputs.model", {
            "source": "hub", "repo": "https://me:secret@hub.example/a/b", "revision": "main",
        }), "fetch_inputs.model.repo"),
    ]  # fmt: skip


def _environment() -> list[Case]:
    def nothing(root: Path) -> None:
        pass

    learn = "stages.learn_masks"
    return [
        Case("TVAPRUNE_DEVICE=tpux", learn, nothing, "TVAPRUNE_DEVICE", environment={"TVAPRUNE_DEVICE": "tpux"}),
        Case("TVAPRUNE_DTYPE=int8", learn, nothing, "TVAPRUNE_DTYPE", environment={"TVAPRUNE_DTYPE": "int8"}),
        Case("TVAPRUNE_DTYPE=float16 to learn masks", learn, nothing, "TVAPRUNE_DTYPE",
             environment={"TVAPRUNE_DTYPE": "float16"}),
        Case("TVAPRUNE_DTYPE=float16 to fine-tune", "stages.finetune_lora", nothing, "TVAPRUNE_DTYPE",
             environment={"TVAPRUNE_DTYPE": "float16"}),
    ]  # fmt: skip


def _fetch(what: str, spoil: Callable[[Path], object], named: str) -> Case:
    return Case(what, "stages.fetch_inputs", spoil, named)


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return change_tensors(WEIGHTS, change)


def _models() -> list[Case]:
    layer = "model.layers.1.mlp.up_proj.weight"
    config = f"{MODEL}/config.json"
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}}
    return [
        _fetch("no model there", param("fetch_inputs.model.path", "inputs/none"), "inputs/none"),
        _fetch("the model's path is a file", param("fetch_inputs.model.path", "inputs/notes.jsonl"), "notes.jsonl"),
        _fetch("a damaged config.json", cut_short(config, 40), "config.json"),
        _fetch("config.json is a list", write(config, "[1]"), "config.json"),
        _fetch("config.json is not UTF-8", write(config, b"\xff\xfe{}"), "config.json"),
        _fetch("config.json without a model type", set_json(config, model_type=...), "model_type"),
        _fetch("a mixture of experts", set_json(config, model_type="mixtral"), "mixtral"),
        _fetch("an encoder-decoder", set_json(config, model_type="t5", architectures=["T5Model"]), "t5"),
        _fetch("a family that is not supported", set_json(config, model_type="gpt2"), "gpt2"),
        _fetch("zero layers", set_json(config, num_hidden_layers=0), "num_hidden_layers"),
        _fetch("a hidden width of zero", set_json(config, hidden_size=0), "hidden_size"),
        _fetch("a negative width", set_json(config, intermediate_size=-96), "intermediate_size"),
        _fetch("heads that do not divide", set_json(config, num_attention_heads=5, head_dim=16), "num_key_value_heads"),
        _fetch("a width in words", set_json(config, hidden_size="sixty-four"), "hidden_size"),
        _fetch("a quantised model", set_json(config, quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
        _fetch("no weights", remove(WEIGHTS), MODEL),
        _fetch("pickled weights alone", both(remove(WEIGHTS), write(f"{MODEL}/pytorch_model.bin", b"\x80\x04.")),
               "pytorch_model.bin"),
        _fetch("a missing shard", both(
            remove(WEIGHTS), write(f"{MODEL}/model.safetensors.index.json", json.dumps(index))
        ), "model-00002-of-00002.safetensors"),
        _fetch("weights cut short", cut_short(WEIGHTS, 5000), "model.safetensors"),
        _fetch("empty weights", write(WEIGHTS, b""), "model.safetensors"),
        _fetch("a header that names a tensor twice", header(WEIGHTS, _TWICE, b"\0" * 64), "model.safetensors"),
        _fetch("a tensor beyond the file", header(WEIGHTS, {"a": _tensor(0, 1 << 40, 1 << 38)}), "model.safetensors"),
        _fetch("two tensors in one place", header(
            WEIGHTS, {"a": _tensor(0, 64, 16), "b": _tensor(32, 96, 16)}, b"\0" * 96
        ), "model.safetensors"),
        _fetch("a tensor of 2^62 rows", header(WEIGHTS, {"a": _tensor(0, 64, 1 << 62)}, b"\0" * 64),
               "model.safetensors"),
        _fetch("a tensor is missing", _tensors(lambda tensors: tensors.pop(layer)), layer),
        _fetch("a tensor too many", _tensors(lambda tensors: tensors.update({"model.extra": torch.ones(2)})),
               "model.extra"),
        _fetch("a tensor of another shape", _tensors(lambda tensors: tensors.update({layer: torch.ones(4, 4)})), layer),
        _fetch("a weight is NaN", _tensors(lambda tensors: tensors[layer].view(-1)[7:8].fill_(NAN)), layer),
        _fetch("a weight is infinite", _tensors(lambda tensors: tensors[layer].view(-1)[7:8].fill_(INF)), layer),
        _fetch("integer weights", _tensors(lambda tensors: tensors.update({layer: tensors[layer].to(torch.int8)})),
               layer),
        _fetch("a model with code of its own", set_json(config, auto_map={"AutoModelForCausalLM": "modeling.Own"}),
               "trust_remote_code"),
        _fetch("a tokenizer with code of its own", set_json(
            f"{MODEL}/tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.Own", None]}
        ), "trust_remote_code"),
        _fetch("an adapter in the place of a model", write(
            f"{MODEL}/adapter_config.json", '{"base_model_name_or_path": "a/b", "peft_type": "LORA"}'
        ), "adapter_config.json"),
        _fetch("no tokenizer", remove(f"{MODEL}/tokenizer.json", f"{MODEL}/tokenizer_config.json"), MODEL),
        _fetch("a damaged tokenizer.json", cut_short(f"{MODEL}/tokenizer.json", 200), MODEL),
        _fetch("a tokenizer without an end-of-text token", set_json(
            f"{MODEL}/tokenizer_config.json", eos_token=...
        ), "end-of-text"),
        _fetch("more tokens than the model has", _add_tokens, "tokens"),
    ]  # fmt: skip


def _tensor(first: int, last: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [first, last]}


_TWICE = b'{"a":%s,"a":%s}' % (json.dumps(_tensor(0, 64, 16)).encode(), json.dumps(_tensor(0, 64, 8, 2)).encode())


def _add_tokens(root: Path) -> None:
    path = root / MODEL / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"<{number}>": 320 + number for number in range(5)}
    path.write_text(json.dumps(content))


def _texts() -> list[Case]:
    letters, notes, tasks = "inputs/letters/00.txt", "inputs/notes.jsonl", "inputs/zeroshot"
    one = [param(f"{LETTERS}.path", letters)]
    return [
        _fetch("no such text", param(f"{LETTERS}.path", "inputs/none"), "inputs/none"),
        _fetch("a folder without text", both(write("inputs/none/a.pdf", "x"), param(f"{LETTERS}.path", "inputs/none")),
               "inputs/none"),
        _fetch("an empty text", both(write(letters, ""), *one), "letters"),
        _fetch("a text that is not UTF-8", write(letters, b"caf\xe9 and more"), "00.txt"),
        _fetch("a line that is not JSON", write(notes, '{"body": "a"}\n{"body": \n'), "notes.jsonl"),
        _fetch("lines that are not UTF-8", write(notes, b'{"body": "caf\xe9"}\n'), "notes.jsonl"),
        _fetch("rows without the field", write(notes, '{"text": "a"}\n'), "body"),
        _fetch("rows that are lists", write(notes, "[1, 2]\n"), "body"),
        _fetch("a text of numbers", write(notes, '{"body": 7}\n'), "body"),
        _fetch("a damaged parquet file", both(
            write("inputs/rows.parquet", b"PAR1 no more"), param(f"{LETTERS}.path", "inputs/rows.parquet")
        ), "rows.parquet"),
        _fetch("a damaged arrow file", both(
            write("inputs/rows.arrow", b"no more"), param(f"{LETTERS}.path", "inputs/rows.arrow")
        ), "rows.arrow"),
        _fetch("only held-out text", param(f"{LETTERS}.path", "inputs/stories"), "letters"),
        _fetch("a sample of .txt files", param(f"{LETTERS}.documents", 3), "documents"),
        _fetch("a task is missing", remove(f"{tasks}/piqa.jsonl"), "piqa.jsonl"),
        _fetch("a task without rows", write(f"{tasks}/piqa.jsonl", ""), "piqa"),
        _fetch("a task without a column", write(f"{tasks}/piqa.jsonl", '{"goal": "a"}\n'), "piqa"),
        _fetch("a task that is not JSON", write(f"{tasks}/piqa.jsonl", "goal\n"), "piqa.jsonl"),
    ]  # fmt: skip


def _fits(what: str, spoil: Callable[[Path], object], named: str) -> Case:
    return Case(what, "stages.check_model", spoil, named)


def _against_the_model() -> list[Case]:
    return [
        _fits("no fetched model", remove(DATA), DATA),
        _fits("a fetched config.json that is damaged", cut_short(CONFIG, 40), CONFIG),
        _fits("a sparsity that the axes cannot reach", both(
            param("sparsity", 0.9), param("learn_masks.axes", ["kv_heads"])
        ), "sparsity"),
        _fits("an axis that the method cannot score", param("learn_masks.method", "flap"), "axes"),
        _fits("every layer protected", both(
            param("learn_masks.method", "magnitude"), param("learn_masks.magnitude.protect_first", 3)
        ), "protect_first"),
        _fits("a multiple that does not divide", param("adapt_dimensions.multiple", 7), "adapt_dimensions.multiple"),
        _fits("a multiple above the width", param("adapt_dimensions.multiple", 128), "adapt_dimensions.multiple"),
        _fits("a multiple that a quantised type does not hold", both(
            param("quantize.enabled", True), param("adapt_dimensions.multiple", 16)
        ), "adapt_dimensions.multiple.hidden = 16"),
        _fits("windows longer than the context", param("sample_calibration.seq_len", 512),
              "sample_calibration.seq_len"),
        _fits("fine-tuning windows longer than the context", param("sample_calibration.finetune_seq_len", 512),
              "sample_calibration.finetune_seq_len"),
        _fits("evaluation windows longer than the context", param("eval_perplexity.window", 512),
              "eval_perplexity.window"),
        _fits("more evaluation windows than there is text", param("eval_perplexity.test.stories", 10**6),
              "test text stories"),
        _fits("prompts longer than the context", param("compact.prompt_tokens", 512), "compact.prompt_tokens"),
        _fits("a prefill longer than the context", param("benchmark_speed.prefill_tokens", 512), "prefill_tokens"),
    ]  # fmt: skip


def _windows() -> list[Case]:
    def sample(what: str, spoil: Callable[[Path], object], named: str) -> Case:
        return Case(what, "stages.sample_calibration", spoil, named)

    def learn(what: str, spoil: Callable[[Path], object], named: str) -> Case:
        return Case(what, "stages.learn_masks", spoil, named)

    texts, ids = "data/calibration/letters.jsonl", "artifacts/calibration/tensors.safetensors"
    meta = "artifacts/calibration/meta.json"
    return [
        sample("no texts", remove("data/calibration"), "data/calibration"),
        sample("a text source of one token", write(texts, '{"id": "0", "text": "the"}\n'), "letters"),
        sample("a text source of one line", write(texts, json.dumps({"id": "0", "text": "a river " * 9})), "letters"),
        sample("an empty text source", write(texts, ""), "letters"),
        sample("more windows than there is text", param("sample_calibration.samples", 10**6), "input_ids"),
        sample("a damaged fetched text", write(texts, '{"id": "0", "text'), "letters.jsonl"),
        sample("no fetched tokenizer", remove(f"{DATA}/tokenizer_config.json"), "tokenizer_config.json"),
        sample("a fetched tokenizer that is damaged", cut_short(f"{DATA}/tokenizer.json", 100), DATA),
        learn("no windows", remove("artifacts/calibration"), "artifacts/calibration"),
        learn("windows of another tokenizer", change_tensors(
            ids, lambda tensors: tensors["input_ids"].fill_(4000)
        ), "artifacts/calibration"),
        learn("negative token ids", change_tensors(ids, lambda tensors: tensors["input_ids"].fill_(-1)),
              "artifacts/calibration"),
        learn("windows cut short", cut_short(ids, 300), "artifacts/calibration"),
        learn("windows described as others", set_json(meta, kind="masks"), meta),
        learn("meta.json is a list", write(meta, "[]"), meta),
        learn("meta.json is not UTF-8", write(meta, b"\xff\xfe"), "artifacts/calibration"),
        learn("meta.json without tensors", set_json(meta, tensors=...), meta),
        learn("meta.json of a later version", set_json(meta, schema=99), meta),
        learn("windows without a set", both(
            change_tensors(ids, lambda tensors: tensors.pop("validation_ids")), set_json(meta, tensors={})
        ), "validation_ids"),
        learn("fetched weights that are missing", remove(f"{DATA}/model.safetensors"), DATA),
        learn("fetched weights that are damaged", cut_short(f"{DATA}/model.safetensors", 900), DATA),
    ]  # fmt: skip


def _artifacts() -> list[Case]:
    def adapt(what: str, spoil: Callable[[Path], object], named: str) -> Case:
        return Case(what, "stages.adapt_dimensions", spoil, named)

    def cut(what: str, spoil: Callable[[Path], object], named: str) -> Case:
        return Case(what, "stages.compact", spoil, named)

    masks, adapted = "artifacts/masks/tensors.safetensors", "artifacts/adapted/tensors.safetensors"
    update, modeling = "artifacts/update/tensors.safetensors", "artifacts/compact/modeling_tvaprune.py"
    return [
        adapt("no masks", remove("artifacts/masks"), "artifacts/masks"),
        adapt("masks of another model", set_json(CONFIG, num_hidden_layers=4), "artifacts/masks"),
        adapt("scores that are NaN", change_tensors(
            masks, lambda tensors: tensors["intermediate.score"][0].fill_(NAN)
        ), "artifacts/masks"),
        adapt("masks without how they were made", set_json("artifacts/masks/meta.json", made_with=...),
              "artifacts/masks"),
        adapt("a header that lies", header(masks, {"hidden.keep": _tensor(0, 1 << 40, 1 << 38)}), "artifacts/masks"),
        adapt("measured widths without a table", param("adapt_dimensions.multiple", "measured"), "artifacts/profile"),
        Case("means that are NaN", "stages.update_weights", change_tensors(
            "artifacts/means/tensors.safetensors", lambda tensors: tensors["hidden.scale"].fill_(NAN)
        ), "artifacts/means"),
        cut("an update that is infinite", change_tensors(
            update, lambda tensors: tensors["hidden.scale"].fill_(INF)
        ), "artifacts/update"),
        cut("masks that keep no hidden dimension", change_tensors(
            adapted, lambda tensors: tensors["hidden.keep"].fill_(False)
        ), "hidden"),
        cut("uneven masks for a uniform checkpoint", param("compact.layout", "uniform"), "compact.layout"),
        cut("an update for a module that the model lacks", both(change_tensors(
            update, lambda tensors: tensors.update({"mean_input.model.layers.9.mlp.down_proj": torch.zeros(64)})
        )), "model.layers.9.mlp.down_proj"),
        Case("a compact model without its certificate", "stages.finetune_lora", remove("artifacts/compact/parity.json"),
             "parity.json"),
        Case("a compact model that was altered", "stages.finetune_lora", set_json(
            "artifacts/compact/config.json", rms_norm_eps=0.5
        ), "artifacts/compact/config.json"),
        Case("an altered modeling file", "tvaprune verify", write(modeling, "open('ran', 'w')\n"), modeling,
             ("artifacts/compact",)),
        Case("no certificate to verify", "tvaprune verify", remove("artifacts/compact/parity.json"), "parity.json",
             ("artifacts/compact",)),
        Case("a damaged certificate", "tvaprune verify", write("artifacts/compact/parity.json", "[]"), "parity.json",
             ("artifacts/compact",)),
        Case("held-out text that is missing", "stages.eval_perplexity", remove("data/heldout"), "data/heldout"),
        Case("more windows than held-out text", "stages.eval_perplexity", param(
            "eval_perplexity.validation", {"stories": 10**6}
        ), "stories"),
        Case("no compact model to time", "stages.benchmark_speed", remove("artifacts/compact"), "artifacts/compact"),
        Case("tasks that are missing", "stages.eval_zeroshot", remove("data/zeroshot/piqa.jsonl"), "piqa.jsonl"),
        *_published(),
    ]  # fmt: skip


def _spoil_pickle(root: Path) -> None:
    content = pickle.loads((root / "masks.pkl").read_bytes())  # of this test's own making
    content["hidden_mask_z_mu"][3] = NAN
    (root / "masks.pkl").write_bytes(pickle.dumps(content, protocol=4))


def _published() -> list[Case]:
    def read(what: str, spoil: Callable[[Path], object], named: str) -> Case:
        return Case(what, "tvaprune import-masks", spoil, named, ("masks.pkl", "--out", "artifacts/published"))

    def pickled(content: Any) -> Callable[[Path], None]:
        return write("masks.pkl", pickle.dumps(content, protocol=4))

    return [
        read("no masks to import", remove("masks.pkl"), "masks.pkl"),
        read("an empty pickle", write("masks.pkl", b""), "masks.pkl"),
        read("a pickle cut short", cut_short("masks.pkl", 60), "masks.pkl"),
        read("a pickle that runs a command", write("masks.pkl", b"cposix\nsystem\n(S'touch ran'\ntR."), "posix.system"),
        read("a pickle that numbers a value 2^32", write("masks.pkl", b"}r\xff\xff\xff\xff."), "masks.pkl"),
        read("means that are NaN, pickled", _spoil_pickle, "hidden_mask_z_mu"),
        read("a pickle of numbers", pickled([1, 2]), "masks.pkl"),
        read("masks of another model, pickled", set_json(CONFIG, intermediate_size=128), "inter_layer0_z_mu"),
    ]
