"""A whole run as one object: decoding, the checks across parts, and the way back."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.balancers.base import Balancer, BalancerSpec
from polytask.balancers.scalar import FixedSpec
from polytask.config import decode, encode, register, registered
from polytask.errors import ConfigError, ConfigErrors
from polytask.files import dump_yaml, load_yaml, override, parse_yaml
from polytask.heads import PooledHead
from polytask.recipe import Recipe, find_recipe, load_recipe, recipe_schema, shipped_recipes
from polytask.tasks import TaskSet
from tests.conftest import SMALL, Make


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(dump_yaml(SMALL))
    return path


def problems(file: Path, *changes: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load_recipe(file, changes)
    assert caught.value.exit_code == 2
    assert all(problem.startswith(f"{file}: ") for problem in caught.value.problems)
    return [problem.removeprefix(f"{file}: ") for problem in caught.value.problems]


OWN = "data={type: folder, root: x, image_size: 8, splits: {train: a, val: b}, targets: {far"
SENTENCES = {
    "model.adapter.rnak=3": "model.adapter.rnak: unknown key; did you mean 'rank'? (mtlora takes type,",
    "optim.lr=fast": "optim.lr: input should be a valid number, unable to parse string as a number",
    "optim.lr=0": "optim.lr: input should be greater than 0, got 0",
    "optim.lr=.nan": "optim.lr: input should be a finite number",
    "optim.lr=yes": "optim.lr: a number is needed, got True",
    "optim.schedule=no": "optim.schedule: input should be 'cosine', 'poly' or 'constant', got False; YAML",
    "run.precision=fp16": "run.precision: input should be 'fp32' or 'bf16', got 'fp16'; did you mean 'bf16'?",
    "balancer=fxied": "balancer: unknown name 'fxied'; did you mean 'fixed'?",
    "balancer.weights.dpeth=2": "balancer.weights: 'dpeth' is not a task of this run; did you mean 'depth'?",
    "balancer.weights.depth=-1": "balancer.weights: a loss weight is at least 0",
    "tasks=[]": "tasks: at least one task is needed; rooms has semseg,",
    "tasks=[semsge]": "tasks.semsge: dataset 'rooms' has no such task; did you mean 'semseg'?",
    "tasks=[depth, depth]": "tasks: named twice: depth",
    "tasks=[{depth: {}}]": "tasks: a list of names is needed, or a mapping of names to",
    "tasks={no: {}}": "tasks: a list of names is needed, or a mapping of names to",
    "tasks=7": "tasks: input should be a mapping, got 7",
    "tasks.depth.wieght=2": "tasks.depth.wieght: unknown key; did you mean 'weight'?",
    "tasks.depth.type=dept": "tasks.depth.type: 'dept' is not a kind of task; did you mean 'depth'?",
    "tasks.depth.type=[depth]": "tasks.depth.type:",
    "tasks.depth.weight=-1": "tasks.depth.weight: input should be greater than or equal to 0",
    "phases=[]": "phases: list should have at least 1 item, not 0",
    "phases.0.steps=null": "phases.0: phase 'train' needs either `epochs` or `steps`",
    "phases.0.epochs=1": "phases.0: phase 'train' needs either `epochs` or `steps`",
    "phases.0.epohcs=1": "phases.0.epohcs: unknown key; did you mean 'epochs'?",
    "phases.0.tasks=[]": "phases.0.tasks: at least one task is needed",
    "phases.0.tasks=[normals]": "phases.0.tasks: 'normals' is not a task of this run;",
    "phases.0.objective.losses.sene=1": "phases.0.objective.losses.sene: 'sene' is not a task of this phase;",
    "phases.0={steps: 1, tasks: [depth], objective: {losses: {scene: 1}}}": "phases.0.objective.losses",
    "phases.0.objective.losses={}": "phases.0.objective: selects neither a loss nor a penalty",
    "phases.0.objective.penalties.budget=1": "phases.0.objective.penalties.budget: no part",
    "phases.0.actions=[{type: frezee, patterns: [a]}]": "phases.0.actions.0: unknown name 'frezee'; did you",
    "phases.0.actions=[freeze]": "phases.0.actions.0.patterns: required key is missing",
    "model.head=pooled": "model.head: head 'pooled' does not fit task 'semseg'",
    "model.heads.scene=hrnet": "model.heads.scene: head 'hrnet' does not fit task 'scene'",
    "model.heads.secne=pooled": "model.heads.secne: 'secne' is not a task of this run; did you mean 'scene'?",
    "model.freeze_backbone=true": "model.freeze_backbone: an adapter decides itself what trains",
    "model.adapter.task_rank={depth: 2}": "model.adapter.task_rank: no value for task 'semseg'",
    "model.backbone=null": "model.backbone: input should be",
    "data.image_size=[1, 2, 3]": "data.image_size: list should have at most 2 items",
    "data.batch_size=0": "data.batch_size: input should be greater than or equal to 1",
    "run.eval_split=vla": "run.eval_split: 'vla' is not a split of rooms; did you mean 'val'?",
    "run.trackers=[wnadb]": "run.trackers.0: input should be 'tensorboard', 'wandb', 'trackio' or 'mlflow'",
    "data.pipeline.type=astm": "data.pipeline: unknown name 'astm'; did you mean 'astmt'? (known: plain, ast",
    f"{OWN}: {{task: dept}}}}}}": "data.targets.far.task: unknown name 'dept'; did you mean 'depth'?",
    f"{OWN}: {{task: {{type: depth, max: 1}}, file: a}}}}}}": "data.targets.far.task.max: unknown key",
    f"{OWN}: {{task: depth, fiel: a}}}}}}": "data.targets.far.fiel: unknown key; did you mean 'file'?",
    f"{OWN}.a: {{task: depth, file: a}}}}}}": "data.targets.far.a: 'far.a' cannot name a task: use letters,",
    "tasks=[items]": "tasks: 'items' cannot name a task",
    "tasks={image: {}}": "tasks.image: 'image' cannot name a task",
    "seed=-1": "seed: input should be greater than or equal to 0, got -1",
    "schema_version=2": "schema_version: input should be 1",
    "sede=1": "sede: unknown key; did you mean 'seed'? (Recipe takes schema_version, name,",
}


@pytest.mark.parametrize("change", SENTENCES)
def test_sentence(file: Path, change: str) -> None:
    found = problems(file, change)
    assert any(problem.startswith(SENTENCES[change]) for problem in found), found


def test_every_problem_is_told_at_once(file: Path) -> None:
    changes = [
        "model.adapter.rnak=3", "optim.lr=fast", "tasks=[semsge, depth]", "run.eval_split=vla", "extra=1",
        "balancer.weights.dpeth=2", "phases.0.tasks=[semseg]",
    ]  # fmt: skip
    found = problems(file, *changes)
    for start in ("model.adapter.rnak", "optim.lr", "tasks.semsge", "run.eval_split", "extra"):
        assert any(problem.startswith(start) for problem in found), (start, found)
    assert len(found) == len(set(found))
    both = problems(file, "optim.lr=fast", "phases.0.tasks=[dept]", "balancer.weights.dpeth=2")
    assert [p.partition(":")[0] for p in both] == ["optim.lr", "phases.0.tasks", "balancer.weights"]


def test_numbers_may_be_written_as_yaml_takes_for_text(file: Path) -> None:
    assert load_recipe(file, ["optim.lr=5e-4"]).optim.lr == 5e-4
    text = file.read_text().replace("lr: 0.002", "lr: 5e-4")
    file.write_text(text)
    assert load_recipe(file).optim.lr == 5e-4


def test_missing_file_names_the_nearest_shipped_recipe() -> None:
    with pytest.raises(ConfigError, match="no such recipe; did you mean 'smoke/mtlora'"):
        load_recipe(Path("smoke/mtlroa"))
    assert find_recipe(Path("smoke/mtlora")).samefile(find_recipe(Path("recipes/smoke/mtlora")))
    assert not any(name.rpartition("/")[2].startswith("_") for name in shipped_recipes())


def test_run_folder_stands_for_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_yaml(SMALL))
    assert load_recipe(tmp_path).name == "small"


def test_changed_task(small: Make) -> None:
    recipe = small("tasks.depth.weight=3", "tasks.depth.max_depth=5")
    tasks = recipe.task_set()
    assert list(tasks) == ["semseg", "depth", "scene"]
    assert tasks["depth"].weight == 3
    assert tasks["semseg"] == recipe.data.TASKS["semseg"]


def test_declared_penalty_is_accepted(file: Path) -> None:
    @register("head")
    class Fussy(PooledHead):
        type: Literal["fussy"] = "fussy"  # type: ignore[assignment]
        PENALTIES: ClassVar[tuple[str, ...]] = ("fuss",)

    try:
        changes = ["model.image_head=fussy", "phases.0.objective.penalties.fuss=0.1"]
        assert load_recipe(file, changes).phases[0].objective.penalties == {"fuss": 0.1}
        (found,) = problems(file, "model.heads.scene=fussy", "phases.0.objective.penalties.fus=1")
        assert "did you mean 'fuss'" in found
    finally:
        registered("head").pop("fussy")  # type: ignore[attr-defined]


def test_third_party_spec_stands_in_a_recipe(file: Path) -> None:
    @register("balancer")
    class Halved(BalancerSpec):
        type: Literal["halved"] = "halved"
        factor: float = 0.5

        def build(self, tasks: Any) -> Balancer:
            return FixedSpec(weights=dict.fromkeys(tasks, self.factor)).build(tasks)

    try:
        recipe = load_recipe(file, ["balancer={type: halved, factor: 0.25}"])
        assert recipe.balancer == Halved(factor=0.25)
        assert decode(Recipe, encode(recipe)) == recipe
    finally:
        registered("balancer").pop("halved")  # type: ignore[attr-defined]


# --- the way back ----------------------------------------------------------------------------------

rates = st.floats(1e-6, 10, allow_nan=False)
names = st.sampled_from(["semseg", "depth", "scene", "normals"])
changes = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8)
        | st.just("1e5"),
        "seed": st.integers(0, 2**40),
        "optim.lr": rates,
        "optim.betas": st.tuples(rates, rates).map(list),
        "optim.clip_norm": st.none() | rates,
        "optim.type": st.sampled_from(["adamw", "adam", "sgd"]),
        "balancer": st.sampled_from(["equal", "uw", {"type": "fixed", "weights": {"depth": 0.0}}]),
        "tasks.depth.weight": rates,
        "data.image_size": st.integers(8, 64) | st.lists(st.integers(8, 64), min_size=2, max_size=2),
        "data.cache": st.none() | st.sampled_from(["a/b", "ü"]),
        "model.adapter": st.none() | st.just({"type": "mtlora", "rank": [1, 2, 3, 4], "scale": 2}),
        "model.backbone.options.window_size": st.integers(1, 9),
        "run.trackers": st.lists(st.sampled_from(["wandb", "mlflow"]), max_size=2),
        "run.checkpoint_every": st.none() | st.integers(1, 9),
        "phases": st.lists(
            st.fixed_dictionaries(
                {"steps": st.integers(1, 9), "name": st.text("ab: #é-", max_size=5)},
                optional={
                    "tasks": st.lists(st.sampled_from(["semseg", "depth"]), min_size=1, unique=True),
                    "optim": st.fixed_dictionaries({"lr": rates}),
                    "actions": st.just([{"type": "freeze", "patterns": ["backbone.*"]}]),
                    "objective": st.just({"losses": {"depth": 0.5}}),
                },
            ),
            min_size=1,
            max_size=3,
        ),
    },
)


@settings(deadline=None, max_examples=40)
@given(changes)
def test_round_trip(values: dict[str, Any]) -> None:
    data = copy.deepcopy(SMALL)
    for path, value in values.items():
        data = override(data, [f"{path}=0"])
        node: Any = data
        *above, last = path.split(".")
        for key in above:
            node = node[key]
        node[last] = value
    recipe = decode(Recipe, data)
    assert decode(Recipe, encode(recipe)) == recipe
    text = dump_yaml(encode(recipe))
    again = decode(Recipe, parse_yaml(text, "recipe.yaml"))
    assert again == recipe
    assert dump_yaml(encode(again)) == text


@pytest.mark.parametrize("name", shipped_recipes())
def test_schema_accepts_what_decodes(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    if load_yaml(shipped_recipes()[name])["data"]["type"] not in registered("data"):
        pytest.skip("its dataset is not registered")
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    raw = parse_yaml(shipped_recipes()[name].read_text(), name)
    assert [error.message for error in check.iter_errors(raw)] == []
    assert [error.message for error in check.iter_errors(encode(load_recipe(Path(name))))] == []
    assert not check.is_valid({**raw, "sede": 1})
    assert not check.is_valid({**raw, "seed": "x"})


def test_modules_to_import(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_parts.py").write_text("LOADED = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_recipe(file, ["imports=[own_parts]"]).imports == ("own_parts",)
    assert sys.modules.pop("own_parts").LOADED
    with pytest.raises(ConfigError, match=r"imports: cannot import \(No module named 'own_prats'\)"):
        load_recipe(file, ["imports=[own_prats]"])
    with pytest.raises(ConfigErrors, match="imports"):
        load_recipe(file, ["imports=7"])


def test_optimizer_of_a_phase_changes_that_of_the_recipe(file: Path) -> None:
    recipe = load_recipe(file, ["optim={lr: 0.1, warmup_epochs: 2}", "phases.0.optim.lr=0.5"])
    assert recipe.phases[0].optim is not None
    assert (recipe.phases[0].optim.lr, recipe.phases[0].optim.warmup_epochs) == (0.5, 2)


def test_home_in_paths(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    recipe = load_recipe(file, ["model.backbone.weights=~/w.safetensors"])
    assert recipe.model.backbone.weights == Path("/somewhere/w.safetensors")


@pytest.mark.parametrize("name", ["keys", "items", "type", "forward", "a.b", "", "image", "id"])
def test_names_a_task_cannot_have(name: str, small: Make) -> None:
    task = small().task_set()["semseg"]
    with pytest.raises(ConfigError, match="cannot name a task"):
        TaskSet({name: task})
