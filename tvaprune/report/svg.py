"""Figures as inline SVG: columns, dots with error bars, bars, lines, points.

A figure is 360 units wide, so that its text is legible on a phone. Colours are CSS variables of the page, which follow
light and dark; a series also has its own marker and its own dash, so no series is told by its colour alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 30, 34
# By series number: dense, pruned, fine-tuned, and a fourth.
DASHES = ("none", "none", "5 3", "2 2")
# Set on the page, or in a picture that stands alone.
LIGHT = "--ink:#1b2027;--soft:#545c67;--rule:#d5d9df;--paper:#fff;--c0:#5b6470;--c1:#1f5fbf;--c2:#ad4a00;--c3:#7a3f9d"
DARK = "--ink:#e8ebef;--soft:#aab2bd;--rule:#3a414b;--paper:#14171c;--c0:#aeb6c2;--c1:#82b4ff;--c2:#ffab66;--c3:#d3a5f0"
STYLE = (
    "svg.figure{font:11px system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}"
    "svg.figure text{fill:var(--ink)}svg.figure .soft{fill:var(--soft)}"
    "svg.figure .grid{stroke:var(--rule);stroke-width:1}svg.figure .axis{stroke:var(--soft);stroke-width:1}"
    "svg.figure .line{fill:none;stroke-width:1.8;stroke-linejoin:round}"
    "svg.figure .thin{stroke-width:.7}"
    "svg.figure .limit{stroke:var(--ink);stroke-width:2}"
    "svg.figure .frame{fill:none;stroke:var(--soft);stroke-width:.8}"
)


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from [low, high] to [start, end], in units of the figure."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the scale, at most seven or so."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):
                found = [f * 10.0**p for p in powers for f in factors if self.low <= f * 10.0**p <= self.high]
                if len(found) <= 6:
                    break
            return found
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [round(n * step, 10) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def spread(values: Sequence[float], start: float, end: float, log: bool = False, zero: bool = False) -> Scale:
    """A scale around the values, with a margin; `zero` makes it begin at 0."""
    low, high = min(values), max(values)
    if log:
        return Scale(low / 1.15, high * 1.15, start, end, log=True)
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    return Scale(0.0 if zero else low - margin, high + margin, start, end)


def number(value: float) -> str:
    """A tick's text."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def text(x: float, y: float, content: str, anchor: str = "start", kind: str = "") -> str:
    shown = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{shown}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def marker(x: float, y: float, series: int) -> str:
    """Square, circle, triangle or diamond."""
    color = f'fill="var(--c{series % 4})"'
    if series % 4 == 0:
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" {color}/>'
    if series % 4 == 1:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {color}/>'
    corners = ((0, -4.6), (4.4, 3.6), (-4.4, 3.6)) if series % 4 == 2 else ((0, -5), (4.4, 0), (0, 5), (-4.4, 0))
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}" {color}/>'


def legend(names: Sequence[tuple[str, int]], lines: bool = False) -> str:
    """Markers with their names, in one row at the top."""
    parts, x = [], 8.0
    for name, series in names:
        if lines:
            parts.append(path([(x - 4, 12), (x + 14, 12)], series))
        else:
            parts.append(marker(x + 4, 12, series))
        parts.append(text(x + (18 if lines else 12), 16, name))
        x += (32 if lines else 26) + 5.9 * len(name)
    return "".join(parts)


def path(points: Sequence[tuple[float, float]], series: int, steps: bool = False) -> str:
    """A line through points; with `steps`, level until the next point's x."""
    commands = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    commands += [f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}" for x, y in points[1:]]
    dash = "" if DASHES[series % 4] == "none" else f' stroke-dasharray="{DASHES[series % 4]}"'
    return f'<path d="{"".join(commands)}" class="line" stroke="var(--c{series % 4})"{dash}/>'


def axis_x(scale: Scale, bottom: float, top: float, label: str) -> str:
    parts = [line(scale(tick), top, scale(tick), bottom, "grid") for tick in scale.ticks()]
    parts += [text(scale(tick), bottom + 13, number(tick), "middle", "soft") for tick in scale.ticks()]
    return "".join([*parts, text((scale.start + scale.end) / 2, bottom + 28, label, "middle", "soft")])


def axis_y(scale: Scale) -> str:
    parts = [line(LEFT, scale(tick), WIDTH - RIGHT, scale(tick), "grid") for tick in scale.ticks()]
    return "".join([*parts, *(text(LEFT - 5, scale(t) + 4, number(t), "end", "soft") for t in scale.ticks())])


def picture(title: str, description: str, height: float, *parts: str) -> str:
    """An SVG image with a name and a description for a screen reader."""
    return (
        f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}"><title>{escape(title)}</title><desc>{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def standalone(svg: str) -> str:
    """The figure as a file of its own, with its colours and a background."""
    style = f"svg.figure{{{LIGHT}}}@media(prefers-color-scheme:dark){{svg.figure{{{DARK}}}}}{STYLE}"
    head, _, body = svg.partition("<title>")
    return f'{head}<style>{style}</style><rect width="100%" height="100%" fill="var(--paper)"/><title>{body}\n'


def columns(title: str, description: str, kept: Sequence[float], full: float, label: str) -> str:
    """A column a layer: what is kept of it, in a frame of the dense width."""
    height, bottom = 190, 190 - BOTTOM
    y, step = Scale(0, full * 1.02, bottom, 12), (WIDTH - LEFT - RIGHT) / len(kept)
    parts = [axis_y(y)]
    for index, value in enumerate(kept):
        x, wide = LEFT + index * step + 0.12 * step, 0.76 * step
        box = f'x="{x:.1f}" width="{wide:.1f}"'
        parts.append(f'<rect {box} y="{y(full):.1f}" height="{bottom - y(full):.1f}" class="frame"/>')
        parts.append(f'<rect {box} y="{y(value):.1f}" height="{bottom - y(value):.1f}" fill="var(--c1)"/>')
    every = next(each for each in (1, 2, 5, 10, 20, 50) if len(kept) / each <= 12)
    for index in range(0, len(kept), every):
        parts.append(text(LEFT + (index + 0.5) * step, bottom + 13, str(index), "middle", "soft"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 28, label, "middle", "soft"))
    return picture(title, description, height, *parts)


@dataclass(frozen=True)
class Dot:
    """A value with its standard error, of one series of a group."""

    series: int
    value: float
    error: float = 0.0


def dots(
    title: str, description: str, groups: dict[str, list[Dot]], names: Sequence[str], label: str, log: bool = False
) -> str:
    """A row a series in each group: its value as a marker, ± one standard error as a line."""
    left, row = 92, 13
    ends = [end for group in groups.values() for dot in group for end in (dot.value - dot.error, dot.value + dot.error)]
    positive = [end for end in ends if end > 0]
    x = spread(positive if log else ends, left + 6, WIDTH - RIGHT - 6, log)
    height = TOP + sum(len(group) * row + 10 for group in groups.values()) + BOTTOM
    parts, y = [legend([(name, n) for n, name in enumerate(names)]), axis_x(x, height - BOTTOM, TOP - 4, label)], TOP
    for name, group in groups.items():
        parts.append(text(left - 6, y + len(group) * row / 2 + 6, name, "end"))
        for n, dot in enumerate(group):
            at = y + n * row + 8
            low = max(dot.value - dot.error, x.low)
            parts.append(
                f'<line x1="{x(low):.1f}" x2="{x(dot.value + dot.error):.1f}" y1="{at}" y2="{at}" '
                f'stroke="var(--c{dot.series})" stroke-width="1.6"/>'
            )
            parts.append(marker(x(dot.value), at, dot.series))
        y += len(group) * row + 10
    return picture(title, description, height, *parts)


@dataclass(frozen=True)
class Bar:
    """A bar, the text at its end, and a mark beyond it such as a limit."""

    label: str
    value: float
    shown: str
    series: int = 1
    mark: float | None = None


def bars(title: str, description: str, rows: Sequence[Bar], label: str, mark: str = "") -> str:
    """Horizontal bars from 0. `mark` says what the marks are."""
    left, row, top = 116, 26, TOP if mark else 8
    height = top + row * len(rows) + BOTTOM
    highest = max(max(bar.value, bar.mark or 0) for bar in rows) or 1.0
    x = Scale(0, highest * 1.24, left, WIDTH - RIGHT)
    parts = [axis_x(x, height - BOTTOM, top, label)]
    if mark:
        parts.append(line(12, 5, 12, 19, "limit") + text(20, 16, mark))
    for n, bar in enumerate(rows):
        y = top + n * row + 5
        parts.append(text(left - 6, y + 12, bar.label, "end"))
        wide = x(bar.value) - left
        parts.append(
            f'<rect x="{left}" y="{y}" width="{wide:.1f}" height="16" rx="1.5" fill="var(--c{bar.series % 4})"/>'
        )
        parts.append(text(max(x(bar.value), x(bar.mark or 0)) + 5, y + 12, bar.shown))
        if bar.mark is not None:
            parts.append(line(x(bar.mark), y - 3, x(bar.mark), y + 19, "limit"))
    return picture(title, description, height, *parts)


@dataclass(frozen=True)
class Line:
    """Points of one series, in the data's units."""

    name: str
    points: Sequence[tuple[float, float]]
    series: int
    markers: bool = False
    thin: bool = False


def lines(title: str, description: str, series: Sequence[Line], labels: tuple[str, str], zero: bool = False) -> str:
    """Lines over a common axis. `labels`: of x and of y."""
    height = 210
    x = spread([p[0] for each in series for p in each.points], LEFT + 4, WIDTH - RIGHT - 4)
    y = spread([p[1] for each in series for p in each.points], height - BOTTOM, TOP + 14, zero=zero)
    parts = [legend([(each.name, each.series) for each in series], lines=True), axis_y(y)]
    parts += [axis_x(x, height - BOTTOM, height - BOTTOM, labels[0]), text(LEFT - 36, TOP + 4, labels[1], kind="soft")]
    for each in series:
        placed = [(x(a), y(b)) for a, b in each.points]
        parts.append(path(placed, each.series).replace('"line"', '"line thin"' if each.thin else '"line"'))
        parts += [marker(*point, each.series) for point in placed] if each.markers else []
    return picture(title, description, height, *parts)


@dataclass(frozen=True)
class Point:
    """A point with a short label beside it."""

    x: float
    y: float
    label: str
    series: int


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both, of least x first; less is better."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def scatter(
    title: str,
    description: str,
    points: Sequence[Point],
    front: Sequence[tuple[float, float]],
    names: Sequence[str],
    labels: tuple[str, str],
) -> str:
    """Labelled points and a staircase through those that no other point beats; y is logarithmic."""
    height = 250
    x = spread([point.x for point in points], LEFT + 8, WIDTH - RIGHT - 14)
    y = spread([point.y for point in points], height - BOTTOM, TOP + 18, log=True)
    parts = [legend([(name, n) for n, name in enumerate(names)]), axis_y(y)]
    parts += [axis_x(x, height - BOTTOM, height - BOTTOM, labels[0]), text(8, TOP + 6, labels[1], kind="soft")]
    if front:
        parts.append(path([(x(a), y(b)) for a, b in front], 3, steps=True))
    for n, point in enumerate(points):  # labels alternate sides, as neighbours in the list are often neighbours here
        at = x(point.x), y(point.y)
        side = -1 if n % 2 or at[0] > WIDTH - 50 else 1
        parts.append(marker(*at, point.series))
        parts.append(text(at[0] + 7 * side, at[1] + 4, point.label, "start" if side > 0 else "end"))
    return picture(title, description, height, *parts)
