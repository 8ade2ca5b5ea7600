"""Which operations feed which: the graph in which conv, linear and norm layers are paired."""

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from torchmto.gradients.torch_private import tree_leaves, tree_map
from torchmto.task_norms import SplitNorm, is_norm
from torchmto.undo import undisturbed

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVS, nn.Linear, nn.MultiheadAttention)

# Operations after which a channel is no longer the channel it was.
_MIXING = frozenset(
    [
        *("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "linear", "bilinear"),
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("scaled_dot_product_attention", "multi_head_attention_forward", "lstm", "gru", "embedding"),
        *("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "local_response_norm"),
        *("normalize", "softmax", "log_softmax", "softmin", "gumbel_softmax", "safe_softmax", "renorm"),
        *("addbmm", "addmv", "addr", "mv", "inner", "outer", "kron", "chain_matmul", "matrix_exp", "matrix_power"),
        *("rnn_tanh", "rnn_relu", "rnn_tanh_cell", "rnn_relu_cell", "gru_cell", "lstm_cell", "cov", "corrcoef"),
        *("cross_entropy", "nll_loss", "cdist", "cosine_similarity", "addmm_activation", "channel_shuffle"),
        *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "cumulative_trapezoid", "gradient", "diff"),
        *("sort", "msort", "unique"),
    ]
)
# Operations that give a part of the channels, or one for several.
PARTING = frozenset(
    [
        *("chunk", "split", "tensor_split", "unbind", "getitem", "select", "narrow", "index_select", "gather"),
        *("mean", "sum", "max", "min", "amax", "amin", "glu"),
    ]
)
_JOINING = frozenset(("cat", "concat", "concatenate", "hstack"))
_PROPERTIES = frozenset(("shape", "ndim", "dtype", "device"))


@dataclass(eq=False)
class Node:
    """One operation: a layer or norm of the model (``module``) or anything else (``op``)."""

    op: str
    module: nn.Module | None = None
    inputs: list["Node"] = field(default_factory=list)
    users: list["Node"] = field(default_factory=list)
    # Of a recorded operation: how to run it again, and what it took and put out.
    run: Callable[..., Any] | None = None
    arguments: Any = ()
    outputs: list["Value"] = field(default_factory=list)

    @property
    def is_norm(self) -> bool:
        """Whether a norm runs here."""
        return self.module is not None and is_any_norm(self.module)

    @property
    def mixes(self) -> bool:
        """Whether channels are mixed here, so that a search ends."""
        if self.module is not None:
            return not is_any_norm(self.module) and _mixes_channels(self.module)
        return self.op in _MIXING or self.op.startswith(("fft_", "linalg_"))

    @property
    def concatenates(self) -> bool:
        """Whether values are put side by side here."""
        return self.module is None and self.op in _JOINING

    def connect(self, inputs: list["Node"]) -> None:
        """Record where this operation's inputs come from."""
        self.inputs = inputs
        for node in dict.fromkeys(inputs):
            node.users.append(self)


@dataclass(eq=False)
class Value:
    """A tensor of a recorded forward pass: what it looked like, and of which operation it was which output."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    node: Node | None = None
    place: int = 0

    def ones(self) -> Tensor:
        """A tensor that looks like it."""
        return torch.ones(self.shape, dtype=self.dtype, device=self.device)


def is_any_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, split or not."""
    return isinstance(module, SplitNorm) or is_norm(module)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a conv, linear or attention layer."""
    return isinstance(module, LAYERS)


def _is_opaque(module: nn.Module) -> bool:
    """Whether a module is one node: a layer, a norm, or something without any inside."""
    if is_layer(module) or is_any_norm(module):
        return True
    return not any(is_layer(inner) or is_any_norm(inner) for inner in module.modules())


def _mixes_channels(module: nn.Module) -> bool:
    by_name = (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.LocalResponseNorm, nn.ChannelShuffle)
    return (
        isinstance(module, by_name) or is_layer(module) or any(parameter.dim() > 1 for parameter in module.parameters())
    )


class _Tracer(fx.Tracer):
    """Traces what its own thread runs: while it does, every thread's modules are called and read through it."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_opaque(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        own = threading.get_ident() == self._thread
        return super().call_module(m, forward, args, kwargs) if own else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        own = threading.get_ident() == self._thread
        return super().getattr(attr, attr_val, parameter_proxy_cache) if own else attr_val


_ONE_AT_A_TIME = threading.Lock()
"""Tracing changes `nn.Module` itself and puts back what it found there: never what another thread has put there."""


def trace_subtrees(model: nn.Module) -> list[tuple[nn.Module, list[Node]]]:
    """The graphs of the largest subtrees of a model that ``torch.fx`` can trace.

    Tracing runs the modules' Python code on stand-ins for tensors and parameters, with arguments that have a
    plain default (a flag, None) fixed to it. Attributes that the code sets, buffers and random states are put
    back. The code draws from fixed seeds, so that the graphs are the same whenever and on whichever rank it
    runs.

    Args:
        model: Any module.

    Returns:
        Each traced module with its operations in order.
    """
    with undisturbed(model, seed=0):
        return list(_traced_subtrees(model))


def _traced_subtrees(model: nn.Module) -> Iterator[tuple[nn.Module, list[Node]]]:
    if _is_opaque(model):
        return
    graph = _trace(model)
    if graph is None:
        for child in model.children():
            yield from _traced_subtrees(child)
    else:
        yield model, _nodes_of(model, graph)


def _trace(module: nn.Module) -> fx.Graph | None:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    fixed = {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is None or isinstance(parameter.default, (bool, int, float, str))
    }
    attributes = [(inner, dict(inner.__dict__)) for inner in module.modules()]
    try:
        with _ONE_AT_A_TIME:
            return _Tracer().trace(module, concrete_args=fixed)
    except Exception:  # noqa: BLE001 - the module's own code runs on stand-ins: anything may come out of it
        return None
    finally:
        for inner, before in attributes:
            inner.__dict__.clear()
            inner.__dict__.update(before)


def _nodes_of(root: nn.Module, graph: fx.Graph) -> list[Node]:
    nodes: dict[fx.Node, Node] = {}
    constants: set[fx.Node] = set()  # parameters, shapes and what is computed from them: no branch of the dataflow
    for traced in graph.nodes:
        if traced.op == "placeholder":
            nodes[traced] = Node("input")
            continue
        module = root.get_submodule(traced.target) if traced.op == "call_module" else None
        sources = _data_inputs(module, traced.args, traced.kwargs) if module is not None else traced.all_input_nodes
        sources = [source for source in sources if isinstance(source, fx.Node) and source not in constants]
        name = traced.target if isinstance(traced.target, str) else getattr(traced.target, "__name__", "")
        asks_shape = name in ("size", "dim", "numel") or (name == "getattr" and traced.args[1] in _PROPERTIES)
        if asks_shape or not sources:
            constants.add(traced)
            continue
        nodes[traced] = Node("module" if module is not None else name.strip("_"), module)
        nodes[traced].connect([nodes[source] for source in sources])
    return list(nodes.values())


def _data_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a module that are data: query, key and value, the input of a layer, or all."""
    if isinstance(module, nn.MultiheadAttention):
        return [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)][:3]
    if is_layer(module) or is_any_norm(module):
        return [*args, *kwargs.values()][:1]
    return tree_leaves((args, kwargs))


def keeps_apart(
    sources: Collection[Node], ends: Sequence[Value], places: Tensor, axes: tuple[int, int], width: int
) -> bool:
    """Whether channel c of what recorded operations put out is channel ``places[c]`` of other tensors, and nothing else is.

    The operations in between run again on ones, with some channels NaN: these arrive where they belong, and only there.

    Args:
        sources: The operations.
        ends: The other tensors.
        places: int64, where each channel belongs.
        axes: The dimensions of the channels of both.
        width: How many channels the others have.
    """
    starts = [source.outputs[0] for source in sources]
    axis, end_axis = axes
    seen = [(start, axis, len(places)) for start in starts] + [(end, end_axis, width) for end in ends]
    if not ends or any(not -len(v.shape) <= a < len(v.shape) or v.shape[a] != size for v, a, size in seen):
        return False
    if len(places) > width and any(end.shape.numel() != starts[0].shape.numel() for end in ends):
        return False  # a part of the channels, or the largest of several
    if all(end in starts for end in ends):
        return (axis - end_axis) % len(ends[0].shape) == 0
    between, waiting = set(sources), list(sources)
    while waiting:
        new = {user for user in waiting.pop().users if user.run is not None} - between
        between |= new
        waiting.extend(new)
    code = torch.randperm(width, generator=torch.Generator().manual_seed(0), device="cpu")
    ours = torch.zeros(width, dtype=torch.bool, device="cpu").index_fill(0, places, value=True)
    # Of large layers some bits of a random code tell enough: what mixes channels mixes many.
    for chosen in (code >> power & 1 == bit for power in range(2) for bit in range(2)):
        marked = chosen[places].nonzero().flatten()
        done = {
            source: [start.ones().index_fill(axis, marked.to(start.device), torch.nan)]
            for source, start in zip(sources, starts, strict=True)
        }
        for end in ends:
            found = _again(end, between, done).isnan().movedim(end_axis, 0).flatten(1).any(1)
            if not torch.equal(found.cpu(), chosen & ours):
                return False
    return True


def _again(value: Value, between: Collection[Node], done: dict[Node, list[Tensor]]) -> Tensor:
    """What a tensor is now, where operations have put out what is ``done``; ones where it isn't from ``between``."""
    node = value.node
    if node is None or node not in between:
        return value.ones()
    if node not in done:
        args, kwargs = tree_map(lambda v: _again(v, between, done) if isinstance(v, Value) else v, node.arguments)
        assert node.run is not None
        done[node] = _tensors(node.run(*args, **kwargs))
    outputs = done[node]
    return outputs[value.place] if value.place < len(outputs) else value.ones()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Recording(TorchFunctionMode):
    """The dataflow of the forward passes made while :func:`record_dataflow` was active."""

    def __init__(self) -> None:
        super().__init__()
        self._nodes: list[Node] = []
        self._producers = WeakIdKeyDictionary()
        self._depth = 0
        self._open: list[Node] = []

    @property
    def nodes(self) -> list[Node]:
        """What was recorded. Who asks for it has seen enough: the recording ends."""
        self._depth += 1
        return self._nodes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._depth:
            return func(*args, **kwargs)
        # Before the call: an in-place operation returns its own input.
        inputs = self._inputs(tree_leaves((args, kwargs)))
        arguments = tree_map(self._seen, (args, kwargs)) if inputs else ()
        result = func(*args, **kwargs)
        if inputs:
            node = Node(getattr(func, "__name__", "").strip("_"), run=func, arguments=arguments)
            if self._register(node, result):
                node.connect(inputs)
        return result

    def _inputs(self, values: list[Any]) -> list[Node]:
        """The operations that made the tensors; parameters and vectors are no branch of the dataflow."""
        inputs = []
        for value in values:
            if isinstance(value, Tensor):
                if value in self._producers:
                    inputs.append(self._producers[value].node)
                elif value.dim() > 1 and not isinstance(value, nn.Parameter):
                    inputs.append(Node("input"))
        return inputs

    def _seen(self, leaf: Any) -> Any:
        """What to keep of an argument: of numbers that may depend on channels only what they look like."""
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        seen: Value = self._producers.get(leaf, Value(leaf.shape, leaf.dtype, leaf.device))  # type: ignore[no-untyped-call]
        return seen

    def _register(self, node: Node, result: Any) -> bool:
        outputs = _tensors(result)
        for place, tensor in enumerate(outputs):
            self._producers[tensor] = Value(tensor.shape, tensor.dtype, tensor.device, node, place)
            node.outputs.append(self._producers[tensor])
        if outputs:
            self._nodes.append(node)
        return bool(outputs)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._depth:
            data = _data_inputs(module, args, kwargs)
            node = Node("module", module, arguments=tree_map(self._seen, data))
            node.connect(self._inputs(data))
            self._open.append(node)
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        self._depth -= 1
        if not self._depth and self._open:
            self._register(self._open.pop(), result)


@contextmanager
def record_dataflow(model: nn.Module) -> Iterator[Recording]:
    """Record which layer feeds which while forward passes of a model run in the ``with`` block.

    The numbers are not changed. Modules that a compiled model runs without calling them aren't seen.

    Args:
        model: The module to watch.

    Yields:
        The recording, to be given to :func:`torchmto.structure.find_norm_pairs`.
    """
    recording = Recording()
    inner_copies = {copy for module in model.modules() if isinstance(module, SplitNorm) for copy in module.children()}
    handles = []
    for module in model.modules():
        if module not in inner_copies and (is_layer(module) or is_any_norm(module)):
            handles.append(module.register_forward_pre_hook(recording._enter, with_kwargs=True))  # noqa: SLF001
            handles.append(
                module.register_forward_hook(recording._leave, with_kwargs=True, always_call=True)  # noqa: SLF001
            )
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused inference path doesn't call the layers inside
    try:
        with recording:
            yield recording
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
