"""How task features are fused. Importing registers the necks."""

from polytask.necks import fuse as _fuse  # noqa: F401
