from __future__ import annotations

import numpy as np
import pytest
import torch

from polytask.errors import DataError
from polytask.tasks import Classification

TASK = Classification(classes=("indoor", "outdoor"))


def test_captions() -> None:
    assert not TASK.dense
    assert [TASK.caption(np.array(i)) for i in (0, 1, -1)] == ["indoor", "outdoor", "unknown"]


def test_encode() -> None:
    assert TASK.encode(torch.tensor(1, dtype=torch.uint8)).dtype == torch.long
    assert int(TASK.encode(torch.tensor(-1))) == -1
    with pytest.raises(DataError, match="expected 0 to 1, or -1 where unknown, got 2"):
        TASK.encode(torch.tensor(2))
