"""Finding the norm that belongs to each conv and linear layer."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import nn

from torchmto.structure.dataflow import (
    CONVOLUTIONS,
    Node,
    Recording,
    is_layer,
    isinstance_of_norm,
    record_dataflow,
    trace_subtrees,
)
from torchmto.structure.layers import StructuredLayer, norm_channels
from torchmto.structure.norms import SplitNorm
from torchmto.structure.preserve import undisturbed

logger = logging.getLogger(__name__)


def find_norm_pairs(
    model: nn.Module,
    *,
    forward: Callable[[], object] | None = None,
    recording: Recording | None = None,
    pairs: Iterable[tuple[str, str]] | None = None,
) -> list[StructuredLayer]:
    """Pair the conv and linear layers of a model with the norms that scale their channels.

    A layer is paired with the norm its output reaches through operations that keep channels apart
    (activations, dropout, residual sums, reshapes); this is the paper's conv -> BatchNorm. Where no norm
    follows, it is paired with the norm its input comes from, as in pre-norm transformer blocks.
    ``nn.MultiheadAttention`` counts as two layers, ``in_proj`` (rows of the packed weight; only where query,
    key and value come from one norm) and ``out_proj``. Where a sum of branches feeds a layer, no single norm
    precedes it.

    Found in this order: ``torch.fx`` on the largest subtrees that trace; the dataflow of a recorded forward
    pass; the order of the modules (a norm right after a layer, or right before a linear one), only for layers
    that neither of the former saw whole. What was used is logged, with the layers left without a norm. Layers
    whose weight is computed (parametrizations) are left out; of layers that share a weight the first counts.

    Args:
        model: the model, or its shared trunk. Norms may be split or not.
        forward: makes one forward pass, ``lambda: model(example)``; it is recorded without gradients, and
            norm statistics and torch's random state are put back.
        recording: a recording made with :func:`torchmto.structure.record_dataflow`, instead of ``forward``.
        pairs: paths of modules in the order the data runs through them, ``("conv1", "bn1")`` or ``("norm1",
            "fc1")``; then nothing is searched.

    Returns:
        One :class:`StructuredLayer` per paired layer, in the order of ``model.named_modules()``.

    Raises:
        ValueError: a pair that names no module, doesn't hold one layer and one norm, or whose channels don't
            fit; both ``forward`` and ``recording``.

    Source: the paper (arXiv 2406.02996) pairs conv and BatchNorm; all else is our generalisation.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> [(layer.name, layer.norm_out is model[1]) for layer in find_norm_pairs(model)]
        [('0', True)]
    """
    if forward is not None and recording is not None:
        raise ValueError("Parameters `forward` and `recording` exclude each other. Found both.")
    search = _Search(model)
    if pairs is not None:
        search.take(pairs)
        return search.result()
    for root, nodes in trace_subtrees(model):
        search.read(nodes, "fx", whole=root is model)
    if forward is not None:
        with undisturbed(model), torch.no_grad(), record_dataflow(model) as recorded:
            forward()
        recording = recorded
    if recording is not None:
        search.read(recording.nodes, "recorded", whole=True)
    search.guess_by_order()
    return search.result()


class _Search:
    """What is known so far about each layer: a module and, for attentions, one of its projections."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        copies = {copy for module in model.modules() if isinstance(module, SplitNorm) for copy in module.children()}
        inner = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        self.modules = {
            module: path
            for path, module in model.named_modules()
            if module not in copies and module not in inner and (is_layer(module) or isinstance_of_norm(module))
        }
        self.layers = [module for module in self.modules if is_layer(module)]
        self.found: dict[tuple[nn.Module, str], StructuredLayer] = {}
        self.settled: set[nn.Module] = set()

    def result(self) -> list[StructuredLayer]:
        chosen: dict[int, StructuredLayer] = {}
        for layer in self.layers:
            for part in _parts(layer):
                structured = self.found.get((layer, part))
                if structured is None:
                    logger.info("%s: no norm found, its gradients are summed plainly", self._name(layer, part))
                elif id(structured.weight) in chosen:
                    logger.info("%s: shares its weight with %s", structured.name, chosen[id(structured.weight)].name)
                else:
                    chosen[id(structured.weight)] = structured
                    norms = [("out", structured.norm_out), ("in", structured.norm_in)]
                    described = ", ".join(f"{side} {self.modules[norm]}" for side, norm in norms if norm is not None)
                    logger.info("%s: %s (%s)", structured.name, described, structured.source)
        return list(chosen.values())

    def read(self, nodes: Sequence[Node], source: str, *, whole: bool) -> None:
        """Pair the layers of a graph. ``whole``: it is the whole model's, so what it lacks doesn't exist."""
        layer_nodes = [
            (node, node.module)
            for node in nodes
            if node.module is not None and node.module in self.modules and is_layer(node.module)
        ]
        for node, layer in layer_nodes:
            for part in _parts(layer):
                if (layer, part) in self.found:
                    continue
                norm_out = None if part == "in_proj" else self._following(node, layer, part)
                norm_in = None if part == "out_proj" or norm_out is not None else self._preceding(node, layer, part)
                self._add(layer, part, norm_out, norm_in, source)
        if whole:
            self.settled.update(layer for _, layer in layer_nodes)

    def guess_by_order(self) -> None:
        order = list(self.modules)
        for before, after in pairwise(order):
            if is_layer(before) and isinstance_of_norm(after) and self._open(before):
                part = _parts(before)[-1]
                if self._fits(before, part, after, incoming=False):
                    self._add(before, part, after, None, "module order")
        for before, after in pairwise(order):
            if isinstance_of_norm(before) and isinstance(after, (nn.Linear, nn.MultiheadAttention)):
                part = _parts(after)[0]
                if self._open(after, part) and self._fits(after, part, before, incoming=True):
                    self._add(after, part, None, before, "module order")

    def take(self, pairs: Iterable[tuple[str, str]]) -> None:
        for first, second in pairs:
            before, after = self._module(first), self._module(second)
            incoming = isinstance_of_norm(before)
            layer, norm = (after, before) if incoming else (before, after)
            if not is_layer(layer) or not isinstance_of_norm(norm):
                raise ValueError(
                    "Parameter `pairs` should hold one conv or linear layer and one norm per pair. "
                    f"Found {(first, second)}."
                )
            part = _parts(layer)[0 if incoming else -1]
            if not self._fits(layer, part, norm, incoming=incoming):
                raise ValueError(f"Parameter `pairs`: the channels of {first!r} and {second!r} don't fit.")
            known = self.found.get((layer, part))
            norm_in, norm_out = (None, None) if known is None else (known.norm_in, known.norm_out)
            if incoming:
                norm_in = norm
            else:
                norm_out = norm
            self._add(layer, part, norm_out, norm_in, "explicit")

    def _module(self, path: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"Parameter `pairs`: the model has no module {path!r}.") from error

    def _open(self, layer: nn.Module, part: str | None = None) -> bool:
        part = _parts(layer)[-1] if part is None else part
        return layer not in self.settled and (layer, part) not in self.found

    def _name(self, layer: nn.Module, part: str) -> str:
        return ".".join(filter(None, (self.modules[layer], part)))

    def _following(self, node: Node, layer: nn.Module, part: str) -> nn.Module | None:
        """The first norm that the output reaches, breadth first, whose channels fit."""
        queue, seen = deque(node.users), {node}
        while queue:
            user = queue.popleft()
            if user in seen or user.mixes:
                continue
            seen.add(user)
            if not user.is_norm:
                queue.extend(user.users)
            elif user.module is not None and self._fits(layer, part, user.module, incoming=False):
                return user.module
        return None

    def _preceding(self, node: Node, layer: nn.Module, part: str) -> nn.Module | None:
        """The one norm that all of the input comes from."""
        norms = {_source_norm(source) for source in node.inputs}
        norm = norms.pop() if len(norms) == 1 else None
        return norm if norm is not None and self._fits(layer, part, norm, incoming=True) else None

    def _fits(self, layer: nn.Module, part: str, norm: nn.Module, *, incoming: bool) -> bool:
        candidate = self._structured(layer, part, None, None, "")
        if candidate is None:
            return False
        have = norm_channels(norm, spatial=candidate.spatial)
        if incoming:
            return have == candidate.num_inputs
        heads = isinstance(layer, nn.Linear) and have > 0 and candidate.num_channels % have == 0
        return have == candidate.num_channels or heads

    def _add(
        self, layer: nn.Module, part: str, norm_out: nn.Module | None, norm_in: nn.Module | None, source: str
    ) -> None:
        structured = self._structured(layer, part, norm_out, norm_in, source)
        if structured is not None and (norm_out is not None or norm_in is not None):
            self.found[layer, part] = structured

    def _structured(
        self, layer: nn.Module, part: str, norm_out: nn.Module | None, norm_in: nn.Module | None, source: str
    ) -> StructuredLayer | None:
        own: nn.Module = layer.get_submodule("out_proj") if part == "out_proj" else layer
        prefix = "in_proj_" if part == "in_proj" else ""
        parameters = dict(own.named_parameters(recurse=False))
        weight = parameters.get(f"{prefix}weight")
        if weight is None:
            return None
        return StructuredLayer(
            name=self._name(layer, part),
            weight=weight,
            bias=parameters.get(f"{prefix}bias"),
            norm_out=norm_out,
            norm_in=norm_in,
            groups=int(getattr(layer, "groups", 1)) if isinstance(layer, CONVOLUTIONS) else 1,
            transposed=bool(getattr(layer, "transposed", False)) if isinstance(layer, CONVOLUTIONS) else False,
            spatial=isinstance(layer, CONVOLUTIONS),
            source=source,
        )


def _parts(layer: nn.Module) -> tuple[str, ...]:
    return ("in_proj", "out_proj") if isinstance(layer, nn.MultiheadAttention) else ("",)


def _source_norm(node: Node) -> nn.Module | None:
    """The one norm that all of a value comes from through operations that keep channels apart, if any."""
    origins: set[nn.Module | None] = set()
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.is_norm:
            origins.add(current.module)
        elif current.mixes or not current.inputs:
            origins.add(None)
        else:
            waiting.extend(current.inputs)
    return origins.pop() if len(origins) == 1 else None
