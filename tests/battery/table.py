"""One row per registered method: how the battery constructs it. A method without a row fails `test_table.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torchmto


def _none(num_tasks: int) -> dict[str, Any]:
    return {}


def _weights(num_tasks: int) -> dict[str, Any]:
    return {"weights": [1.0 + 0.5 * i for i in range(num_tasks)]}


@dataclass(frozen=True)
class Row:
    """How to test one method.

    Attributes:
        options: Number of tasks -> the hyper-parameters the battery constructs it with.
        skip: Test -> reason, where a test makes no sense for this method.
        steps: How many steps it may take to come near the Pareto set.
    """

    options: Callable[[int], dict[str, Any]] = _none
    skip: Mapping[str, str] = field(default_factory=dict)
    steps: int = 60


ROWS: dict[str, Row] = {
    "adatask": Row(skip={"one direction": "Adam's moments per task change the direction"}),
    "aligned_mtl": Row(),
    "cagrad": Row(),
    "config": Row(),
    "connection_strength": Row(lambda k: {"schedule": "phase2"}),
    "consmtl": Row(),
    "constant": Row(_weights),
    "cosmos": Row(),
    "cr_mogm": Row(steps=100),
    "db_mtl": Row(),
    "dtp": Row(),
    "dualproj": Row(),
    "dwa": Row(),
    "excess_mtl": Row(),
    "f_mtl": Row(),
    "fairgrad": Row(),
    "famo": Row(),
    "gd": Row(),
    "gls": Row(),
    "go4align": Row(),
    "graddrop": Row(skip={"every_method_takes_the_steps_of_the_cpu": "draws where the gradients are"}),
    "gradnorm": Row(),
    "gradvac": Row(),
    "igb": Row(),
    "imtl_g": Row(),
    "imtl_l": Row(),
    "krum": Row(skip={"a_finished_task_does_not_stop_the_others": "the zero gradient may be the one that is selected"}),
    "ldc_mtl": Row(),
    "m_config": Row(lambda k: {"num_updates": k}, skip={"one direction": "Adam's second moment changes the direction"}),
    "metabalance": Row(),
    "mgda": Row(steps=100),
    "moco": Row(steps=250),
    "modo": Row(),
    "mtchebycheff": Row(),
    "nash_mtl": Row(steps=120),
    "pbi": Row(),
    "pcd": Row(
        skip={"a_finished_task_does_not_stop_the_others": "a primary task without a gradient stops all, by definition"}
    ),
    "pcgrad": Row(),
    "pivrg": Row(),
    "random": Row(),
    "rlw": Row(),
    "samo": Row(skip={"every_method_takes_the_steps_of_the_cpu": "draws where the gradients are"}),
    "sdmgrad": Row(steps=100),
    "sequential": Row(),
    "si": Row(),
    "son_goku": Row(),
    "static": Row(_weights),
    "stch": Row(),
    "task_groups": Row(),
    "tchebycheff": Row(),
    "trimmed_mean": Row(),
    "upgrad": Row(),
    "uw": Row(),
    "wpcgrad": Row(),
}


def build(name: str, num_tasks: int) -> torchmto.Method:
    """The method of a row."""
    return torchmto.make_method(name, **ROWS[name].options(num_tasks))
