"""How losses become gradients. Importing registers the balancers."""

from polytask.balancers import gramian as _gramian  # noqa: F401
from polytask.balancers import rowwise as _rowwise  # noqa: F401
from polytask.balancers import scalar as _scalar  # noqa: F401
from polytask.balancers import scalarizers as _scalarizers  # noqa: F401
