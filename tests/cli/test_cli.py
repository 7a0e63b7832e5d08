"""The command line, verb by verb, on the smallest rooms."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polytask.cli import main, parser
from tests.cli.forks import Forks
from tests.data.pascal_mt import write_pascal_mt

Write = Callable[..., Path]
VERBS = (
    "train",
    "eval",
    "predict",
    "profile",
    "compare",
    "convert",
    "delta-m",
    "study",
    "list",
    "show",
    "demo",
    "data",
    "data verify",
    "data preview",
    "data prepare",
    "data export",
    "data pack",
)


class Call:
    """Exit code and outputs of one command line."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: Any) -> tuple[int, str, str]:
        try:
            code = main([*map(str, words)])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = self.capsys.readouterr()
        return code, out, err

    def json(self, *words: Any) -> Any:
        code, out, err = self(*words, "--json")
        assert code == 0, err
        return json.loads(out, parse_constant=pytest.fail)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return Call(capsys)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (45, 71, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# --- help ------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys; from polytask.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'timm', 'pydantic', 'numpy', 'yaml', 'rich', 'PIL'} & set(sys.modules)))"
    )
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - started)
        assert done.stdout.endswith("[]\n")
        assert "exit codes: 0 done" in done.stdout
    assert min(times) < 0.2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_that_parses(call: Call, verb: str) -> None:
    code, out, _ = call(*verb.split(), "--help")
    assert code == 0
    example = " ".join(out.partition("example:")[2].split())
    assert example.startswith(f"polytask {verb}")
    parser().parse_args(example.split()[1:])


def test_usage_errors(call: Call) -> None:
    for words in (
        [],
        ["trian"],
        ["eval"],
        ["list", "nonsense"],
        ["profile", "x", "--repeats", "-1"],
        ["data", "export", "PASCAL_MT", "x", "--count", "0"],
        ["data", "pack", "rooms", "--count", "0"],
        ["data", "preview", "rooms", "--count", "0"],
        ["data"],
    ):
        code, out, err = call(*words)
        assert (code, out) == (2, "")
        assert "usage: polytask" in err
    assert call("--version")[1].startswith("polytask ")


# --- a whole session -------------------------------------------------------------------------------


def test_eval_has_the_published_score_of_edges(
    call: Call, recipe_file: Write, rooms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trained = call.json("train", recipe_file("tasks=[semseg, edge]"), "--output", run)["scores"]
    assert set(trained["edge"]) == {"F_tol"}
    final = call.json("eval", run)["scores"]
    assert set(final["edge"]) == {"F_tol", "odsF", "oisF", "AP", "ods_threshold"}
    assert call.json("eval", run, "--quick")["scores"] == {**final, "edge": {"F_tol": final["edge"]["F_tol"]}}
    assert "odsF" not in call("eval", run, "--set", "tasks.edge.boundary=null")[2]


def test_what_a_recipe_warns_of_is_said_once(
    call: Call, recipe_file: Write, rooms: Path, tmp_path: Path
) -> None:
    words = ("--output", tmp_path / "run", "--set", "balancer={type: pcgrad, mode: last_layer}")
    code, _, err = call("train", recipe_file(), *words)
    assert code == 0
    assert err.count("warning: balancer 'pcgrad' goes by angles") == 1


def test_train_eval_predict_profile(
    call: Call, recipe_file: Write, rooms: Path, tmp_path: Path, photo: Path
) -> None:
    run = tmp_path / "run"
    result = call.json(
        "train", recipe_file(), "--output", run, "--set", "optim.lr=5e-4", "--opts", "seed", "3"
    )
    assert result["run"] == str(run)
    assert set(result["scores"]) == {"semseg", "depth", "scene"}
    code, out, err = call("eval", run)
    assert (code, out) == (0, "")
    assert "mIoU" in err
    scored = call.json(
        "eval", run, "--checkpoint", "best", "--split", "test", "--set", "tasks.semseg.absent=zero"
    )
    assert set(scored["scores"]) == set(result["scores"])
    (predicted,) = call.json("predict", run, photo, "--raw", "--tasks", "depth, scene")
    assert Path(predicted["depth"]) == run / "predictions" / "photo_depth.png"
    with Image.open(predicted["depth"]) as picture:
        assert picture.size == (71, 45)
    figures = call.json("profile", run, "--repeats", "0")
    assert figures["total"] == json.loads((run / "cost.json").read_text())["total"]
    assert figures["latency_ms"] is None
    text = call("show", run)[1]
    assert "seed: 3" in text
    assert call.json("show", run)["optim"]["lr"] == 5e-4


def test_compare(call: Call, recipe_file: Write, rooms: Path, tmp_path: Path) -> None:
    runs = []
    for name, tasks in (("both", "[depth, scene]"), ("one", "[depth]"), ("two", "[scene]")):
        runs.append(tmp_path / name)
        changes = ["--set", f"tasks={tasks}", "--set", f"name={name}", "--set", "phases.0.steps=2"]
        assert call("train", recipe_file(), "--output", runs[-1], *changes)[0] == 0
    code, out, err = call("compare", *runs)
    assert (code, out) == (0, "")
    assert "single task (2 models)" in err
    assert "Δm %" in err
    page = tmp_path / "r.html"
    result = call.json("compare", *runs, "--report", page)
    assert [row["name"] for row in result["rows"]] == ["single task (2 models)", "both"]
    text = page.read_text()
    for piece in ("<table", "<svg", "data:image/png;base64,"):
        assert piece in text
    assert "http://" not in text
    assert "https://" not in text


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("tasks", "segmentation"), ("datasets", "rooms"), ("adapters", "mtlora"), ("necks", "fuse"),
        ("heads", "hrnet"), ("balancers", "uw"), ("pipelines", "plain"), ("actions", "freeze"),
        ("recipes", "smoke/mtlora"),
    ],
)  # fmt: skip
def test_list(call: Call, what: str, name: str) -> None:
    rows = {row["name"]: row["description"] for row in call.json("list", what)}
    assert rows[name]
    assert not any(name.rpartition("/")[2].startswith("_") for name in rows)
    code, out, err = call("list", what)
    assert (code, out) == (0, "")
    assert name in err


def test_list_tells_other_names(call: Call) -> None:
    (row,) = call.json("list", "balancers", "gradnorm")
    assert row["name"] == "gn" and row["description"].endswith("(also gradnorm)")


def test_list_backbones(call: Call) -> None:
    rows = call.json("list", "backbones", "swin_tiny*")
    assert {"swin_tiny_patch4_window7_224"} <= {row["name"] for row in rows}
    assert all(row["name"].startswith("swin_tiny") for row in rows)


def test_shown_recipe_is_the_recipe(call: Call, tmp_path: Path) -> None:
    text = call("show", "smoke/mtlora", "--set", "optim.lr=1e-3")[1]
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert call("show", again)[1] == text
    assert call("show", "smoke/mtlora", "--opts", "optim.lr", "1e-3")[1] == text
    assert call("show", "--cfg", "recipes/smoke/mtlora.yaml", "--opts", "optim.lr", "1e-3")[1] == text
    schema = call.json("show", "--schema")
    assert "base" in schema["properties"]


def test_data_verbs(call: Call, rooms: Path, tmp_path: Path) -> None:
    code, _, err = call("data", "verify", "rooms", "--set", "preset=nano", "--split", "val")
    assert code == 0
    assert "no problems" in err
    found = call.json("data", "verify", "rooms", "--set", "preset=nano", "--split", "val")
    assert found["counts"] == {"val": 32}
    assert found["problems"] == []
    sheet = tmp_path / "new" / "sheet.png"
    assert call.json(
        "data", "preview", "rooms", "--set", "preset=nano", "--output", sheet, "--count", "2"
    ) == {"preview": str(sheet)}
    with Image.open(sheet) as picture:
        assert picture.size[1] > 2 * 32


def test_data_export_and_pack(call: Call, tmp_path: Path) -> None:
    nyud, packed = tmp_path / "nyud", tmp_path / "packed"
    made = call.json("data", "export", "NYUD_MT", nyud, "--set", "preset=nano", "--count", "3")
    assert made == {"folder": str(nyud), "counts": {"train": 3, "val": 3}}
    made = call.json("data", "pack", "nyud", nyud, packed, "--split", "train", "--count", "2")
    assert made["counts"] == {"train": 3}
    assert {p.name for p in packed.iterdir()} == {"index.json", "train-000000.tar", "train-000001.tar"}
    found = [
        call.json("data", "verify", *words) for words in (("nyud", nyud), ("packed", f"file://{packed}"))
    ]
    assert found[0]["counts"] == {"train": 3, "val": 3}
    assert found[1]["counts"] == {"train": 3}
    assert found[0]["problems"] == found[1]["problems"] == []
    sheet = tmp_path / "sheet.png"
    assert call("data", "preview", "packed", packed, "--output", sheet)[0] == 0
    for words, code, message in (
        (("export", "NYUD", tmp_path / "x"), 2, "did you mean 'NYUDv2'"),
        (("export", "CelebA", nyud), 2, "nothing is overwritten"),
        (("pack", "packed", packed, packed), 2, "nothing is overwritten"),
        (("verify", "packed", tmp_path / "nowhere"), 3, "nowhere/index.json: no such file"),
        (("verify", "packed", "memory://nowhere"), 3, "memory://nowhere/index.json: no such file"),
    ):
        result = call("data", *words)
        assert result[:2] == (code, "")
        assert message in result[2]
        assert "Traceback" not in result[2]


OWN = """
name: own
data:
  type: folder
  root: photos
  image_size: [24, 36]
  splits: {train: "*[0-2].png", val: "*3.png"}
  targets:
    floor: {task: {type: segmentation, classes: [other, floor]}, file: "{stem}.tif", ids: {0: 0, 7: 1}}
    far: {task: depth, file: "{stem}.npy"}
tasks: [floor]
model: {backbone: {name: resnet18}}
phases: [{epochs: 1}]
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A recipe for photos that have masks and no depth."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (36, 24)).save(tmp_path / "photos" / f"p{i}.png")
        Image.new("L", (36, 24), 7 * (i % 2)).save(tmp_path / "photos" / f"p{i}.tif")
    (tmp_path / "own.yaml").write_text(OWN)
    return tmp_path / "own.yaml"


def test_data_of_a_recipe(call: Call, own: Path, tmp_path: Path) -> None:
    photos, elsewhere = tmp_path / "photos", ("--set", f"data.root={tmp_path / 'photos'}")
    found = call.json("data", "verify", own, photos)
    assert found["counts"] == {"train": 3, "val": 1}
    assert found["histograms"] == {"floor": {"0": 2 * 24 * 36, "1": 2 * 24 * 36}}
    assert call.json("data", "verify", own, *elsewhere) == found
    assert "floor: 50 %" in call("data", "verify", own, photos)[2]
    (photos / "p1.tif").write_bytes(b"no")
    (photos / "p2.tif").unlink()
    code, _, err = call("data", "verify", own, *elsewhere)
    assert (code, err.count("problem: ")) == (3, 2)
    assert f"problem: {photos / 'p2.tif'}: no such file" in err
    code, _, err = call("data", "verify", own, *elsewhere, "--set", "tasks=[floor, far]")
    assert (code, err.count(".npy: no such file")) == (3, 4)
    assert "unknown task 'flor'; did you mean 'floor'" in call("data", "verify", own, "--tasks", "flor")[2]
    words = ("data", "preview", own, photos, "--split", "val", "--output", tmp_path / "sheet.png")
    assert call(*words)[0] == 0
    code, _, err = call("data", "pack", own, photos, tmp_path / "packed")
    assert code == 3
    assert "1 of 3 images have no label 'floor'" in err
    made = call.json("data", "pack", own, photos, tmp_path / "packed", "--split", "val")
    assert made["counts"] == {"val": 1}
    assert call.json("data", "verify", "packed", tmp_path / "packed")["problems"] == []
    kept = ("--set", f"data.label_cache={tmp_path / 'kept'}", "--workers", "0", "--split", "val")
    assert call.json("data", "prepare", own, photos, *kept)["labels"] == ["floor"]


def test_data_of_shipped_recipes_and_of_some_tasks(call: Call, rooms: Path) -> None:
    few = ("--set", "data.preset=nano", "--set", "data.image_size=[32,48]", "--split", "val")
    found = call.json("data", "verify", "rooms/mtlora", *few)
    assert found["counts"] == {"val": 32}
    assert found["problems"] == []
    words = ("data", "verify", "rooms", "--set", "preset=nano", "--split", "val")
    found = call.json(*words, "--tasks", "depth, scene")
    assert [*found["histograms"], *found["ranges"]] == ["scene", "depth"]
    assert "did you mean 'depth'" in call(*words, "--tasks", "dpeth")[2]
    for name, words in (("nowhere.yaml", "no such recipe"), ("rooms/mtlroa", "did you mean 'rooms/mtlora'")):
        code, _, err = call("data", "verify", name)
        assert (code, words in err) == (2, True)


def test_data_prepare(call: Call, tmp_path: Path) -> None:
    photos = write_pascal_mt(tmp_path / "PASCAL_MT")
    words = ("data", "prepare", "pascal_context", tmp_path / "PASCAL_MT", "--workers", "0")
    kept = ("--set", f"label_cache={tmp_path / 'kept'}")
    found = call.json(*words, *kept)
    assert found["counts"] == {"train": 2, "val": 3}
    assert len([path for path in Path(found["folder"]).rglob("*") if path.is_file()]) == 5 * len(photos)
    (tmp_path / "PASCAL_MT" / "human_parts" / "2008_000002.mat").write_bytes(b"no")
    code, _, err = call(*words, *kept, "--split", "val")
    assert code == 3
    assert "problem: " in err
    assert "2008_000002.mat: file cannot be read" in err
    assert call(*words, "--set", "label_cache=never")[0] == 2


# --- exit codes ------------------------------------------------------------------------------------


def test_configuration_errors(call: Call, recipe_file: Write, tmp_path: Path, trained: Path) -> None:
    file = recipe_file()
    cases = {
        ("train", file, "--set", "optim.lr=fast", "--set", "model.adapter.rnak=1"): "did you mean 'rank'",
        ("train",): "name one recipe; see: polytask list recipes",
        ("show", file, "--cfg", file): "name one recipe",
        ("train", "smoke/mtlroa"): "did you mean 'smoke/mtlora'",
        ("show", file, "--opts", "seed"): "--opts takes pairs",
        ("show", file, "--set", "seed"): "must look like a.b=value",
        ("train", file, "--output", trained): "holds a run already",
        ("eval", trained, "--split", "tset"): "did you mean 'test'",
        ("data", "verify", "romos"): "did you mean 'rooms'",
        ("data", "preview", "rooms", "--set", "preset=nano", "--output", tmp_path / "x.abc"): "use .png",
        ("data", "verify", "rooms", "folder"): "root: unknown key",
        ("predict", trained, tmp_path / "x.png", "--tasks", "dpeth"): "did you mean 'depth'",
    }
    for words, message in cases.items():
        code, out, err = call(*words)
        assert (code, out) == (2, ""), words
        assert message in err, words
        assert "Traceback" not in err
        assert all(line.startswith("error: ") for line in err.splitlines())


def test_data_errors(call: Call, recipe_file: Write, tmp_path: Path, trained: Path, photo: Path) -> None:
    nowhere = tmp_path / "nowhere"
    broken = tmp_path / "broken.png"
    broken.write_text("x")
    cases = {
        ("data", "verify", "pascal_context", nowhere): "nowhere",
        ("predict", trained, broken, photo, "--output", tmp_path / "out"): "broken.png: image cannot be read",
        (
            "predict",
            trained,
            photo,
            tmp_path / "gone.png",
            "--output",
            tmp_path / "out",
        ): "gone.png: no such image",
    }
    for words, message in cases.items():
        code, out, err = call(*words)
        assert (code, out) == (3, ""), words
        assert message in err
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    data = f"data={{type: pascal_context, root: {nowhere}, image_size: 32}}"
    code, _, err = call(
        "train", recipe_file(), "--output", tmp_path / "run", "--set", data, "--set", "tasks=[semseg]"
    )
    assert code == 3
    assert not (tmp_path / "run").exists()


def test_problems_of_the_data_are_listed(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTASK_CACHE", str(tmp_path / "cache"))
    words = ("data", "verify", "rooms", "--set", "preset=nano", "--split", "val")
    assert call(*words)[0] == 0
    (file,) = (tmp_path / "cache").rglob("image.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err = call(*words, "--json")
    assert code == 3
    assert len(json.loads(out)["problems"]) == 1
    assert "problem: " in err
    assert "1 problem\n" in err


def test_checkpoint_errors(call: Call, tmp_path: Path, trained: Path, photo: Path) -> None:
    for words in (("eval", tmp_path), ("predict", tmp_path, photo), ("compare", tmp_path, trained)):
        code, out, err = call(*words)
        assert (code, out) == (4, "")
        assert "this is no run folder" in err


def test_divergence(forks: Forks, recipe_file: Write, tmp_path: Path) -> None:
    file = recipe_file(
        "run.checkpoint_every=1", "data.batch_size=4", "phases.0.epochs=1", "phases.0.steps=null"
    )
    fork = forks.run("train", file, "--output", tmp_path / "run", "--json", patch="bad_image")
    assert fork.wait() == 5
    assert fork.out == ""
    assert "0000011" in fork.err
    assert "phase 'train', step" in fork.err
    assert forks.run("eval", tmp_path / "run", "--json").wait() == 0


def test_batches_without_labels_train_nothing(forks: Forks, recipe_file: Write, tmp_path: Path) -> None:
    fork = forks.run("train", recipe_file(), "--output", tmp_path / "run", patch="no_labels")
    assert fork.wait() == 0, fork.err
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert not any(key.startswith("loss/") for key in line)


def test_bug_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polytask.catalog.catalog", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["list", "tasks"])


def test_interrupt(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polytask.catalog.catalog", stop)
    code, _, err = call("list", "tasks")
    assert (code, err) == (130, "interrupted\n")


@pytest.mark.slow
def test_reader_that_goes_away() -> None:
    command = f"{sys.executable} -m polytask show --schema | head -c 10"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr


# --- delta-m -----------------------------------------------------------------------------------------


def test_delta_m_of_a_run(call: Call, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "history.csv"
    result = call.json("delta-m", trained, "--depth-st", "2", "--baseline", "scene=50", "--csv-out", out)
    assert list(result["tasks"]) == ["depth", "scene"]
    assert result["best"] == result["evaluations"][-1]
    assert out.read_text().startswith("epoch,Depth_rmse,scene_accuracy,Delta_m_percent\n1,")
    code, stdout, err = call("delta-m", "--log-file", trained, "--depth-st", "2", "--tasks", "depth")
    assert (code, stdout) == (0, "")
    assert "depth rmse ↓" in err
    assert "best" in err


def test_delta_m_refused_writes_nothing(call: Call, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "history.csv"
    assert call("delta-m", trained, "--csv", out)[0] == 2
    code, _, err = call("delta-m", trained, "--baseline", "normals=17", "--csv", out)
    assert (code, len(err.splitlines())) == (3, 1)
    assert "never reports a score of 'normals'" in err
    assert not out.exists()
