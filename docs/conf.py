"""How Sphinx builds the site: `make docs`. Nothing is fetched, neither while building nor by a reader's browser."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / folder) for folder in ("pipeline", "targets", "benchmarks"))]

from rankship_pipeline import __version__  # noqa: E402  # the paths above come first

project = "Rankship"
copyright = "the Rankship authors, Apache-2.0"  # noqa: A001  # Sphinx names it so
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
exclude_patterns = ["pictures"]

html_theme = "furo"
html_title = "Rankship"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
suppress_warnings = ["myst.header"]  # an included page may start one level deeper
highlight_language = "none"

default_role = "code"  # docstrings write `name` for code
autodoc_member_order = "groupwise"
autodoc_typehints = "description"
autodoc_typehints_format = "fully-qualified"
autodoc_typehints_description_target = "documented_params"
napoleon_custom_sections = [("Keys", "params_style")]
