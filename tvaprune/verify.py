"""Repeat the proof of a model directory that someone was given: `python -m tvaprune.verify DIRECTORY`.

Needs neither the dense model nor this repository's pipeline.
"""

from pathlib import Path
from typing import Annotated

import typer

from tvaprune.checkpoint.certificate import Check, fresh_checks, read_certificate
from tvaprune.checkpoint.compact import MODELING_FILE


def verify(directory: Path, trust_remote_code: bool = False) -> list[Check]:
    """Check the files against their hashes, then what they compute against what the certificate stores.

    The directory's own modeling file is run only where it is this version's, byte for byte, or is trusted by name.

    Raises:
        FileNotFoundError: there is no certificate.
        DamagedDirectoryError: a file is absent, changed or added, or does not load.
        ValueError: the directory brings code that is not this version's.
    """
    certificate, reference = read_certificate(directory)
    code = sorted(directory.rglob("*.py"))
    unknown = [path for path in code if path.read_bytes() != MODELING_FILE.read_bytes()]
    if unknown and not trust_remote_code:
        raise ValueError(
            f"{unknown[0]}: code that is not this version's {MODELING_FILE.name}; read it, then pass "
            "--trust-remote-code to run it"
        )
    bound = certificate["bounds"]["max_abs_logit_diff"]
    return fresh_checks(directory, reference, bound, trust_remote_code=bool(certificate["trust_remote_code"]))


def main(
    directory: Annotated[Path, typer.Argument(help="A model directory with a parity.json.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the directory's modeling file even where it is unknown.")
    ] = False,
) -> None:
    """Verify a pruned model: its files, its logits, its generation, its GGUF file. Exit status 1 where it fails."""
    try:
        checks = verify(directory, trust_remote_code)
    except (ValueError, FileNotFoundError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo("files: as certified (SHA-256)")
    for check in checks:
        typer.echo(check)
    if any(check.passed is False for check in checks):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
