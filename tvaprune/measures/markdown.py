"""Tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

SPEEDUP = ["speedup", "limit", "efficiency"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A header, a line of dashes, and the rows."""
    lines = ["|" + "---|" * len(head), *("| " + " | ".join(cells) + " |" for cells in rows)]
    return "\n".join(["| " + " | ".join(head) + " |", *lines])


def speedup_cells(phase: dict[str, Any]) -> list[str]:
    """The cells under SPEEDUP, from a phase of `speed_report.summarise`."""
    return [f"{phase['speedup']:.2f}×", f"{phase['limit']:.2f}×", f"{phase['efficiency']:.2f}"]
