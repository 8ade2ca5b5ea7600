"""Multi-task models: a trunk, one head per task, ``model(x, tasks=None) -> {task: output}``."""

from torchmto.lab.models.base import MultiTaskModel
from torchmto.lab.models.registry import build_model, models

__all__ = ["MultiTaskModel", "build_model", "models"]
