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


def _settings() -> list[tuple[Any, str, object]]:
    """The compiler's settings in a step: module, name, value."""
    tags: Any = getattr(torch.compiler, "config", None)
    if hasattr(tags, "cache_key_tag"):
        apart: tuple[Any, str, object] = (tags, "cache_key_tag", f"{tags.cache_key_tag}{TAG}")
    else:
        from torch._inductor import config as inductor_config  # noqa: PLC0415 - PyTorch before the tag only

        apart = (inductor_config, "fx_graph_cache", False)
    return [(functorch_config, "donated_buffer", False), apart]


@contextlib.contextmanager
def keeping_buffers() -> Iterator[None]:
    """Whatever is compiled in this context keeps what its forward has saved, however many backwards there are."""
    settings = _settings()
    before = [getattr(module, name) for module, name, _ in settings]
    for module, name, value in settings:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(settings, before, strict=True):
            setattr(module, name, value)


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
