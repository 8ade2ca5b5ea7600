"""Finding the norm that belongs to each conv and linear layer."""

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from torchmto.gradients.torch_private import modules_of
from torchmto.structure import dataflow
from torchmto.structure.dataflow import CONVS, Node, Recording, is_any_norm, is_layer, record_dataflow, trace_subtrees
from torchmto.structure.layers import StructuredLayer, norm_axes, norm_channels, norm_places
from torchmto.task_norms import SplitNorm
from torchmto.undo import undisturbed

logger = logging.getLogger(__name__)

_Key = tuple[nn.Module, str]
"""A layer: its module and, for attentions, one of its projections."""

Pairs = dict[str, list[str | None]]
"""A layer's name -> the names of the norms after and before it, and how they were found; None for what there isn't.

``<norm>@<n>`` is a norm after a concatenation, whose channels from n on are the layer's.
"""


def find_norm_pairs(
    model: nn.Module,
    *,
    forward: Callable[[], object] | None = None,
    recording: Recording | None = None,
    pairs: Iterable[tuple[str, str]] | None = None,
) -> list[StructuredLayer]:
    """Pair the conv and linear layers of a model with the norms that scale their channels.

    A layer is paired with the norm its output reaches through operations that keep channels apart
    (activations, dropout, residual sums, products, reshapes); this is the paper's conv -> BatchNorm. So is the last layer
    of a gate that scales channels, as in squeeze-and-excitation, with the norm after the product. A norm after a
    concatenation is paired with each layer by the layer's own channels of it. It is also paired with the norm
    its input comes from, as in pre-norm transformer blocks; not where a norm that tracks a variance follows,
    so that there the strength is the paper's. ``nn.MultiheadAttention`` counts as two layers, ``in_proj``
    (rows of the packed weight; only where query, key and value come from one norm) and ``out_proj``. Where a
    sum of branches feeds a layer, no single norm precedes it.

    A linear layer may have several times the norm's channels: a norm over the last dimension (the width of a head) then
    serves every head, a BatchNorm, GroupNorm or InstanceNorm the outputs that become its maps, ``c * h * w`` to
    ``(c + 1) * h * w - 1``. A norm of a part of the outputs (q of a packed qkv, a chunk) is no pair.

    A recorded forward pass shows where channels go: what is in between runs again on ones, with some channels NaN. Where
    they get mixed or change places, or the norm scales another dimension, there is no pair. Without one, the kinds and sizes of
    layer and norm and the names of the operations between decide: a transposition or a flip isn't noticed, give ``pairs``.

    Of a layer that is used several times the first use with a norm counts: one weight has one set of strengths.
    A norm that is used several times goes with every layer that runs into it.

    Found in this order: the dataflow of a recorded forward pass; ``torch.fx`` on the largest subtrees that trace, for what it
    doesn't show, without the norm after the last layer of a subtree; the order of the modules (a norm right
    after a layer, or right before a linear one), only for layers that neither of the former saw whole. What was
    used is logged, with the layers left without a norm. Layers whose weight is computed (parametrizations) are
    left out; of layers that share a weight the first counts.

    Args:
        model: The model, or its shared trunk. Norms may be split or not.
        forward: Makes one forward pass, ``lambda: model(example)``; it is recorded without gradients, and
            norm statistics and torch's random state are put back.
        recording: A recording made with :func:`torchmto.structure.record_dataflow`, instead of ``forward``.
        pairs: Paths of modules in the order the data runs through them, ``("conv1", "bn1")`` or ``("norm1",
            "fc1")``; then nothing is searched.

    Returns:
        One :class:`StructuredLayer` per paired layer, in the order of ``model.named_modules()``.

    Raises:
        ValueError: A pair that names no module, doesn't hold one layer and one norm, or whose channels don't
            fit; both ``forward`` and ``recording``.

    Source: the paper (arXiv 2406.02996) pairs conv and BatchNorm; all else is our generalisation.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> [(layer.name, layer.norm_out is model[1]) for layer in find_norm_pairs(model)]
        [('0', True)]
    """
    if forward is not None and recording is not None:
        raise ValueError("Parameters `forward` and `recording` exclude each other. Found both.")
    search = PairSearch(model)
    if pairs is not None:
        search.take(pairs)
        return search.result()
    if forward is not None:
        with undisturbed(model), torch.no_grad(), record_dataflow(model) as recorded:
            forward()
        recording = recorded
    if recording is not None:
        search.read(recording.nodes, "recorded")
    search.trace()
    search.guess_by_order()
    return search.result()


class PairSearch:
    """What is known so far about each layer: a module and, for attentions, one of its projections.

    Args:
        model: The model.
        serves: Whether a norm may go with the layer of a weight; asked for pairs that aren't given explicitly.
            By default any may. A norm that only one of a layer's tasks runs says nothing about the others.
    """

    def __init__(self, model: nn.Module, serves: Callable[[nn.Parameter, nn.Module], bool] | None = None) -> None:
        self.model = model
        self.serves = serves
        copies = {copy for module in model.modules() if isinstance(module, SplitNorm) for copy in module.children()}
        inner = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        self.modules = {
            module: path
            for path, module in modules_of(model).items()
            if module not in copies and module not in inner and (is_layer(module) or is_any_norm(module))
        }
        self.names = {
            ".".join(filter(None, (path, part))): (module, part)
            for module, path in self.modules.items()
            for part in _parts(module)
        }
        # What they are by themselves; those whose weight is computed are left out.
        alone = {key: _unpaired(name, *key) for name, key in self.names.items()}
        self.layers = {key: layer for key, layer in alone.items() if layer is not None}
        self.found: dict[_Key, StructuredLayer] = {}
        self.settled: set[nn.Module] = set()
        self.refuted: set[tuple[_Key, nn.Module, bool]] = set()

    def result(self) -> list[StructuredLayer]:
        """The paired layers, in the order of the model's modules."""
        chosen: dict[int, StructuredLayer] = {}
        for name, key in self.names.items():
            structured = self.found.get(key)
            if structured is None:
                logger.info("%s: no norm found, its gradients are summed plainly", name)
            elif id(structured.weight) in chosen:
                logger.info("%s: shares its weight with %s", structured.name, chosen[id(structured.weight)].name)
            else:
                chosen[id(structured.weight)] = structured
                norms = [("out", structured.norm_out), ("in", structured.norm_in)]
                described = ", ".join(f"{side} {self.modules[norm]}" for side, norm in norms if norm is not None)
                logger.info("%s: %s (%s)", structured.name, described, structured.source)
        return list(chosen.values())

    def pairs(self) -> Pairs:
        """What is known, by name: also of layers that were seen and have no norm."""
        known: Pairs = {}
        for name, key in self.names.items():
            structured = self.found.get(key)
            if structured is not None:
                norms = [structured.norm_out, structured.norm_in]
                after, before = (None if norm is None else self.modules[norm] for norm in norms)
                start = structured.out_start
                known[name] = [after if start is None else f"{after}@{start}", before, structured.source]
            elif key[0] in self.settled:
                known[name] = [None, None, None]
        return known

    def recall(self, pairs: Pairs) -> None:
        """Take over what an earlier search of this model knew and this one doesn't.

        Raises:
            ValueError: A name that the model doesn't have, or channels that don't fit.
        """
        norms: dict[str | None, nn.Module | None] = {None: None}
        norms |= {path: module for module, path in self.modules.items() if is_any_norm(module)}
        for name, (after, before, source) in pairs.items():
            first, _, place = (after or "").partition("@")
            path, start = first or None, int(place) if place.isdecimal() else None
            if name not in self.names or path not in norms or before not in norms:
                raise ValueError(f"The model has no layer {name!r} with the norms {after!r} and {before!r}.")
            key, norm_out, norm_in = self.names[name], norms[path], norms[before]
            if not (self._fits(key, norm_out, incoming=False, start=start) and self._fits(key, norm_in, incoming=True)):
                raise ValueError(f"The channels of layer {name!r} and the norms {after!r} and {before!r} don't fit.")
            if norm_out is None and norm_in is None:
                self.settled.add(key[0])
            elif key not in self.found and self._serve(key, norm_out) and self._serve(key, norm_in):
                self.found[key] = replace(
                    self.layers[key], norm_out=norm_out, norm_in=norm_in, source=source or "", out_start=start
                )

    def trace(self) -> None:
        """Pair the layers of the subtrees that ``torch.fx`` can trace."""
        for root, nodes in trace_subtrees(self.model):
            self.read(nodes, "fx", whole=root is self.model)

    def read(self, nodes: Sequence[Node], source: str, *, whole: bool = True) -> None:
        """Pair the layers of a graph. ``whole``: it is the whole model's, so what it lacks doesn't exist."""
        used = [(node, node.module) for node in nodes if node.module is not None]
        seen: set[_Key] = set()
        with undisturbed(self.model) if source == "recorded" else nullcontext(), torch.no_grad():
            for node, module in used:
                for part in _parts(module):
                    key = module, part
                    if key in self.layers and key not in seen and self._complete(node, key, source):
                        seen.add(key)
        if whole:
            self.settled.update(module for _, module in used)

    def _complete(self, node: Node, key: _Key, source: str) -> bool:
        """Pair a layer by one of its uses, with what isn't known of it yet; whether that is anything."""
        known = self.found.get(key, self.layers[key])
        if known.source == "explicit":
            return False
        norm_out, norm_in, start = known.norm_out, known.norm_in, known.out_start
        if norm_out is None and key[1] != "in_proj":
            norm_out, start = self._following(node, key)
        if _tracks_variance(norm_out):
            # The paper's formula: the variance shows what comes in.
            norm_in = None
        elif norm_in is None and key[1] != "out_proj":
            norm_in = self._preceding(node, key)
        if (norm_out, norm_in) == (known.norm_out, known.norm_in):
            return False
        self.found[key] = replace(
            known, norm_out=norm_out, norm_in=norm_in, source=known.source or source, out_start=start
        )
        return True

    def guess_by_order(self) -> None:
        """Pair layers that no graph holds with the norm right after them, or right before a linear one."""
        order = list(self.modules)
        for before, after in pairwise(order):
            if is_layer(before) and is_any_norm(after):
                key = before, _parts(before)[-1]
                if self._open(key) and self._suits(key, after, incoming=False):
                    self.found[key] = replace(self.layers[key], norm_out=after, source="module order")
        for before, after in pairwise(order):
            if is_any_norm(before) and isinstance(after, (nn.Linear, nn.MultiheadAttention)):
                key = after, _parts(after)[0]
                if self._open(key) and self._suits(key, before, incoming=True):
                    self.found[key] = replace(self.layers[key], norm_in=before, source="module order")

    def take(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Pair explicitly; see :func:`find_norm_pairs`."""
        for first, second in pairs:
            before, after = self._module(first), self._module(second)
            incoming = is_any_norm(before)
            layer, norm = (after, before) if incoming else (before, after)
            if not is_layer(layer) or not is_any_norm(norm):
                raise ValueError(
                    "Parameter `pairs` should hold one conv or linear layer and one norm per pair. "
                    f"Found {(first, second)}."
                )
            key = layer, _parts(layer)[0 if incoming else -1]
            if not self._fits(key, norm, incoming=incoming):
                raise ValueError(f"Parameter `pairs`: the channels of {first!r} and {second!r} don't fit.")
            known = replace(self.found.get(key, self.layers[key]), source="explicit")
            self.found[key] = replace(known, norm_in=norm) if incoming else replace(known, norm_out=norm)

    def _module(self, path: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"Parameter `pairs`: the model has no module {path!r}.") from error

    def _open(self, key: _Key) -> bool:
        return key in self.layers and key not in self.found and key[0] not in self.settled

    def _following(self, node: Node, key: _Key) -> tuple[nn.Module | None, int | None]:
        """The first norm that the output reaches, breadth first, whose channels fit; and where the layer's begin.

        The latter is None unless the norm takes a concatenation.
        """
        queue: deque[tuple[Node, Node, int, set[str]]] = deque((node, user, 0, set()) for user in node.users)
        seen = {node}
        while queue:
            source, user, start, path = queue.popleft()
            if user in seen or user.mixes:
                continue
            seen.add(user)
            if user.module is not None and user.is_norm:
                norm = user.module
                whole = norm_channels(norm, spatial=self.layers[key].spatial)
                if self._suits(key, norm, incoming=False, ends=(node, user), path=path):
                    return norm, None
                if _width(source) == whole and self._suits(key, norm, incoming=False, start=start, ends=(node, user)):
                    return norm, start
            else:
                if user.concatenates:
                    before = [_width(entry) for entry in user.inputs[: user.inputs.index(source)]]
                    start = start + sum(before) if all(before) else -1
                path = path | {user.op if user.module is None else type(user.module).__name__.lower()}
                queue.extend((user, following, start, path) for following in user.users)
        return None, None

    def _preceding(self, node: Node, key: _Key) -> nn.Module | None:
        """The one norm that all of the input comes from."""
        origins = _origins(node.inputs, joins=True)
        norms = {origin.module if origin.is_norm else None for origin in origins}
        norm = norms.pop() if len(norms) == 1 else None
        return norm if norm is not None and self._suits(key, norm, incoming=True, ends=(*origins, node)) else None

    def _suits(
        self,
        key: _Key,
        norm: nn.Module,
        *,
        incoming: bool,
        start: int | None = None,
        ends: Sequence[Node] = (),
        path: Collection[str] = (),
    ) -> bool:
        """Whether a norm goes with a layer, by the channels they have, and where these get from the first ``ends``."""
        if not (self._fits(key, norm, incoming=incoming, start=start) and self._serve(key, norm)):
            return False
        use, layer = (key, norm, incoming), self.layers[key]
        axes, width = norm_axes(norm, spatial=layer.spatial), norm_channels(norm, spatial=layer.spatial)
        if ends and ends[-1].arguments:
            own, channels = 1 - layer.weight.dim(), layer.num_inputs if incoming else layer.num_channels
            places = norm_places(norm, channels, start, spatial=layer.spatial)
            tried = [(axis, own) if incoming else (own, axis) for axis in axes]
            with suppress(Exception):  # an operation that doesn't run again says nothing
                if not any(dataflow.keeps_apart(ends[:-1], ends[-1].arguments, places, both, width) for both in tried):
                    self.refuted.add(use)
                    return False
            return True
        if not incoming:  # No numbers: what the operations are called has to do.
            parts = start is None and layer.num_channels != width and dataflow.PARTING.intersection(path)
            if parts or (layer.spatial and axes == (-1,) and ends and not path):
                return False
        return use not in self.refuted

    def _serve(self, key: _Key, norm: nn.Module | None) -> bool:
        return norm is None or self.serves is None or self.serves(self.layers[key].weight, norm)

    def _fits(self, key: _Key, norm: nn.Module | None, *, incoming: bool, start: int | None = None) -> bool:
        layer = self.layers.get(key)
        if norm is None or layer is None:
            return norm is None
        have = norm_channels(norm, spatial=layer.spatial)
        if incoming:
            return have == layer.num_inputs
        if start is not None:
            return 0 <= start <= have - layer.num_channels
        heads = isinstance(key[0], nn.Linear) and have > 0 and layer.num_channels % have == 0
        return have == layer.num_channels or heads


def _unpaired(name: str, layer: nn.Module, part: str) -> StructuredLayer | None:
    """What a layer is by itself; None if its weight is computed."""
    own: nn.Module = layer.get_submodule("out_proj") if part == "out_proj" else layer
    prefix = "in_proj_" if part == "in_proj" else ""
    parameters = dict(own.named_parameters(recurse=False))
    weight = parameters.get(f"{prefix}weight")
    if weight is None:
        return None
    spatial = isinstance(layer, CONVS)
    return StructuredLayer(
        name=name,
        weight=weight,
        bias=parameters.get(f"{prefix}bias"),
        norm_out=None,
        norm_in=None,
        groups=int(getattr(layer, "groups", 1)) if spatial else 1,
        transposed=bool(getattr(layer, "transposed", False)) if spatial else False,
        spatial=spatial,
        source="",
    )


def _parts(module: nn.Module) -> tuple[str, ...]:
    """The layers that a module counts as."""
    if isinstance(module, nn.MultiheadAttention):
        return "in_proj", "out_proj"
    return ("",) if is_layer(module) else ()


def _tracks_variance(norm: nn.Module | None) -> bool:
    """Whether a norm divides by a variance that it tracks."""
    if isinstance(norm, SplitNorm):
        norm = norm.copy_for(norm.task_names[0])
    return getattr(norm, "running_var", None) is not None or getattr(norm, "running_group_var", None) is not None


def _origins(nodes: Iterable[Node], *, joins: bool) -> set[Node]:
    """Where values come from through operations that keep channels apart, ``joins``: and through concatenations."""
    origins: set[Node] = set()
    waiting, seen = list(nodes), set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.is_norm or current.mixes or not current.inputs or (current.concatenates and not joins):
            origins.add(current)
        else:
            waiting.extend(current.inputs)
    return origins


def _width(node: Node) -> int:
    """The channels of a value, as far as layers and norms tell; 0 if they don't."""
    widths = {_own_width(origin) for origin in _origins([node], joins=False)}
    return widths.pop() if len(widths) == 1 else 0


def _own_width(node: Node) -> int:
    """The channels of what a norm, a layer or a concatenation puts out; 0 for anything else."""
    if node.module is not None:
        if node.is_norm:
            return norm_channels(node.module)
        names = ("out_channels", "out_features", "embed_dim") if is_layer(node.module) else ()
        return next((int(getattr(node.module, name)) for name in names if hasattr(node.module, name)), 0)
    parts = [_width(entry) for entry in node.inputs] if node.concatenates else [0]
    return sum(parts) if all(parts) else 0
