"""Every model in every type that the quantize stage is asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers import AutoTokenizer

from tvaprune.checkpoint.config import load_config
from tvaprune.export.gguf import GgufDtype, write_gguf
from tvaprune.export.torchao import write_int8
from tvaprune.export.widths import check_types, check_widths
from tvaprune.options.quantize import TORCHAO, FileType
from tvaprune.proof.certificate import Check, Reference, prompt_ids
from tvaprune.proof.quantized import reload_check

PROMPT_TOKENS = 32


class Written(NamedTuple):
    """What was written."""

    files: dict[str, dict[str, Path]]  # by model and type: a GGUF file, or a model directory
    reloaded: dict[str, Check]  # by the directory's name: that it loads in a fresh process


def write_files(models: Mapping[str, Path], types: Sequence[FileType], out: Path) -> Written:
    """Write each model in each type as MODEL-TYPE.gguf, or as a directory MODEL-TYPE.

    All widths are checked before the first file. Raises what `check_types`, `check_widths` and the writers raise.
    """
    check_types(types)
    for name, directory in models.items():
        check_widths(name, load_config(directory), types)
    written = Written({name: {} for name in models}, {})
    for name, directory in models.items():
        for kind in types:
            path = out / f"{name}-{kind}{'' if kind in TORCHAO else '.gguf'}"
            if kind in TORCHAO:
                input_ids = prompt_ids(AutoTokenizer.from_pretrained(directory), PROMPT_TOKENS)
                reference = Reference("the model in memory", input_ids, write_int8(directory, path, input_ids))
                written.reloaded[path.name] = reload_check(path, reference)
            else:
                write_gguf(directory, path, cast(GgufDtype, kind))
            written.files[name][kind] = path
    return written


def certified(written: Written, mean_kl: Mapping[tuple[str, str], float]) -> dict[str, dict[str, Any]]:
    """What the certificate says of each file or directory, by its name; `mean_kl` is by model and type."""
    found: dict[str, dict[str, Any]] = {}
    for (model, kind), nats in mean_kl.items():
        name = written.files[model][kind].name
        reloaded = {"reloaded": written.reloaded[name].figures} if name in written.reloaded else {}
        found[name] = {"model": model, "type": kind, "mean_kl": nats, **reloaded}
    return found
