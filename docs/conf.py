"""Sphinx: ``make docs`` builds this folder, warnings are errors."""

from importlib import metadata

project = "tttc"
release = metadata.version("tttc")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tttc {release}"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True
