"""Prune a model from Python, in one call: what the stages do, without DVC."""

import math
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tvaprune.architecture.topology import Topology, check_family
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.cut import CheckpointSize, compact
from tvaprune.checkpoint.loading import load
from tvaprune.device import pick_device, pick_dtype
from tvaprune.inputs.calibration import WindowSet, load_tokenizer, sample_windows, tokenise
from tvaprune.inputs.documents import Document
from tvaprune.inputs.model_files import check_config, check_weights
from tvaprune.masks.adapt import adapt
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate
from tvaprune.methods import check_request, find_masks
from tvaprune.options.masks import MaskRequest, method_options

SEQ_LEN, VALIDATION_WINDOWS, MULTIPLE = 512, 4, 32


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    sparsity: float = 0.2,
    method: str = "tva",
    options: Any = None,
    windows: int = 512,
    out: Path | str | None = None,
) -> PreTrainedModel:
    """Prune a causal LM on the given texts, and return the smaller model, ready for inference, on the CPU.

    Seed 0, windows of 512 tokens or the model's context if that is shorter. Widths are in multiples of 32 where the
    model's are and the target leaves such widths, but not of a method that refits matrices, which count on every unit
    that it keeps. The pipeline (`dvc repro`) has a parameter for each of these, proves the result and measures it.

    Args:
        model: dense, on the device to compute on. It is left as it was.
        texts: what masks are learned on. A few hundred pages; more kinds of text generalise better.
        sparsity: share of the decoder layers' parameters to remove, at least 0 and below 1.
        method: a key of `tvaprune.options.masks.METHOD_OPTIONS`. It prunes all axes that it can.
        options: an instance of the method's class there; None: its defaults.
        windows: windows of text to learn on.
        out: new or empty directory to write the pruned model and the tokenizer to; None: they are not kept.

    Raises:
        FileExistsError: `out` is not empty.
        TypeError: texts is a single string; options are of another method.
        UnsupportedModelError: the model is pruned already, or of a family that is not supported.
        ValueError: an argument that is out of range, by its name in params.yaml; texts that are too short.
        UnreachableSparsityError: the pruned axes cannot remove so much.
    """
    if out is not None:
        require_empty(Path(out))
    masks, update = _learn(model, tokenizer, texts, sparsity, method, options, windows)
    # Beside `out`, because a system's own directory for temporary files can be in memory.
    parent = None if out is None else Path(out).absolute().parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        dense, directory = Path(scratch, "dense"), Path(out) if out is not None else Path(scratch, "compact")
        model.save_pretrained(dense)
        compact(dense, masks, update, directory)
        if out is not None:
            tokenizer.save_pretrained(directory)
        return load(directory)


def prune_directory(
    dense: Path, texts: Iterable[str], out: Path, sparsity: float = 0.2, method: str = "tva", windows: int = 512
) -> CheckpointSize:
    """Prune a model directory that has a tokenizer, as `prune` does a model.

    Masks are learned in the dtype that suits the machine; the tensors are cut in the dtype that they are stored in.

    Raises:
        FileNotFoundError: there is no model.
        InputError: the model is not complete, or its weights are not in safetensors.
        As `prune`.
    """
    require_empty(out)
    config = load_config(dense)
    check_family(config)
    check_config(dense, trust_remote_code=False)
    check_weights(dense, config)
    device = pick_device()
    model, tokenizer = load(dense, pick_dtype(device), device), load_tokenizer(dense)
    masks, update = _learn(model, tokenizer, texts, sparsity, method, None, windows)
    return compact(dense, masks, update, out)


def _learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    sparsity: float,
    method: str,
    options: Any,
    windows: int,
) -> tuple[Masks, WeightUpdate]:
    """Adapted masks, and what to fold into the weights."""
    if isinstance(texts, str):
        raise TypeError("texts: expected several texts, found one str; pass [text]")
    check_family(model.config)
    topology = Topology.of(model.config)
    kind = method_options(method)
    request = MaskRequest(method, options or kind(), sparsity, kind.axes)
    check_request(request, topology)
    seq_len = min(SEQ_LEN, model.config.max_position_embeddings)
    documents = tokenise([Document(str(i), text) for i, text in enumerate(texts)], tokenizer, "texts")
    sets = [WindowSet("texts", windows, seq_len), WindowSet("validation", VALIDATION_WINDOWS, seq_len)]
    ids = sample_windows({"texts": documents}, sets, packing="auto", eos_token_id=tokenizer.eos_token_id, seed=0)
    attention, asked = model.config._attn_implementation, [p for p in model.parameters() if p.requires_grad]
    try:
        found = find_masks(model, ids["texts"], ids["validation"], request)
    finally:
        model.set_attn_implementation(attention)
        for parameter in asked:
            parameter.requires_grad_(True)
    multiple = (math.gcd(MULTIPLE, topology.hidden), math.gcd(MULTIPLE, topology.intermediate))
    if found.update.weight:
        multiple = (1, 1)
    try:
        return adapt(topology, found.masks, sparsity, "budget", *multiple), found.update
    except ValueError as error:  # what was learned is not lost
        warnings.warn(f"the widths are no multiples of {multiple}: {error}", stacklevel=3)
        return found.masks, found.update


def require_empty(directory: Path) -> None:
    """Raise FileExistsError for a directory that holds files."""
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory}: is there and not empty; name another directory")
