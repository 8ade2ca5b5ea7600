"""Which parameters are shared, the K x P matrix of their task gradients, and its reduction across ranks."""

from torchmto.gradients.choice import Auto
from torchmto.gradients.compiled import check_keeps, keeping_buffers
from torchmto.gradients.engine import Engine
from torchmto.gradients.finite import all_finite, dense, finite_mark
from torchmto.gradients.layerwise import Layerwise
from torchmto.gradients.ranks import Ranks
from torchmto.gradients.representation import Representation
from torchmto.gradients.roles import Roles, reached_parameters
from torchmto.gradients.rows import Rows, gramian
from torchmto.gradients.sharded import ShardedRows

__all__ = [
    "Auto",
    "Engine",
    "Layerwise",
    "Ranks",
    "Representation",
    "Roles",
    "Rows",
    "ShardedRows",
    "all_finite",
    "check_keeps",
    "dense",
    "finite_mark",
    "gramian",
    "keeping_buffers",
    "reached_parameters",
]
