"""Compiled regions of a graph that several backwards go through.

A compiled backward may write over what the forward has saved for it (PyTorch's "donated buffers"). That is fine for one
backward, and garbage for those after it. Whether it does so is decided when it is compiled; PyTorch's own check is off while
the setting is off, and its cache on disk doesn't tell the two kinds apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

TAG = "torchmto"
"""Part of the names under which the caches on disk keep what is compiled in a step."""

_CACHES: Any = getattr(torch.compiler, "config", None)
_TAGGED = hasattr(_CACHES, "cache_key_tag")
if not _TAGGED:
    # An older PyTorch: nothing is read from the cache then.
    from torch._inductor import config as _CACHES

_CACHE = "cache_key_tag" if _TAGGED else "fx_graph_cache"


@contextlib.contextmanager
def keeping_buffers() -> Iterator[None]:
    """Whatever is compiled in this context keeps what its forward has saved, however many backwards there are."""
    donated, cache = functorch_config.donated_buffer, getattr(_CACHES, _CACHE)
    functorch_config.donated_buffer = False
    setattr(_CACHES, _CACHE, cache + TAG if _TAGGED else False)
    try:
        yield
    finally:
        functorch_config.donated_buffer = donated
        setattr(_CACHES, _CACHE, cache)


def check_keeps(losses: Iterable[Tensor]) -> None:
    """Raise if a compiled region in the graph of ``losses`` gives up in its first backward what the forward has saved.

    Raises:
        ValueError: If there is one.
    """
    stack: list[Any] = [loss.grad_fn for loss in losses]
    visited = set(stack)
    while stack:
        node = stack.pop()
        region = getattr(node, "_forward_cls", None)
        donated = getattr(getattr(region, "metadata", None), "bw_donated_idxs", None)
        # Not compiled yet, it will learn from its first backward that others follow.
        if donated and getattr(region, "compiled_bw", node) is not None:
            raise ValueError(
                "The model was compiled outside mt.step, for one backward only: that backward writes over what the next "
                "task's needs. Call `torch.compiler.reset()` and pass a closure, so that the model is compiled within mt.step."
            )
        for following, _ in getattr(node, "next_functions", ()):
            if following is not None and following not in visited:
                visited.add(following)
                stack.append(following)
