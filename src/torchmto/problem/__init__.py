"""One step of multi-task training: its forwards, backwards and optimizer steps, the only place with side effects."""

from torchmto.problem.info import StepInfo
from torchmto.problem.losses import Losses, NonFiniteError
from torchmto.problem.network import Network
from torchmto.problem.problem import Problem
from torchmto.problem.task_gradients import TaskGradients

__all__ = ["Losses", "Network", "NonFiniteError", "Problem", "StepInfo", "TaskGradients"]
