"""The page that `dvc plots` fills, with the drawing library in it, so that plots show without a network.

`python -m tools.plots_page` writes .dvc/plots.html (0.9 MB, not in git; `make` does so after it has installed the
packages). .dvc/config names the file as `plots.html_template`. The library is Vega, Vega-Lite and Vega-Embed
(BSD-3-Clause) as the package vl-convert-python holds them, so its version is pinned in requirements.lock.
"""

from pathlib import Path
from typing import Annotated

import vl_convert
from typer import Option

from stages._command import command

# DVC replaces {refresh_tag} and {plot_divs}. Its own {scripts} would load the library from a network.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh_tag}
<title>DVC plots</title>
<style>body { font-family: sans-serif; margin: 1em; } table { border-spacing: 1em; }</style>
<script>(function () {
LIBRARY
})();</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def page() -> str:
    """HTML that sets `vegaEmbed`, which DVC's plots call; a function keeps the library's other names to itself."""
    library = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    if "</script" in library:
        raise ValueError("vl_convert: the library holds '</script', which would end it early; use another version")
    return PAGE.replace("LIBRARY", library)


@command
def main(
    out: Annotated[Path, Option(help="The page to write; .dvc/config names it.")] = Path(".dvc/plots.html"),
) -> None:
    out.write_text(page(), encoding="utf-8")
