"""Importing registers the datasets and their pipelines (not in ``__init__``: tasks import ``data.maps``)."""

from polytask.data import celeba as _celeba  # noqa: F401
from polytask.data import cityscapes as _cityscapes  # noqa: F401
from polytask.data import composed as _composed  # noqa: F401
from polytask.data import crops as _crops  # noqa: F401
from polytask.data import folder as _folder  # noqa: F401
from polytask.data import mtan as _mtan  # noqa: F401
from polytask.data import nyud as _nyud  # noqa: F401
from polytask.data import packed as _packed  # noqa: F401
from polytask.data import pascal_context as _pascal_context  # noqa: F401
from polytask.data import pets as _pets  # noqa: F401
from polytask.data import rooms as _rooms  # noqa: F401
