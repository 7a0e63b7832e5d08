"""Losses of the tasks: pure functions that return one process's share of the global mean.

All counts go through ``total`` in a single exchange, so that with several processes each share is the local
sum over the *global* count: shares add up to the loss that one process would compute for the whole batch,
and their gradients are to be summed, not averaged. Every process makes the same exchange even without valid
labels of its own; all of them return None when the global count is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.metrics.base import IGNORE, Total
from polytask.metrics.normals import unit_vectors


def cross_entropy(logits: Tensor, target: Tensor, total: Total, *, ignore: int = IGNORE) -> Tensor | None:
    """Mean softmax cross entropy over labels other than ``ignore``.

    Args:
        logits: ``[B, C, H, W]`` or ``[B, C]``.
        target: class ids, ``[B, 1, H, W]`` or ``[B]``, long.
        total: sum over all processes.
        ignore: the id that marks unknown labels (255 in label maps, -1 for image-level classes).
    """
    labels = target.reshape(logits.shape[0], *logits.shape[2:])
    count = total((labels != ignore).sum())
    if count == 0:
        return None
    return F.cross_entropy(_wide(logits), labels, ignore_index=ignore, reduction="sum") / count


def balanced_bce(
    logits: Tensor, target: Tensor, total: Total, *, positive_weight: float | None = None
) -> Tensor | None:
    """Class-balanced binary cross entropy: positives weigh w, negatives 1 - w, over the valid pixels.

    Without a fixed w it is the fraction of negatives in the global batch (HED, Xie & Tu, ICCV 2015, eq. 2),
    which makes a batch without positives weigh nothing: the loss is 0, not NaN.

    Args:
        logits: ``[B, 1, H, W]``.
        target: 0, 1 or 255 = ignore, ``[B, 1, H, W]``.
        total: sum over all processes.
        positive_weight: w in (0, 1), or None to take it from the batch.
    """
    valid, positive = target != IGNORE, target == 1
    pixels, positives = total(torch.stack([valid.sum(), positive.sum()])).unbind()
    if pixels == 0:
        return None
    logits = _wide(logits)
    w = 1 - positives / pixels if positive_weight is None else logits.new_tensor(positive_weight)
    weights = torch.where(positive, w, 1 - w).to(logits) * valid
    share = F.binary_cross_entropy_with_logits(logits, positive.to(logits), weights, reduction="sum")
    return share / pixels


def normals_l1(logits: Tensor, target: Tensor, total: Total) -> Tensor | None:
    """L1 distance of the unit-normalized prediction, averaged over valid *elements* (three per pixel).

    Args:
        logits: ``[B, 3, H, W]``, any length.
        target: unit vectors, (0, 0, 0) = invalid, ``[B, 3, H, W]``.
        total: sum over all processes.
    """
    valid = (target != 0).any(1, keepdim=True)
    elements = total(valid.sum()) * target.shape[1]
    if elements == 0:
        return None
    return ((unit_vectors(_wide(logits)) - target).abs() * valid).sum() / elements


def normals_cosine(logits: Tensor, target: Tensor, total: Total) -> Tensor | None:
    """One minus the cosine of the angle, averaged over valid pixels (Liu et al., MTAN, CVPR 2019).

    Args:
        logits: ``[B, 3, H, W]``, any length.
        target: unit vectors, (0, 0, 0) = invalid, ``[B, 3, H, W]``.
        total: sum over all processes.
    """
    valid = (target != 0).any(1)
    pixels = total(valid.sum())
    if pixels == 0:
        return None
    cosines = (unit_vectors(_wide(logits)) * target).sum(1)
    return (valid.to(cosines) - cosines).sum() / pixels


def masked_l1(prediction: Tensor, target: Tensor, total: Total) -> Tensor | None:
    """Mean absolute error over pixels with a positive target (0 = invalid).

    Args:
        prediction: ``[B, 1, H, W]``, in the unit of the target.
        target: ``[B, 1, H, W]``.
        total: sum over all processes.
    """
    valid = target > 0
    pixels = total(valid.sum())
    if pixels == 0:
        return None
    return ((_wide(prediction) - target).abs() * valid).sum() / pixels


def attribute_bce(logits: Tensor, target: Tensor, total: Total) -> Tensor | None:
    """Mean binary cross entropy over known attributes.

    Args:
        logits: ``[B, K]``.
        target: 0, 1 or -1 = unknown, ``[B, K]``.
        total: sum over all processes.
    """
    known = target >= 0
    count = total(known.sum())
    if count == 0:
        return None
    wide = _wide(logits)
    return (
        F.binary_cross_entropy_with_logits(
            wide, target.clamp(min=0).to(wide), known.to(wide), reduction="sum"
        )
        / count
    )


def supervised_contrastive(
    vectors: Tensor, target: Tensor, total: Total, *, temperature: float
) -> Tensor | None:
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020, eq. 2), mean over anchors.

    An anchor is an image with another one of its identity in the batch *of its process*, and is compared with
    that batch only. Shares add up to the mean over the anchors of all processes; unlike other losses, that is
    not what one process would compute for the whole batch.

    Args:
        vectors: ``[B, D]``, any length; compared by their cosines, over ``temperature``.
        target: identities, -1 = unknown (takes no part), ``[B]``.
        total: sum over all processes.
    """
    known = target >= 0
    units, ids = unit_vectors(_wide(vectors[known])), target[known]
    itself = torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    same = (ids[:, None] == ids) & ~itself
    anchors = total(same.any(1).sum())
    if anchors == 0:
        return None
    cosines = (units @ units.T / temperature).masked_fill(itself, -torch.inf)
    likely = cosines.log_softmax(1).masked_fill(~same, 0.0).sum(1) / same.sum(1).clamp(min=1)
    return -likely.sum() / anchors


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: sums over millions of pixels do not fit the precision of bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
