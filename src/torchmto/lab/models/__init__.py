"""Multi-task models: a trunk, one head per task, ``model(x, tasks=None) -> {task: output}``."""

from torchmto.lab.models.base import MultiTaskModel, Trunk
from torchmto.lab.models.bev import BEVNet, BEVTrunk
from torchmto.lab.models.checkpointing import checkpoint_blocks
from torchmto.lab.models.convnet import ConvNetTrunk, SegNetTrunk
from torchmto.lab.models.cross_stitch import CrossStitch
from torchmto.lab.models.efficientnet import EfficientNetTrunk
from torchmto.lab.models.hrnet import HRNetTrunk
from torchmto.lab.models.huggingface import HuggingFaceTrunk, ViTTrunk
from torchmto.lab.models.mlp import MLPTrunk
from torchmto.lab.models.mtinet import MTINet
from torchmto.lab.models.registry import build_model, model_options, models, with_decoders
from torchmto.lab.models.rotograd import RotoGrad
from torchmto.lab.models.weights import load_weights

__all__ = [
    "BEVNet",
    "BEVTrunk",
    "ConvNetTrunk",
    "CrossStitch",
    "EfficientNetTrunk",
    "HRNetTrunk",
    "HuggingFaceTrunk",
    "MLPTrunk",
    "MTINet",
    "MultiTaskModel",
    "RotoGrad",
    "SegNetTrunk",
    "Trunk",
    "ViTTrunk",
    "build_model",
    "checkpoint_blocks",
    "load_weights",
    "model_options",
    "models",
    "with_decoders",
]
