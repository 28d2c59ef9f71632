"""The certificate of a directory of quantised models: what each differs from the model that it was made of."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvaprune.artifacts import write_json
from tvaprune.checkpoint.cut import MODELING_FILE
from tvaprune.proof.certificate import Check, DamagedDirectoryError, Reference, check_files, hashes
from tvaprune.proof.checks import against_reference, bounded_check, generation, reload_fresh

QUANTIZED = "quantized.json"
SCHEMA = 1
# Largest mean KL in nats from the unquantised model over a window of text. A file that is wrong has several nats.
KL_BOUND = {"bf16": 0.02, "q8_0": 0.05, "q5_1": 0.3, "q5_0": 0.3, "q4_1": 1.0, "q4_0": 1.0, "int8_wo": 0.1}
# Largest difference of logits, as a share of the largest, between the model before it was saved and a fresh process
# that loads it. The same numbers are computed; with another number of threads bfloat16 rounds otherwise.
RELOAD_BOUND = 0.03
RELOADED_TOKENS = 4  # generated in that process, with a cache and without


def write_quantized(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the certificate, last: what was measured of each model, and the SHA-256 of every file there."""
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
        checks += [_reloaded(name, each["reloaded"]) for name, each in measured.items() if "reloaded" in each]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DamagedDirectoryError(f"{path}: damaged certificate ({error}); run the quantize stage again") from error
    check_files(directory, expected, _files(directory))
    return checks


def kl_check(name: str, kind: str, mean_kl: float) -> Check:
    """The mean KL of a file from its unquantised model, against the bound of its type."""
    return bounded_check(f"{name} = unquantised", {"mean_kl": mean_kl}, {"mean_kl": KL_BOUND[kind]})


def reload_check(directory: Path, reference: Reference) -> Check:
    """Load a model directory in a fresh process with transformers alone, and compare its logits with the reference's.

    Raises DamagedDirectoryError if it does not load there; the error is quoted.
    """
    own_code = (directory / MODELING_FILE.name).is_file()
    beginnings, _ = generation(directory, reference.input_ids)
    found = reload_fresh(directory, reference.input_ids, beginnings, RELOADED_TOKENS, own_code)
    figures = against_reference(directory.name, reference, found["logits"], RELOAD_BOUND).figures
    return _reloaded(directory.name, {"max_rel_logit_diff": figures["max_rel_logit_diff"]})


def _reloaded(name: str, figures: Mapping[str, float]) -> Check:
    return bounded_check(f"{name} = reloaded in a fresh process", dict(figures), {"max_rel_logit_diff": RELOAD_BOUND})


def _files(directory: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(directory).items() if name != QUANTIZED}
