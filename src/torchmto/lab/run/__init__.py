"""One Run: typed settings, one loop, checkpoints that are whole or absent, resuming bit for bit."""

from torchmto.lab.run.checkpoint import CheckpointError, CheckpointFolder, read_checkpoint, write_checkpoint
from torchmto.lab.run.config import (
    ConfigError,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    config_of,
)
from torchmto.lab.run.loop import Interrupted, Trainer
from torchmto.lab.run.processes import RankError
from torchmto.lab.run.single import train

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
    "RunConfig",
    "Trainer",
    "config_of",
    "read_checkpoint",
    "train",
    "write_checkpoint",
]
