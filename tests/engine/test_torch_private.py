"""Every private name of PyTorch is in one module, is there in this PyTorch, and is missed with a clear error."""

import ast
import contextlib
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from torchmto.gradients import factors, rules, torch_private

CORE = Path(torch_private.__file__).parents[1]
OWN_FILE = Path(torch_private.__file__)
NAMES = ("_saved_", "_raw_saved_", "_DDPSink", "CompiledFunction", "CheckpointFunction", "_orig_mod", "cache_key_tag")


def trees():
    for path in sorted(CORE.rglob("*.py")):
        if path != OWN_FILE and not {"lab", "cli", "integrations"} & set(path.relative_to(CORE).parts):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_private_names_are_in_one_module():
    """No underscore attribute of anything that isn't this class's or module's own, no private import, no name as a string."""
    for path, tree in trees():
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        for node in ast.walk(tree):
            found = ""
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                known = node.attr in own or node.attr == "_getframe" or node.attr.startswith("_foreach_")
                found = "" if known or ast.unparse(node.value) in {"self", "cls"} else node.attr
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
                names = [node.module or "", *(alias.name for alias in node.names)]
                found = next((name for name in names if name.startswith("_") or "._" in name), "")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr", "setattr"}:
                name = node.args[1]
                named = str(name.value) if isinstance(name, ast.Constant) else ""
                found = named if named.startswith("_") and not named.startswith("__") else ""
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                found = next((name for name in NAMES if name in node.value), "")
            assert not found, f"{path.relative_to(CORE)}, line {node.lineno}: {found}"


# ------------------------------------------------------------------ each name, on what PyTorch really makes


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def graph(loss):
    """The nodes of a graph."""
    found, stack = [], [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.append(node)
            stack += [following for following, _ in node.next_functions]
    return found


def test_distributed_data_parallel(process_group):
    replica = DistributedDataParallel(nn.Linear(2, 2), find_unused_parameters=True)
    nodes = graph(replica(torch.ones(1, 2)).sum())
    assert [torch_private.is_sink(node) for node in nodes].count(True) == 1
    assert not torch_private.delayed_by(replica)
    assert not torch_private.hooks_of(replica)
    assert not torch_private.is_joining(replica)
    torch_private.forgetting(replica)()
    replica.register_comm_hook(None, default_hooks.allreduce_hook)
    assert torch_private.hooks_of(replica)
    with replica.join():
        assert torch_private.is_joining(replica)
    delayed = nn.Linear(2, 2)
    named = [("weight", delayed.weight)]
    delays = DistributedDataParallel(
        delayed, delay_all_reduce_named_params=named, param_to_hook_all_reduce=delayed.bias
    )
    assert torch_private.delayed_by(delays)


@pytest.mark.cpu  # with tensors made there
def test_optimizers_and_first_fsdp(process_group):
    from torch.distributed.device_mesh import DeviceMesh  # noqa: PLC0415
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: PLC0415
    from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: PLC0415

    parameters = nn.Linear(2, 2).parameters()
    assert not torch_private.overlaps(ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.1))
    assert not torch_private.overlaps(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    module = fully_shard(nn.Linear(2, 2), mesh=DeviceMesh("cpu", [0]))
    assert torch_private.divided_by(module) is None
    module.set_gradient_divide_factor(2.0)
    assert torch_private.divided_by(module) == 2
    module.set_requires_gradient_sync(False)
    module.set_is_last_backward(False)
    switches = torch_private.reducing(module)
    assert len(switches) == 2
    assert not any(getattr(owner, name) for owner, name in switches)
    module.set_requires_gradient_sync(True)
    module.set_is_last_backward(True)
    assert all(getattr(owner, name) for owner, name in switches)
    wrapped = FullyShardedDataParallel(nn.Linear(2, 2), use_orig_params=True, device_id=torch.device("cpu"))
    assert all(torch_private.is_flattened(parameter) for parameter in wrapped.parameters())
    assert not torch_private.is_flattened(nn.Linear(2, 2).weight)


def test_compiled_regions():
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch_private.compiled_inside(compiled) is model
    assert torch_private.compiled_inside(model) is model
    inside, outside = [], graph(model(torch.ones(1, 2)).sum())
    with contextlib.ExitStack() as stack:
        torch_private.keep_buffers(stack)
        inside = graph(compiled(torch.ones(1, 2)).sum())
    regions = [node for node in inside if torch_private.is_compiled(node)]
    assert len(regions) == 1
    assert not torch_private.gives_up(regions[0])
    region = torch_private._forward_class(regions[0])
    region.metadata.bw_donated_idxs, region.compiled_bw = [0], print
    assert torch_private.gives_up(regions[0])
    assert not any(map(torch_private.is_compiled, outside))
    assert not torch_private.is_opaque(regions[0])


def test_code_of_compiled_regions():
    run = torch.compile(lambda x, y: (x * y, x + 1), backend="aot_eager")

    def code(x):
        whole = graph(run(x, torch.ones(2))[0].sum())  # kept: older versions' nodes don't outlive it
        (region,) = filter(torch_private.is_compiled, whole)
        assert torch_private.is_opaque(region)
        return torch_private.compiled_code(region)

    x = torch.ones(2, requires_grad=True)
    assert code(x) is code(x)
    assert code(x) is not code(x.double())


def test_settings_of_the_compiler():
    donating, caches, tagged = torch_private._settings()
    name = "cache_key_tag" if tagged else "fx_graph_cache"
    before = donating.donated_buffer, getattr(caches, name)
    with contextlib.ExitStack() as stack:
        torch_private.keep_buffers(stack)
        assert not donating.donated_buffer
        assert getattr(caches, name) != before[1]
    assert (donating.donated_buffer, getattr(caches, name)) == before


def test_what_may_compile(monkeypatch):
    monkeypatch.setattr(torch_private, "_compiling", False)
    monkeypatch.setattr(eval_frame, "cached_backends", {0: None})
    torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert not torch_private.may_compile()
    torch.compile(nn.Linear(2, 2), backend="eager")
    assert torch_private.may_compile()
    torch.compiler.reset()
    assert not eval_frame.cached_backends
    assert torch_private.may_compile()


def test_reentrant_checkpoint_conversion_and_functions():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    x = torch.ones(2, requires_grad=True)
    assert torch_private.reentrant() in {n.name() for n in graph(checkpoint(torch.sin, x, use_reentrant=True).sum())}
    assert torch_private.converting() in {node.name() for node in graph(x.double().sum())}
    assert [node for node in graph(Twice.apply(x).sum()) if torch_private.is_users(node)]
    assert not [n for n in graph(checkpoint(torch.sin, x, use_reentrant=True).sum()) if torch_private.is_users(n)]


@pytest.mark.parametrize("name", [*rules.RULES, *factors._FINDERS])
def test_nodes_with_formulas(name):
    assert hasattr(torch._C._functions, name)


def test_what_nodes_know():
    x = torch.ones(2, 3, requires_grad=True)
    before = torch_private.nodes_made()
    first = x * torch.full((2, 3), 2.0)
    second = first.sum()
    assert torch_private.nodes_made() == before + 2
    assert torch_private.number_of(second.grad_fn) > torch_private.number_of(first.grad_fn)
    (place,) = torch_private.places(first.grad_fn)
    assert (tuple(place.shape), place.dtype, place.device) == ((2, 3), torch.float32, x.device)
    assert torch_private.saved(first.grad_fn, "other").tolist() == [[2.0] * 3] * 2
    assert torch_private.saved(first.grad_fn, "alpha", 1) == 1
    assert torch_private.native(first.grad_fn)
    assert not torch_private.hooked(first.grad_fn)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert torch_private.hooked((x * x).grad_fn)


def test_hooks_of_tensors():
    leaf = torch.ones(2, requires_grad=True)
    hooks = torch_private.hooks_made()
    assert not torch_private.has_hooks(leaf)
    assert not torch_private.gradient_hooks(leaf)
    leaf.register_hook(print)
    assert torch_private.has_hooks(leaf)
    assert torch_private.hooks_made() == hooks + 1
    leaf.register_post_accumulate_grad_hook(print)
    assert list(torch_private.gradient_hooks(leaf).values()) == [print]


def test_modules_tensors_and_scalers():
    norm = nn.BatchNorm1d(2)
    assert isinstance(norm, torch_private.NormBase)
    assert not isinstance(norm, torch_private.InstanceNorm)
    instance = nn.InstanceNorm1d(2)
    assert isinstance(instance, torch_private.InstanceNorm)
    assert torch_private.is_single(instance, torch.ones(2, 3))
    assert not torch_private.is_single(instance, torch.ones(1, 2, 3))
    assert torch_private.children_of(nn.Sequential(norm)) == {"0": norm}
    assert torch_private.buffers_of(norm)["running_mean"] is norm.running_mean
    x = torch.ones(2)
    before = torch_private.version_of(x)
    x.add_(1)
    assert torch_private.version_of(x) == before + 1
    assert torch_private.tree_leaves({"a": [1, (2,)]}) == [1, 2]
    assert torch_private.tree_map(str, [1, (2,)]) == ["1", ("2",)]
    assert torch_private.flattened([x, torch.zeros(1)]).tolist() == [2, 2, 0]
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD([leaf := torch.ones(1, requires_grad=True)], lr=1)
    scaler.scale(leaf.sum()).backward()
    scaler.unscale_(optimizer)
    state = torch_private.scaler_states(scaler)[id(optimizer)]
    assert state["stage"].name == "UNSCALED"


# ------------------------------------------------------------------ an older or newer PyTorch


def test_a_missing_name_is_an_error_where_it_is_used():
    clear = r"PyTorch .* has no `.*there.*`, which torchmto relies on"
    attribute = torch_private._of("Tensor", "_not_there")
    with pytest.raises(RuntimeError, match=clear):
        attribute(torch.ones(1))
    for missing in (torch_private._name("torch", "_not_there"), torch_private._name("torch._not_there", "name")):
        with pytest.raises(RuntimeError, match=clear):
            isinstance(1, missing)
        with pytest.raises(RuntimeError, match=clear):
            missing()
    with pytest.raises(RuntimeError, match=clear):
        torch_private._defined(torch, "_not_there")
    with pytest.raises(RuntimeError, match=clear):
        torch_private.saved((torch.ones(1, requires_grad=True) * 2).grad_fn, "there")


def test_what_ddp_is_told_to_leave_alone():
    model = nn.Linear(2, 2)
    assert torch_private.left_alone(model) == set()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["weight"])
    assert torch_private.left_alone(model) == {"weight"}


RENAMED = [
    (torch_private._sink, torch.nn.parallel.distributed, "_DDPSink"),
    (torch_private.reentrant, torch.utils.checkpoint, "CheckpointFunction"),
    (torch_private._compiled, inspect, "getsource"),
]


@pytest.mark.parametrize(("name", "owner", "attribute"), RENAMED, ids=lambda value: getattr(value, "__name__", value))
def test_names_that_nodes_are_recognised_by_are_looked_for(name, owner, attribute, monkeypatch):
    importlib.import_module(torch_private._COMPILER)
    name.cache_clear()
    assert name()
    name.cache_clear()
    if owner is inspect:
        monkeypatch.setattr(owner, attribute, lambda module: "")
    else:
        monkeypatch.delattr(owner, attribute)
    with pytest.raises(RuntimeError, match="which torchmto relies on"):
        name()


def test_import_needs_none():
    code = (
        "import torch; del torch.nn.modules.instancenorm._InstanceNorm, torch.utils._pytree.tree_map; import torchmto"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
