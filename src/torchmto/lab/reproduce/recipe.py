"""Recipes: what an experiment runs, as a typed YAML file."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchmto.checks import check_choice, check_integer
from torchmto.lab.run.config import MOST, RunConfig, config_of
from torchmto.lab.run.folder import read_yaml
from torchmto.lab.specs import parse_method, parse_methods
from torchmto.methods import method_class
from torchmto.methods import methods as all_methods

_PACKAGE = Path(__file__).resolve().parents[2]
_FOLDERS = (_PACKAGE / "recipes" / "reproduce", _PACKAGE.parents[1] / "recipes" / "reproduce")
"""In an installed package, and in a checkout."""


class RecipeError(ValueError):
    """A recipe that doesn't say what to run."""


@dataclass(frozen=True)
class Arm:
    """One comparison of an experiment: methods that share data, model and optimizer.

    Attributes:
        name: What the arm is called; also its folder.
        methods: Texts of methods, see `torchmto.lab.specs.parse_method`.
        run: Settings of a Run, as `torchmto.lab.run.config.config_of` takes them, that differ from the recipe's.
        method_run: The same, but for the multi-task runs only: the single-task models stay as they are.
        reference: The method that the others are compared with.
        about: What the arm is there for.
        baselines: Whether single-task models are trained, too; without them there is no Δm.
        seeds: At most so many, where fewer than the recipe's do.
        added: Those of the methods that aren't the recipe's, see `with_methods`.
    """

    name: str
    methods: tuple[str, ...]
    run: Mapping[str, Any] = field(default_factory=dict)
    method_run: Mapping[str, Any] = field(default_factory=dict)
    reference: str = "gd"
    about: str = ""
    baselines: bool = True
    seeds: int | None = None
    added: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """An experiment.

    Attributes:
        name: The recipe's.
        study: What is done with it, see `torchmto.lab.reproduce.tables.STUDIES`.
        summary: One line.
        papers: What the papers say about it: text that is printed beside the results.
        seeds: How many.
        run: Settings of a Run, as `torchmto.lab.run.config.config_of` takes them, that all arms share.
        tune: Settings of which each method gets its best one by validation on the first seed; empty for none.
        tune_run: Settings of a Run that differ while tuning, say fewer epochs.
        arms: The comparisons.
        options: What else the study takes.
    """

    name: str
    study: str
    summary: str
    papers: str = ""
    seeds: int = 3
    run: Mapping[str, Any] = field(default_factory=dict)
    tune: tuple[Mapping[str, Any], ...] = ()
    tune_run: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[Arm, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer("seeds", self.seeds, minimum=1, maximum=MOST)
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise RecipeError(f"Arms should have different names. Found {', '.join(names)}.")
        arms = (s for arm in self.arms for s in (arm.run, arm.method_run))
        for settings in (self.run, *self.tune, self.tune_run, *arms):
            config_of(settings)
        for name in (*_IDLE.get(self.study, ("options",)), *(() if self.tune else ("tune_run",))):
            if getattr(self, name):
                raise RecipeError(f"`{name}` has no effect in a recipe of the study `{self.study}`. Leave it out.")

    @property
    def reads_data(self) -> bool:
        """Whether ``{data}`` stands in it."""
        return "{data}" in str([self.run, *(arm.run for arm in self.arms)])

    def run_config(self, arm: Arm, data_root: Path) -> RunConfig:
        """The runs of an arm, with ``{data}`` in its data's name and options replaced."""
        config = config_of(arm.run, config_of(self.run))
        name, options = (_filled(value, str(data_root)) for value in (config.data.reference, config.data.options))
        return replace(config, threads=config.threads or 1, data=replace(config.data, name=name, options=options))


_IDLE = {"theory": ("run", "arms", "tune")}
"""Without effect in certain studies; in all others it is the options."""


def _filled(value: Any, data_root: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(entry, data_root) for key, entry in value.items()}
    return value.replace("{data}", data_root) if isinstance(value, str) else value


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package.

    Example:
        >>> "theory" in recipe_names()
        True
    """
    return tuple(sorted({path.stem for folder in _FOLDERS for path in folder.glob("*.yaml")}))


def load_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a file of one's own.

    Args:
        name: One of `recipe_names`, or the path of a YAML file.

    Raises:
        RecipeError: If there is none, or it doesn't say what to run.
    """
    path = next((folder / f"{name}.yaml" for folder in _FOLDERS if (folder / f"{name}.yaml").is_file()), Path(name))
    if not path.is_file():
        raise RecipeError(f"There is no experiment {name!r}. There are: {', '.join(recipe_names())}.")
    try:
        return _recipe(path.stem, read_yaml(path))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise RecipeError(f"{path} isn't a recipe: {error}") from error


def with_methods(recipe: Recipe, methods: str) -> Recipe:
    """A recipe whose first arm has more methods.

    Args:
        recipe: The recipe.
        methods: Such as ``fairgrad,wpcgrad(mode=pairwise)``; those that the arm has already count once.

    Raises:
        RecipeError: If there is no such method, or no arm.
    """
    if not recipe.arms:
        raise RecipeError(f"{recipe.name} has no arm to add methods to.")
    first, *others = recipe.arms
    try:
        labels = dict.fromkeys(spec.label for spec in parse_methods(methods))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    new = tuple(label for label in labels if label not in first.methods)
    more = replace(first, methods=(*first.methods, *new), added=(*first.added, *new))
    return replace(recipe, arms=(more, *others))


def _recipe(name: str, content: Mapping[str, Any]) -> Recipe:
    entries = dict(content)
    arms = tuple(_arm(arm, entry) for arm, entry in (entries.pop("arms", None) or {}).items())
    tune = tuple(entries.pop("tune", None) or ())
    return Recipe(name=name, arms=arms, tune=tune, **entries)


def _needed(method: str) -> list[str]:
    """What a method can't do without, besides what every Run tells it."""
    parameters = inspect.signature(method_class(method)).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.name != "total_steps" and p.kind not in {2, 4}]


def _arm(name: str, content: Mapping[str, Any]) -> Arm:
    entries = dict(content)
    methods: Sequence[str] = entries.pop("methods")
    if "added" in entries:
        raise RecipeError("An arm has no entry `added`; methods are added by `--add`.")
    if methods == "all":
        methods = [method for method in all_methods() if not _needed(method)]
    labels = tuple(parse_method(method).label for method in methods)
    if "reference" in entries:
        check_choice("reference", entries["reference"], labels)
    return Arm(name, labels, **entries)
