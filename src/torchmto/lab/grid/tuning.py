"""The same number of settings for every method and every single-task model, chosen on the validation split of the first seed.

By default the settings are drawn beforehand, the same for all. With ``sampler="tpe"`` each method draws its own, one after
the other, from what the ones before gave. Single-task models are tuned first: their best values are what methods are
measured by. Settings are compared by the score that chooses a Run's epoch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import filterfalse
from typing import Any

from torchmto.checks import check_choice, check_integer, needed
from torchmto.lab.grid.executors import Executor
from torchmto.lab.grid.experiment import Experiment, run_label
from torchmto.lab.grid.folder import GridFolder
from torchmto.lab.grid.identity import run_key
from torchmto.lab.grid.runner import FailedRunsError, Stage, Watcher, try_grid
from torchmto.lab.metrics import primary_metric
from torchmto.lab.problem import Problem
from torchmto.lab.run.config import MOST, ConfigError, RunConfig, check_used
from torchmto.lab.specs import parse_method
from torchmto.methods import method_class

Settings = Mapping[str, Any]
SPACE: dict[str, tuple[Any, ...]] = {
    "optimizer.lr": ("log", 1e-4, 1e-1),
    "optimizer.name": ("choice", "sgd", "adamw"),
    "optimizer.weight_decay": ("choice", 0.0, 1e-4, 1e-2),
}
"""What is drawn: log-uniform, uniform ("linear") or one of a few. A method adds its class's ``tuning_space``, by option."""


class Plan:
    """Which settings are tried: the same ones by all, from a list.

    Args:
        offers: The list.
    """

    def __init__(self, offers: Sequence[Settings]) -> None:
        self._offers = offers

    def __len__(self) -> int:
        return len(self._offers)

    def settings(self, who: str, number: int) -> Settings:
        """Those of a method or single-task model in a round."""
        return self._offers[number]

    def tell(self, who: str, number: int, score: float | None) -> None:
        """How they did; higher is better."""


class Sampled(Plan):
    """Settings drawn by Optuna from `SPACE`, at random and equal for all, or by TPE for each on its own.

    Args:
        number: How many by each.
        sampler: ``"random"`` or ``"tpe"``.
    """

    def __init__(self, number: int, sampler: str = "random") -> None:
        undrawn: Settings = {}
        super().__init__([undrawn] * check_integer("tune", number, minimum=1, maximum=MOST))
        self._optuna = needed("Tuning", "optuna", "tune")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._sampler = check_choice("sampler", sampler, ("random", "tpe"))
        self._studies: dict[str, Any] = {}
        self._trials: dict[tuple[str, int], Any] = {}

    def settings(self, who: str, number: int) -> Settings:
        """The next ones: at random from one study for all, a method's own hyper-parameters apart; by TPE from its own."""
        trial = self._trial("" if self._sampler == "random" else who, number)
        drawn = {name: _draw(trial, name, entry) for name, entry in SPACE.items()}
        own: Mapping[str, tuple[Any, ...]] = {}
        if not who.startswith("single-task "):
            spec = parse_method(who)
            own = method_class(spec.name).tuning_space
            trial = self._trial(who, number)
            options = {name: _draw(trial, f"{spec.name}.{name}", entry) for name, entry in own.items()}
            drawn |= {"method.options": {**options, **spec.hyperparameters}} if options else {}
        return drawn

    def _trial(self, who: str, number: int) -> Any:
        if (who, number) not in self._trials:
            if who not in self._studies:
                samplers = self._optuna.samplers
                kind = samplers.RandomSampler if self._sampler == "random" else samplers.TPESampler
                self._studies[who] = self._optuna.create_study(direction="maximize", sampler=kind(seed=0))
            self._trials[who, number] = self._studies[who].ask()
        return self._trials[who, number]

    def tell(self, who: str, number: int, score: float | None) -> None:
        """For TPE."""
        if self._sampler == "random":
            return
        failed = self._optuna.trial.TrialState.FAIL if score is None else None
        self._studies[who].tell(self._trials[who, number], score, state=failed)


def _draw(trial: Any, name: str, entry: tuple[Any, ...]) -> Any:
    kind, *values = entry
    if kind == "choice":
        return trial.suggest_categorical(name, values)
    return trial.suggest_float(name, *values, log=kind == "log")


# ---------------------------------------------------------------------------------------------------------- tuning


@dataclass
class Tuning:
    """What tuning found.

    Attributes:
        chosen: Settings by method, and by ``single-task <task>``.
        tried: Each one's settings and scores, in the order of the rounds.
        measure: What methods were scored by.
        failed: What went wrong, a line for each run.
        unfinished: Those of which runs are missing: nothing is chosen for them, nor for methods before all single-task models.
    """

    chosen: dict[str, Settings] = field(default_factory=dict)
    tried: dict[str, list[tuple[Settings, float | None]]] = field(default_factory=dict)
    measure: str = ""
    failed: list[str] = field(default_factory=list)
    unfinished: set[str] = field(default_factory=set)

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return {
            "chosen": self.chosen,
            "tried": {who: [{"settings": s, "score": score} for s, score in rows] for who, rows in self.tried.items()},
            "edges": {who: edges(own, [s for s, _ in self.tried[who]]) for who, own in self.chosen.items()},
            "measure": self.measure,
            "failed": self.failed,
        }


def check_tunable(problem: Problem, config: RunConfig | None = None) -> None:
    """Whether a problem can be tuned, and by `SPACE` if there are settings.

    Raises:
        ConfigError: If it has no validation split to choose by, or something else decides what tuning chooses.
    """
    if problem.evaluate is not None:
        raise ConfigError("Tuning chooses on the validation split. Found a problem with `evaluate`, which has none.")
    if config is None:
        return
    if problem.optimizer is not None:
        raise ConfigError("Tuning chooses the optimizer. Found a problem that brings its own.")
    check_used(config, dict.fromkeys(SPACE, "tuning chooses it"), tuned=SPACE)


def tune(
    experiment: Experiment,
    problem: Problem,
    plan: Plan,
    folder_of: Callable[[str, Experiment], GridFolder],
    *,
    executor: Executor,
    watcher: Watcher,
) -> Tuning:
    """Each method and each single-task model at its best settings by validation on the first seed.

    Args:
        experiment: What is tuned for; its own ``chosen`` goes over what tuning chooses, but isn't tuned with.
        problem: What is learnt.
        plan: Which settings.
        folder_of: The folder of a round, by its name and its experiment.
        executor: Where they run.
        watcher: Is told how far each round is.

    Raises:
        FailedRunsError: If one had no finite score at any settings.
        ConfigError: If the problem has no validation split to choose by.
    """
    check_tunable(problem)
    found = Tuning()
    baseline: dict[str, float] = {}
    said: dict[str, str] = {}
    singles = [f"single-task {name}" for name in problem.task_names] if experiment.baselines else []
    stages: dict[Stage, list[str]] = {"single-task": singles, "methods": list(experiment.methods)}
    for stage, names in stages.items():
        for number in range(len(plan)):
            offers = {who: plan.settings(who, number) for who in names}
            trial = replace(experiment, seeds=1, chosen=offers)
            results, error = try_grid(
                trial,
                folder_of(f"{stage}-{number}", trial),
                problem,
                executor=executor,
                watcher=watcher,
                stages=[stage],
                baseline=baseline,
            )
            failures = {run_key(run): text for run, text in error.failures} if error else {}
            runs = trial.single_task_runs(problem.task_names) if stage == "single-task" else trial.method_runs()
            for who, run in zip(names, runs, strict=True):
                key = run_key(run)
                if key not in results and key not in failures:
                    found.unfinished.add(who)
                    continue
                result = results.get(key, {})
                score = result.get("score")
                why = failures.get(key, "no finite score on the validation split")
                if stage == "methods":
                    found.measure = result.get("measure", found.measure)
                if score is None:
                    shown = ", ".join(f"{name} {value}" for name, value in offers[who].items())
                    said[who] = f"{run_label(run)}, {shown}: {why.partition(chr(10))[0]}"
                    found.failed.append(said[who])
                found.tried.setdefault(who, []).append((offers[who], score))
                plan.tell(who, number, score)
        if stage == "single-task" and found.unfinished:
            return found
        for who in filterfalse(found.unfinished.__contains__, names):
            scores = [(score, settings) for settings, score in found.tried[who] if score is not None]
            if not scores:
                raise FailedRunsError(
                    f"{who}: no setting in tuning gave a finite score on the validation split.\n{said[who]}"
                )
            best, settings = max(scores, key=lambda entry: entry[0])
            found.chosen[who] = {**settings, **experiment.chosen.get(who, {})}
            if stage == "single-task":
                task = problem.only([who.removeprefix("single-task ")]).task_list[0]
                baseline[task.name] = best if primary_metric(task)[1] else -best
        if 0.0 in baseline.values():  # no Δm to it: methods are scored as without single-task values
            baseline = {}
    return found


def edges(settings: Settings, offers: Sequence[Settings]) -> list[str]:
    """Numbers of ``settings`` that no offer with otherwise equal choices exceeds, or falls below: a better one may lie beyond.

    Nothing lies below 0.

    Example:
        >>> edges({"lr": 0.1, "method.options": {"c": 0.0}}, [{"lr": 0.01}, {"lr": 0.1, "method.options": {"c": 0.5}}])
        ['largest lr']
    """
    chosen, others = _flat(settings), [_flat(offer) for offer in offers]
    same = [
        offer for offer in others if all(offer[key] == chosen[key] for key in offer if _is_choice(key, offer, chosen))
    ]
    found = []
    for key, value in chosen.items():
        rivals = {offer[key] for offer in same if key in offer} if _is_number(value) else set()
        if len(rivals) > 1 and value == max(rivals):
            found.append(f"largest {key}")
        elif len(rivals) > 1 and value == min(rivals) and value != 0:
            found.append(f"smallest {key}")
    return found


def _flat(settings: Settings) -> Settings:
    """A method's own hyper-parameters by names of their own."""
    options = {f"method.options.{name}": value for name, value in settings.get("method.options", {}).items()}
    return {**settings, **options}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_choice(key: str, first: Settings, second: Settings) -> bool:
    return key in second and isinstance(first[key], str | bool)
