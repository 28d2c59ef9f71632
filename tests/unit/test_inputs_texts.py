"""Texts: cleaning, reading of every format, and what the held-out text keeps out."""

import bz2
import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from tvaprune.artifacts import ArtifactError
from tvaprune.inputs.documents import Document, clean, drop_known, load_documents, load_texts, write_documents
from tvaprune.inputs.sources import InputError, TextField, TextLocal, TextPackage
from tvaprune.inputs.texts import clean_transcript, read_documents
from tvaprune.inputs.wikipedia import plain_text, read_dump
from tvaprune.resume import ResumableRun


@pytest.fixture(autouse=True)
def workspace(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("workspace"))


def read(path: Path, text_field: TextField = "text") -> list[Document]:
    with ResumableRun("fetch_inputs", {}, []) as state:
        return list(
            read_documents(
                TextLocal(label="x", kind="x", path=path, text_field=text_field), path.parent / "unused", state
            )
        )


def test_clean_keeps_paragraphs_and_nothing_else_of_the_layout() -> None:
    assert clean(" a\u00a0 b \r\n\r\n\n c\td\ne ") == "a b\n\nc d\ne"


def test_a_transcribers_marks_go_and_the_words_stay() -> None:
    spoken = (
        "Thank you. [Applause] We [the States] won. [Laughter]\n[At this point, a toast was given.] "
        "It is [its; White House correction] day."
    )
    assert clean_transcript(spoken) == "Thank you. We [the States] won. It is its day."


def test_local_files_of_all_formats(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("plain")
    (folder / "a.jsonl").write_text('{"body": "one", "id": 7, "title": "One"}\n{"body": "two"}\n')
    parquet.write_table(pyarrow.table({"body": ["three", "four"]}), folder / "sub" / "c.parquet")
    (folder / "notes.md").write_text("not read")
    assert read(folder, "body") == [
        Document("7", "one", "One"),
        Document("a/1", "two"),
        Document("b", "plain"),
        Document("sub/c/0", "three"),
        Document("sub/c/1", "four"),
    ]
    assert read(folder / "b.txt") == [Document("b", "plain")]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", '{"body": "x"}\n', InputError, "a.jsonl row 0: no field 'text'; it has body"),
        ("a.jsonl", '{"text": 3}\n', InputError, "a.jsonl row 0: field 'text' is of type int, not text"),
        ("a.jsonl", "{", ArtifactError, "a.jsonl, line 1: not valid JSON"),
        ("a.csv", "x", InputError, "no file that ends in .txt, .jsonl, .jsonl.gz, .parquet, .arrow"),
    ],
)
def test_unreadable_text_is_named(
    tmp_path: Path, name: str, content: str, error: type[Exception], message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read(tmp_path)


def test_scraped_files_are_read(tmp_path: Path) -> None:
    """Byte order marks, empty lines, null, half a surrogate pair, compressed files and suffixes in capitals."""
    (tmp_path / "A.TXT").write_text("\ufeffHello", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('\ufeff{"text": "one \\ud83d"}\n\n{"text": null}\n', encoding="utf-8")
    (tmp_path / "c.JSONL.gz").write_bytes(gzip.compress(b'{"text": "two", "title": " "}\n'))
    assert [(each.text, each.title) for each in read(tmp_path)] == [
        ("Hello", None),
        ("one \ufffd", None),
        ("", None),
        ("two", None),
    ]


def test_several_fields_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"problem": "What is\\t2 + 2?", "solution": "4."}\n')
    assert read(tmp_path / "a.jsonl", ("problem", "solution")) == [Document("a/0", "What is\t2 + 2?\n\n4.")]
    with pytest.raises(InputError, match="no field 'answer'; it has problem, solution"):
        read(tmp_path / "a.jsonl", ("problem", "answer"))


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    assert [document.text for document in read(tmp_path / "saved")] == ["one", "two"]


def test_code_keeps_its_indentation_and_lines_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "index" / "texts_for_test-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    code = "def one():\n\n\n    return 1  # two spaces\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("texts/deep/b.py", code)
        archive.writestr("texts/a.py", "")
        archive.writestr("texts/py.typed", "")
        archive.writestr("texts/news.cor", "first  text\nsecond\u2028text\n")
        about = "Metadata-Version: 2.1\nName: texts-for-test\nVersion: 1.0\n"
        archive.writestr("texts_for_test-1.0.dist-info/METADATA", about)
        archive.writestr("texts_for_test-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))

    def read_package(**own: str) -> list[Document]:
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        common = {"label": "x", "kind": "x", "name": "texts-for-test", "version": "1.0", "license": "none"}
        source = TextPackage.model_validate({**common, "sha256": sha256, **own})
        with ResumableRun("fetch_inputs", {}, []) as state:
            return list(read_documents(source, tmp_path / own["format"], state))

    assert read_package(format="code", member="texts/") == [
        Document("a.py", ""),
        Document("deep/b.py", code.strip()),
    ]
    assert [document.text for document in read_package(format="lines", member="texts/news.cor")] == [
        "first text",
        "second text",
        "",
    ]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such file or directory"):
        read(tmp_path / "nowhere")


def test_known_titles_and_repeated_texts_are_left_out() -> None:
    documents = [
        Document("1", "a", "Big Apple"),
        Document("2", "b", "big_apple"),
        Document("3", "a"),
        Document("4", "c"),
        Document("5", ""),
        Document("6", "held out"),
        Document("7", "c"),
    ]
    kept, same_title, repeated = drop_known(documents, {"big apple"}, {"held out"})
    assert [one.id for one in kept] == ["3", "4"]
    assert (same_title, repeated) == (2, 3)


def test_documents_survive_a_round_trip(tmp_path: Path) -> None:
    documents = [Document("ä", 'line\nbreak "quoted" \u2028 separator'), Document("2", "b")]
    write_documents(tmp_path / "name.jsonl", documents)
    assert load_documents(tmp_path) == {"name": documents}
    with pytest.raises(InputError, match=r"no .jsonl file; run the fetch_inputs stage"):
        load_documents(tmp_path / "empty")
    write_documents(tmp_path / "a.jsonl", [Document("1", "one")])
    assert load_texts(tmp_path) == {"a": ["one"], "name": [document.text for document in documents]}
    (tmp_path / "a.jsonl").write_text('{"id": "1", "text": "one"}\n{"id": "2"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, document 2: no field 'text'"):
        load_texts(tmp_path)


def test_a_users_own_text_keeps_its_spaces(tmp_path: Path) -> None:
    """Code without its indentation would be learned from, and measured, as what it is not."""
    code = "    if x:\n\n\n        return  1"
    (tmp_path / "a.txt").write_bytes(f"\r\n \r\n{code}  \r\n".replace("\n\n\n", "\r\n\r\n\r\n").encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": f"\n{code}\n"}))
    with ResumableRun("fetch_inputs", {}, []) as state:
        own = list(read_documents(TextLocal(label="x", kind="code", path=tmp_path), tmp_path / "unused", state))
    assert [document.text for document in own] == [code, code]


def test_lines_of_wikitext_become_articles(tmp_path: Path) -> None:
    lines = [
        "",
        " = Valkyria = \n",
        "",
        " It is a game . \n",
        " = = Plot = = \n",
        " War . \n",
        "",
        " = 1 = 2 = \n",
        " A sum . \n",
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    source = TextLocal(label="x", kind="wikipedia", path=file, format="wikitext")
    with ResumableRun("fetch_inputs", {}, []) as state:
        articles = list(read_documents(source, tmp_path / "unused", state))
    assert articles == [
        Document("0", "= Valkyria =\nIt is a game .\n= = Plot = =\nWar .", "Valkyria"),
        Document("1", "= 1 = 2 =\nA sum .", "1 = 2"),
    ]
    text = tmp_path / "train.txt"
    text.write_text("\n".join(line.strip("\n") for line in lines))
    with ResumableRun("fetch_inputs", {}, []) as state:
        assert list(read_documents(source.model_copy(update={"path": text}), tmp_path / "unused", state)) == articles
    with pytest.raises(ValueError, match="documents = 5 samples rows, which are lines in wikitext"):
        TextLocal(label="x", kind="wikipedia", path=file, format="wikitext", documents=5)


ARTICLE = """{{Infobox|name=x}}
[[File:Map.png|thumb|A map of [[somewhere]]]]
'''Plain''' ({{IPA|x}}; , {{y}}) is a [[Text (literary theory)|text]] that stays about {{convert|10|km|mi}} long \
after all markup is gone.<ref name="a">A source.</ref>

== History ==
* a list item that is certainly longer than sixty characters, but is not a paragraph.
It has a second paragraph, ''in italics'', with &ndash; an entity, and it is long enough too.
{| class="wikitable"
| a cell of a table that is certainly longer than sixty characters, but not a paragraph.
|}
Short line.

== References ==
This line stands in a section of references and is longer than sixty characters, so it must go.
[[Category:Examples]]
"""
PARAGRAPHS = (
    "Plain is a text that stays about 10 km long after all markup is gone.\n\n"
    "It has a second paragraph, in italics, with \u2013 an entity, and it is long enough too."
)


def test_only_paragraphs_of_an_article_stay() -> None:
    assert plain_text(ARTICLE) == PARAGRAPHS


def test_a_dump_gives_its_articles_only(tmp_path: Path) -> None:
    from xml.sax.saxutils import escape

    pages = [
        f"<page><title>{title}</title><ns>{namespace}</ns>{redirect}"
        f"<revision><text>{escape(ARTICLE)}</text></revision></page>"
        for title, namespace, redirect in (
            ("Kept", 0, ""),
            ("Moved", 0, '<redirect title="Kept"/>'),
            ("Talk:Kept", 1, ""),
        )
    ]
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    path = tmp_path / "dump.xml.bz2"
    path.write_bytes(bz2.compress(xml.encode()))
    assert list(read_dump(path)) == [("Kept", PARAGRAPHS)]


def test_requests_give_each_text_once_and_papers_in_full(tmp_path: Path) -> None:
    import gzip

    from tvaprune.inputs.texts import _read_requests

    long = "A paragraph that says enough to be more than a caption, which is a hundred characters and some more words."
    paper = {"title": "On gates", "abstract": "We prune.", "text": {"paragraphs": [[long, "Table 1"], ["1.1em"]]}}
    passage = {"text": "Once  upon a time."}
    path = tmp_path / "requests.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for number, doc in enumerate([paper, paper, passage]):
            file.write(json.dumps({"native_id": number, "doc": doc}) + "\n")
    assert list(_read_requests(path, "text")) == [
        Document("0", f"On gates\n\nWe prune.\n\n{long}"),
        Document("2", "Once upon a time."),
    ]
