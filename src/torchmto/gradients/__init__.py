"""Which parameters are shared, the K x P matrix of their task gradients, and its reduction across ranks."""

from torchmto.gradients.backwards import backward, gradients_of
from torchmto.gradients.choice import Auto
from torchmto.gradients.engine import Engine
from torchmto.gradients.finite import dense, finite_mark, plain, real
from torchmto.gradients.hooks import quiet, run_hooks
from torchmto.gradients.layerwise import Layerwise
from torchmto.gradients.ranks import Ranks
from torchmto.gradients.reach import check_keeps, reach_of, refuse_hidden, refuse_reentrant, run_unreached
from torchmto.gradients.representation import Representation
from torchmto.gradients.roles import Agreement, Roles
from torchmto.gradients.rows import Rows, gramian
from torchmto.gradients.sharded import ShardedRows
from torchmto.gradients.torch_private import keeping_buffers, may_compile, nodes_made

__all__ = [
    "Agreement",
    "Auto",
    "Engine",
    "Layerwise",
    "Ranks",
    "Representation",
    "Roles",
    "Rows",
    "ShardedRows",
    "backward",
    "check_keeps",
    "dense",
    "finite_mark",
    "gradients_of",
    "gramian",
    "keeping_buffers",
    "may_compile",
    "nodes_made",
    "plain",
    "quiet",
    "reach_of",
    "real",
    "refuse_hidden",
    "refuse_reentrant",
    "run_hooks",
    "run_unreached",
]
