"""How task features are fused. Importing registers the necks."""

from polytask.necks import fuse as _fuse  # noqa: F401
from polytask.necks import level as _level  # noqa: F401
from polytask.necks import mlore as _mlore  # noqa: F401
