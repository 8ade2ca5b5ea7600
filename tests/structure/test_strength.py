"""Connection strength, priority and the projection of phase 2."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from shared_data import golden
from torchmto.structure import (
    active_task,
    connection_strength,
    find_norm_pairs,
    gradient_strength,
    normalized_strength,
    oracle_priority,
    priority_coefficients,
    project_by_priority,
    scaled_strength,
    split_norms,
    top_priority,
)
from torchmto.structure.layers import norm_scale

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def by_definition(grads, top, degenerate="sum"):
    """The formula as printed, one loop after the other."""
    num_tasks = grads.shape[0]
    result = torch.zeros_like(grads[0])
    if degenerate == "sum" and top.unique().numel() == 1 and top[0] >= 0:
        return grads.sum(0)
    for i in range(-1, num_tasks):
        group = top == i
        reference = grads[i, group]
        for j in range(num_tasks):
            row = grads[j, group]
            product = (reference * row).sum()
            if i >= 0 and j != i and product < 0:
                row = row - product / reference.square().sum() * reference
            result[group] += row
    return result


def tensors(case, key):
    return torch.tensor([case[key][task] for task in case["tasks"]], dtype=torch.float64)


def test_reference_numbers():
    reference = golden("connection_strength")
    compared = 0
    for case in reference["cases"]:
        weight = torch.tensor(case["weight"], dtype=torch.float64)
        gamma, var = tensors(case, "bn_weight"), tensors(case, "bn_running_var")
        strengths = torch.stack(
            [connection_strength(weight, g, v, reference["eps"]) for g, v in zip(gamma, var, strict=True)]
        )
        torch.testing.assert_close(strengths, tensors(case, "strength"), **CLOSE)
        normalized = normalized_strength(strengths)
        torch.testing.assert_close(normalized, tensors(case, "normalised_strength"), **CLOSE)
        scale = gamma / (var + reference["eps"]).sqrt()
        torch.testing.assert_close(scaled_strength(weight, scale), strengths, **CLOSE)
        top = top_priority(normalized)
        if case["top_margin_min"] > 0:
            assert top.tolist() == case["top_task"]
            grads = torch.tensor(case["task_grads"], dtype=torch.float64)
            combined = torch.tensor(case["combined"], dtype=torch.float64)
            torch.testing.assert_close(project_by_priority(grads, top), combined, **CLOSE)
            compared += 1
        elif case["mode"] not in ("random", "degenerate"):
            assert (top == -1).any()
    assert compared > len(reference["cases"]) / 2


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from(["sum", "project"]))
def test_projection_equals_its_definition_in_every_order(seed, num_tasks, degenerate):
    generator = torch.Generator().manual_seed(seed)
    channels = int(torch.randint(1, 7, (), generator=generator))
    grads = torch.randn(num_tasks, channels, 3, 2, dtype=torch.float64, generator=generator)
    top = torch.randint(-1, num_tasks, (channels,), generator=generator)
    combined = project_by_priority(grads, top, degenerate=degenerate)
    torch.testing.assert_close(combined, by_definition(grads, top, degenerate), **CLOSE)
    order = torch.randperm(num_tasks, generator=generator)
    renamed = torch.where(top >= 0, order.argsort()[top.clamp(min=0)], top)
    torch.testing.assert_close(project_by_priority(grads[order], renamed, degenerate=degenerate), combined, **CLOSE)
    for scale in (1e-8, 1e8):
        torch.testing.assert_close(
            project_by_priority(scale * grads, top, degenerate=degenerate) / scale, combined, **CLOSE
        )


def test_the_leading_task_is_never_opposed():
    grads = torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    top = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    combined = project_by_priority(grads, top)
    for task in range(3):
        group = top == task
        assert (combined[group] * grads[task, group]).sum() >= grads[task, group].square().sum() - 1e-12


def test_tasks_are_interchangeable():
    strengths = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    top = top_priority(normalized_strength(strengths))
    for order in itertools.permutations(range(3)):
        permuted = top_priority(normalized_strength(strengths[list(order)]))
        assert torch.equal(torch.tensor(order)[permuted], top)


def test_special_groups():
    grads = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[-1.0, 1.0], [-1.0, 0.0]]])
    plain = grads.sum(0)
    everywhere = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(project_by_priority(grads, everywhere), plain)
    # <(1, 0, 2, 0), (-1, 1, -1, 0)> = -3, squared norm 5: the leader counts 1 + 3/5 times.
    torch.testing.assert_close(project_by_priority(grads, everywhere, degenerate="project"), plain + 3 / 5 * grads[0])
    assert torch.equal(project_by_priority(grads, torch.tensor([-1, -1])), plain)
    grads[0] = 0
    assert torch.equal(project_by_priority(grads, everywhere, degenerate="project"), grads.sum(0))


def test_priority_needs_a_unique_maximum():
    equal = torch.full((3, 2), 0.5, dtype=torch.float64)
    assert top_priority(equal).tolist() == [-1, -1]
    equal[2, 0] += 1e-14
    assert top_priority(equal).tolist() == [-1, -1]
    equal[2, 0] += 1e-11
    assert top_priority(equal).tolist() == [2, -1]
    assert top_priority(torch.tensor([[0.2, 0.8]])).tolist() == [0, 0]
    assert top_priority(torch.tensor([[float("nan"), 1.0], [1.0, 2.0]])).tolist() == [-1, 1]


@given(st.integers(0, 10_000), st.sampled_from([1e-200, 1.0, 1e200]))
@settings(max_examples=20)
def test_normalized_rows_sum_to_one(seed, scale):
    strengths = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    normalized = normalized_strength(strengths)
    torch.testing.assert_close(normalized.sum(1), torch.ones(3, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(normalized, strengths / scale / (strengths / scale).sum(1, keepdim=True), **CLOSE)


def test_half_precision_is_widened():
    weight = torch.full((2, 4), 300.0, dtype=torch.float16)
    assert torch.isfinite(connection_strength(weight, torch.ones(2, dtype=torch.float16))).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_general_strength_against_loops(transposed, groups):
    generator = torch.Generator().manual_seed(3)
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 2, groups=groups, bias=False).double()
    out_scale = torch.rand(2, 6, dtype=torch.float64, generator=generator)
    in_scale = torch.rand(2, 4, dtype=torch.float64, generator=generator)
    found = scaled_strength(conv.weight, out_scale, in_scale, groups=groups, transposed=transposed)
    # The response of output p to input q alone is the kernel that connects them.
    expected = torch.zeros(2, 6, dtype=torch.float64)
    for q in range(4):
        x = torch.zeros(1, 4, 3, 3, dtype=torch.float64)
        x[0, q, 1, 1] = 1
        expected += out_scale.square() * conv(x)[0].square().sum((1, 2)) * in_scale[:, q, None].square()
    torch.testing.assert_close(found, expected.detach(), **CLOSE)


def test_measures_from_gradients():
    grads = torch.tensor([[[1.0, 2.0], [0.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]])
    weight = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    torch.testing.assert_close(gradient_strength(grads).float(), torch.tensor([[5.0, 9.0], [2.0, 2.0]]))
    assert gradient_strength(grads, weight).tolist() == [[3, 6], [2, 2]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: connection_strength(torch.ones(2, 3), torch.ones(3)), "`gamma` should hold one number"),
        (lambda: connection_strength(torch.ones(2, 3), torch.ones(2), torch.ones(3)), "`running_var` should"),
        (lambda: connection_strength(torch.ones(2, 3), torch.ones(2), eps=-1.0), "`eps` should be a non-negative"),
        (lambda: normalized_strength(torch.ones(3)), r"shape \[T, C_out\]"),
        (lambda: top_priority(torch.ones(0, 3)), r"shape \[T, C_out\]"),
        (lambda: project_by_priority(torch.ones(2, 3, 4), torch.zeros(4, dtype=torch.int64)), "one task per channel"),
        (lambda: project_by_priority(torch.ones(2, 3, 4), torch.tensor([0, 2, -1])), "tasks from 0 to 1"),
        (
            lambda: priority_coefficients(torch.ones(2, 3), torch.zeros(3, dtype=torch.int64), degenerate="x"),
            "`degenerate` should be one of 'sum', 'project'",
        ),
    ],
)
def test_misuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def two_layer_net():
    torch.manual_seed(4)
    net = nn.Sequential(
        *(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
    )
    split_norms(net, ["a", "b"]).double()
    for name, parameter in net.named_parameters():
        if ".a." in name or ".b." in name:
            nn.init.uniform_(parameter, 0.2, 2.0)
    return net


def test_two_layer_conv_net_by_hand():
    net, tasks = two_layer_net(), ["a", "b"]
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    layers = find_norm_pairs(net)
    assert [layer.name for layer in layers] == ["0", "3"]
    shared = [parameter for layer in layers for parameter in layer.parameters]
    rows = []
    for index, task in enumerate(tasks):
        with active_task(task):
            output = net(x)
        rows.append(torch.autograd.grad((output * (index - 0.4)).square().sum() + output[:, index].sum(), shared))
    for number, (layer, conv, norm) in enumerate(((layers[0], net[0], net[1]), (layers[1], net[3], net[4]))):
        kernels = conv.weight.detach().flatten(1).tolist()
        strength = torch.tensor(
            [
                [
                    sum(w * w for w in kernel) * gamma**2 / (var + 1e-5)
                    for kernel, gamma, var in zip(kernels, copy.weight.tolist(), copy.running_var.tolist(), strict=True)
                ]
                for copy in (norm.copy_for(task) for task in tasks)
            ],
            dtype=torch.float64,
        )
        torch.testing.assert_close(layer.strengths(tasks), strength, **CLOSE)
        share = strength / strength.sum(1, keepdim=True)
        top = torch.tensor([0 if share[0, p] > share[1, p] else 1 for p in range(conv.out_channels)])
        assert torch.equal(top_priority(normalized_strength(layer.strengths(tasks))), top)
        assert len(set(top.tolist())) == 2

        grads = [torch.stack([row[2 * number + part] for row in rows]) for part in range(2)]
        found = layer.combine(grads, layer.coefficients(grads, top))
        # Weight and bias of a channel are one vector here.
        joint = torch.cat([grads[0].flatten(2), grads[1].unsqueeze(2)], dim=2)
        expected = by_definition(joint, top)
        torch.testing.assert_close(found[0].flatten(1), expected[:, :-1], **CLOSE)
        torch.testing.assert_close(found[1], expected[:, -1], **CLOSE)


def test_all_channels_tie_at_initialisation():
    for norm in (nn.BatchNorm2d(8), nn.GroupNorm(2, 8)):
        net = split_norms(nn.Sequential(nn.Conv2d(3, 8, 3), norm), ["a", "b", "c"])
        (layer,) = find_norm_pairs(net)
        assert top_priority(normalized_strength(layer.strengths(["a", "b", "c"]))).tolist() == [-1] * 8


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_layers_combine_by_output_channel(groups):
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=groups), nn.BatchNorm2d(6)).double()
    (layer,) = find_norm_pairs(net)
    assert (layer.num_channels, layer.num_inputs) == (6, 4)
    grads = [torch.randn(2, *parameter.shape, dtype=torch.float64) for parameter in layer.parameters]
    top = torch.tensor([0, 1, 1, -1, 0, 1])
    found = layer.combine(grads, layer.coefficients(grads, top))

    def channel(tensor, p):  # [..., C_in, C_out / groups, kh, kw] -> everything that feeds output p
        width, per = 4 // groups, 6 // groups
        return tensor[..., (p // per) * width : (p // per + 1) * width, p % per, :, :]

    joint = torch.stack([torch.cat([channel(grads[0], p).flatten(1), grads[1][:, [p]]], 1) for p in range(6)], dim=1)
    expected = by_definition(joint, top)
    for p in range(6):
        torch.testing.assert_close(channel(found[0], p).flatten(), expected[p, :-1], **CLOSE)
    torch.testing.assert_close(found[1], expected[:, -1], **CLOSE)
    for measure in ("gradients", "saliency"):
        assert layer.strengths(["a", "b"], measure=measure, task_grads=grads[0]).shape == (2, 6)


def test_measures_are_checked():
    (layer,) = find_norm_pairs(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="`measure` should be one of"):
        layer.strengths(["a"], measure="magnitude")
    with pytest.raises(ValueError, match="`task_grads` is needed"):
        layer.strengths(["a"], measure="saliency")


def test_oracle_finds_the_leader_and_leaves_no_trace():
    """Task a's loss is steep in channel 0, task b's in channel 1: each should lead its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Dropout(0.2), nn.BatchNorm1d(2)).double()
    first = nn.Linear(2, 2).double()
    x = torch.randn(16, 2, dtype=torch.float64)

    def closure(tasks):
        y = first(x)
        net(x)
        losses = {"a": (10 * (y[:, 0] - 1)).square().mean(), "b": (10 * (y[:, 1] - 1)).square().mean()}
        mixed = {"a": losses["a"] + 0.1 * y[:, 1].mean(), "b": losses["b"] + 0.1 * y[:, 0].mean()}
        return {task: mixed[task] for task in tasks}

    model = nn.ModuleDict({"first": first, "norm": nn.LayerNorm(2).double(), "net": net})
    (layer,) = find_norm_pairs(model, pairs=[("first", "norm")])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    top, decrease = oracle_priority(model, closure, [(layer, [0]), (layer, [1])], ["a", "b"], step_size=1e-4)
    assert top.tolist() == [0, 1]
    assert decrease.shape == (2, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    (only_b, _) = oracle_priority(model, closure, [(layer, [0, 1])], ["a", "b"], weights={"a": 0.0, "b": 1.0})
    assert only_b.tolist() == [1]
    for frozen in (first.bias, first.weight):
        frozen.requires_grad_(False)
        top, decrease = oracle_priority(model, closure, [(layer, [0]), (layer, [1])], ["a", "b"], step_size=1e-4)
        # With both frozen nothing moves, and nobody leads.
        assert top.tolist() == ([0, 1] if first.weight.requires_grad else [-1, -1])
    first.requires_grad_(True)
    with pytest.raises(ValueError, match="positive float"):
        oracle_priority(model, closure, [], ["a"], step_size=0)
    with pytest.raises(ValueError, match="channels of first below 2"):
        oracle_priority(model, closure, [(layer, [2])], ["a"])


def test_oracle_runs_split_norms_task_by_task():
    net = two_layer_net()
    layers = find_norm_pairs(net)
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    seen = []

    def closure(tasks):
        seen.append(tasks)
        return {task: net(x).square().mean() for task in tasks}

    result = oracle_priority(net, closure, [(layers[1], [0, 1])], ["a", "b"])
    assert torch.isfinite(result.decrease).all()
    assert all(len(tasks) == 1 for tasks in seen)
    assert len(seen) == 2 * (1 + 1 + 2)  # gradients, before, one per (group, task)


@pytest.mark.parametrize("split", [True, False])
def test_oracle_of_a_checkpointed_trunk(split):
    """The forward runs again inside the backward, for the same task."""
    results = []
    for checkpointed in (True, False):
        net = two_layer_net() if split else nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
        torch.manual_seed(0)
        x = torch.randn(6, *([2, 3, 3] if split else [3]), dtype=torch.float64, requires_grad=True)

        def closure(tasks, net=net, x=x, checkpointed=checkpointed):
            y = checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)
            return {task: (y - i).square().mean() for i, task in enumerate("ab") if task in tasks}

        torch.manual_seed(1)
        for parameter in net.parameters():
            nn.init.normal_(parameter)
        (layer, *_) = find_norm_pairs(net)
        results.append(oracle_priority(net, closure, [(layer, [0])], ["a", "b"]))
    torch.testing.assert_close(*(result.decrease for result in results), rtol=0, atol=0)


class GemmaRMSNorm(nn.Module):
    """Scales by 1 + weight, as Gemma's; by the weight, as Llama's, with ``plus=0``."""

    def __init__(self, size, plus=1.0):
        super().__init__()
        self.weight, self.plus = nn.Parameter(torch.zeros(size)), plus

    def _normalized(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(self, x):
        return (self._normalized(x.float()) * (self.plus + self.weight.float())).type_as(x)


class LayerNorm1P(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class ChannelsFirstNorm(nn.Module):
    """Works on images alone; adds its bias before it scales."""

    def __init__(self, size):
        super().__init__()
        self.bias, self.gamma = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x):
        assert x.dim() == 4
        x = x / x.square().mean(1, keepdim=True).sqrt()
        return (x + self.bias[:, None, None]) * (1 + self.gamma[:, None, None])


class ActivatedNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


class ConditionalNorm(GemmaRMSNorm):
    def forward(self, x, shift):
        return super().forward(x) + shift


NORMS = {
    "Gemma's": (lambda: GemmaRMSNorm(6), 1.0),
    "Llama's": (lambda: GemmaRMSNorm(6, plus=0.0), 0.0),
    "in half precision": (lambda: GemmaRMSNorm(6).bfloat16(), 1.0),
    "a subclass": (lambda: LayerNorm1P(6), 1.0),
    "of several dimensions": (lambda: LayerNorm1P((2, 3)), 1.0),
    "of images": (lambda: ChannelsFirstNorm(6), 1.0),
    "with an activation": (lambda: ActivatedNorm(6), 0.0),
    "not to be called like this": (lambda: ConditionalNorm(6), 0.0),
}


@pytest.mark.parametrize("kind", NORMS)
def test_the_scale_of_a_norm_is_what_it_multiplies_by(kind):
    """Not its weight, where it adds 1 to that; and finding out leaves no trace in it."""
    make, plus = NORMS[kind]
    norm = make()
    nn.init.normal_(norm.gamma if kind == "of images" else norm.weight)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    weight = before["gamma" if kind == "of images" else "weight"].double()
    true = weight + plus if weight.dim() == 1 else (weight + plus).square().mean(1).sqrt()
    for _ in range(2):
        scale = norm_scale(norm, torch.device("cpu"), with_variance=False)
        torch.testing.assert_close(scale, true)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(4), lambda: nn.BatchNorm1d(4)])
def test_the_scale_of_a_parametrized_norm(make):
    """Split or not, it is what the parametrization makes of its parameter."""
    norm = make()
    nn.init.uniform_(norm.weight)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    model = split_norms(nn.Sequential(nn.Linear(3, 4), norm), ["a", "b"])
    nn.init.normal_(model[1].b.parametrizations.weight.original)
    (layer,) = find_norm_pairs(model)
    scale = model[1].b.weight.detach().double()
    expected = model[0].weight.detach().double().square().sum(1) * scale**2
    if isinstance(norm, nn.BatchNorm1d):
        expected = expected / (1 + norm.eps)
    torch.testing.assert_close(layer.strengths(["a", "b"])[1], expected, rtol=1e-6, atol=1e-9)
