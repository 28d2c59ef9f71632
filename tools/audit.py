"""Ask the OSV database for known vulnerabilities of the pinned packages.

`python -m tools.audit`, or `make audit`, sends the names and versions of the lock files to the service, and nothing
else. It needs a network, so CI does not run it. Where the service cannot be reached, it says so and fails.
"""

import json
from collections.abc import Sequence
from http.client import HTTPException
from itertools import chain
from typing import Annotated, Any
from urllib.request import Request, urlopen

from typer import Exit, Option, echo

from stages._command import command
from tools.lock_hashes import LOCKS, pins

SERVICE = "https://api.osv.dev/v1/querybatch"


def vulnerabilities(packages: Sequence[tuple[str, str]], service: str) -> dict[tuple[str, str], list[str]]:
    """Identifiers by package and version, of those packages that have any.

    Raises ValueError where the service gives no answer, or one for another number of packages.
    """
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in packages]
    request = Request(service, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=60) as reply:
            results: list[dict[str, Any]] = json.load(reply)["results"]
            found = [[each["id"] for each in result.get("vulns", [])] for result in results]
    except (OSError, HTTPException) as error:
        raise ValueError(f"{service} cannot be reached, so nothing was checked: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{service} gave no answer of the OSV API, so nothing was checked") from error
    if len(found) != len(packages):
        raise ValueError(f"{service} answered for {len(found)} of {len(packages)} packages")
    return {package: identifiers for package, identifiers in zip(packages, found, strict=True) if identifiers}


@command
def main(service: Annotated[str, Option(help="Address of the OSV API's querybatch.")] = SERVICE) -> None:
    """List the pinned packages with a known vulnerability; exit status 1 if there is one."""
    packages = sorted(set(chain.from_iterable(pins(path.read_text().splitlines()) for path in LOCKS)))
    found = vulnerabilities(packages, service)
    for (name, version), identifiers in found.items():
        echo(f"{name}=={version}: {', '.join(identifiers)}")
    echo(f"{len(packages)} packages checked, {len(found)} with a known vulnerability")
    raise Exit(bool(found))
