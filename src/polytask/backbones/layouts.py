"""How the tokens that leave a block become the network's feature map of that stage.

Networks keep tokens as ``[B, C, H, W]``, ``[B, H, W, C]``, ``[B, N, C]`` behind prefix tokens, or in an order
of their own. Shapes alone do not tell (64 channels on 64 x 64), so the two are compared once, by value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polytask.errors import UnsupportedBackboneError


def to_map(layout: str, tokens: Tensor, like: Tensor, net: nn.Module) -> Tensor:
    """Tokens in a layout -> ``[B, C, H, W]`` with the C, H, W of ``like``."""
    _, channels, height, width = like.shape
    name, _, block = layout.partition(":")
    if name == "grid":
        tokens = tokens[:, tokens.shape[1] - height * width :].reshape(len(tokens), height, width, channels)
    elif name == "reroll":  # Hiera orders tokens by the unit that masks them
        tokens = net.reroll(tokens, int(block))  # type: ignore[operator]
    return tokens if name == "first" else tokens.permute(0, 3, 1, 2)


def read_layout(tokens: Tensor, like: Tensor, net: nn.Module, module: str) -> str:
    """The layout in which a block's output is the network's own map.

    Args:
        tokens: output of the block.
        like: the network's map ``[B, C, H, W]`` for the stage that ends there.
        net: the network.
        module: path of the stage's last module.

    Raises:
        UnsupportedBackboneError: in no layout, the network computes on between block and map.
    """
    candidates = ["grid"] if tokens.ndim == 3 else ["first", "last"]
    if tokens.ndim == 3 and callable(getattr(net, "reroll", None)):
        candidates.insert(0, f"reroll:{module.rpartition('.')[2]}")
    for layout in candidates:
        if _is_map(layout, tokens, like, net):
            return layout
    raise UnsupportedBackboneError(
        "the feature map of a stage is not what its last block puts out, so tasks cannot have their own",
        where=f"backbone {type(net).__name__}, {module}", got=f"{tuple(tokens.shape)} -> {tuple(like.shape)}",
        hint="use e.g. a Swin, ViT or DeiT3, or train without task streams",
    )  # fmt: skip


@torch.no_grad()
def _is_map(layout: str, tokens: Tensor, like: Tensor, net: nn.Module) -> bool:
    try:
        made = to_map(layout, tokens, like, net)
    except RuntimeError:  # the sizes do not even fit
        return False
    return made.shape == like.shape and torch.equal(made.nan_to_num(), like.nan_to_num())


def normed(level: Tensor, net: nn.Module) -> Tensor:
    """A map ``[B, C, H, W]`` after the network's final norm."""
    tokens: Tensor = net.norm(level.permute(0, 2, 3, 1))  # type: ignore[operator]
    return tokens.permute(0, 3, 1, 2)
