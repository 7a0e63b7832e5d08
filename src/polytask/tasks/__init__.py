"""What is predicted: importing the package registers every kind of task."""

from __future__ import annotations

from polytask.tasks.attributes import Attributes
from polytask.tasks.base import Task, TaskSet
from polytask.tasks.classification import Classification
from polytask.tasks.depth import Depth
from polytask.tasks.edge import Edge
from polytask.tasks.embedding import Embedding
from polytask.tasks.normals import Normals
from polytask.tasks.reconstruction import Reconstruction
from polytask.tasks.saliency import Saliency
from polytask.tasks.segmentation import Segmentation

__all__ = [
    "Attributes",
    "Classification",
    "Depth",
    "Edge",
    "Embedding",
    "Normals",
    "Reconstruction",
    "Saliency",
    "Segmentation",
    "Task",
    "TaskSet",
]
