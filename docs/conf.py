"""The documentation site: `make docs`."""

import tomllib
from pathlib import Path

project = "tvaprune"
release = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tvaprune {release}"
html_copy_source = False
highlight_language = "none"
