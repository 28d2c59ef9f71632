"""What a report consists of, as one HTML page without scripts or links to elsewhere, and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from tvaprune.report.svg import DARK, LIGHT, STYLE

CSS = (
    f":root{{color-scheme:light dark;{LIGHT};--wash:#f4f6f8;--link:#1a56b0}}"
    f"@media(prefers-color-scheme:dark){{:root{{{DARK};--wash:#1d2229;--link:#8fbcff}}}}"
    + STYLE
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,
'Helvetica Neue',Arial,sans-serif;overflow-wrap:anywhere}
header,main,footer{max-width:66rem;margin:0 auto;padding:0 1rem}
header{padding-top:1.5rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.3rem;line-height:1.25;margin:2.75rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:0 0 .25rem}
p{max-width:44rem;margin:.4rem 0}
a{color:var(--link)}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-999rem}.skip:focus{left:1rem;top:.5rem;background:var(--paper);padding:.5rem}
nav ul{list-style:none;margin:1.25rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.1rem 1.1rem}
nav a{display:inline-block;padding:.3rem 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1.25rem 0 0}
.tiles div{background:var(--wash);border-radius:6px;padding:.7rem .9rem}
.tiles dt{color:var(--soft);font-size:.82rem;line-height:1.3}
.tiles dd{margin:0;font-size:1.5rem;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.35}
.tiles dd+dd{font-size:.82rem;font-weight:400;color:var(--soft)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1.75rem 2.5rem}
figure{margin:0;min-width:0;max-width:34rem;break-inside:avoid}
figure svg{display:block;width:100%;height:auto}
figcaption{font-weight:600;margin-bottom:.1rem}
figcaption span{display:block;font-weight:400;font-size:.85rem;color:var(--soft)}
details{margin-top:.25rem;font-size:.9rem}
summary{cursor:pointer;color:var(--soft);padding:.25rem 0}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.2rem 0}
th,td{padding:.3rem .75rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
thead th{vertical-align:bottom;min-width:4.5rem;color:var(--soft);font-weight:600;border-bottom:1px solid var(--soft)}
tbody th{font-weight:500}
table{overflow-wrap:normal}
td.n,th.n{text-align:right}td.n{white-space:nowrap}tbody th{min-width:5.5rem}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr));gap:1rem;margin:.5rem 0 1.5rem}
.samples div{background:var(--wash);border-radius:6px;padding:.7rem .9rem;min-width:0}
.samples h4{margin:0;font-size:.82rem;color:var(--soft);font-weight:600}
.samples p{margin:.2rem 0 0;white-space:pre-wrap}
footer{color:var(--soft);font-size:.85rem;margin-top:3rem;padding-bottom:2rem}
@media print{:root{color-scheme:light;"""
    + LIGHT
    + """;--wash:#f4f6f8;--link:#1b2027}body{font-size:10.5pt}nav,.skip{display:none}
h2{break-after:avoid}tr,.tiles div,.samples div{break-inside:avoid}details{display:none}.scroll{overflow:visible}}
"""
)


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption. The first cell of a row is its heading; numbers are aligned right."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption, one sentence on how to read it, and the numbers behind it."""

    caption: str
    note: str
    svg: str
    data: Table


@dataclass(frozen=True)
class Samples:
    """Texts of several models after the same prompt."""

    prompt: str
    texts: dict[str, str]


Block = str | Table | Figure | Samples


@dataclass(frozen=True)
class Section:
    """A part of the report. `name` is its address in the page."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """A figure that stands at the top."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    summary: str
    sections: Sequence[Section]
    tiles: Sequence[Tile] = field(default=())


def html(report: Report) -> str:
    """The page: every text escaped, no script, and nothing loaded."""
    contents = "".join(f'<li><a href="#{each.name}">{escape(each.title)}</a></li>' for each in report.sections)
    tiles = "".join(
        f"<div><dt>{escape(tile.label)}</dt><dd>{escape(tile.value)}</dd><dd>{escape(tile.note)}</dd></div>"
        for tile in report.tiles
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(report.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the contents</a>\n'
        f"<header><h1>{escape(report.title)}</h1><p>{escape(report.summary)}</p>"
        + (f'<dl class="tiles">{tiles}</dl>' if tiles else "")
        + f'<nav aria-label="Contents"><ul>{contents}</ul></nav></header>\n<main id="main">\n'
        + "\n".join(_section(section) for section in report.sections)
        + "\n</main>\n<footer><p>Written by tvaprune from the files of the run.</p></footer>\n</body>\n</html>\n"
    )


def markdown(report: Report) -> str:
    """The same without figures: headings, sentences, tables and samples."""
    parts = [f"# {report.title}", report.summary]
    for section in report.sections:
        parts.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Table):
                parts += [f"{block.caption}:", _markdown_table(block)]
            elif isinstance(block, Samples):
                rows = [[name, text] for name, text in block.texts.items()]
                parts.append(_markdown_table(Table("", ["model", f"after “{block.prompt}”"], rows)))
            elif isinstance(block, str):
                parts.append(_plain(block))
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    shown, figures = [], []
    for block in [*section.blocks, ""]:
        if isinstance(block, Figure):
            figures.append(_figure(block))
            continue
        if figures:
            shown.append(f'<div class="figures">{"".join(figures)}</div>')
            figures = []
        if isinstance(block, Table):
            shown.append(_table(block))
        elif isinstance(block, Samples):
            texts = "".join(f"<div><h4>{escape(n)}</h4><p>{escape(t)}</p></div>" for n, t in block.texts.items())
            shown.append(f'<h3>“{escape(block.prompt)}”</h3><div class="samples">{texts}</div>')
        elif block:
            shown.append(f"<p>{escape(block)}</p>")
    heading = f'<h2 id="{section.name}-title">{escape(section.title)}</h2>'
    return f'<section id="{section.name}" aria-labelledby="{section.name}-title">{heading}{"".join(shown)}</section>'


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.caption)}<span>{escape(figure.note)}</span></figcaption>"
    behind = f"<details><summary>Numbers of this figure</summary>{_table(figure.data)}</details>"
    return f"<figure>{caption}{figure.svg}{behind}</figure>"


def _table(table: Table) -> str:
    right = [all(_is_number(row[n]) for row in table.rows) and n > 0 for n in range(len(table.head))]
    kind = [' class="n"' if each else "" for each in right]
    head = "".join(f'<th scope="col"{k}>{escape(cell)}</th>' for k, cell in zip(kind, table.head, strict=True))
    rows = []
    for first, *rest in table.rows:
        cells = "".join(f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kind[1:], rest, strict=True))
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" role="region" aria-label="{escape(table.caption)}" tabindex="0"><table>'
        f"<caption>{escape(table.caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] in "-±+"


def _markdown_table(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in cells) + " |" for cells in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no cell ends, no HTML, one line."""
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
    return " ".join(escaped.split()) if text.strip("-") else text
