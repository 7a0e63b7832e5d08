"""The adapter slot: how weights become task-specific."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from polytask.backbones.streams import StreamPlan
from polytask.backbones.timm import Backbone
from polytask.config import Spec
from polytask.errors import ConfigError
from polytask.types import Site


class Adapter(Spec):
    """A weight-side technique: says where streams fork and wraps the layers it wants."""

    type: str

    @abstractmethod
    def plan(self, tasks: Sequence[str]) -> StreamPlan:
        """Which tasks own a stream, and where streams fork."""

    def sites(self, backbone: Backbone) -> list[Site]:
        """The layers that ``wrap`` is asked about; none if the technique wraps nothing."""
        return list(backbone.sites())

    def check(self, sites: Sequence[Site], parameters: Sequence[str]) -> None:
        """Refuse settings that name no site and no parameter (timm names) of the backbone.

        Raises:
            ConfigError: with the name that matches nothing.
        """

    @abstractmethod
    def wrap(self, site: Site, layer: Any, plan: StreamPlan, backbone: Backbone) -> nn.Module | None:
        """The module to put at a site, or None to leave the layer alone.

        Must not change ``layer`` or the backbone: all sites are checked before any is replaced.
        """

    @abstractmethod
    def trains(self, name: str) -> bool:
        """Whether a parameter of the original network, by its timm name, keeps training."""


class Branch(nn.Module):
    """What an adapter adds to one layer; a shared one (of no task) may sit out a training step.

    Attributes:
        on: whether it takes part in training steps; in eval mode every branch does.
    """

    on: bool = True


class Mergeable(nn.Module):
    """A wrapper that can fold itself into a cheaper module with the same outputs in eval mode."""

    def merged(self) -> nn.Module:
        """The cheaper module."""
        raise NotImplementedError


def adapt(backbone: Backbone, adapter: Adapter, tasks: Sequence[str]) -> None:
    """Freeze what the adapter freezes, wrap its sites and install its streams.

    Raises:
        UnsupportedBackboneError: the backbone lacks the layers or would bypass a wrapper.
        ConfigError: settings that do not fit the tasks or the number of stages, or no site wrapped.
    """
    plan = adapter.plan(tasks)
    sites = adapter.sites(backbone)
    adapter.check(sites, [name for name, _ in backbone.net.named_parameters()])
    wrapped: list[tuple[Site, nn.Module]] = []
    for site in sites:
        layer = backbone.net.get_submodule(site.name)
        if site.role != "layer" and not isinstance(layer, nn.Linear):
            raise ConfigError(
                f"site {site.name} is a {type(layer).__name__}", expected="a plain linear layer"
            )
        module = adapter.wrap(site, layer, plan, backbone)
        if module is not None:
            wrapped.append((site, module))
    if sites and not wrapped:
        raise ConfigError(
            f"adapter {adapter.type!r} matched no layer of the backbone", where="model.adapter.layers"
        )
    backbone.check_fork(plan)
    for name, parameter in backbone.net.named_parameters():
        parameter.requires_grad_(adapter.trains(name.replace(".layer.", ".")))
    for site, module in wrapped:
        backbone.replace(site.name, module)
    aware = frozenset(site.role for site, _ in wrapped if site.is_stage_end)
    backbone.fork(plan, aware)


def merged(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose mergeable wrappers are folded into plain layers."""
    model = copy.deepcopy(model).eval()
    targets = [(name, m) for name, m in model.named_modules() if isinstance(m, Mergeable)]
    for name, module in targets:
        model.set_submodule(name, module.merged())
    return model.requires_grad_(False)


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm of an eval-mode module into the convolution before it in the same chain."""
    for chain in [part for part in module.modules() if isinstance(part, nn.Sequential)]:
        for index in range(len(chain) - 1):
            convolution, norm = chain[index], chain[index + 1]
            transposed = isinstance(convolution, nn.ConvTranspose2d)
            if isinstance(convolution, (nn.Conv2d, nn.ConvTranspose2d)) and isinstance(norm, nn.BatchNorm2d):
                chain[index] = nn.utils.fuse_conv_bn_eval(convolution, norm, transpose=transposed)
                chain[index + 1] = nn.Identity()
