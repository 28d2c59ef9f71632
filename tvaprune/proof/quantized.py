"""The certificate of a directory of quantised files: what each differs from the model that it was made of."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvaprune.artifacts import write_json
from tvaprune.proof.certificate import Check, DamagedDirectoryError, hashes

QUANTIZED = "quantized.json"
SCHEMA = 1
# Largest mean KL in nats from the unquantised model over a window of text. A file that is wrong has several nats.
KL_BOUND = {"bf16": 0.02, "q8_0": 0.05, "q5_1": 0.3, "q5_0": 0.3, "q4_1": 1.0, "q4_0": 1.0}


def write_quantized(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the certificate, last: of each file its model, type and mean KL, and the SHA-256 of every file there."""
    write_json(directory / QUANTIZED, {"schema": SCHEMA, "measured": dict(files), "files": _files(directory)})


def check_quantized(directory: Path) -> list[Check]:
    """Compare the files with the certificate's hashes; a check for each, by the KL that was measured.

    Raises:
        DamagedDirectoryError: names the first file that is absent, changed or unknown, or a damaged certificate.
    """
    path = directory / QUANTIZED
    try:
        content = json.loads(path.read_text())
        expected, measured = dict(content["files"]), dict(content["measured"])
        if content["schema"] != SCHEMA:
            raise DamagedDirectoryError(f"{path}: schema {content['schema']!r}, this version reads {SCHEMA}")
        checks = [kl_check(name, each["type"], each["mean_kl"]) for name, each in measured.items()]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DamagedDirectoryError(f"{path}: damaged certificate ({error}); run the quantize stage again") from error
    found = _files(directory)
    for file in sorted(expected.keys() | found.keys()):
        if found.get(file) != expected.get(file):
            what = "absent" if file not in found else "not in the certificate" if file not in expected else "changed"
            raise DamagedDirectoryError(f"{directory / file}: {what} since {QUANTIZED} was written (SHA-256)")
    return checks


def kl_check(name: str, kind: str, mean_kl: float) -> Check:
    """The mean KL of a file from its unquantised model, against the bound of its type."""
    bound = KL_BOUND[kind]
    return Check(f"{name} = unquantised", mean_kl <= bound, {"mean_kl": float(f"{mean_kl:.1e}")}, {"mean_kl": bound})


def _files(directory: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(directory).items() if name != QUANTIZED}
