"""What sees. Importing registers the shipped backbone with timm."""

from polytask.backbones import shipped as _shipped  # noqa: F401
