"""Turn the masks that the paper's authors published into a masks artifact.

    python -m tools.import_masks FILE --model DIRECTORY --out artifacts/masks --means artifacts/means

The directory needs a config.json alone. Adaptation, weight update and compaction then run on the artifact as on any.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.loading import load_config
from tvaprune.masks.masks import write_masks
from tvaprune.masks.published import read_published_masks
from tvaprune.masks.update import write_update


def main(
    file: Annotated[Path, typer.Argument(help="The authors' pickle.")],
    model: Annotated[Path, typer.Option(help="Directory with the dense model's config.json.")] = Path("data/model"),
    out: Annotated[Path, typer.Option(help="Masks artifact to write.")] = Path("artifacts/masks"),
    means: Annotated[Path | None, typer.Option(help="Artifact of the gates' means to write too.")] = None,
) -> None:
    """Read the file without executing anything in it, check it against the model, and write the artifact."""
    try:
        topology = Topology.of(load_config(model))
        masks, update = read_published_masks(file, topology)
    except (ValueError, FileNotFoundError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    meta: dict[str, Any] = {
        "made_with": {"import_masks": {"file": file.name, "sha256": digest}},
        "validation_ppl": {},
    }
    write_masks(out, masks, **meta)
    if means is not None:
        write_update(means, update, **meta)
    widths = masks.widths()
    typer.echo(f"hidden {int(widths['hidden'])} of {topology.hidden}")
    typer.echo(f"kv_heads by layer: {' '.join(map(str, widths['kv_heads'].tolist()))} of {topology.kv_heads}")
    typer.echo(
        f"intermediate by layer: {' '.join(map(str, widths['intermediate'].tolist()))} of {topology.intermediate}"
    )
    typer.echo(f"sparsity of the decoder {sparsity(topology, masks.widths()):.4f}, before adaptation")


if __name__ == "__main__":
    typer.run(main)
