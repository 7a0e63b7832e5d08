"""Settings of the documentation: ``make docs``."""

from __future__ import annotations

import polytask
from polytask.config import Spec

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


def _is_spec(item: object) -> bool:
    return isinstance(item, type) and issubclass(item, Spec)


def _no_signature(app, what, name, item, options, signature, returns):  # noqa: ANN001, ANN202, ARG001
    """Specs take keywords, which their list of settings explains."""
    return ("", returns) if _is_spec(item) else None


def _settings(app, what, name, item, options, lines) -> None:  # noqa: ANN001, ARG001
    """Append the settings of a spec with defaults and descriptions."""
    if not _is_spec(item):
        return
    lines.append("")
    for key, field in item.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = type(default).__name__ if isinstance(default, Spec) else repr(default)
        note = "required" if field.is_required() else f"default ``{shown}``"
        lines.append(f":param {key}: {field.description + '; ' if field.description else ''}{note}")


def setup(app) -> None:  # noqa: ANN001
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _bars)
    app.connect("autodoc-process-docstring", _settings)
    app.connect("autodoc-process-signature", _no_signature)
