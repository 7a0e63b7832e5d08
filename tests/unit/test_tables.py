"""What people see of a look at a dataset."""

from __future__ import annotations

from collections import Counter

import pytest

from polytask.data.verification import VerifyReport
from polytask.tables import print_verification
from polytask.tasks import Attributes, Classification, Depth, Edge, Embedding, Segmentation


def test_classes_are_named_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = {
        "semseg": Segmentation(classes=("floor", "wall")),
        "edge": Edge(),
        "scene": Classification(classes=("kitchen", "bath")),
        "facts": Attributes(names=("sunny", "tidy")),
        "person": Embedding(),
        "nobody": Embedding(),
        "depth": Depth(),
        "gone": Depth(),
    }
    histograms = {
        "semseg": {0: 600, 1: 300, 255: 100},
        "edge": {0: 3, 1: 1},
        "scene": {-1: 2, 1: 1500},
        "facts": {-1: 3, 0: 0, 1: 2},
        "person": {-1: 4, 7: 2, 9: 5},
        "nobody": {-1: 4},
    }
    ranges = {
        "depth": {"min": 0.5, "max": 9.87654, "valid": 3, "invalid": 1},
        "gone": {"min": float("inf"), "max": float("-inf"), "valid": 0, "invalid": 4},
    }
    counts = {name: Counter(seen) for name, seen in histograms.items()}
    print_verification(VerifyReport({"train": 12000}, [], counts, ranges), tasks)
    text = capsys.readouterr().err
    for words in (
        "12,000", "floor: 60 %, wall: 30 %, unlabeled: 10 %", "0: 75 %, 1: 25 %", "unknown: 2, bath: 1,500",
        "unknown: 3, sunny: 0, tidy: 2", "2 identities, 2 to 5 images of each, 4 unknown",
        "0 identities, 4 unknown", "0.5 to 9.877, 75 % valid", "none valid",
    ):  # fmt: skip
        assert words in text
