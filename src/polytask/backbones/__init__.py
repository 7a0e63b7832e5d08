"""What sees. Importing registers the networks of this package with timm."""

from polytask.backbones import decoders as _decoders  # noqa: F401
from polytask.backbones import shipped as _shipped  # noqa: F401
