"""Tiny random models of every supported family, for unit tests only."""

import pickle
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tvaprune.architecture.topology import SITES, Topology, reader_shapes
from tvaprune.masks.latency_table import PHASES, LatencyTable
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.axes import AXES

FAMILIES: dict[str, dict] = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "llama_bias": {"attention_bias": True, "mlp_bias": True},
    "llama_mha": {"num_key_value_heads": 4},
    "llama_mqa": {"num_key_value_heads": 1},
    "llama_scaled": {  # Llama 3's rotary scaling, with a context short enough that it bends the prompts' frequencies
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
}


def tiny_model(family: str, seed: int = 0, layers: int = 3, **changed: Any) -> PreTrainedModel:
    """A random model; weights are large enough for logits to differ visibly, norms are not all ones.

    Args:
        changed: settings of the config otherwise than below.
    """
    settings = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        **FAMILIES[family],
        **changed,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.split("_")[0], **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def save_tiny_model(family: str, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    tiny_model(family, seed).to(dtype).save_pretrained(directory)
    return directory


def tiny_tokenizer(directory: Path, pre_tokenizer: pre_tokenizers.PreTokenizer | None = None) -> None:
    """Put a byte-level BPE tokenizer as large as the model's vocabulary into its directory; bos is put before texts.

    A vocabulary of less than 300 knows the bytes of ASCII alone.

    Args:
        pre_tokenizer: GPT-2's if None; its last step maps bytes to characters.
    """
    vocab_size = AutoConfig.from_pretrained(directory).vocab_size
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (letter not in "ĠĊ", ord(letter)))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # transformers' Qwen2Tokenizer adds a token of its own
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=alphabet[: 256 if vocab_size >= 300 else 96],
        limit_alphabet=256 if vocab_size >= 300 else 96,
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["The bank's 1234 engineers don't think that THEY'LL pay 56.7 of it.\n\n  There!"], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    fast.save_pretrained(directory)


def random_masks(topology: Topology, seed: int, keep_share: float = 0.6, empty_layer: int | None = None) -> Masks:
    """Random masks; `empty_layer` loses both of its blocks."""
    generator = torch.Generator().manual_seed(seed)
    keep, score = {}, {}
    for axis in AXES:
        shape = topology.gate_shape(axis)
        score[axis] = torch.randn(shape, generator=generator)
        keep[axis] = torch.rand(shape, generator=generator) < keep_share
    keep["hidden"][0] = True
    if empty_layer is not None:
        keep["intermediate"][empty_layer] = False
        keep["kv_heads"][empty_layer] = False
    return Masks(keep, score)


def random_update(topology: Topology, seed: int) -> WeightUpdate:
    """Random means of units and of channels, without biases."""
    generator = torch.Generator().manual_seed(seed)
    scale = {axis: 1 + 0.3 * torch.randn(topology.gate_shape(axis), generator=generator) for axis in AXES}
    channels = {site: 1 + 0.2 * torch.randn(topology.site_shape(site), generator=generator) for site in SITES}
    return WeightUpdate(scale, channel_scale=channels)


def random_mean_inputs(topology: Topology, size: float = 20.0) -> dict[str, torch.Tensor]:
    """Mean inputs of every o_proj and down_proj, large enough for their biases to change the logits."""
    shapes = reader_shapes(topology)
    return {name.removesuffix(".weight"): size * torch.randn(inputs) for name, (_, inputs) in shapes.items()}


def write_published(file: Path, masks: Masks, update: WeightUpdate) -> Path:
    """Write masks in the form that the paper's authors published: mu, and the log-variance that gives log_alpha."""
    content: dict[str, Any] = {}
    for axis, name in {"hidden": "hidden_mask", "intermediate": "inter_layer{}", "kv_heads": "attn_layer{}"}.items():
        mu, score = update.scale[axis], masks.score[axis]  # type: ignore[index]
        rows = zip(mu[None] if axis == "hidden" else mu, score[None] if axis == "hidden" else score, strict=True)
        for layer, (mean, log_alpha) in enumerate(rows):
            content[f"{name.format(layer)}_z_mu"] = mean.clone()
            content[f"{name.format(layer)}_z_logD"] = torch.log(mean.square() + 1e-8) - log_alpha
    file.write_bytes(pickle.dumps(content, protocol=4))
    return file


def stairs_table(topology: Topology, seed: int, step: int = 16) -> LatencyTable:
    """A latency table of a model of these sizes: times that rise with the width, each step by another height."""
    generator = torch.Generator().manual_seed(seed)

    def stairs(*shape: int) -> dict:
        rise = {phase: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.05 for phase in PHASES}
        return {phase: steps.cumsum(0).cumsum(-1) for phase, steps in rise.items()}

    hidden = list(range(16, topology.hidden + 1, 16))
    intermediate, kv_heads = list(range(0, topology.intermediate + 1, step)), list(range(topology.kv_heads + 1))
    ms = {
        "rest": {phase: steps.flatten() for phase, steps in stairs(len(hidden), 1).items()},
        "attention": stairs(len(hidden), len(kv_heads)),
        "mlp": stairs(len(hidden), len(intermediate)),
    }
    return LatencyTable(hidden, intermediate, kv_heads, ms, {}, {"decode_tokens": 3, "threads": 1, "device": "cpu"})  # type: ignore[arg-type]
