"""Importing registers the datasets and their pipelines (not in ``__init__``: tasks import ``data.maps``)."""

from polytask.data import pascal_context as _pascal_context  # noqa: F401
from polytask.data import rooms as _rooms  # noqa: F401
