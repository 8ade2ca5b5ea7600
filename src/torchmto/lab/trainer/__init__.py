"""Training that loses nothing: typed settings, checkpoints that are whole or absent, runs that resume bit for bit."""

from torchmto.lab.trainer.checkpoint import CheckpointError, CheckpointFolder, read_checkpoint, write_checkpoint
from torchmto.lab.trainer.config import (
    ConfigError,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from torchmto.lab.trainer.processes import RankError
from torchmto.lab.trainer.trainer import Interrupted, Trainer, train

__all__ = [
    "CheckpointError",
    "CheckpointFolder",
    "ConfigError",
    "DataConfig",
    "Interrupted",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RankError",
    "TrainConfig",
    "Trainer",
    "read_checkpoint",
    "train",
    "write_checkpoint",
]
