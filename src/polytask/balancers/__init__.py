"""How losses become gradients. Importing registers the balancers."""

from polytask.balancers import bridge as _bridge  # noqa: F401
from polytask.balancers import gramian as _gramian  # noqa: F401
from polytask.balancers import recon as _recon  # noqa: F401
from polytask.balancers import rowwise as _rowwise  # noqa: F401
from polytask.balancers import scalar as _scalar  # noqa: F401
from polytask.balancers.face import Outcome, balancer
from polytask.balancers.weighting import weights

__all__ = ["Outcome", "balancer", "weights"]
