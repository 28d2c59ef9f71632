"""Prune a model from Python, in one call: what the stages do, without DVC."""

import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tvaprune.architecture.topology import Topology, UnsupportedModelError, check_family
from tvaprune.baselines.gradients import frozen
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.cut import CheckpointSize, compact
from tvaprune.checkpoint.loading import load
from tvaprune.device import pick_device, pick_dtype
from tvaprune.inputs.calibration import WindowSet, load_tokenizer, sample_windows, tokenise
from tvaprune.inputs.documents import Document, plain
from tvaprune.inputs.model import check_tokenizer, check_values
from tvaprune.inputs.model_files import check_config, check_weights
from tvaprune.masks.adapt import adapt
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate
from tvaprune.methods import check_request, find_masks
from tvaprune.options.masks import MaskRequest, method_options

SEQ_LEN, VALIDATION_WINDOWS, MULTIPLE = 512, 4, 32
PRUNED = "pruned"  # of a temporary directory: what becomes `out`
UNFINISHED = ".unfinished-"  # the name of that directory begins with it


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
        model: dense, on the device to compute on, in bfloat16 or float32. It is left as it was.
        texts: what masks are learned on. A few hundred pages; more kinds of text generalise better.
        sparsity: share of the decoder layers' parameters to remove, at least 0 and below 1.
        method: a key of `tvaprune.options.masks.METHOD_OPTIONS`. It prunes all axes that it can.
        options: an instance of the method's class there; None: its defaults.
        windows: windows of text to learn on.
        out: new or empty directory to write the pruned model and the tokenizer to; None: they are not kept.

    Raises:
        FileExistsError: `out` is not empty.
        TypeError: texts is a single string, or has what is none; options are of another method.
        UnsupportedModelError: the model is pruned already, has an adapter, or is of a family that is not supported.
        InputError: the weights or the tokenizer cannot be used.
        ValueError: an argument that is out of range, by its name in params.yaml; texts that are too short.
        UnreachableSparsityError: the pruned axes cannot remove so much.
    """
    request = _request(model, tokenizer, texts, sparsity, method, options, windows)
    place = None if out is None else Path(out)
    with _scratch_for(place) as scratch:
        # First, so that a model that cannot be written, or a full disk, costs no learning.
        model.save_pretrained(scratch / "dense")
        tokenizer.save_pretrained(scratch / "dense")
        masks, update = _learn(model, tokenizer, texts, request, windows)
        compact(scratch / "dense", masks, update, scratch / PRUNED)
        if place is None:
            return load(scratch / PRUNED)
    return load(place)


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
    config = load_config(dense)
    check_family(config)
    check_config(dense, trust_remote_code=False)
    check_weights(dense, config)
    with _scratch_for(out) as scratch:
        device = pick_device()
        model, tokenizer = load(dense, pick_dtype(device), device), load_tokenizer(dense)
        request = _request(model, tokenizer, texts, sparsity, method, None, windows)
        masks, update = _learn(model, tokenizer, texts, request, windows)
        return compact(dense, masks, update, scratch / PRUNED)


@contextmanager
def _scratch_for(out: Path | None) -> Iterator[Path]:
    """A directory for temporary files; what is in its PRUNED at the end becomes `out`, if nothing failed.

    It is in `out`, before anything is learned: a place that cannot be written is found then, and a system's own
    directory for temporary files can be too small or in memory.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    require_empty(out)
    there = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=out) as scratch:
            yield Path(scratch)
            for file in sorted(Path(scratch, PRUNED).iterdir()):
                file.replace(out / file.name)
    except BaseException:
        if not there and not any(out.iterdir()):
            out.rmdir()
        raise


def _request(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    sparsity: float,
    method: str,
    options: Any,
    windows: int,
) -> MaskRequest:
    """What is asked for. Raises, before any work, what `prune` does for all but the texts themselves."""
    if windows < 1:
        raise ValueError(f"windows = {windows}: must be at least 1")
    if isinstance(texts, str):
        raise TypeError("texts: expected several texts, found one str; pass [text]")
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError("the model has an adapter; merge it first (merge_and_unload)")
    if getattr(model.config, "quantization_config", None):
        raise UnsupportedModelError("the model's weights are quantised; load it in bfloat16 or float32")
    check_family(model.config)
    check_tokenizer(tokenizer, model.config.vocab_size)
    check_values(model)
    kind = method_options(method)
    request = MaskRequest(method, options or kind(), sparsity, kind.axes)
    check_request(request, Topology.of(model.config))
    return request


def _learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    request: MaskRequest,
    windows: int,
) -> tuple[Masks, WeightUpdate]:
    """Adapted masks, and what to fold into the weights."""
    topology, seq_len = Topology.of(model.config), _window_tokens(model, request)
    documents = tokenise(list(_documents(texts)), tokenizer, "texts")
    sets = [WindowSet("texts", windows, seq_len), WindowSet("validation", VALIDATION_WINDOWS, seq_len)]
    ids = sample_windows({"texts": documents}, sets, packing="auto", eos_token_id=tokenizer.eos_token_id, seed=0)
    attention = model.config._attn_implementation
    try:
        with frozen(model), _usual_modes():
            found = find_masks(model, ids["texts"], ids["validation"], request)
    finally:
        model.set_attn_implementation(attention)
    multiple = (math.gcd(MULTIPLE, topology.hidden), math.gcd(MULTIPLE, topology.intermediate))
    if found.update.weight:
        multiple = (1, 1)
    try:
        return adapt(topology, found.masks, request.sparsity, "budget", *multiple), found.update
    except ValueError:  # what was learned is not lost
        problem = f"no widths in multiples of {multiple} meet sparsity = {request.sparsity}; they stay as learned"
        warnings.warn(problem, stacklevel=3)
        return found.masks, found.update


@contextmanager
def _usual_modes() -> Iterator[None]:
    """Gradients, and new tensors in float32, whatever the caller has set for all of torch."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(default)


def _window_tokens(model: PreTrainedModel, request: MaskRequest) -> int:
    """SEQ_LEN, or what the model's context and sliding window have room for, in whole blocks of the method."""
    config = model.config
    room = min(SEQ_LEN, config.max_position_embeddings, getattr(config, "sliding_window", None) or SEQ_LEN)
    block = min(getattr(request.options, "curvature_tokens", None) or 1, room)
    return int(room // block * block)


def _documents(texts: Iterable[str]) -> Iterator[Document]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts: number {number} is of type {type(text).__name__}, not str")
        yield Document(str(number), plain(text))


def require_empty(directory: Path) -> None:
    """Raise FileExistsError for a directory that holds files."""
    if not directory.exists():
        return
    if left := sorted(directory.glob(f"{UNFINISHED}*")):
        raise FileExistsError(f"{left[0]}: a run that was killed left it there; remove it, or name another directory")
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory}: is there and not empty; name another directory")
