"""What a release writes for a tiny random model of each family.

tests/golden/VERSION/FAMILY holds the dense model, the update artifact, and for each layout its masks artifact, the
compact model directory, and the logits of a prompt.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import tvaprune
from tests.tiny_models import random_masks, random_update, tiny_model
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.config import load_config
from tvaprune.options.choices import Layout
from tvaprune.masks.masks import Masks, write_masks
from tvaprune.masks.projection import keep_widths
from tvaprune.masks.update import write_update
from tvaprune.proof.parity import compact_logits

GOLDEN = Path(__file__).parent
GOLDEN_FAMILIES = ("llama_tied", "mistral", "qwen3")
LAYOUTS: tuple[Layout, ...] = ("uneven", "uniform", "padded")
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}


def write_version(root: Path = GOLDEN) -> Path:
    """Write the folder of this version. Raises FileExistsError where it is: what a release wrote does not change."""
    folder = root / tvaprune.__version__
    if folder.exists():
        raise FileExistsError(f"{folder} is what that release wrote, and is not written again; raise the version")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary, tvaprune.__version__)
        for seed, family in enumerate(GOLDEN_FAMILIES):
            _write_family(work / family, family, seed)
        shutil.copytree(work, folder)
    return folder


def _write_family(folder: Path, family: str, seed: int) -> None:
    dense = folder / "dense"
    tiny_model(family, seed, **SIZES).save_pretrained(dense)
    topology = Topology.of(load_config(dense))
    update = random_update(topology, seed)
    write_update(folder / "update", update, made_with={})
    prompts = torch.randint(0, SIZES["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(seed))
    for layout in LAYOUTS:
        masks, out = _masks(topology, layout, seed), folder / layout / "compact"
        write_masks(folder / layout / "masks", masks, made_with={})
        compact(dense, masks, update, out, layout)
        logits = compact_logits(out, prompts)
        save_file({"input_ids": prompts, "logits": logits.contiguous()}, folder / layout / "prompt.safetensors")


def _masks(topology: Topology, layout: Layout, seed: int) -> Masks:
    """12 hidden dimensions, which every family's config takes; one layer has no block left unless layers are equal."""
    masks = random_masks(topology, seed)
    widths = ([9, 9, 9], [1, 1, 1]) if layout == "uniform" else ([13, 0, 6], [2, 0, 1])
    return keep_widths(masks, 12, *widths)
