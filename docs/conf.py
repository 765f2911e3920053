"""The settings of the site: ``python -m sphinx -W -b html docs build/site``. site_extension.py does the rest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that "docs" is a package

import minunet
from docs.site_extension import linkcode_resolve as linkcode_resolve  # Sphinx looks for it here

project = "minunet"
author = "The minunet authors"
version = release = minunet.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.linkcode", "docs.site_extension"]
exclude_patterns = ["interactive"]

highlight_language = "text"  # what a docstring sets apart is mostly formulas and columns

html_theme = "furo"
html_title = "minunet"
html_static_path = ["static"]
html_css_files = ["minunet.css"]
html_math_renderer = "latex2mathml"
html_copy_source = False
html_use_index = False
html_show_copyright = False
html_show_sphinx = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # the anchors that GitHub gives to headings
myst_dmath_allow_labels = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
toc_object_entries = False
