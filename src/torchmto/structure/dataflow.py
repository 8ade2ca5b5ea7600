"""Which operations feed which: the graph in which conv, linear and norm layers are paired."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from torchmto.gradients.torch_private import tree_leaves
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
        *("normalize", "softmax", "log_softmax", "cross_entropy", "nll_loss", "channel_shuffle"),
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

    @property
    def is_norm(self) -> bool:
        """Whether a norm runs here."""
        return self.module is not None and is_any_norm(self.module)

    @property
    def mixes(self) -> bool:
        """Whether channels are mixed here, so that a search ends."""
        if self.module is not None:
            return not is_any_norm(self.module) and _mixes_channels(self.module)
        return self.op in _MIXING

    @property
    def concatenates(self) -> bool:
        """Whether values are put side by side here."""
        return self.module is None and self.op in _JOINING

    def connect(self, inputs: list["Node"]) -> None:
        """Record where this operation's inputs come from."""
        self.inputs = inputs
        for node in dict.fromkeys(inputs):
            node.users.append(self)


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
    by_name = isinstance(module, (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.ChannelShuffle))
    return by_name or is_layer(module) or any(parameter.dim() > 1 for parameter in module.parameters())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_opaque(m)


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


class Recording(TorchFunctionMode):
    """The dataflow of the forward passes made while :func:`record_dataflow` was active."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self._producers = WeakIdKeyDictionary()
        self._depth = 0
        self._open: list[Node] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._depth:
            return func(*args, **kwargs)
        # Before the call: an in-place operation returns its own input.
        inputs = self._inputs(tree_leaves((args, kwargs)))
        result = func(*args, **kwargs)
        if inputs:
            node = Node(getattr(func, "__name__", "").strip("_"))
            if self._register(node, result):
                node.connect(inputs)
        return result

    def _inputs(self, values: list[Any]) -> list[Node]:
        """The operations that made the tensors; parameters and vectors are no branch of the dataflow."""
        inputs = []
        for value in values:
            if isinstance(value, Tensor):
                if value in self._producers:
                    inputs.append(self._producers[value])
                elif value.dim() > 1 and not isinstance(value, nn.Parameter):
                    inputs.append(Node("input"))
        return inputs

    def _register(self, node: Node, result: Any) -> bool:
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._producers[tensor] = node
        if outputs:
            self.nodes.append(node)
        return bool(outputs)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._depth:
            node = Node("module", module)
            node.connect(self._inputs(_data_inputs(module, args, kwargs)))
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
