"""The recipes that come with the project say something that can run."""

from pathlib import Path

import pytest
import yaml

from torchmto.lab.data import Task, dataset_info, datasets
from torchmto.lab.losses import task_loss
from torchmto.lab.references import resolve
from torchmto.lab.reproduce import RecipeError, load_recipe, recipe_names
from torchmto.lab.reproduce.tables import STUDIES
from torchmto.lab.run.config import RunConfig
from torchmto.lab.specs import parse_method

TRAIN = sorted((Path(__file__).parents[3] / "recipes" / "train").glob("*.yaml"))


@pytest.mark.parametrize("name", recipe_names())
def test_recipe(name):
    recipe = load_recipe(name)
    assert recipe.study in {*STUDIES, "theory"}
    assert recipe.arms or recipe.study == "theory"
    for arm in recipe.arms:
        run = recipe.run_config(arm, Path("somewhere"))
        assert "{" not in run.data.name
        data, _, path = run.data.name.partition(":")
        if data in datasets():
            assert bool(path) == bool(dataset_info(data).layouts)
        else:
            assert resolve(run.data.name)
        for method in arm.methods:
            spec = parse_method(method)
            more = {"total_steps": 10} if spec.takes("total_steps") else {}
            if spec.hyperparameters.get("priority") == "performance":
                more["baseline"] = {"task": 1.0}
            spec.make(**more)


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_training_recipe_is_valid_where_the_data_is(path, tmp_path):
    settings = yaml.safe_load(path.read_text())
    settings["data"]["name"] = settings["data"]["name"].partition(":")[0] + f":{tmp_path}"
    config = RunConfig.from_dict(settings)
    config.validate()
    for options in config.losses.values():
        task_loss(Task("edges", "edges", 1), **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: comparison\nsummary: x\nrun: {rate: 1}\n", "no setting `rate`"),
        ("study: comparison\nsummary: x\nwrong: 1\n", "wrong"),
        ("study: comparison\nsummary: x\nseeds: 0\n", "seeds"),
        ("study: comparison\nsummary: x\ntune_run: {epochs: 1}\n", "`tune_run` has no effect"),
        ("study: groups\nsummary: x\noptions: {problems: 1}\n", "`options` has no effect"),
        ("study: theory\nsummary: x\narms: {a: {methods: [gd]}}\n", "`arms` has no effect"),
        ("- 1\n", "isn't a recipe"),
        ("study: [\n", "isn't a recipe"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "r.yaml"))


def test_unknown_names_are_listed():
    with pytest.raises(RecipeError, match="theory"):
        load_recipe("nothing")
