"""What is compared: one data set and model, several methods, several seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torchmto.checks import check_integer, check_number, check_tasks
from torchmto.lab.data import DataBundle
from torchmto.lab.specs import parse_method
from torchmto.lab.training import RunConfig, build_run

__all__ = ["DEFAULT_METHODS", "Experiment", "default_experiment"]

DEFAULT_METHODS = ("gd", "pcgrad", "wpcgrad", "sequential", "connection_strength", "task_groups")

_RECIPES: dict[str, dict[str, Any]] = {
    "mlp": {"epochs": 20, "batch_size": 64, "learning_rate": 1e-3},
    "convnet": {"epochs": 10, "batch_size": 64, "learning_rate": 1e-3},
    "segnet": {"epochs": 10, "batch_size": 8, "learning_rate": 1e-3, "model_options": {"width": 16}},
}
_DATA_RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 4, "batch_size": 64, "learning_rate": 4e-3, "model_options": {"widths": [16, 32, 64]}},
}


@dataclass(frozen=True)
class Experiment:
    """The settings of a comparison.

    Args:
        methods: Texts of methods, see `torchmto.lab.specs.parse_method`.
        seeds: How many; they are 0, 1, ...
        run: Everything that all runs have in common.
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: int = 3
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_tasks(self.methods)
        check_integer("seeds", self.seeds, minimum=1)
        check_integer("epochs", self.run.epochs, minimum=1)
        check_integer("batch_size", self.run.batch_size, minimum=1)
        check_number("learning_rate", self.run.learning_rate, above=0)
        check_number("weight_decay", self.run.weight_decay, minimum=0)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings in one mapping, as they are saved with the results."""
        common = asdict(self.run)
        del common["method"], common["seed"]
        return {"methods": list(self.methods), "seeds": self.seeds, **common}

    def task_names(self, bundle: DataBundle) -> tuple[str, ...]:
        """The tasks that take part."""
        return self.run.tasks or tuple(task.name for task in bundle.tasks)

    def single_task_runs(self, tasks: Sequence[str]) -> list[RunConfig]:
        """One baseline per seed and task."""
        plain = replace(self.run, method="gd", loss_weights=None, head_rate=1.0)
        return [replace(plain, tasks=(task,), seed=seed) for seed in range(self.seeds) for task in tasks]

    def method_runs(self) -> list[RunConfig]:
        """One run per seed and method."""
        return [replace(self.run, method=method, seed=seed) for seed in range(self.seeds) for method in self.methods]

    def check(self, bundle: DataBundle) -> None:
        """Build every method once, so that a mistake shows before hours of training.

        Raises:
            ValueError: If a setting makes no sense.
            TypeError: If a method or the model has no such option.
        """
        baseline = dict.fromkeys(self.task_names(bundle), 1.0)
        for method in self.methods:
            build_run(replace(self.run, method=method), bundle, baseline=baseline)


def default_experiment(
    bundle: DataBundle, *, data: str, methods: Sequence[str] = DEFAULT_METHODS, seeds: int = 3, **run: Any
) -> Experiment:
    """An experiment with settings that suit the data set, where they aren't given.

    Args:
        bundle: The data.
        data: ``NAME`` or ``NAME:PATH`` it was loaded from.
        methods: Texts of methods.
        seeds: How many.
        **run: Fields of `torchmto.lab.training.RunConfig`; None stands for the default.

    Returns:
        The experiment.
    """
    given = {key: value for key, value in run.items() if value is not None}
    model = given.get("model", bundle.default_model)
    recipe: Mapping[str, Any] = _RECIPES.get(
        model, _RECIPES["segnet"] if bundle.input_kind == "image" else _RECIPES["mlp"]
    )
    recipe = {key: value for key, value in recipe.items() if key != "model_options" or model in _RECIPES}
    if model == bundle.default_model:
        recipe = {**recipe, **_DATA_RECIPES.get(bundle.name, {})}
    labels = tuple(parse_method(method).label for method in methods)
    return Experiment(labels, seeds, RunConfig(**{"data": data, "model": model, **recipe, **given}))
