"""Write the SHA-256 of every pinned package's files into the lock files, from the indexes that pip is configured for.

`python -m tools.lock_hashes` keeps each lock file's pins and comments, and replaces the hashes. It lists the files of
the pinned version that CPython 3.11 or newer can install on Linux (x86_64, aarch64) or macOS: wheels, also those with a
local version such as `+cpu`, and the source archive. Where two indexes give one file different hashes, it writes
nothing.
"""

import ast
import hashlib
import json
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated
from urllib.error import HTTPError
from urllib.parse import unquote, urldefrag, urlsplit, urlunsplit
from urllib.request import Request, url2pathname, urlopen

from packaging.tags import Tag
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import InvalidVersion, Version
from typer import Argument, Option, echo

from stages._command import command

LOCKS = [Path(f"requirements{suffix}.lock") for suffix in ("-build", "", "-cuda", "-dev", "-vllm")]
PIN = re.compile(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)(?: ; .+)?")
MACHINES = re.compile(r"(manylinux|linux).*_(x86_64|aarch64)|macosx_.*_(x86_64|arm64|universal2)|any")
PYTHON = re.compile(r"py(?:2|3[0-9]*)|cp31[1-9]")
STABLE_ABI = re.compile(r"cp3[0-9]*")
JSON = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True)
class Sources:
    """Where pip looks: base addresses of simple indexes, and folders or pages with links."""

    indexes: tuple[str, ...]
    links: tuple[str, ...] = ()


def configured_sources() -> Sources:
    """What pip's configuration and environment name; the index of pip's own default if they name none."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    listed = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=True).stdout
    values = {key: ast.literal_eval(value) for key, value in (line.split("=", 1) for line in listed.splitlines())}

    def named(option: str) -> list[str]:
        sections = [values.get(f"{section}.{option}") for section in (":env:", "install", "global")]
        return next((value.split() for value in sections if value), [])

    index = named("index-url")
    if not index:
        said = subprocess.run([*pip, "install", "--help"], capture_output=True, text=True, check=True).stdout
        index = re.findall(r"index-url <url>.*?\(default\s+(\S+?)\)", said, flags=re.DOTALL)[:1]
    return Sources((*index, *named("extra-index-url")), tuple(named("find-links")))


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hrefs += [value for key, value in attrs if tag == "a" and key == "href" and value]


def files_on_page(content: str, is_json: bool) -> dict[str, str]:
    """SHA-256 by file name, of a page of a simple index; files without one are left out."""
    if is_json:
        files = json.loads(content)["files"]
        return {file["filename"]: file["hashes"]["sha256"] for file in files if "sha256" in file["hashes"]}
    parser = _Anchors()
    parser.feed(content)
    found = {}
    for address, fragment in map(urldefrag, parser.hrefs):
        if digest := re.search(r"sha256=([0-9a-f]{64})", fragment):
            found[unquote(urlsplit(address).path).rpartition("/")[2]] = digest[1]
    return found


def _fetch(address: str) -> dict[str, str]:
    """The files of a page; none where the index has no such page. User and password of the address go into a header."""
    parts = urlsplit(address)
    if parts.scheme == "file":
        page = Path(url2pathname(parts.path), "index.html")
        return files_on_page(page.read_text(encoding="utf-8"), is_json=False) if page.is_file() else {}
    user, at, host = parts.netloc.rpartition("@")
    request = Request(urlunsplit(parts._replace(netloc=host)), headers={"Accept": f"{JSON}, text/html;q=0.1"})
    if at:  # a redirect can lead to another host
        request.add_unredirected_header("Authorization", f"Basic {b64encode(unquote(user).encode()).decode()}")
    try:
        with urlopen(request, timeout=60) as reply:
            return files_on_page(reply.read().decode(), reply.headers.get_content_type() == JSON)
    except HTTPError as error:
        if error.code == 404:
            return {}
        raise


def _in_folder(place: str, name: str) -> dict[str, str]:
    """Files of a package in a folder of `find-links`, with the hashes of their bytes; or those on a page."""
    if urlsplit(place).scheme in ("http", "https"):
        return _fetch(place)
    folder = Path(url2pathname(urlsplit(place).path) if place.startswith("file:") else place)
    files = [path for path in folder.glob("*") if (parsed := _parsed(path.name)) and parsed[0] == name]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _parsed(file: str) -> tuple[str, Version, frozenset[Tag] | None] | None:
    """Package, version and tags of a file name, the tags None for a source archive; None for other files."""
    try:
        if file.endswith(".whl"):
            name, version, _, tags = parse_wheel_filename(file)
            return name, version, tags
        return *parse_sdist_filename(file), None
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
        return None


def _installable(tag: Tag) -> bool:
    stable = tag.abi == "abi3" and STABLE_ABI.fullmatch(tag.interpreter)
    python = PYTHON.fullmatch(tag.interpreter) or stable
    return bool(python and MACHINES.fullmatch(tag.platform) and not re.fullmatch(r"cp\d+t", tag.abi))


def wanted(file: str, name: str, version: str) -> bool:
    """Whether a file is of this version and one of the platforms in the module's docstring."""
    parsed = _parsed(file)
    if parsed is None or (parsed[0], Version(parsed[1].public)) != (name, Version(version)):
        return False
    return parsed[2] is None or any(map(_installable, parsed[2]))


def hashes(name: str, version: str, sources: Sources) -> list[str]:
    """The SHA-256 of all wanted files of a release, sorted.

    Raises ValueError where there is none, or where two sources give one file different hashes.
    """
    found: dict[str, str] = {}
    pages = chain(
        (_fetch(f"{index.rstrip('/')}/{name}/") for index in sources.indexes),
        (_in_folder(place, name) for place in sources.links),
    )
    for page in pages:
        for file, digest in page.items():
            if wanted(file, name, version) and found.setdefault(file, digest) != digest:
                raise ValueError(f"{file}: two indexes serve different bytes, SHA-256 {found[file]} and {digest}")
    if not found:
        raise ValueError(f"{name}=={version}: the configured indexes give no hash of a file of it")
    return sorted(set(found.values()))


def pins(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Name and version of each pin of a lock file. Raises ValueError for a line of another kind."""
    found = []
    for line in lines:
        if line.startswith(("#", "-r ", "    --hash=")) or not line.strip():
            continue
        match = PIN.fullmatch(line.removesuffix("\\").strip())
        if match is None:
            raise ValueError(f"{line!r}: a line of a lock file is a comment, `-r FILE` or `name==version [; marker]`")
        found.append((match[1], match[2]))
    return found


def renewed(lock: str, digests: dict[tuple[str, str], list[str]]) -> str:
    """The text of a lock file with these hashes in place of its own."""
    lines: list[str] = []
    for line in lock.splitlines():
        if line.startswith("    --hash="):
            continue
        if line.startswith(("#", "-r ")) or not line.strip():
            lines.append(line)
            continue
        (pin,) = pins([line])
        written = line.removesuffix("\\").strip()
        lines.append(" \\\n    ".join([written, *(f"--hash=sha256:{digest}" for digest in digests[pin])]))
    return "\n".join(lines) + "\n"


@command
def main(
    locks: Annotated[list[Path] | None, Argument(help="Lock files; all of the repository's if none is named.")] = None,
    extra_index: Annotated[list[str] | None, Option(help="A further simple index to take hashes from.")] = None,
) -> None:
    """Renew the hashes. Run it after a change of a pin."""
    texts = {path: path.read_text(encoding="utf-8") for path in locks or LOCKS}
    configured = configured_sources()
    sources = Sources((*configured.indexes, *(extra_index or [])), configured.links)
    locked = sorted(set(chain.from_iterable(pins(text.splitlines()) for text in texts.values())))
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(locked, pool.map(hashes, *zip(*locked, strict=True), repeat(sources)), strict=True))
    for path, text in texts.items():
        path.write_text(renewed(text, found), encoding="utf-8")
    echo(f"{len(found)} packages, {sum(map(len, found.values()))} hashes")
