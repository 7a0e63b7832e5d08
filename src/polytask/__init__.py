"""polytask: efficient multi-task learning in vision. Public names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from polytask.adapters.base import Adapter
    from polytask.adapters.mtlora import MTLoRA
    from polytask.backbones.timm import Backbone, BackboneSpec
    from polytask.balancers.base import Balancer, BalancerSpec
    from polytask.comparison import Comparison, compare
    from polytask.config import Slot, Spec, decode, encode, register, registered
    from polytask.cost import CostReport, profile
    from polytask.data.base import DatasetSpec, Record
    from polytask.engine.adapter_sets import AdapterSets, save_adapters
    from polytask.engine.evaluator import Scores, evaluate
    from polytask.engine.launch import train
    from polytask.errors import PolytaskError, PolytaskWarning
    from polytask.heads import HeadSpec
    from polytask.metrics.base import Metric
    from polytask.metrics.delta import delta_m
    from polytask.model import ModelSpec, MultiTaskModel
    from polytask.necks.base import Levels, Neck, NeckSpec
    from polytask.phases import Action, Objective, PhaseSpec
    from polytask.predict import predict_files, predict_image
    from polytask.recipe import Recipe, load_recipe
    from polytask.report import write_report
    from polytask.runs import Run, score
    from polytask.tasks.base import Task, TaskSet
    from polytask.types import Output, Partition, Pyramids

_HOMES = {
    name: f"polytask.{home}"
    for home, names in {
        "adapters.base": ("Adapter",),
        "adapters.mtlora": ("MTLoRA",),
        "backbones.timm": ("Backbone", "BackboneSpec"),
        "balancers.base": ("Balancer", "BalancerSpec"),
        "comparison": ("Comparison", "compare"),
        "config": ("Slot", "Spec", "decode", "encode", "register", "registered"),
        "cost": ("CostReport", "profile"),
        "data.base": ("DatasetSpec", "Record"),
        "engine.adapter_sets": ("AdapterSets", "save_adapters"),
        "engine.evaluator": ("Scores", "evaluate"),
        "engine.launch": ("train",),
        "errors": ("PolytaskError", "PolytaskWarning"),
        "heads": ("HeadSpec",),
        "metrics.base": ("Metric",),
        "metrics.delta": ("delta_m",),
        "model": ("ModelSpec", "MultiTaskModel"),
        "necks.base": ("Levels", "Neck", "NeckSpec"),
        "phases": ("Action", "Objective", "PhaseSpec"),
        "predict": ("predict_files", "predict_image"),
        "recipe": ("Recipe", "load_recipe"),
        "report": ("write_report",),
        "runs": ("Run", "score"),
        "tasks.base": ("Task", "TaskSet"),
        "types": ("Output", "Partition", "Pyramids"),
    }.items()
    for name in names
}

__all__ = [
    "Action",
    "Adapter",
    "AdapterSets",
    "Backbone",
    "BackboneSpec",
    "Balancer",
    "BalancerSpec",
    "Comparison",
    "CostReport",
    "DatasetSpec",
    "HeadSpec",
    "Levels",
    "MTLoRA",
    "Metric",
    "ModelSpec",
    "MultiTaskModel",
    "Neck",
    "NeckSpec",
    "Objective",
    "Output",
    "Partition",
    "PhaseSpec",
    "PolytaskError",
    "PolytaskWarning",
    "Pyramids",
    "Recipe",
    "Record",
    "Run",
    "Scores",
    "Slot",
    "Spec",
    "Task",
    "TaskSet",
    "__version__",
    "compare",
    "decode",
    "delta_m",
    "encode",
    "evaluate",
    "load_recipe",
    "predict_files",
    "predict_image",
    "profile",
    "register",
    "registered",
    "save_adapters",
    "score",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'polytask' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
