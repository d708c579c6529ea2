"""How Sphinx builds the documentation (`make docs`). Nothing is downloaded, neither now nor by a reader's browser."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import api_pages

project = "ablate"
author = "The ablate authors"
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "ablate"
html_show_sphinx = False
html_copy_source = False
# Types in signatures are short names (Plan), and two modules may have one of that name; such a name gets no link.
suppress_warnings = ["ref.python"]

api_pages.write(Path(__file__).parent / "api")
