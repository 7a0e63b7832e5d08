"""Settings of the documentation: ``make docs``."""

from __future__ import annotations

import polytask

project = "polytask"
author = "polytask contributors"
copyright = "2026, polytask contributors"
version = release = polytask.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = False

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"polytask {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_theme_options = {"navigation_with_keys": True}


OTHERS = ("pydantic", "torch", "torchvision")
SPEC_NOISE = {"model_config", "model_post_init", "model_fields", "model_computed_fields"}


def _skip(app, what, name, item, skip, options) -> bool:  # noqa: ANN001, ARG001
    """Leave out what other libraries put on every spec, or what a module passes on from them."""
    home = str(getattr(item, "__module__", "")).partition(".")[0]
    return skip or name in SPEC_NOISE or (what == "module" and home in OTHERS)


def _bars(app, what, name, item, options, lines) -> None:  # noqa: ANN001, ARG001
    """Bars in formulas mean absolute values; Sphinx would take them for substitutions."""
    lines[:] = [line if "``" in line else line.replace("|", r"\|") for line in lines]


def setup(app) -> None:  # noqa: ANN001
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _bars)
