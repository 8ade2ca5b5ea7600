"""One step of multi-task training: its forwards, backwards and optimizer steps, the only place with side effects."""

from torchmto.step.context import StepContext
from torchmto.step.info import StepInfo
from torchmto.step.losses import Losses, NonFiniteError
from torchmto.step.messages import RankFailedError
from torchmto.step.network import Network
from torchmto.step.task_gradients import TaskGradients

__all__ = ["Losses", "Network", "NonFiniteError", "RankFailedError", "StepContext", "StepInfo", "TaskGradients"]
