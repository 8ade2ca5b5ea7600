"""All that this package knows of PyTorch beyond its public names; nothing outside this file uses such a name.

A name that a version of PyTorch has no longer is an error that says so where it is first used, never at import, and one test
for each (``tests/engine/test_torch_private.py``) finds it on what PyTorch really makes. That holds too for what is only
recognised by its name, which otherwise would just never be met. ``torch._foreach_*`` are documented, and used everywhere.
"""

import contextlib
import functools
import importlib
import inspect
import operator
import re
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle


def _gone(name: str) -> RuntimeError:
    return RuntimeError(
        f"PyTorch {torch.__version__} has no `{name}`, which torchmto relies on. Install a version that "
        "torchmto is tested with (its constraints.txt names one)."
    )


def _of(owner: str, name: str, example: object = None) -> Callable[[Any], Any]:
    """What reads the attribute ``name`` of an ``owner``; without a call in Python where an ``example`` shows it to be there."""
    read = operator.attrgetter(name)
    if hasattr(example, name):
        return read

    def attribute(thing: Any) -> Any:
        try:
            return read(thing)
        except AttributeError:
            raise _gone(f"{owner}.{name}") from None

    return attribute


class _Missing(type):
    """The type of what stands for a name that isn't there."""

    def __instancecheck__(cls, instance: object) -> bool:
        raise _gone(cls.__name__)

    def __call__(cls, *args: Any, **options: Any) -> Any:
        raise _gone(cls.__name__)


def _name(module: str, name: str) -> Any:
    """The class or function ``name``; in its place, where there is none, what raises when it is used."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return _Missing(f"{module}.{name}", (), {})


# ------------------------------------------------------------------ modules, tensors, scalers

NormBase: type[torch.nn.Module] = _name("torch.nn.modules.batchnorm", "_NormBase")
"""The base of batch and instance norms."""

InstanceNorm: type[torch.nn.Module] = _name("torch.nn.modules.instancenorm", "_InstanceNorm")
"""The base of instance norms."""

tree_leaves: Callable[[Any], list[Any]] = _name("torch.utils._pytree", "tree_leaves")
"""What there is in nested lists, tuples and dicts."""

tree_map: Callable[[Callable[..., Any], Any], Any] = _name("torch.utils._pytree", "tree_map")
"""Nested lists, tuples and dicts with what a function makes of what is in them."""

flattened: Callable[[Sequence[Tensor]], Tensor] = _name("torch._utils", "_flatten_dense_tensors")
"""Tensors as one vector, in one call."""

children_of: Callable[[Any], dict[str, torch.nn.Module | None]] = _of("Module", "_modules", torch.nn.Module())
"""A module's children by their names in it, None where one was taken out."""

buffers_of: Callable[[Any], dict[str, Tensor | None]] = _of("Module", "_buffers", torch.nn.Module())
"""A module's own buffers, not those of its children."""

version_of: Callable[[Any], int] = _of("Tensor", "_version", Tensor)
"""How often a tensor was changed in place."""

gradient_hooks: Callable[[Any], dict[int, Callable[[Tensor], None]] | None] = _of(
    "Tensor", "_post_accumulate_grad_hooks", Tensor
)
"""The hooks of a leaf that run once its gradient is complete."""

scaler_states: Callable[[Any], dict[int, dict[str, Any]]] = _of("GradScaler", "_per_optimizer_states")
"""What a scaler knows of each optimizer since its last update: whether gradients were unscaled, what was found."""

_instance_dims = _of("InstanceNorm", "_get_no_batch_dim")
_leaf_hooks = _of("Tensor", "_backward_hooks")


def is_single(norm: torch.nn.Module, x: Tensor) -> bool:
    """Whether an instance norm takes ``x`` for one sample, without a dimension of samples."""
    return isinstance(norm, InstanceNorm) and x.dim() == _instance_dims(norm)()


def has_hooks(leaf: Tensor) -> bool:
    """Whether something else than the optimizer looks at, or changes, the gradient of a leaf."""
    return bool(_leaf_hooks(leaf))


hooks_made: Callable[[], int] = functools.partial(_of("RemovableHandle", "next_id", RemovableHandle), RemovableHandle)
"""How many hooks were ever set: those on activations are always new, but a node doesn't tell that it has one."""


# ------------------------------------------------------------------ wrappers of models and optimizers


def compiled_inside(model: torch.nn.Module) -> torch.nn.Module:
    """The model that ``torch.compile`` was given, or the model itself."""
    inside: torch.nn.Module = getattr(model, "_orig_mod", model)
    return inside


def uncompiled(name: str) -> str:
    """The name of a parameter or module without what ``torch.compile`` puts before it."""
    return name.replace("_orig_mod.", "")


def modules_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """A model's modules by the paths that they have uncompiled."""
    return {uncompiled(path): module for path, module in model.named_modules()}


def is_flattened(parameter: Tensor) -> bool:
    """Whether the first FSDP has made a parameter part of a flat one."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def overlaps(optimizer: object) -> bool:
    """Whether a ``ZeroRedundancyOptimizer`` steps inside the backward."""
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    return "ZeroRedundancyOptimizer" in names and bool(_overlap(optimizer))


_overlap = _of("ZeroRedundancyOptimizer", "_overlap_with_ddp")

delayed_by: Callable[[Any], Any] = _of("DistributedDataParallel", "_delay_all_reduce_params")
"""The parameters that ``DistributedDataParallel`` was given as ``delay_all_reduce_named_params``."""

hooks_of: Callable[[Any], Any] = _of("DistributedDataParallel", "_comm_hooks")
"""The communication hooks of ``DistributedDataParallel``."""

is_joining: Callable[[Any], bool] = _of("DistributedDataParallel", "_join_config.enable")
"""Whether ``DistributedDataParallel`` is inside ``join()``."""

forgetting: Callable[[Any], Callable[[], None]] = _of("DistributedDataParallel", "reducer._reset_state")
"""What makes ``DistributedDataParallel`` forget that a forward has prepared it to reduce in the next backward."""

_sharding_of = _of("FSDPModule", "_get_fsdp_state")
_group_of = _of("FSDPState", "_fsdp_param_group")
_shared_by = _of("FSDPState", "_state_ctx")


def _groups(module: Any) -> list[Any]:
    """The groups of parameters that FSDP2 shards together in one module."""
    state = _sharding_of(module)()
    # Older versions of PyTorch know of one at most.
    several = getattr(state, "_fsdp_param_groups", None)
    return list(filter(None, [_group_of(state)] if several is None else several))


def reducing(module: Any) -> list[tuple[Any, str]]:
    """The switches of a module sharded by FSDP2 that are on where each backward sums gradients and waits: owners and names."""
    found = [*((group, "reduce_grads") for group in _groups(module))]
    found.append((_shared_by(_sharding_of(module)()), "is_last_backward"))
    for owner, name in found:
        if not hasattr(owner, name):
            raise _gone(f"{type(owner).__name__}.{name}")
    return found


def divided_by(module: Any) -> float | None:
    """What FSDP2 was told to divide the gradients of a module by; None for the number of ranks."""
    return next((factor for group in _groups(module) if (factor := group.gradient_divide_factor) is not None), None)


# ------------------------------------------------------------------ nodes of the backward graph

_NATIVE = re.compile(r"Backward\d+$")

places: Callable[[Any], Sequence[Any]] = _of("Node", "_input_metadata")
"""The shape, dtype and device of the tensors whose gradients a node takes."""

_sequence_number = _of("Node", "_sequence_nr")
_forward_class = _of("BackwardCFunction", "_forward_cls")
run_backward: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)
"""What ``torch.autograd.backward`` and ``grad`` call with the arguments they have checked; where it is None they do."""


def number_of(node: Node) -> int:
    """A number that is larger for operations that ran later; the largest there is for leaves."""
    return int(_sequence_number(node)())


nodes_made: Callable[[], int] = _name("torch.autograd", "_get_sequence_nr")
"""How many graph nodes this thread has made: its growth over a forward is the size of that forward's graph."""


def saved(node: Any, name: str, default: Any = None) -> Any:
    """What a node has saved as ``name``; ``default`` if nodes of its kind save no such thing."""
    try:
        return getattr(node, f"_saved_{name}")
    except AttributeError:
        if default is None:
            raise _gone(f"{node.name()}._saved_{name}") from None
        return default


@functools.cache
def _names(kind: Hashable) -> tuple[str, ...] | None:
    """What nodes of a kind of PyTorch's own save; None for other nodes: of custom functions, compiled regions, views."""
    if not isinstance(kind, type) or issubclass(kind, BackwardCFunction) or not _NATIVE.search(kind.__name__):
        return None
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


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


# What follows is recognised by its name, and the name is looked for where PyTorch defines it.


def _defined(module: Any, name: str) -> str:
    if not hasattr(module, name):
        raise _gone(f"{module.__name__}.{name}")
    return name


_functions_of = _of("torch", "_C._functions")


@functools.cache
def converting() -> str:
    """The name of the nodes of conversions between dtypes and devices."""
    return _defined(_functions_of(torch), "ToCopyBackward0")


@functools.cache
def reentrant() -> str:
    """The name of the node of a reentrant checkpoint, in PyTorch and in libraries that follow it."""
    return _defined(torch.utils.checkpoint, "CheckpointFunction") + "Backward"


@functools.cache
def _sink() -> str:
    return _defined(torch.nn.parallel.distributed, "_DDPSink")


def is_sink(node: Node) -> bool:
    """Whether ``DistributedDataParallel`` passes all outputs of a model through a node, each to its own input."""
    return isinstance(node, BackwardCFunction) and node.name().startswith(_sink())


def left_alone(model: Any) -> frozenset[str]:
    """The names of what ``DistributedDataParallel`` was told to leave to every rank."""
    return frozenset(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))


_COMPILER = "torch._functorch._aot_autograd.runtime_wrappers"


def is_compiled(node: Node) -> bool:
    """Whether a node is a compiled region, which hides which of its outputs depends on which input."""
    # Nothing has been compiled where the compiler isn't loaded.
    return isinstance(node, BackwardCFunction) and _COMPILER in sys.modules and node.name().startswith(_compiled())


@functools.cache
def _compiled() -> str:
    # It is defined inside a function, where only the source shows it.
    with contextlib.suppress(OSError):
        if "class CompiledFunction(" not in inspect.getsource(sys.modules[_COMPILER]):
            raise _gone(f"{_COMPILER}.CompiledFunction")
    return "CompiledFunction"


compiled_code: Callable[[Any], type] = _forward_class
"""What stands for the code of a compiled region: the same whenever that code runs, another one once it is compiled anew."""


def is_opaque(node: Node) -> bool:
    """Whether a node is a compiled region of several outputs: it gives zeros for what those with a gradient don't depend on."""
    return is_compiled(node) and len(places(node)) > 1


_donated = _of("CompiledFunction", "metadata.bw_donated_idxs")
_compiled_backward = _of("CompiledFunction", "compiled_bw")


def gives_up(node: Any) -> bool:
    """Whether a node is a compiled region whose backward writes over what its forward has saved."""
    if not is_compiled(node):
        return False
    region = _forward_class(node)
    # Not compiled yet, it will learn from its first backward that others follow.
    return bool(_donated(region)) and _compiled_backward(region) is not None


def is_users(node: Node) -> bool:
    """Whether a node is of a function written in Python outside PyTorch; what it generates around an operator is the user's."""
    if not isinstance(node, BackwardCFunction):
        return False
    module: str = _forward_class(node).__module__
    return not module.startswith("torch.") or module.startswith("torch._library")


# ------------------------------------------------------------------ the compiler's settings

TAG = "torchmto"
"""Part of the names under which the caches on disk keep what is compiled in a step."""


@functools.cache
def _settings() -> tuple[Any, Any, bool]:
    """Where it is set whether backwards may write over what was saved; where the cache on disk is; whether that takes a tag."""
    try:
        donating = importlib.import_module("torch._functorch.config")
        caches: Any = sys.modules.get("torch.compiler.config")
        tagged = hasattr(caches, "cache_key_tag")
        if not tagged:
            # An older PyTorch: nothing is read from the cache then.
            caches = importlib.import_module("torch._inductor.config")
        _of("torch._functorch.config", "donated_buffer")(donating)
        _of("torch._inductor.config", "cache_key_tag" if tagged else "fx_graph_cache")(caches)
    except ImportError as error:
        raise _gone(error.name or "torch._functorch.config") from error
    return donating, caches, tagged


_compiling = False


def may_compile() -> bool:
    """Whether anything was given to ``torch.compile`` in this process, so that calls may compile."""
    global _compiling  # noqa: PLW0603 - `torch.compiler.reset()` forgets it, and what was given compiles again
    if not _compiling:
        frames = sys.modules.get("torch._dynamo.eval_frame")
        # Where the name is gone, something may.
        _compiling = frames is not None and any(getattr(frames, "cached_backends", {0: True}).values())
    return _compiling


def keep_buffers(stack: contextlib.ExitStack) -> None:
    """Until ``stack`` ends, whatever is compiled keeps what its forward has saved, however many backwards there are.

    A compiled backward may write over what the forward has saved for it (PyTorch's "donated buffers"). That is fine for one
    backward, and garbage for those after it. Whether it does so is decided when it is compiled; PyTorch's own check is off
    while the setting is off, and its cache on disk doesn't tell the two kinds apart.
    """
    donating, caches, tagged = _settings()
    cache = "cache_key_tag" if tagged else "fx_graph_cache"
    kept = getattr(caches, cache)
    stack.callback(setattr, donating, "donated_buffer", donating.donated_buffer)
    stack.callback(setattr, caches, cache, kept)
    donating.donated_buffer = False
    setattr(caches, cache, kept + TAG if tagged else False)
