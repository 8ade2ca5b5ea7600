"""Modules around a model that train it in their own way: those a step can drive, and those it refuses."""

import contextlib
import gc
from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchmto.gradients.ranks import is_sharded
from torchmto.gradients.torch_private import (
    compiled_inside,
    delayed_by,
    divided_by,
    forgetting,
    hooks_of,
    is_flattened,
    is_joining,
    overlaps,
    reducing,
)

_REPLICATE = "use DistributedDataParallel, or `torch.distributed.fsdp.fully_shard` (FSDP2)"

_FOREIGN = {
    "DDP": f"it comes from `replicate`: {_REPLICATE}",
    "ReplicateModule": f"it comes from `replicate`: {_REPLICATE}",
    "FullyShardedDataParallel": "shard the model by `torch.distributed.fsdp.fully_shard` (FSDP2), whose parameters keep their "
    "shapes",
    "ShardedDataParallel": _REPLICATE,
    "DeepSpeedEngine": "give the module itself and an ordinary optimizer, on several processes in DistributedDataParallel or "
    "`torch.distributed.fsdp.fully_shard` (FSDP2)",
}
"""Wrappers that own backward and step, by name, so that none has to be imported; and what to use instead."""

_HOOK = "a communication hook (`register_comm_hook`)"

_LIBRARIES = ("torch", "fairscale", "deepspeed")


def _kinds(module: nn.Module) -> set[str]:
    """The names of a module's classes that come from PyTorch or a library of wrappers."""
    return {kind.__name__ for kind in type(module).__mro__ if kind.__module__.split(".")[0] in _LIBRARIES}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, compiled or not, whose names of parameters have no prefix then."""
    inside = compiled_inside(model)
    return inside.module if isinstance(inside, DistributedDataParallel) else model


def replicas(model: nn.Module) -> list[DistributedDataParallel]:
    """All DistributedDataParallel wrappers in a model."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def wrappers_around(parameters: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """The DistributedDataParallel wrappers of this process that hold some of ``parameters``, which know of no wrapper.

    Raises:
        ValueError: If one has an option that a step can't drive.
    """
    ours = set(map(id, parameters))
    # By their types: asking things themselves may load what they stand for. One without a reducer was never finished.
    every = [thing for thing in gc.get_objects() if DistributedDataParallel in type(thing).__mro__]
    found = [r for r in every if hasattr(r, "reducer") and not ours.isdisjoint(map(id, r.parameters()))]
    for replica in found:
        _check_options(replica)
    return found


def shards_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a model whose parameters FSDP2 shards."""
    return [module for module in model.modules() if "FSDPModule" in _kinds(module)]


def check_wrappers(model: nn.Module, optimizers: Iterable[object], parameters: Iterable[Tensor]) -> None:
    """Raise if something around a model, or a part of it, trains it in a way that a step can't drive.

    Raises:
        ValueError: If there is such a wrapper, or an option of one.
    """
    for module in model.modules():
        kinds = _kinds(module)
        for name in kinds & _FOREIGN.keys():
            raise _refusal(name, _FOREIGN[name])
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise _refusal(
                "DataParallel on several devices",
                "one node of its graph gets all parameters, whatever a task reaches. Use DistributedDataParallel",
            )
        if isinstance(module, DistributedDataParallel):
            _check_options(module)
    sharded = {id(parameter) for module in shards_of(model) for parameter in module.parameters()}
    for parameter in parameters:
        if is_flattened(parameter):
            raise _refusal("FullyShardedDataParallel", _FOREIGN["FullyShardedDataParallel"])
        if is_sharded(parameter) and id(parameter) not in sharded:
            raise _refusal("Tensor parallelism", "use `fully_shard` over a one-dimensional mesh of all ranks")
    if any(map(overlaps, optimizers)):
        raise _refusal("ZeroRedundancyOptimizer with overlap_with_ddp=True", "leave that out")


def _check_options(replica: DistributedDataParallel) -> None:
    for option in _options(replica):
        raise _refusal(f"DistributedDataParallel with {option}", "wrap the model without it")


def _options(replica: DistributedDataParallel) -> Iterator[str]:
    """The options of a DistributedDataParallel that its own reduction would carry out."""
    if replica.static_graph:
        yield "static_graph=True"
    if getattr(replica, "mixed_precision", None) is not None:
        yield "mixed_precision="
    if delayed_by(replica):
        yield "delay_all_reduce_named_params="
    if any(p.requires_grad and name in replica.parameters_to_ignore for name, p in replica.module.named_parameters()):
        yield "trained parameters that it is told to ignore"
    # Last, as mixed precision is one of its hooks.
    if hooks_of(replica):
        yield _HOOK


def _refusal(what: str, instead: str) -> ValueError:
    return ValueError(
        f"{what} can't be driven by mt.step, which takes and reduces the tasks' gradients itself: {instead}."
    )


def take_over(
    wrappers: Iterable[DistributedDataParallel], shards: Iterable[nn.Module], stack: contextlib.ExitStack
) -> None:
    """Until ``stack`` ends, let the step reduce gradients itself, and FSDP2 reduce those it shards in each task's backward.

    Args:
        wrappers: Wrappers that are kept from reducing.
        shards: Modules sharded by FSDP2.
        stack: Ends with the step.

    Raises:
        ValueError: Inside ``join()``, whose collectives would meet the step's; for a communication hook that was set later;
            if FSDP2 would divide gradients by another number than that of the ranks.
    """
    for wrapper in wrappers:
        if hooks_of(wrapper):
            raise _refusal(f"DistributedDataParallel with {_HOOK}", "wrap the model without it")
        if is_joining(wrapper):
            raise _refusal(
                "`join()` of DistributedDataParallel",
                "on a rank that has no batch left return no losses, `{}`, from the closure",
            )
        # Its first forward would broadcast the buffers, but a rank without labels may not run the model at all.
        stack.callback(setattr, wrapper, "require_forward_param_sync", wrapper.require_forward_param_sync)
        wrapper.require_forward_param_sync = False
        # A forward outside of the step, as that of ready losses, has prepared it for a backward of its own.
        forgetting(wrapper)()
        stack.enter_context(wrapper.no_sync())
    for module in shards:
        if divided_by(module) is not None:
            raise _refusal("`set_gradient_divide_factor` of FSDP", "leave it at its default, the number of ranks")
        for owner, name in reducing(module):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, True)
