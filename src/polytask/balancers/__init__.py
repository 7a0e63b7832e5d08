"""How losses become gradients. Importing registers the balancers."""

from polytask.balancers import scalar as _scalar  # noqa: F401
