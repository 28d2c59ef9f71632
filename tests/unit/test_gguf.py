"""A GGUF file computes in llama.cpp what its model directory computes in transformers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3ForCausalLM

from tests.http_servers import post
from tests.tiny_models import (
    FAMILIES,
    random_masks,
    random_mean_inputs,
    random_update,
    save_tiny_model,
    tiny_model,
    tiny_tokenizer,
)
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint import tensor_files
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.loading import load
from tvaprune.export.gguf import check_export, interleave, write_gguf
from tvaprune.export.gguf_tokenizer import _LLAMA3, _QWEN2, _TEKKEN
from tvaprune.inputs.model import _read_gguf
from tvaprune.inputs.sources import InputError
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate
from tvaprune.proof.gguf_runtime import greedy_steps, start_server

PROMPTS = [[5, 17, 99, 3], [120], [64, 64, 7, 31, 90, 12, 2]]
TOKENS = 32
COMPACT = Path(__file__).parents[2] / "artifacts" / "compact"


def saved(family: str, directory: Path) -> Path:
    save_tiny_model(family, directory)
    tiny_tokenizer(directory)
    return directory


def pruned(family: str, directory: Path, masks: Masks, layout: str = "uneven", bias: bool = False) -> Path:
    dense = saved(family, directory / "dense")
    update = random_update(Topology.of(tiny_model(family).config), seed=4)
    if bias:
        update = WeightUpdate(update.scale, random_mean_inputs(Topology.of(tiny_model(family).config)))
    compact(dense, masks, update, directory / "compact", layout)
    return directory / "compact"


def masks_of(family: str, empty_layer: int | None = None) -> Masks:
    return random_masks(Topology.of(tiny_model(family).config), seed=3, empty_layer=empty_layer)


def greedy_tokens(file: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    return [[step.token for step in steps] for steps in greedy_steps(file, prompts, tokens)]


def tokenize(file: Path, texts: list[str]) -> list[list[int]]:
    """Token ids by the file's own tokenizer, with the special tokens that it adds and those named in the text."""
    server = start_server(file, context=32)  # it listens while there is a reference to it
    return [
        post(f"{server.listening_address}/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        for text in texts
    ]


@torch.inference_mode()
def assert_runs_alike(directory: Path, file: Path, bound: float = 1e-4, prompts: list[list[int]] = PROMPTS) -> None:
    """The same greedy tokens, and the same probabilities of all tokens at every step."""
    model = load(directory, dtype=torch.float32)
    vocab_size = model.config.vocab_size
    for prompt, steps in zip(prompts, greedy_steps(file, prompts, TOKENS, top=vocab_size), strict=True):
        settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        whole = model.generate(torch.tensor([prompt]), **settings)
        assert [step.token for step in steps] == whole[0, len(prompt) :].tolist()
        expected = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        ids = range(min(vocab_size, len(steps[0].logprobs)))
        got = torch.tensor([[step.logprobs[number] for number in ids] for step in steps])
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=0, atol=bound)


def assert_exports_alike(directory: Path, architecture: str) -> None:
    file = directory / "model.gguf"
    write_gguf(directory, file, "f32")
    assert GGUFReader(file).get_field("general.architecture").contents() == architecture
    assert_runs_alike(directory, file)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_model_runs_alike_in_llama_cpp(family: str, tmp_path: Path) -> None:
    architecture = {"mistral": "llama"}.get(family, family.split("_")[0])
    assert_exports_alike(saved(family, tmp_path), architecture)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_read_as_the_model_that_it_was_or_refused(family: str, tmp_path: Path) -> None:
    """transformers reads neither scaled rotary frequencies nor Llama's biases from GGUF, nor Qwen3's head_dim."""
    directory, file = saved(family, tmp_path / "model"), tmp_path / "file" / "model.gguf"
    file.parent.mkdir()
    write_gguf(directory, file, "f32")
    refused = {
        "llama_scaled": "its rotary frequencies are scaled",
        "llama_bias": "weights, of which transformers reads",
        "qwen3": "cannot read this model from GGUF",
    }
    if family in refused:
        with pytest.raises(InputError, match=refused[family]):
            _read_gguf(file)
        return
    weights = load(directory, dtype=torch.bfloat16).state_dict()
    read = _read_gguf(file)[0].state_dict()
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("family", ["llama_tied", "mistral", "qwen2", "qwen3"])
def test_a_padded_model_runs_alike_in_llama_cpp(family: str, tmp_path: Path) -> None:
    masks = masks_of(family, empty_layer=1)
    masks.keep["hidden"][:40], masks.keep["hidden"][40:] = True, False
    assert_exports_alike(pruned(family, tmp_path, masks, "padded"), "qwen3" if family == "qwen3" else "llama")


@pytest.mark.parametrize("empty_layer", [None, 0, 1, 2])
@pytest.mark.parametrize("family", ["llama_tied", "llama_bias", "mistral", "qwen2"])
def test_uneven_layers_run_alike_in_llama_cpp(family: str, empty_layer: int | None, tmp_path: Path) -> None:
    assert_exports_alike(pruned(family, tmp_path, masks_of(family, empty_layer)), "deci")


def test_what_no_pruned_model_could_be_exported_as_is_refused_before_the_learning(tmp_path: Path) -> None:
    qwen = saved("qwen3", tmp_path / "qwen3")
    check_export(qwen, "padded")
    with pytest.raises(ValueError, match="uneven layers of qwen3"):
        check_export(qwen, "uneven")
    llama = saved("llama", tmp_path / "llama")
    check_export(llama, "uneven")
    (llama / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer to export"):
        check_export(llama, "uneven")


@torch.inference_mode()
def test_the_server_completes_over_http(tmp_path: Path) -> None:
    """What llama-server offers its clients: the request of OpenAI's API, for a pruned model with an empty layer."""
    directory = pruned("llama", tmp_path, masks_of("llama", empty_layer=1))
    write_gguf(directory, tmp_path / "model.gguf", "f32")
    server = start_server(tmp_path / "model.gguf", context=32)
    asked = {"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    (choice,) = post(f"{server.listening_address}/v1/completions", **asked)["choices"]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = load(directory, dtype=torch.float32).generate(torch.tensor(PROMPTS[:1]), **settings)
    chosen = [step["id"] for step in choice["logprobs"]["content"]]
    assert chosen == expected[0, len(PROMPTS[0]) :].tolist()
    assert choice["text"]


@pytest.mark.parametrize("axis", ["kv_heads", "intermediate"])
@pytest.mark.parametrize("empty_layer", [0, 1, 2])
def test_a_layer_without_one_of_its_blocks_runs_alike(axis: str, empty_layer: int, tmp_path: Path) -> None:
    masks = masks_of("llama")
    for other in ("kv_heads", "intermediate"):
        masks.keep[other][:, 0] = True
    masks.keep[axis][empty_layer] = False
    assert_exports_alike(pruned("llama", tmp_path, masks), "deci")
    counts = GGUFReader(tmp_path / "compact" / "model.gguf").get_field("deci.attention.head_count_kv").contents()
    assert (counts[empty_layer] == 0) == (axis == "kv_heads" and empty_layer > 0)


@pytest.mark.parametrize(
    ("family", "layout", "architecture"),
    [("llama", "uneven", "deci"), ("qwen2", "uneven", "deci"), ("llama", "padded", "llama")],
)
def test_flap_biases_run_alike_where_a_block_is_empty(
    family: str, layout: str, architecture: str, tmp_path: Path
) -> None:
    masks = masks_of(family, empty_layer=1)
    masks.keep["hidden"][:40], masks.keep["hidden"][40:] = True, False
    assert_exports_alike(pruned(family, tmp_path, masks, layout, bias=True), architecture)


def test_uneven_layers_that_are_alike_take_the_base_familys_architecture(tmp_path: Path) -> None:
    masks = Masks.dense(Topology.of(tiny_model("qwen3").config))
    masks.keep["intermediate"][:, 50:] = False
    masks.keep["kv_heads"][:, 0] = False
    assert_exports_alike(pruned("qwen3", tmp_path, masks), "qwen3")


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}])
def test_scaled_rotary_frequencies(rope: dict, tmp_path: Path) -> None:
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    plain, scaled = tmp_path / "plain.gguf", tmp_path / "scaled.gguf"
    write_gguf(tmp_path, plain, "f32")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    write_gguf(tmp_path, scaled, "f32")
    assert_runs_alike(tmp_path, scaled)
    with pytest.raises(AssertionError):
        assert_runs_alike(tmp_path, plain)


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 0.1), ("bf16", 0.5), ("q8_0", 1.0)])
def test_smaller_dtypes(dtype: str, bound: float, tmp_path: Path) -> None:
    """Some widths are no multiple of q8_0's block, whose rows are then float16."""
    directory = pruned("llama", tmp_path, masks_of("llama", empty_layer=2))
    whole, file = tmp_path / "whole.gguf", tmp_path / "small.gguf"
    write_gguf(directory, whole, "f32")
    write_gguf(directory, file, dtype)
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    assert file.stat().st_size < 0.8 * whole.stat().st_size
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if tensor.data.ndim == 2}
    assert kinds == {"q8_0": {"Q8_0", "F16"}}.get(dtype, {dtype.upper()})
    exact, rounded = (greedy_steps(f, PROMPTS, 1, top=128) for f in (whole, file))
    for (one,), (other,) in zip(exact, rounded, strict=True):
        assert max(abs(other.logprobs[token] - value) for token, value in one.logprobs.items()) < bound


def test_bytes_depend_on_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the time, the directory's name, or the size of the blocks that are streamed."""
    directory = pruned("llama_tied", tmp_path, masks_of("llama_tied", empty_layer=1))
    write_gguf(directory, tmp_path / "one.gguf", "q8_0")
    monkeypatch.setattr(tensor_files, "_BLOCK_BYTES", 1000)
    write_gguf(directory.rename(tmp_path / "moved"), tmp_path / "two.gguf", "q8_0")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_interleaving_takes_one_row_of_each_half_by_turns() -> None:
    rows = torch.arange(8).view(8, 1).expand(8, 3)
    assert interleave(rows, head_dim=4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleave(rows[:, 0], head_dim=8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


# Tokenizers

AWKWARD = [
    "",
    "a",
    " a",
    "  a b   c  \n\n d\t\te ",
    "12 345, 6.7e-8",
    "don't I'LL we've 'tis",
    "naïve café Ünïcödé ß",
    "日本語テキスト 漢字",
    "🙂👩‍👩‍👧 x",
    "<|bos|>user\nhi<|eos|> and <|eos|>",
    "Ⅷ ½ ²³ ٣٤",
    "a\u00a0b\u3000c\u200bd",
    "\r\n\r\nx\r",
    "def f(x):\n    return x**2\n\n\n",
    "...!!!???",
    "http://a.b/c?d=e&f=1",
    "The bank's 1234 engineers",
]


def wordless(regex: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "smaug-bpe": wordless(_LLAMA3),
    "llama-bpe": wordless(_LLAMA3),
    "qwen2": wordless(_QWEN2),
    "tekken": wordless(_TEKKEN),
}


def model_for_tokenizer(directory: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=640, max_position_embeddings=64, **sizes)).save_pretrained(directory)


def assert_tokenizes_alike(directory: Path, texts: list[str]) -> None:
    file = directory / "model.gguf"
    write_gguf(directory, file, "f16")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for text, got in zip(texts, tokenize(file, texts), strict=True):
        assert got == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_tokenizes_as_transformers(name: str, tmp_path: Path) -> None:
    model_for_tokenizer(tmp_path)
    tiny_tokenizer(tmp_path, PRE_TOKENIZERS[name])
    if name in ("llama-bpe", "tekken"):
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["model"]["ignore_merges"] = True
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert_tokenizes_alike(tmp_path, AWKWARD)
    assert GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.ggml.pre").contents() == name


def sentencepiece_tokenizer(directory: Path, normalizer: normalizers.Normalizer | None) -> None:
    """As Llama 2's: bytes for unknown characters, U+2581 for spaces, one of them before the text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    trained.train_from_iterator(["The bank's 1234 engineers don't think that they'll pay it there."], trainer)
    model = json.loads(trained.to_str())["model"]
    specials = ["<unk>", "<|bos|>", "<|eos|>"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    merges = [(left, right) for left, right in model["merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if normalizer is None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    names = {"unk_token": "<unk>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)


@pytest.mark.parametrize("kind", ["prepend", "metaspace", "bare"])
def test_llama_cpp_tokenizes_as_a_sentencepiece_tokenizer(kind: str, tmp_path: Path) -> None:
    replace = normalizers.Replace(" ", "▁")
    forms = {"prepend": normalizers.Sequence([normalizers.Prepend("▁"), replace]), "metaspace": None, "bare": replace}
    model_for_tokenizer(tmp_path)
    sentencepiece_tokenizer(tmp_path, forms[kind])
    # Metaspace adds its space to fewer texts than llama.cpp, which the docstring says.
    texts = [text for text in AWKWARD if kind != "metaspace" or (not text.startswith(" ") and "<|" not in text)]
    assert_tokenizes_alike(tmp_path, texts)


def test_rows_without_a_token_and_the_chat_template_are_written(tmp_path: Path) -> None:
    model_for_tokenizer(tmp_path)
    tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    write_gguf(tmp_path, tmp_path / "model.gguf", "f16")
    reader = GGUFReader(tmp_path / "model.gguf")
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    known = len(AutoTokenizer.from_pretrained(tmp_path))
    assert len(tokens) == 640 > known
    assert tokens[known] == f"[PAD{known}]"
    assert reader.get_field("tokenizer.chat_template").contents() == "{{ messages[0]['content'] }}"
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is True


# Refusals


def refused(directory: Path, match: str) -> None:
    """Nothing is left behind, and a file that was there stays."""
    file = directory / "model.gguf"
    file.write_text("kept")
    with pytest.raises(ValueError, match=match):
        write_gguf(directory, file, "f32")
    assert file.read_text() == "kept"
    assert not list(directory.glob("*.partial"))


@pytest.mark.parametrize(
    ("family", "change", "match"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("mistral", {"sliding_window": 64}, "sliding_window 64"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "rope_type 'llama3'.* qwen2"),
        ("llama", {"num_hidden_layers": 4}, r"tensor model\.layers\.3\..* is missing"),
        ("llama", {"num_hidden_layers": 2}, r"tensor model\.layers\.2\..* is none that config\.json describes"),
        ("llama", {"intermediate_size": 95}, "has the shape"),
    ],
)
def test_what_the_file_cannot_say_is_refused(family: str, change: dict, match: str, tmp_path: Path) -> None:
    saved(family, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refused(tmp_path, match)


def test_biases_and_norms_that_an_architecture_lacks_are_refused(tmp_path: Path) -> None:
    config = tiny_model("qwen3").config
    config.attention_bias = True
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "biased")
    tiny_tokenizer(tmp_path / "biased")
    refused(tmp_path / "biased", r"q_proj\.bias cannot be exported to GGUF: .* qwen3")
    uneven = pruned("qwen3", tmp_path, masks_of("qwen3"))
    refused(uneven, "uneven layers of qwen3 .* compact.layout = padded")


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    refused(tmp_path, "no tokenizer to export")
    tiny_tokenizer(tmp_path, wordless(r"\w+|\W+"))
    refused(tmp_path, r"no tokenizer with this pre_tokenizer .*\\\\w\+\|\\\\W\+.*known are gpt-2, smollm")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    refused(tmp_path, "normalizer .*Lowercase")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    refused(tmp_path, "type WordLevel")


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.lm_head.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight holds numbers that float16 cannot"):
        write_gguf(tmp_path, tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.glob("*.gguf*"))


def test_the_runtime_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.gguf").write_text("nothing")
    with pytest.raises(ValueError, match=r"broken\.gguf: llama\.cpp does not load this file"):
        greedy_tokens(tmp_path / "broken.gguf", PROMPTS, 1)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ValueError, match=r"pip install xllamacpp"):
        greedy_tokens(tmp_path / "broken.gguf", PROMPTS, 1)


@pytest.mark.slow
@pytest.mark.skipif(not (COMPACT / "config.json").is_file(), reason="artifacts/compact is not there: dvc repro compact")
def test_the_real_compact_model_runs_alike(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(COMPACT, file, "f32")
    tokenizer = AutoTokenizer.from_pretrained(COMPACT)
    texts = ["The capital of France is", "In 1984, the 3 engineers wrote", "def main():\n"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    model = load(COMPACT, dtype=torch.float32)
    for prompt, got in zip(prompts, greedy_tokens(file, prompts, TOKENS), strict=True):
        settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert got == model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    for text, ids in zip(AWKWARD, tokenize(file, AWKWARD), strict=True):
        assert ids == tokenizer(text)["input_ids"], text
