"""The lab: anyone's problem, one Run, one grid, on one machine or many.

``lab.Problem`` is what is learnt, ``lab.fit`` one Run of it, ``lab.compare`` many, ``lab.diagnose`` a look at its gradients.
Everything here needs the extra ``torchmto[lab]``; nothing below this layer imports from it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmto.lab.data.base import Task as Task
    from torchmto.lab.diagnosis.runs import diagnose as diagnose
    from torchmto.lab.grid.plan import compare as compare
    from torchmto.lab.grid.result import Result as Result
    from torchmto.lab.grid.result import load_result as load_result
    from torchmto.lab.problem import Problem as Problem
    from torchmto.lab.problem import ProblemError as ProblemError
    from torchmto.lab.run.config import RunConfig as RunConfig
    from torchmto.lab.run.fitted import FittedRun as FittedRun
    from torchmto.lab.run.fitted import fit as fit

_HOME = {
    "FittedRun": "run.fitted",
    "Problem": "problem",
    "ProblemError": "problem",
    "Result": "grid.result",
    "RunConfig": "run.config",
    "Task": "data.base",
    "compare": "grid.plan",
    "diagnose": "diagnosis.runs",
    "fit": "run.fitted",
    "load_result": "grid.result",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: the lab takes seconds to import as a whole."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
