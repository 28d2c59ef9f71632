"""Plain paragraphs from a MediaWiki XML dump."""

import bz2
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import mwparserfromhell
from mwparserfromhell.nodes import Heading, Tag, Template, Wikilink

from tvaprune.progress import Progress

# Sections that hold lists of sources and links, not prose.
_SKIPPED_SECTIONS = {
    "bibliography", "citations", "discography", "external links", "filmography", "footnotes", "further reading",
    "gallery", "notes", "notes and references", "references", "see also", "sources", "works", "works cited",
}  # fmt: skip
_DROPPED_TAGS = {"ref", "table", "gallery", "math", "timeline", "score", "imagemap", "li", "dd", "dt", "hr"}
_LIST = "\ue000"  # replaces the mark of a list item, whose words are not inside its tag
_DROPPED_NAMESPACES = ("file:", "image:", "category:", "media:")


def read_dump(path: Path) -> Iterator[tuple[str, str]]:
    """(title, text) of every article of a bz2 dump: namespace 0, no redirects, none left empty."""
    with bz2.open(path) as file, Progress(desc=path.name[:40], unit=" pages") as progress:
        for _, element in ElementTree.iterparse(file):
            if element.tag.rpartition("}")[2] != "page":
                continue
            progress.update()
            article = element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None
            if article and (text := plain_text(element.findtext("{*}revision/{*}text") or "")):
                yield element.findtext("{*}title") or "", text
            element.clear()


def plain_text(wikitext: str) -> str:
    """The paragraphs of an article, an empty line between them; no headings, lists, tables, references or templates."""
    paragraphs: list[str] = []
    for section in mwparserfromhell.parse(wikitext).get_sections(flat=True, include_lead=True):
        headings = section.filter_headings(recursive=False)
        if headings and headings[0].title.strip_code().strip().lower() in _SKIPPED_SECTIONS:
            continue
        section.nodes = [node for node in section.nodes if not isinstance(node, Heading)]
        paragraphs += _paragraphs(section)
    return "\n\n".join(paragraphs)


def _paragraphs(section: mwparserfromhell.wikicode.Wikicode) -> list[str]:
    for template in section.filter_templates(recursive=True):
        _swap(section, template, _template_text(template))
    for tag in section.filter_tags(recursive=True):
        if str(tag.tag).strip().lower() in _DROPPED_TAGS:
            _swap(section, tag, _LIST if tag.wiki_markup in {"*", "#", ":", ";"} else "")
    for link in section.filter_wikilinks(recursive=True):
        if str(link.title).strip().lower().startswith(_DROPPED_NAMESPACES):
            _swap(section, link, "")
    lines = section.strip_code(normalize=True, collapse=False).splitlines()
    return [line for line in (_tidy(line) for line in lines) if _is_prose(line)]


def _template_text(template: Template) -> str:
    """The words that a template adds to a sentence; nothing for templates that are not listed here."""
    name = str(template.name).strip().lower()
    values = [str(parameter.value) for parameter in template.params if not parameter.showkey]
    if name in {"convert", "cvt"} and len(values) >= 2:
        return f"{values[0]} {values[1]}"
    if (name == "lang" and len(values) >= 2) or name.startswith("lang-") or name in {"nowrap", "transl", "nihongo"}:
        return values[-1] if values and name != "nihongo" else "".join(values[:1])
    return ""


def _swap(section: mwparserfromhell.wikicode.Wikicode, node: Tag | Template | Wikilink, text: str) -> None:
    with suppress(ValueError):  # its parent is gone already
        section.replace(node, text)


def _tidy(line: str) -> str:
    line = line.replace("\xa0", " ").replace("''", "")
    line = re.sub(r"\(\s*(?:[;,:]\s*)+", "(", line)  # what dropped templates leave
    line = re.sub(r"\s+", " ", re.sub(r"\(\s*\)", "", line))
    return re.sub(r" ([,.;:)])", r"\1", line).strip()


def _is_prose(line: str) -> bool:
    """Whether a line is long enough, ends as a sentence does, and has no markup."""
    return len(line) >= 60 and line[-1] in '.!?"”)' and not re.search(rf"[{{}}|{_LIST}]|\[\[|\]\]", line)
