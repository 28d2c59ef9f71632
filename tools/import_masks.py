"""Turn the masks that the paper's authors published into a masks artifact.

    python -m tools.import_masks FILE --model DIRECTORY --out artifacts/masks --means artifacts/means

The directory needs a config.json alone. Adaptation, weight update and compaction then run on the artifact as on any.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, echo

from stages._command import command
from stages._options import Config
from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.loading import load_config
from tvaprune.masks.masks import write_masks
from tvaprune.masks.published import read_published_masks
from tvaprune.masks.update import write_update


@command
def main(
    file: Annotated[Path, Argument(help="The authors' pickle.")],
    model: Config = Path("data/model"),
    out: Annotated[Path, Option(help="Masks artifact to write.")] = Path("artifacts/masks"),
    means: Annotated[Path | None, Option(help="Artifact of the gates' means to write too.")] = None,
) -> None:
    """Reads the file without executing anything in it, checks it against the model, and writes the artifact."""
    topology = Topology.of(load_config(model))
    masks, update = read_published_masks(file, topology)
    source = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    meta: dict[str, Any] = {"made_with": {"import_masks": source}, "validation_ppl": {}}
    write_masks(out, masks, **meta)
    if means is not None:
        write_update(means, update, **meta)
    widths = masks.widths()
    echo(f"hidden {int(widths['hidden'])} of {topology.hidden}")
    for axis in ("kv_heads", "intermediate"):
        echo(f"{axis} by layer: {' '.join(map(str, widths[axis].tolist()))} of {topology.width(axis)}")
    echo(f"sparsity of the decoder {sparsity(topology, widths):.4f}, before adaptation")
