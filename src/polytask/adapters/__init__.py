"""How weights become task-specific. Importing registers the adapters."""

from polytask.adapters import bitfit as _bitfit  # noqa: F401
from polytask.adapters import lora as _lora  # noqa: F401
from polytask.adapters import mtlora as _mtlora  # noqa: F401
from polytask.adapters import recon as _recon  # noqa: F401
