"""Turn the masks that the paper's authors published into a masks artifact.

    python -m tools.import_masks FILE --model DIRECTORY --out artifacts/masks

The directory needs a config.json alone. Adaptation, weight update and compaction then run on the artifact as on any.
"""

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.loading import load_config
from tvaprune.masks.masks import sparsity, write_masks
from tvaprune.masks.published import read_published_masks


def main(
    file: Annotated[Path, typer.Argument(help="The authors' pickle.")],
    model: Annotated[Path, typer.Option(help="Directory with the dense model's config.json.")] = Path("data/model"),
    out: Annotated[Path, typer.Option(help="Masks artifact to write.")] = Path("artifacts/masks"),
) -> None:
    """Read the file without executing anything in it, check it against the model, and write the artifact."""
    try:
        topology = Topology.of(load_config(model))
        masks = read_published_masks(file, topology)
    except (ValueError, FileNotFoundError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    write_masks(out, masks, made_with={"import_masks": {"file": file.name, "sha256": digest}}, validation_ppl={})
    widths = masks.widths()
    typer.echo(f"hidden {int(widths['hidden'])} of {topology.hidden}")
    typer.echo(f"kv_heads by layer: {' '.join(map(str, widths['kv_heads'].tolist()))} of {topology.kv_heads}")
    typer.echo(
        f"intermediate by layer: {' '.join(map(str, widths['intermediate'].tolist()))} of {topology.intermediate}"
    )
    typer.echo(f"sparsity of the decoder {sparsity(topology, masks):.4f}, before adaptation")


if __name__ == "__main__":
    typer.run(main)
