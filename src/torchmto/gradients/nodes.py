"""What the nodes of a backward graph are."""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

# Everything private that is known of nodes is here.

_NATIVE = re.compile(r"Backward\d+$")


def saved(node: Any, name: str, default: Any = None) -> Any:
    """What a node has saved as ``name``; ``default`` if nodes of its kind save no such thing."""
    return getattr(node, f"_saved_{name}", default) if default is not None else getattr(node, f"_saved_{name}")


def places(node: Any) -> Sequence[Any]:
    """The shape, dtype and device of the tensors whose gradients a node takes."""
    known: Sequence[Any] = node._input_metadata  # noqa: SLF001
    return known


def number_of(node: Node) -> int:
    """A number that is larger for operations that ran later; the largest there is for leaves."""
    return int(node._sequence_nr())  # noqa: SLF001


@functools.cache
def _names(kind: Hashable) -> tuple[str, ...] | None:
    """What nodes of a kind of PyTorch's own save; None for other nodes: of custom functions, compiled regions, views."""
    if not isinstance(kind, type) or issubclass(kind, BackwardCFunction) or not _NATIVE.search(kind.__name__):
        return None
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def has_hooks(leaf: Tensor) -> bool:
    """Whether something else than the optimizer looks at, or changes, the gradient of a leaf."""
    return bool(leaf._backward_hooks)  # noqa: SLF001


def native(node: Node) -> bool:
    """Whether a node is PyTorch's own and may be called outside of a backward."""
    return _names(node.__class__) is not None


def hooked(node: Node) -> bool:
    """Whether something else than a tensor is saved (checkpointing, offloading): only backwards may unpack it."""
    for name in _names(node.__class__) or ():
        kept = getattr(node, name)
        for entry in kept if isinstance(kept, tuple) else (kept,):
            if getattr(entry, "unpack_hook", entry) is not None:
                return True
    return False


class Hooks:
    """Whether hooks were set since: PyTorch numbers their handles, wherever they are."""

    def __init__(self) -> None:
        self._first = RemovableHandle.next_id

    @property
    def new(self) -> bool:
        """Whether there are new hooks: those on activations are always new, but a node doesn't tell that it has one."""
        return RemovableHandle.next_id != self._first
