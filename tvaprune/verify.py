"""Repeat the checks of a model directory, without the dense model: `python -m tvaprune verify DIRECTORY`."""

import json
import re
from pathlib import Path

from tvaprune.artifacts import write_json
from tvaprune.checkpoint.cut import MODELING_FILE
from tvaprune.proof.certificate import Check, read_certificate
from tvaprune.proof.checks import fresh_checks
from tvaprune.proof.quantized import QUANTIZED, check_quantized
from tvaprune.proof.vllm_runtime import vllm_check


def verify(directory: Path, trust_remote_code: bool = False, vllm: Path | None = None) -> list[Check]:
    """Check the files against their hashes, then the logits against those that the certificate stores.

    Of a directory of quantised files the hashes, and the differences that were measured when they were written.

    The directory's modeling file runs only if it is this version's, byte for byte, or `trust_remote_code` is set.
    With `vllm`, the interpreter of an environment that has vLLM, generation is also compared with vLLM's.

    Raises:
        FileNotFoundError: there is no certificate.
        DamagedDirectoryError: a file is absent, changed or added, or does not load.
        ValueError: the directory brings code that is not this version's; or `vllm` is given with quantised files.
    """
    if (directory / QUANTIZED).is_file():
        if vllm is not None:
            raise ValueError(f"{directory}: quantised files are not run in vLLM; leave out --vllm")
        return check_quantized(directory)
    stored = read_certificate(directory)
    if not trust_remote_code:
        _refuse_unknown_code(directory)
    checks = fresh_checks(directory, stored.reference, stored.bound, trust_remote_code=stored.trust_remote_code)
    return checks if vllm is None else [*checks, vllm_check(directory, stored, vllm)]


def _refuse_unknown_code(directory: Path) -> None:
    read_it = "; read it, then pass --trust-remote-code to run it"
    for path in sorted(directory.rglob("*.py")):
        if path.read_bytes() != MODELING_FILE.read_bytes():
            raise ValueError(f"{path}: code that is not this version's {MODELING_FILE.name}{read_it}")
    # Both can name another directory or repository, from which transformers would load code.
    auto_map = json.loads((directory / "config.json").read_text()).get("auto_map") or {}
    for reference in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        if not re.fullmatch(rf"{MODELING_FILE.stem}\.\w+", str(reference)):
            raise ValueError(f"{directory / 'config.json'}: auto_map names the code {reference!r}{read_it}")
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory / 'adapter_config.json'}: loads another model, with that model's code{read_it}")


def report(
    directory: Path, trust_remote_code: bool = False, vllm: Path | None = None, serving: Path | None = None
) -> bool:
    """Print each check; whether none failed. The figures of vLLM are written to `serving`. Raises as `verify`."""
    checks = verify(directory, trust_remote_code, vllm)
    print("files: as certified (SHA-256)")
    for check in checks:
        print(check)
    if vllm is not None and serving is not None:
        write_json(serving, {"vllm": {**checks[-1].figures, "passed": int(bool(checks[-1].passed))}})
    return all(check.passed is not False for check in checks)
