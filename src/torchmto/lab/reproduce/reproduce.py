"""One experiment, from its recipe to its folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchmto.checks import check_choice
from torchmto.lab.grid.executors import make_executor
from torchmto.lab.report import write_report
from torchmto.lab.reproduce.arms import Context, check_arm, run_arms
from torchmto.lab.reproduce.budget import Budget
from torchmto.lab.reproduce.findings import Findings, claim_folder, with_folder, write_findings
from torchmto.lab.reproduce.recipe import Recipe, RecipeError
from torchmto.lab.reproduce.tables import STUDIES, add_tables
from torchmto.lab.reproduce.theory import check_options, theory


def reproduce(
    recipe: Recipe,
    folder: Path,
    *,
    data_root: Path | None = None,
    seeds: int | None = None,
    minutes: float | None = None,
    jobs: int | None = None,
    executor: str = "local",
    ray_address: str | None = None,
    say: Callable[[str], None] = print,
) -> Findings:
    """Run what of an experiment isn't finished yet, and write what is known.

    Args:
        recipe: What to run.
        folder: Where everything goes; an earlier call's runs are taken over, and the methods that it added.
        data_root: What ``{data}`` in the recipe's paths stands for; ``data`` by default.
        seeds: How many; the recipe's by default.
        minutes: No unit of work begins after so many; None for no limit.
        jobs: Training runs at a time; by default one, and as many as the cluster at ``ray_address`` takes.
        executor: Where they run: ``"local"``, ``"ray"``, ``"slurm"``.
        ray_address: Of a Ray cluster; a local one by default.
        say: Prints a line.

    Returns:
        What was found, which is also in ``results.json``, ``results.md``, ``report.html`` and ``plots/`` of the folder.

    Raises:
        RecipeError: If there is no such study, an arm's settings make no sense, or an argument has no effect.
        FolderError: If the folder belongs to something else.
    """
    try:
        check_choice("study", recipe.study, (*STUDIES, "theory"))
        check_options(recipe.options)
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    idle: dict[str, tuple[Any, str]] = (
        {} if recipe.reads_data else {"data_root": (data_root, "no path of it says `{data}`")}
    )
    if recipe.study == "theory":
        of_runs = {"seeds": seeds, "jobs": jobs, "executor": executor != "local", "ray_address": ray_address}
        idle |= {name: (value, "it trains nothing") for name, value in of_runs.items()}
    for name, (value, why) in idle.items():
        if value:
            raise RecipeError(f"The setting `{name}` has no effect on {recipe.name}: {why}. Leave it out.")
    recipe = with_folder(recipe, folder)
    budget = Budget(minutes)
    asked = seeds or recipe.seeds
    where = make_executor(executor, jobs, folder, ray_address)  # says what is missing before anything is read
    context = Context(recipe, folder, data_root or Path("data"), asked, budget, where, say)
    for arm in recipe.arms:
        check_arm(context, arm)
    claim_folder(folder, recipe)
    if recipe.study == "theory":
        findings = theory(folder, recipe.options, budget, say)
    else:
        arms, complete = run_arms(context)
        findings = Findings(complete=complete)
        add_tables(findings, arms, recipe)
    write_findings(folder, recipe, findings, seeds=asked, minutes=budget.used)
    try:
        write_report([folder])
    except ValueError as error:  # more than fits on a page; all else is written
        say(f"No report.html was written: {error}")
    return findings
