"""Scores that a method's published code gives a tiny random Llama, recorded for tests/unit/test_official_scores.py.

    git clone https://github.com/CASIA-IVA-Lab/FLAP clone
    python -m tools.record_official_scores --method flap --clone clone

The published functions run as they are. What is replaced around them, because they want a GPU, a download or an old
transformers, is listed in the record. Nothing of their code is in this repository.
"""

import hashlib
import importlib
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar
from unittest.mock import patch

import torch
import transformers
from jaxtyping import Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typer import Option

from stages._command import command
from tvaprune.architecture.topology import decoder_layers, layer_modules

# Heads of 128 dimensions, because FLAP's code counts on them (lib/prune.py:337, 373, 467).
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SEED, WINDOWS, TOKENS = 0, 6, 16

Record = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """Where a method's code is published, and what records its scores, given the clone, which is on the import path."""

    repository: str
    record: Callable[[Path], list[Record]]


def tiny_llama(**changed: Any) -> PreTrainedModel:
    """A float32 Llama with the settings above, uniform weights and no biases: the same bits wherever it is built."""
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changed})).float().eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            uniform = torch.rand(parameter.shape, generator=generator)
            # Norms around 1; the rest large enough for logits to differ visibly.
            parameter.copy_(uniform + 0.5 if "norm" in name else uniform - 0.5)
    return model.requires_grad_(False)


def token_windows(vocabulary: int = LLAMA["vocab_size"]) -> Int[Tensor, "windows seq"]:
    """Calibration windows, int64."""
    return torch.randint(0, vocabulary, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(SEED + 1))


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all parameters, float32, in the order of their names."""
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def run_record(source: str, replaced: list[str], settings: Record, **found: Any) -> Record:
    """One run's entry: where the code is, what was replaced around it, its settings and what it found.

    Args:
        settings: as the published command line names them; `llama` has what differs from `LLAMA`.
        found: by name, each a tensor or tensors by axis or module.
    """
    model = tiny_llama(**settings.get("llama", {}))
    written = {key: _plain(value) for key, value in found.items()}
    return {"source": source, "replaced": replaced, "settings": settings, "weights": fingerprint(model), **written}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value.int().tolist() if value.dtype == torch.bool else value.detach().tolist()


# ---- FLAP and Wanda-sp


class _FlapRun:
    """A run of one of the published functions, and what passes through it."""

    replaced: ClassVar = [
        "lib.prune.get_loaders, which downloads texts, gives the token windows",
        "decoder layers of today's transformers are also given position_embeddings, which theirs computed inside",
        "self_attn.num_heads is set, which today's transformers keep in the config",
        "Tensor.cuda stays on the CPU",
        "torch.half is float32 for the means of the inputs",
    ]

    def __init__(self, **changed: Any) -> None:
        self.model = tiny_llama(**changed)
        for layer in layer_modules(self.model):
            layer.attention.num_heads = self.model.config.num_attention_heads
            for module in (layer.o_proj, layer.down_proj):
                # As main.py:34-38: the published model has these biases, at 0.
                module.bias = nn.Parameter(torch.zeros(module.out_features), requires_grad=False)
        self.model.seqlen = TOKENS
        self.thresholded: list[Tensor] = []  # the argument of each Tensor.cuda(): a score per unit
        self.concatenated: list[Tensor] = []  # that of the one torch.cat: standardised scores of heads, then of units
        self.masks: dict[str, list[Tensor]] = {"kv_heads": [], "intermediate": []}

    def start(self, function: str, ratio: float, structure: str = "AL-AM", compress: bool = True) -> None:
        """Call lib.prune's function with the published scripts' settings; without `compress` the masks are not used."""
        prune = importlib.import_module("lib.prune")
        cut = prune.compress

        def recorded(layer: nn.Module, heads: Tensor | None, units: Tensor | None, *others: Any, **named: Any) -> None:
            for axis, mask in (("kv_heads", heads), ("intermediate", units)):
                if mask is not None:
                    self.masks[axis].append(mask.clone())
            if compress:
                cut(layer, heads, units, *others, **named)

        def on_cpu(tensor: Tensor) -> Tensor:
            self.thresholded.append(tensor.clone())
            return tensor

        def cat(tensors: list[Tensor]) -> Tensor:
            self.concatenated += tensors
            return torch.cat(tensors)

        settings = Namespace(nsamples=WINDOWS, seed=0, pruning_ratio=ratio, structure=structure, unstr=True)
        settings.metrics, settings.remove_heads = "WIFV", -1
        batches = [(window[None], None) for window in token_windows()]
        with ExitStack() as stack:
            stack.enter_context(patch.object(prune, "get_loaders", lambda *_, **__: (batches, None)))
            stack.enter_context(patch.object(prune, "compress", recorded))
            stack.enter_context(patch.object(prune, "torch", _Torch(half=torch.float32, cat=cat)))
            stack.enter_context(patch.object(Tensor, "cuda", on_cpu))
            stack.enter_context(_position_embeddings(self.model))
            getattr(prune, function)(settings, self.model, None, torch.device("cpu"))


class _Torch(ModuleType):
    """torch, but for some names."""

    def __init__(self, **replaced: Any) -> None:
        super().__init__("torch")
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def _position_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Give each decoder layer the rotary embeddings of the positions that it is given."""

    def add(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeddings = model.model.rotary_emb(args[0], kwargs["position_ids"])
        return args, {**kwargs, "position_embeddings": embeddings}

    with ExitStack() as hooks:
        for layer in decoder_layers(model):
            hooks.enter_context(layer.register_forward_pre_hook(add, with_kwargs=True))
        yield


def _flap(_: Path) -> list[Record]:
    """Scores with the published AL-AM structure, of query heads; masks and biases with both structures."""
    records = []
    for structure, ratio, changed in (
        ("AL-AM", 0.2, {}),
        ("AL-AM", 0.5, {}),
        ("UL-UM", 0.25, {}),
        ("AL-AM", 0.5, {"num_key_value_heads": 2}),
    ):
        run = _FlapRun(**changed)
        # With groups the published code scores, but cannot cut: its masks are of query heads, for k and v too.
        run.start("prune_flap", ratio, structure, compress=not changed)
        found: Record = {}
        if structure == "AL-AM":
            heads, units = (part.view(LLAMA["num_hidden_layers"], -1) for part in run.concatenated)
            found["scores"] = {"kv_heads": heads, "intermediate": units}
        if not changed:
            found["keep"] = {axis: torch.stack(masks) for axis, masks in run.masks.items()}
            modules = [(name, module) for name, module in run.model.named_modules() if isinstance(module, nn.Linear)]
            found["bias"] = {name: module.bias for name, module in modules if module.bias is not None}
        settings = {"pruning_ratio": ratio, "metrics": "WIFV", "structure": structure, "llama": changed}
        records.append(run_record("lib/prune.py:280 prune_flap", run.replaced, settings, **found))
    return records


def _wanda_sp(_: Path) -> list[Record]:
    records = []
    for ratio in (0.25, 0.5):
        run = _FlapRun()
        run.start("prune_wanda_sp", ratio)
        scores = {"kv_heads": torch.stack(run.thresholded[::2]), "intermediate": torch.stack(run.thresholded[1::2])}
        keep = {axis: torch.stack(masks) for axis, masks in run.masks.items()}
        settings = {"pruning_ratio": ratio}
        source = "lib/prune.py:413 prune_wanda_sp"
        records.append(run_record(source, run.replaced, settings, scores=scores, keep=keep))
    return records


# ---- LLM-Pruner


def _llm_pruner_run(clone: Path, source: str, importance: Callable[[ModuleType], Any], settings: Record) -> Record:
    """The published block-wise run of hf_prune.py:95-150 on the layers between the first and the last one.

    Multi-head attention only: with groups the published code adds up query heads of other groups
    (LLMPruner/pruner/hf_llama_pruner.py:334-336).
    """
    for name in ("LLMPruner", "LLMPruner.pruner"):
        # Without their __init__, which import models that need other packages.
        package = ModuleType(name)
        package.__path__ = [str(clone.joinpath(*name.split(".")))]
        sys.modules[name] = package
    tp = importlib.import_module("LLMPruner.torch_pruning")
    llama_pruner = importlib.import_module("LLMPruner.pruner.hf_llama_pruner")
    model, windows = tiny_llama().requires_grad_(True), token_windows()
    score, scores = importance(llama_pruner), []

    def recorded(*args: Any, **named: Any) -> Tensor:
        scores.append(score(*args, **named))
        return scores[-1]

    inner = list(model.model.layers)[1:-1]
    pruner = tp.pruner.MetaPruner(
        model,
        windows[:2, :8],
        importance=recorded,
        ch_sparsity=settings["pruning_ratio"],
        ignored_layers=[],
        channel_groups={},
        consecutive_groups={layer.self_attn.q_proj: LLAMA["head_dim"] for layer in model.model.layers},
        customized_pruners={type(model.model.norm): llama_pruner.hf_rmsnorm_pruner},
        root_module_types=None,
        root_instances=[layer.self_attn.q_proj for layer in inner] + [layer.mlp.gate_proj for layer in inner],
        output_transform=lambda output: output.logits,
    )
    model.zero_grad()
    model(windows, labels=windows).loss.backward()
    pruner.step()
    heads = [each.view(-1, LLAMA["head_dim"]).sum(1) for each in scores if len(each) != LLAMA["intermediate_size"]]
    units = [each for each in scores if len(each) == LLAMA["intermediate_size"]]
    found = {"kv_heads": torch.stack(heads), "intermediate": torch.stack(units)}
    replaced = [
        "the __init__ of LLMPruner and LLMPruner.pruner, which import models that need other packages",
        "MetaPruner is given an output_transform that takes the logits, as the model's output is no tensor",
    ]
    return run_record(source, replaced, settings, scores=found, keep=_kept(model, pruner.pruning_history()))


def _kept(model: PreTrainedModel, history: list[tuple[str, bool, list[int]]]) -> dict[str, Tensor]:
    """What the pruning history leaves: bool [layers, units] per axis."""
    layers, head_dim = LLAMA["num_hidden_layers"], LLAMA["head_dim"]
    keep = {
        "kv_heads": torch.ones(layers, LLAMA["num_attention_heads"], dtype=torch.bool),
        "intermediate": torch.ones(layers, LLAMA["intermediate_size"], dtype=torch.bool),
    }
    for name, _, dropped in history:
        layer = int(name.split(".")[2])
        if name.endswith("q_proj"):
            keep["kv_heads"][layer, torch.tensor(dropped) // head_dim] = False
        else:
            keep["intermediate"][layer, dropped] = False
    return keep


def _llm_pruner(clone: Path) -> list[Record]:
    def of(taylor: str) -> Callable[[ModuleType], Any]:
        return lambda module: module.TaylorImportance(group_reduction="sum", taylor=taylor)

    source = "LLMPruner/pruner/hf_llama_pruner.py:215 TaylorImportance, in hf_prune.py:95-150"
    return [
        _llm_pruner_run(clone, source, of(taylor), {"pruning_ratio": 0.25, "pruner_type": "taylor", "taylor": taylor})
        for taylor in ("param_first", "vectorize")
    ]


def _magnitude(clone: Path) -> list[Record]:
    source = "LLMPruner/pruner/hf_llama_pruner.py:131 MagnitudeImportance, in hf_prune.py:95-150"
    settings = {"pruning_ratio": 0.25, "pruner_type": "l2"}
    return [_llm_pruner_run(clone, source, lambda module: module.MagnitudeImportance(p=2), settings)]


PUBLISHED = {
    "flap": Published("CASIA-IVA-Lab/FLAP", _flap),
    "wanda_sp": Published("CASIA-IVA-Lab/FLAP", _wanda_sp),
    "llm_pruner": Published("horseee/LLM-Pruner", _llm_pruner),
    "magnitude": Published("horseee/LLM-Pruner", _magnitude),
}


def _git(clone: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(clone), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{clone}: {done.stderr.strip()}")
    return done.stdout.strip()


@command
def main(
    method: Annotated[str, Option(help="The baseline.")],
    clone: Annotated[Path, Option(help="A clone of its published repository, without changes.")],
    out: Annotated[Path, Option(help="Directory of the records.")] = Path("tests/official"),
) -> None:
    """Reads the clone; writes METHOD.json with the scores, the repository, the commit and the settings."""
    if method not in PUBLISHED:
        raise ValueError(f"--method {method}: use one of {', '.join(PUBLISHED)}")
    commit = _git(clone, "rev-parse", "HEAD")
    if _git(clone, "status", "--porcelain"):
        raise ValueError(f"{clone}: has changes that are in no commit")
    clone = clone.resolve()
    sys.path.insert(0, str(clone))
    published = PUBLISHED[method]
    record = {
        "repository": published.repository,
        "commit": commit,
        "recorded_with": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "llama": LLAMA,
        "seed": SEED,
        "windows": [WINDOWS, TOKENS],
        "runs": published.record(clone),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{method}.json").write_text(json.dumps(record) + "\n")
