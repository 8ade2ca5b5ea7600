"""What is compared: one problem, several methods, several seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torchmto.checks import check_integer, check_tasks
from torchmto.lab.fingerprints import listed
from torchmto.lab.grid.identity import identity
from torchmto.lab.metrics import task_metrics
from torchmto.lab.problem import Problem
from torchmto.lab.references import method_sources
from torchmto.lab.run.build import Computer, build
from torchmto.lab.run.config import FREE, MOST, MethodConfig, RunConfig, config_of
from torchmto.lab.run.first_batch import check_first_batch
from torchmto.lab.specs import MethodSpec, parse_method

DEFAULT_METHODS = ("gd", "pcgrad", "wpcgrad", "sequential", "connection_strength", "task_groups")


@dataclass(frozen=True)
class Experiment:
    """The settings of a comparison.

    Args:
        methods: Texts of methods, see `torchmto.lab.specs.parse_method`.
        seeds: How many; they are 0, 1, ...
        run: Everything that all Runs have in common, with nothing left open.
        chosen: Settings of single methods, and of baselines by ``single-task <task>``, by dotted names; what tuning chose.
        baselines: Whether single-task models are trained, too; without them there is no Δm.
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: int = 3
    run: RunConfig = field(default_factory=RunConfig)
    chosen: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    baselines: bool = True

    def __post_init__(self) -> None:
        check_tasks(self.methods, "methods")
        check_integer("seeds", self.seeds, minimum=1, maximum=MOST)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that decide the outcome, in one mapping, as they are saved with the results."""
        common, everything = identity(self.run), self.run.as_dict()
        del common["seed"], common["method"]["name"], common["method"]["options"]
        free = {name: everything[name] for name in sorted(FREE & set(everything))}
        if own := method_sources([parse_method(method).name for method in self.methods]):
            free["methods"] = own
        options = (self.run.data.options, self.run.model.options)
        free["content"] = "+".join(filter(None, (self.run.content, *map(listed, options)))) or None
        chosen = {"chosen": {name: dict(entry) for name, entry in self.chosen.items()}} if self.chosen else {}
        alone = {} if self.baselines else {"baselines": False}
        return {"methods": list(self.methods), "seeds": self.seeds, **alone, **common, **chosen, "free": free}

    def single_task_runs(self, tasks: Sequence[str]) -> list[RunConfig]:
        """One baseline per seed and task."""
        runs = []
        for seed in range(self.seeds):
            for task in tasks if self.baselines else ():
                plain = replace(
                    self.run,
                    data=replace(self.run.data, tasks=[task]),
                    method=MethodConfig(on_nonfinite=self.run.method.on_nonfinite),
                    optimizer=replace(self.run.optimizer, head_rate=1.0),
                    losses={name: loss for name, loss in self.run.losses.items() if name == task},
                    seed=seed,
                )
                runs.append(config_of(self.chosen.get(f"single-task {task}", {}), plain))
        return runs

    def method_runs(self, only: str | None = None) -> list[RunConfig]:
        """One run per seed and method, or those of one method."""
        runs = []
        for seed in range(self.seeds):
            for method in self.methods if only is None else (only,):
                spec = parse_method(method)
                chosen = replace(self.run.method, name=spec.name, options=dict(spec.hyperparameters))
                run = replace(self.run, method=chosen, seed=seed)
                runs.append(config_of(self.chosen.get(method, {}), run))
        return runs

    def check(self, problem: Problem) -> None:
        """Build every method once and try the first batch, so that a mistake shows before hours of training.

        Raises:
            ValueError: If a setting makes no sense, or a part of the problem isn't what it should be.
            TypeError: If a method or the model has no such option.
            ImportError: If the tasks' metrics need a package that is missing.
        """
        computer = Computer.of(self.run)
        baseline = dict.fromkeys(problem.task_names, 1.0)
        self.run.validate()
        for number, config in enumerate(self.method_runs()[: len(self.methods)]):
            replace(config, baseline=baseline).validate()
            if number == 0:
                check_first_batch(problem, config)
            build(config, problem, computer, baseline=baseline)
        for task in problem.task_list if problem.evaluate is None else ():
            task_metrics(task)


def is_single_task(config: RunConfig) -> bool:
    """Whether this is a baseline: one task, alone and by no method."""
    return len(config.data.tasks or ()) == 1 and config.method == MethodConfig(on_nonfinite=config.method.on_nonfinite)


def method_label(config: RunConfig) -> str:
    """The method of a run as text."""
    return MethodSpec(config.method.name, config.method.options).label


def run_label(config: RunConfig) -> str:
    """A run in words: ``pcgrad, seed 1`` or ``single-task left, seed 0``."""
    name = f"single-task {(config.data.tasks or [''])[0]}" if is_single_task(config) else method_label(config)
    return f"{name}, seed {config.seed}"
