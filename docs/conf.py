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

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"polytask {release}"
html_static_path = ["_static"]
html_theme_options = {"navigation_with_keys": True}


def _skip(app, what, name, item, skip, options) -> bool:  # noqa: ANN001, ARG001
    """Leave out what pydantic puts on every spec."""
    return skip or name in {"model_config", "model_post_init", "model_fields", "model_computed_fields"}


def setup(app) -> None:  # noqa: ANN001
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _skip)
