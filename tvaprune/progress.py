"""Progress of long work: a bar with the time left on a terminal, a line now and then in a log."""

import sys
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 30.0
SHOWN_AFTER_S = 2.0  # `delay` of a bar that is often done before anyone could read it


class Progress(tqdm):
    """tqdm, but where it does not write to a terminal, whole lines take the place of a bar that is drawn over itself.

    The first line comes after LINE_EVERY_S seconds, the next ones after as many or a tenth of the time so far,
    whichever is longer, and the last one at the end.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._in_lines = not (options.get("file") or sys.stderr).isatty()
        self._next_line_s = LINE_EVERY_S
        if self._in_lines:
            options |= {"leave": False, "mininterval": 1.0}
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self._in_lines:
            return bool(super().display(msg, pos))
        elapsed = self.format_dict["elapsed"]
        if msg is None and elapsed >= self._next_line_s:
            self._next_line_s = elapsed + max(LINE_EVERY_S, elapsed / 10)
            self._write_line()
        return False

    def close(self) -> None:
        shown = self._in_lines and not self.disable and self.n > self.initial
        if shown and self.format_dict["elapsed"] >= self.delay:
            self._write_line()
        super().close()

    def _write_line(self) -> None:
        self.fp.write(f"{self}\n")
        self.fp.flush()
