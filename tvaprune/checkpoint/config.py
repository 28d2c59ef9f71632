"""The config of a model directory, dense or pruned.

Apart from `tvaprune.checkpoint.loading`, because transformers' model classes take seconds to import.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

from tvaprune.out_of_memory import is_out_of_memory

# The model type of pruned models with widths of their own, whose class is in this package.
PRUNED = "tvaprune"
AGAIN = "fetch or make it again (dvc repro, if it is the pipeline's)"


class DamagedModelError(ValueError):
    """A model directory does not load, or not wholly."""


def load_config(directory: Path) -> PreTrainedConfig:
    """The config of a model directory, without its weights.

    Raises:
        FileNotFoundError: the directory holds no model.
        DamagedModelError: its config does not load.
    """
    require_model(directory)
    with damage(directory):
        content, _ = PreTrainedConfig.get_config_dict(directory)
        if content.get("model_type") == PRUNED:
            import tvaprune.checkpoint.loading  # noqa: F401  registers the class

        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def check_context(config: PreTrainedConfig, lengths: dict[str, int]) -> None:
    """Raise ValueError for a length, by the parameter's name and in tokens, beyond the model's context."""
    context = config.max_position_embeddings
    for name, tokens in lengths.items():
        if tokens > context:
            raise ValueError(f"{name} = {tokens}: longer than the model's context of {context} tokens; lower it")


@contextmanager
def damage(directory: Path) -> Iterator[None]:
    """Turn what transformers raises for files that do not load into DamagedModelError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        cause = " ".join(str(error).split())
        raise DamagedModelError(f"{directory}: does not load: {cause}; {AGAIN}") from error


def require_model(directory: Path) -> None:
    """Raise FileNotFoundError where a directory holds no model, which transformers would take for a hub's name."""
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory}: holds no model (no config.json); name a model's directory, or run dvc repro"
        )
