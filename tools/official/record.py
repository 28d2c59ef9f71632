"""What all records share: two tiny Llamas, their token windows, and how a published repository becomes a record."""

import ast
import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SEED, TOKENS = 0, 16

Record = dict[str, Any]


@dataclass(frozen=True)
class TinyLlama:
    """A float32 Llama with uniform weights and no biases, and how many calibration windows it is given."""

    config: dict[str, Any]
    windows: int

    def model(self, **changed: Any) -> PreTrainedModel:
        """The same bits wherever it is built, frozen; `changed` are other settings."""
        return fill(LlamaForCausalLM(LlamaConfig(**{**self.config, **changed})))

    def token_windows(self) -> Int[Tensor, "windows seq"]:
        """Calibration windows, int64."""
        generator = torch.Generator().manual_seed(SEED + 1)
        return torch.randint(0, self.config["vocab_size"], (self.windows, TOKENS), generator=generator)


# Heads of 128 dimensions, because FLAP's code counts on them (lib/prune.py:337, 373, 467).
WIDE_HEADS = TinyLlama(
    {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
    windows=6,
)
# Heads of hidden_size / num_attention_heads dimensions, because Bonsai's and NIRVANA's code compute that.
MANY_HEADS = TinyLlama(
    {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
    windows=4,
)


@torch.no_grad()
def fill(model: PreTrainedModel) -> PreTrainedModel:
    """Uniform weights by the order of their names, frozen."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(model.named_parameters()):
        uniform = torch.rand(parameter.shape, generator=generator)
        # Norms around 1; the rest large enough for logits to differ visibly.
        parameter.copy_(uniform + 0.5 if "norm" in name else uniform - 0.5)
    return model.float().eval().requires_grad_(False)


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all parameters, float32, in the order of their names."""
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def functions(file: Path, names: set[str], given: dict[str, Any]) -> dict[str, Any]:
    """Functions of a file whose module cannot be imported, run with these globals."""
    tree = ast.parse(file.read_text())
    chosen: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    namespace = dict(given)
    exec(compile(ast.Module(chosen, []), str(file), "exec"), namespace)
    return namespace


@dataclass(frozen=True)
class Published:
    """A method's published code.

    Args:
        repository: on GitHub.
        source: file, line and name of what runs.
        replaced: what around it is replaced, because it wants a GPU, a download or another transformers.
        llama: what it runs on.
        runs: given the clone, which is on the import path: the settings of each run, as the published command line
            names them, and what it found. `llama` in the settings has what differs from `llama` above.
    """

    repository: str
    source: str
    replaced: list[str]
    llama: TinyLlama
    runs: Callable[[Path], list[Record]]

    def record(self, clone: Path) -> Record:
        """Run the clone's code, and describe the commit, the settings and what was found.

        Raises:
            ValueError: the clone has no commit, or Python files that are not as in its commit.
        """
        commit = _git(clone, "rev-parse", "HEAD")
        if changed := _git(clone, "status", "--porcelain", "--untracked-files=all", "--", "*.py"):
            raise ValueError(f"{clone}: has changes that are in no commit: {changed}")
        sys.path.insert(0, str(clone))
        runs = [{"source": self.source, "replaced": self.replaced, **run} for run in self.runs(clone)]
        return {
            "repository": self.repository,
            "commit": commit,
            "recorded_with": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
            "llama": self.llama.config,
            "seed": SEED,
            "windows": [self.llama.windows, TOKENS],
            "runs": _plain(runs),
        }


def _git(clone: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(clone), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{clone}: {done.stderr.strip()}")
    return done.stdout.strip()


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor):
        value = value.detach().int() if value.dtype == torch.bool else value.detach()
    return value.tolist() if hasattr(value, "tolist") else value
