"""Sphinx builds these pages, README and its like with them: `make docs`. A link inside them that leads nowhere ends it.

The sources start at the project's own folder, so that links mean the same here and in a repository's viewer.
"""

from typing import Any

from sphinx.application import Sphinx

from asr_train import __version__

project = "Wavefleet"
author = "the Wavefleet authors"
version = release = __version__
copyright = author

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "docs/index"
include_patterns = ["docs/**.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
myst_heading_anchors = 4  # the anchors that GitHub makes, so that links work in both places
nitpicky = True
highlight_language = "none"  # a block says its own language
language = "en"
locale_dirs: list[str] = []

html_theme = "furo"
html_title = f"Wavefleet {__version__}"
html_static_path = ["_static"]
html_css_files = ["wavefleet.css"]
html_extra_path = ["_extra"]  # leads from the top folder to the first page
html_copy_source = False
html_show_sourcelink = False

_RIGHT_TO_LEFT = "docs/ar/"  # translations


def _turn_round(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Language and direction of a translated page; the theme puts `language` into <html lang="..."> as it stands."""
    if page.startswith(_RIGHT_TO_LEFT):
        context["language"] = 'ar" dir="rtl'


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("html-page-context", _turn_round)
