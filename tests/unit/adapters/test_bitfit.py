from __future__ import annotations

from typing import Any

import pytest
import torch

from polytask.adapters.bitfit import BitFit
from polytask.errors import ConfigError
from tests.helpers import SWIN, build, image, model_spec

RESNET: dict[str, Any] = {"name": "resnet10t", "options": {"channels": [8, 8, 8, 8], "stem_width": 8}}


@pytest.mark.parametrize("backbone", [SWIN, RESNET])
def test_biases_move_and_nothing_else(backbone: dict[str, Any]) -> None:
    model = build(model_spec(backbone, adapter="bitfit")).train()
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    optimizer = torch.optim.SGD([p for _, p in model.partition().trainable()], lr=1.0)
    sum(x.square().mean() for x in model(image()).logits.values()).backward()
    optimizer.step()
    moved = {n for n, p in model.backbone.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(name.endswith("bias") for name in moved)
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if name.endswith("bias")}


def test_a_network_without_biases() -> None:
    with pytest.raises(ConfigError, match="the backbone has no biases"):
        BitFit().check([], ["net.weight", "relative_position_bias_table"])
