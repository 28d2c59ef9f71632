"""Lock files: the tool that writes their hashes, and that pip refuses a file with another hash."""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tools.lock_hashes import Sources, configured_sources, files_on_page, hashes, pins, renewed, wanted

WHEEL = "tiny-1.0-py3-none-any.whl"


def wheel(folder: Path, name: str = WHEEL, content: str = "") -> str:
    """A wheel of one module without dependencies; its SHA-256."""
    folder.mkdir(exist_ok=True, parents=True)
    info = "-".join(name.split("-")[:2]) + ".dist-info"
    package, version = name.split("-")[:2]
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("tiny_module.py", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"tiny_module.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def index(root: Path, digest: str, file: str = WHEEL) -> str:
    """The address of a simple index whose one file has this hash."""
    page = root / "tiny" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<html><body><a href="../../files/{file}#sha256={digest}">{file}</a></body></html>')
    return root.as_uri()


def install(folder: Path, lock: str) -> subprocess.CompletedProcess[str]:
    (folder / "tiny.lock").write_text(lock)
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--no-index", "--find-links", str(folder)]
    options = ["--require-hashes", "--no-deps", "--no-cache-dir", "--target", str(folder / "site"), "-r", "tiny.lock"]
    return subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True)


def test_pip_installs_what_the_lock_names_and_refuses_other_bytes(tmp_path: Path) -> None:
    wheel(tmp_path)
    found = hashes("tiny", "1.0", Sources((), (str(tmp_path),)))
    lock = renewed("# comment\ntiny==1.0\n", {("tiny", "1.0"): found})
    done = install(tmp_path, lock)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "tiny_module.py").is_file()

    wheel(tmp_path, content="import os")
    refused = install(tmp_path, lock)
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert found[0] in refused.stderr
    assert (tmp_path / "site" / "tiny_module.py").read_text() == ""


def test_two_indexes_that_disagree_about_a_file_are_refused(tmp_path: Path) -> None:
    one, same, other = (index(tmp_path / name, digest * 64) for name, digest in (("1", "a"), ("2", "a"), ("3", "b")))
    assert hashes("tiny", "1.0", Sources((one, same))) == ["a" * 64]
    with pytest.raises(ValueError, match=rf"{WHEEL}: two indexes serve different bytes, SHA-256 a+ and b+"):
        hashes("tiny", "1.0", Sources((one, other)))
    with pytest.raises(ValueError, match=r"tiny==1\.1: the configured indexes give no hash"):
        hashes("tiny", "1.1", Sources((one,)))
    with pytest.raises(ValueError, match=r"absent==1\.0: the configured indexes give no hash"):
        hashes("absent", "1.0", Sources((one,)))


def test_a_build_with_a_local_version_is_a_file_of_the_pinned_one(tmp_path: Path) -> None:
    public = index(tmp_path / "index", "a" * 64)
    local = wheel(tmp_path / "links", "tiny-1.0+cpu-py3-none-any.whl")
    assert set(hashes("tiny", "1.0", Sources((public,), (str(tmp_path / "links"),)))) == {"a" * 64, local}


@pytest.mark.parametrize(
    ("tags", "taken"),
    [
        ("cp311-cp311-manylinux_2_28_x86_64", True),
        ("cp313-cp313-manylinux_2_17_aarch64.manylinux2014_aarch64", True),
        ("cp312-cp312-macosx_14_0_arm64", True),
        ("cp39-abi3-manylinux_2_34_x86_64", True),
        ("py2.py3-none-any", True),
        ("py37-none-any", True),
        ("cp310-cp310-manylinux_2_28_x86_64", False),
        ("cp313-cp313t-manylinux_2_28_x86_64", False),
        ("cp311-cp311-win_amd64", False),
        ("cp311-cp311-musllinux_1_2_x86_64", False),
        ("cp311-cp311-manylinux_2_28_ppc64le", False),
        ("pp311-pypy311_pp73-manylinux_2_28_x86_64", False),
    ],
)
def test_files_of_the_platforms_that_are_named_are_listed(tags: str, taken: bool) -> None:
    assert wanted(f"tiny_name-1.0-{tags}.whl", "tiny-name", "1.0") is taken
    assert not wanted(f"tiny_name-1.0.1-{tags}.whl", "tiny-name", "1.0")


def test_source_archives_are_listed_and_other_files_are_not() -> None:
    assert wanted("tiny_name-1.0.tar.gz", "tiny-name", "1.0")
    assert not wanted("tiny_name-1.0.exe", "tiny-name", "1.0")


def test_both_formats_of_a_page_give_the_same_files() -> None:
    page = f'<a href="https://a.example/b/x-1%2Bcpu.whl#sha256={"a" * 64}">x</a><a href="y.whl">y</a>'
    content = f'{{"files": [{{"filename": "x-1+cpu.whl", "hashes": {{"sha256": "{"a" * 64}"}}}}, '
    content += '{"filename": "y.whl", "hashes": {}}]}'
    assert files_on_page(page, is_json=False) == files_on_page(content, is_json=True) == {"x-1+cpu.whl": "a" * 64}


def test_renewing_keeps_pins_and_comments_and_is_stable() -> None:
    lock = "# comment\n-r other.lock\na==1 ; python_version > '3.11'\nb==2.0 \\\n    --hash=sha256:old\n"
    digests = {("a", "1"): ["1", "2"], ("b", "2.0"): ["3"]}
    assert pins(lock.splitlines()) == list(digests)
    once = renewed(lock, digests)
    first = "a==1 ; python_version > '3.11' \\\n    --hash=sha256:1 \\\n    --hash=sha256:2\n"
    second = "b==2.0 \\\n    --hash=sha256:3\n"
    assert once == "# comment\n-r other.lock\n" + first + second
    assert renewed(once, digests) == once
    with pytest.raises(ValueError, match="a line of a lock file is"):
        renewed("a>=1\n", {})


def test_pips_own_configuration_says_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    configuration = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert len(configured_sources().indexes) == 1
    assert configured_sources().indexes[0].startswith("https://")
    configuration.write_text(
        "[global]\nindex-url = https://a.example/simple\nextra-index-url = file:///b\n  file:///c\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    monkeypatch.setenv("PIP_FIND_LINKS", "wheels")
    sources = Sources(("https://a.example/simple", "file:///b", "file:///c"), ("wheels",))
    assert configured_sources() == sources


@contextmanager
def served(redirect: str | None = None) -> Iterator[tuple[str, list[str | None]]]:
    """A host with an empty page, or which redirects, and the credentials that it is asked with."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(302 if redirect else 200)
            if redirect:
                self.send_header("Location", redirect)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()


def test_credentials_of_an_index_do_not_follow_a_redirect() -> None:
    with served() as (other, seen_by_other), served(f"http://{other}/tiny/") as (index, seen):
        with pytest.raises(ValueError, match="the configured indexes give no hash"):
            hashes("tiny", "1.0", Sources((f"http://me:word@{index}/simple",)))
        assert seen == ["Basic bWU6d29yZA=="]
        assert seen_by_other == [None]


def test_the_makefile_installs_each_lock_with_its_hashes(tmp_path: Path) -> None:
    """In the order that lets pinned setuptools build the source archives."""
    repository = Path(__file__).resolve().parents[2]
    command = ["make", "-n", f"VENV={tmp_path}", f"{tmp_path}/.installed-dev"]
    said = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout
    installs = [line for line in said.splitlines() if "pip install" in line]
    assert all("--require-hashes" in line and "--no-build-isolation" in line for line in installs)
    installed = [word for line in installs for word in re.findall(r"-r (\S+\.lock)", line)]
    assert installed == [f"requirements{part}.lock" for part in ("-build", "", "-cuda", "-dev")]
