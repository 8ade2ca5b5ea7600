"""Which norm each layer is paired with, on the architectures people use."""

import copy
import logging
import random
import re
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchmto
from torchmto.structure import active_task, find_norm_pairs, make_task_specific, record_dataflow, split_norms
from torchmto.structure.dataflow import Node, trace_subtrees
from torchmto.structure.pairing import PairSearch

TASKS = ("a", "b")


def described(model, layers):
    paths = {module: path for path, module in model.named_modules()}
    return {
        layer.name: (
            "out " + paths[layer.norm_out] if layer.norm_out is not None else "in " + paths[layer.norm_in],
            layer.source,
        )
        for layer in layers
    }


def pairs_of(model, **options):
    return {name: pair for name, (pair, _) in described(model, find_norm_pairs(model, **options)).items()}


class Block(nn.Module):
    """A residual block whose modules are registered in an order that isn't the data's."""

    def __init__(self, dynamic: bool = False) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(4)
        self.bn1 = nn.BatchNorm2d(4)
        self.bn_short = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.short = nn.Conv2d(2, 4, 1)
        self.dynamic = dynamic

    def forward(self, x):
        if self.dynamic and x.sum() > 1e9:  # torch.fx can't trace this
            return x
        y = self.conv2(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(y) + self.bn_short(self.short(x)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 2, qk_norm: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads
        self.q_norm = nn.RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(self.q_norm(q), k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class PreNormBlock(nn.Module):
    def __init__(self, width: int = 8, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width) if attention is None else attention
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        y = self.ln1(x)
        if isinstance(self.attention, nn.MultiheadAttention):
            y = self.attention(y, y, y, need_weights=False)[0]
        else:
            y = self.attention(y)
        x = x + self.drop(y)
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.ln2(x)))))


class MultiTask(nn.Module):
    """``heads[task]`` keeps torch.fx from tracing the whole."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in TASKS})

    def forward(self, x, task):
        return self.heads[task](self.trunk(x).mean((2, 3)))


BLOCK = {"conv1": "out bn1", "conv2": "out bn2", "short": "out bn_short"}
PRE_NORM = {
    **{f"attention.{name}": "in ln1" for name in "qkv"},
    "attention.out": "out ln2",
    "fc1": "in ln2",
}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("how", ["fx", "recorded"])
def test_residual_block(how, split):
    model = Block(dynamic=how == "recorded")
    if split:
        split_norms(model, TASKS)
    x = torch.randn(2, 2, 6, 6)

    def forward():
        with active_task("a"):
            model(x)

    found = described(model, find_norm_pairs(model, forward=None if how == "fx" else forward))
    assert found == {name: (pair, how) for name, pair in BLOCK.items()}


def test_order_of_modules_is_the_last_resort_and_only_for_what_no_graph_holds():
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2), nn.LayerNorm(9), nn.Linear(9, 5))

    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(chain)

        def forward(self, x):
            if x.sum() > 1e9:
                return x
            for layer in self.layers:
                x = layer(x)
            return x

    model = Opaque()
    expected = {"layers.0": ("out layers.1", "module order"), "layers.4": ("in layers.3", "module order")}
    assert described(model, find_norm_pairs(model)) == expected
    seen = described(model, find_norm_pairs(model, forward=lambda: model(torch.randn(2, 3, 5, 5))))
    assert {name: pair for name, (pair, _) in seen.items()} == {name: pair for name, (pair, _) in expected.items()}
    assert {source for _, source in seen.values()} == {"recorded"}
    unrelated = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Softmax(1), nn.BatchNorm1d(4))
    assert find_norm_pairs(unrelated) == []


def test_heads_keep_the_whole_from_tracing_but_not_the_trunk():
    model = MultiTask(Block())
    found = described(model, find_norm_pairs(model))
    assert found == {
        f"trunk.{name}": (f"{pair.split()[0]} trunk.{pair.split()[1]}", "fx") for name, pair in BLOCK.items()
    }


def test_pre_norm_transformer_blocks():
    block = PreNormBlock()
    assert pairs_of(block) == PRE_NORM
    assert pairs_of(block, forward=lambda: block(torch.randn(2, 3, 8))) == PRE_NORM
    stack = nn.Sequential(PreNormBlock(), PreNormBlock(), nn.LayerNorm(8))
    found = pairs_of(stack)
    assert found["0.fc2"] == "out 1.ln1"
    assert found["1.fc2"] == "out 2"
    assert len(found) == 12


def test_query_norms_over_one_head_serve_all_heads():
    block = PreNormBlock(attention=Attention(8, qk_norm=True))
    assert pairs_of(block) == PRE_NORM | {"attention.q": "out attention.q_norm"}
    nn.init.uniform_(block.attention.q_norm.weight)
    layer = next(layer for layer in find_norm_pairs(block) if layer.name == "attention.q")
    expected = layer.weight.square().sum(1) * block.attention.q_norm.weight.repeat(2).square()
    torch.testing.assert_close(layer.strengths(["a"])[0].float(), expected.detach())


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_attention(batch_first):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    block = split_norms(PreNormBlock(attention=attention), TASKS)
    expected = {
        "attention.in_proj": "in ln1",
        "attention.out_proj": "out ln2",
        "fc1": "in ln2",
    }

    def forward():
        with active_task("a"):
            block(torch.randn(3, 3, 8))

    assert pairs_of(block) == expected
    assert pairs_of(block, forward=forward) == expected
    nn.init.uniform_(block.ln1.b.weight)
    layer = find_norm_pairs(block, forward=forward)[0]
    assert layer.weight is attention.in_proj_weight
    assert layer.bias is attention.in_proj_bias
    strengths = layer.strengths(TASKS)
    assert strengths.shape == (2, 24)
    expected_b = attention.in_proj_weight.square() @ block.ln1.b.weight.square()
    torch.testing.assert_close(strengths[1].float(), expected_b.detach())


def test_cross_attention_has_no_single_norm():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, memory):
            return self.attention(self.norm(x), memory, memory)[0]

    model = Cross()
    x = torch.randn(2, 3, 8)
    assert pairs_of(model) == {}
    assert pairs_of(model, forward=lambda: model(x, torch.randn(2, 4, 8))) == {}


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_layers_in_evaluation_too(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, batch_first=True).eval()
    found = pairs_of(layer, forward=lambda: layer(torch.randn(2, 3, 8)))
    if norm_first:
        assert found == {
            "self_attn.in_proj": "in norm1",
            "self_attn.out_proj": "out norm2",
            "linear1": "in norm2",
        }
    else:  # linear1's input is norm1's output, and linear2 goes through the sum into norm2
        assert found == {"self_attn.out_proj": "out norm1", "linear1": "in norm1", "linear2": "out norm2"}


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), (2, 2, 8)),
        (nn.Conv3d(2, 4, 1), nn.BatchNorm3d(4), (2, 2, 3, 3, 3)),
        (nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(2, 4), (2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.InstanceNorm2d(6, affine=True), (2, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 2), nn.BatchNorm1d(6), (2, 4, 5)),
        (nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 3, 3]), (2, 3, 5, 5)),
        (nn.Linear(3, 4), nn.RMSNorm(4), (2, 3)),
        (nn.Linear(3, 4), nn.BatchNorm1d(4), (2, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_kind_of_layer(layer, norm, shape):
    model = split_norms(nn.Sequential(layer, nn.ReLU(), norm), TASKS)
    with active_task("a"):
        channels = model(torch.randn(shape)).shape[1]
    (found,) = find_norm_pairs(model)
    assert found.norm_out is model[2]
    assert found.num_channels == channels
    assert found.bias is layer.bias
    strengths = found.strengths(TASKS)
    assert strengths.shape == (2, channels)
    assert (strengths > 0).all()
    with torch.no_grad():
        model[2].b.weight.mul_(2)
    torch.testing.assert_close(found.strengths(TASKS), strengths * torch.tensor([[1.0], [4.0]]), check_dtype=False)


def test_explicit_pairs():
    model = Block()
    found = find_norm_pairs(model, pairs=[("conv1", "bn1"), ("bn1", "conv2"), ("conv2", "bn2")])
    assert [(layer.name, layer.norm_in, layer.norm_out) for layer in found] == [
        ("conv1", None, model.bn1),
        ("conv2", model.bn1, model.bn2),
    ]
    for pairs, message in [
        ([("conv1", "missing")], "no module 'missing'"),
        ([("conv1", "conv2")], "one conv or linear layer and one norm"),
        ([("bn1", "conv1")], "don't fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_norm_pairs(model, pairs=pairs)
    with pytest.raises(ValueError, match="exclude each other"), record_dataflow(model) as recording:
        find_norm_pairs(model, forward=lambda: None, recording=recording)


def test_shared_weights_parametrized_weights_and_plain_models():
    tied = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))
    tied[2].weight = tied[0].weight
    assert pairs_of(tied) == {"0": "out 1"}
    normalized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert find_norm_pairs(nn.Sequential(normalized, nn.LayerNorm(4))) == []
    assert find_norm_pairs(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == []
    assert find_norm_pairs(nn.Linear(4, 4)) == []


def test_searching_leaves_the_model_alone():
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(dynamic=True)
            self.features = None

        def forward(self, x):
            self.features = F.dropout(x)
            return self.block(self.features)

    model = Caching()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    find_norm_pairs(model)
    assert model.features is None
    x = torch.ones(2, 2, 6, 6)
    find_norm_pairs(model, forward=lambda: model(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Drawing(nn.Module):
    """A residual block that is dropped at random, and a counter, as in many pretrained models."""

    def __init__(self, draw):
        super().__init__()
        self.conv, self.norm, self.draw = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), draw
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = self.last + 1
        return x if self.draw() < 0.5 else self.norm(self.conv(x))


GLOBAL_RANDOMNESS = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.uniform()),  # noqa: NPY002
    "python": random.random,
}


@pytest.mark.parametrize("draw", GLOBAL_RANDOMNESS)
def test_tracing_draws_nothing_and_finds_the_same_whenever_it_runs(draw):
    draw = GLOBAL_RANDOMNESS[draw]
    model = nn.Sequential(*(Drawing(draw) for _ in range(6)))
    expected = described(model, find_norm_pairs(model))
    for _ in range(3):
        states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
        assert described(model, find_norm_pairs(model)) == expected
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), repr(np.random.get_state())) == states[1:]  # noqa: NPY002
        draw()
    assert not any(value for key, value in model.state_dict().items() if key.endswith(("calls", "last")))


def test_a_recording_of_the_training_step_itself():
    model = Block(dynamic=True)
    x = torch.randn(2, 2, 6, 6)
    torch.manual_seed(0)
    expected = copy.deepcopy(model)(x)
    with record_dataflow(model) as recording:
        output = model(x)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert pairs_of(model, recording=recording) == BLOCK


def test_what_was_used_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="torchmto.structure"):
        find_norm_pairs(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 1)))
    assert "0: out 1 (fx)" in caplog.text
    assert "3: no norm found" in caplog.text


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_hugging_face_backbones(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic")
        x = torch.randn(2, 3, 32, 32)
    else:
        config = transformers.ViTConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
        )
        x = torch.randn(2, 3, 16, 16)
    model = split_norms(transformers.AutoModel.from_config(config), TASKS)

    def forward():
        with active_task("a"):
            model(x)

    layers = find_norm_pairs(model, forward=forward)
    count = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
    if kind == "resnet":
        assert len(layers) == count
        assert all(layer.norm_out is not None for layer in layers)
    else:  # all but the pooler, and the patches' projection goes through a sum into the first norm
        assert len(layers) >= count - 1
    for layer in layers:
        assert layer.strengths(TASKS).shape == (2, layer.num_channels)


# ---------------------------------------------------------------------- both sides, concatenations, several uses


def layer_of(model, name, **options):
    return next(layer for layer in find_norm_pairs(model, **options) if layer.name == name)


def test_the_norms_on_both_sides_count():
    """In and out scale; where a BatchNorm follows the strength is the paper's, whatever comes in."""
    model = split_norms(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU(), nn.RMSNorm(6)), TASKS)
    for norm in (model[0], model[3]):
        for task in TASKS:
            nn.init.uniform_(norm.copy_for(task).weight)
    layer = layer_of(model, "1")
    assert (layer.norm_in, layer.norm_out) == (model[0], model[3])
    expected = torch.stack(
        [
            model[3].copy_for(task).weight.square()
            * (model[1].weight.square() @ model[0].copy_for(task).weight.square())
            for task in TASKS
        ]
    )
    torch.testing.assert_close(layer.strengths(TASKS), expected.detach().double(), rtol=1e-6, atol=1e-9)
    chain = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
    layer = layer_of(chain, "2")
    assert (layer.norm_in, layer.norm_out) == (None, chain[3])
    explicit = layer_of(chain, "2", pairs=[("0", "2"), ("2", "3")])
    assert (explicit.norm_in, explicit.norm_out) == (chain[0], chain[3])


class Traced(nn.Sequential):
    """A block that torch.fx traces by itself, inside a model that it doesn't."""


class Chain(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        for block in self.blocks:
            x = block(x)
        return x


def test_the_last_layer_of_a_block_gets_the_next_ones_norm():
    """A block traced by itself shows the norm before the layer, the recorded forward that after it."""
    blocks = [Traced(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(2)]
    model = Chain(*blocks, nn.LayerNorm(4))
    alone = {layer.name: (layer.norm_in, layer.norm_out) for layer in find_norm_pairs(model)}
    assert alone == {f"blocks.{i}.1": (blocks[i][0], None) for i in range(2)}
    found = find_norm_pairs(model, forward=lambda: model(torch.randn(3, 4)))
    after = [blocks[1][0], model.blocks[2]]
    assert [(layer.norm_in, layer.norm_out) for layer in found] == [(blocks[i][0], after[i]) for i in range(2)]
    # A BatchNorm that follows takes the other's place.
    model = Chain(Traced(nn.LayerNorm(4), nn.Linear(4, 4)), nn.BatchNorm1d(4))
    (layer,) = find_norm_pairs(model, forward=lambda: model(torch.randn(3, 4)))
    assert (layer.norm_in, layer.norm_out) == (None, model.blocks[1])


class Concatenating(nn.Module):
    def __init__(self, dynamic: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 5, 1)
        self.third = nn.Conv2d(5, 4, 1)
        self.norm = nn.BatchNorm2d(14)
        self.unknown = nn.BatchNorm2d(5)
        self.dynamic = dynamic

    def forward(self, x):
        if self.dynamic and x.sum() > 1e9:
            return x
        y = F.relu(self.second(x))
        inner = torch.cat([self.first(x), y], 1)
        z = self.norm(torch.cat((F.relu(inner), self.third(y), x), dim=1))
        return z.mean() + self.unknown(torch.cat([self.first(x), x], 1)).mean()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_norm_after_a_concatenation_goes_with_every_branch(dynamic):
    """Each layer has its own channels of it; nothing is said where the width of another branch isn't known."""
    model = Concatenating(dynamic)
    forward = (lambda: model(torch.randn(2, 2, 4, 4))) if dynamic else None
    assert find_norm_pairs(model, forward=forward) == [], "an input of unknown width, so no place is certain"
    model.norm = nn.BatchNorm2d(12)
    cat = torch.cat
    model.forward = lambda x: model.norm(
        cat((F.relu(cat([model.first(x), F.relu(model.second(x))], 1)), model.third(F.relu(model.second(x)))), dim=1)
    )
    split_norms(model, TASKS)

    def run():
        with active_task("a"):
            model(torch.randn(2, 2, 4, 4))

    found = {layer.name: layer for layer in find_norm_pairs(model, forward=run)}
    assert {name: layer.out_start for name, layer in found.items()} == {"first": 0, "second": 3, "third": 8}
    nn.init.uniform_(model.norm.b.weight)
    for name, start, stop in (("first", 0, 3), ("second", 3, 8), ("third", 8, 12)):
        weight = getattr(model, name).weight.detach().double().flatten(1).square().sum(1)
        gamma = model.norm.b.weight.detach().double()[start:stop]
        variance = model.norm.b.running_var.double()[start:stop] + model.norm.b.eps
        torch.testing.assert_close(found[name].strengths(TASKS)[1], weight * gamma**2 / variance, rtol=1e-6, atol=1e-9)


def test_pairs_with_a_place_are_remembered():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(7))
    search = PairSearch(model)
    search.recall({"0": ["1@4", None, "recorded"]})
    assert search.pairs() == {"0": ["1@4", None, "recorded"]}
    assert search.result()[0].out_start == 4
    with pytest.raises(ValueError, match="don't fit"):
        PairSearch(model).recall({"0": ["1@5", None, "recorded"]})
    with pytest.raises(ValueError, match="no layer '0' with the norms '2@0'"):
        PairSearch(model).recall({"0": ["2@0", None, "recorded"]})


@pytest.mark.parametrize("shuffle", [nn.ChannelShuffle(2), lambda x: F.channel_shuffle(x, 2)])
def test_a_channel_shuffle_ends_the_search(shuffle):
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)
            self.shuffle = shuffle

        def forward(self, x):
            return self.second(self.shuffle(self.norm(self.first(x))))

    model = Shuffled()
    for options in ({}, {"forward": lambda: model(torch.randn(2, 2, 3, 3))}):
        assert pairs_of(model, **options) == {"first": "out norm"}


class Reusing(nn.Module):
    """One conv before two norms, and one norm after two convs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.second, self.first, self.both = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.plain = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.plain(self.plain(F.softmax(self.second(self.conv(F.softmax(self.first(self.conv(x)), 1))), 1)))
        return self.both(self.other(F.softmax(self.both(x), 1)))


def test_layers_and_norms_that_are_used_twice():
    """The first use of a layer that has a norm counts; a norm goes with every layer that runs into it."""
    model = Reusing()
    expected = {"conv": "out first", "other": "out both", "plain": "out both"}
    assert pairs_of(model) == expected
    assert pairs_of(model, forward=lambda: model(torch.randn(2, 4, 3, 3))) == expected


@pytest.mark.parametrize("part", ["all", "trunk"])
def test_names_do_not_depend_on_compilation(part):
    """Those of layers, and those by which modules are chosen."""
    runs = []
    for compiled in (False, True):
        trunk = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))
        model = nn.ModuleDict({"trunk": trunk, "head": nn.Sequential(nn.Linear(4, 1), nn.LayerNorm(1))})
        run = model
        if compiled and part == "all":
            run = torch.compile(model, backend="eager")
        elif compiled:
            model["trunk"] = torch.compile(trunk, backend="eager")
        split_norms(run, ("a", "b"), modules=["trunk.3", model["head"]], exclude="head.1")
        search = PairSearch(run)
        search.trace()
        runs.append(search.pairs())
        make_task_specific(run, ("a", "b"), ["trunk.2"])
        assert [path for path, _ in trunk.named_modules() if path.endswith(".a")] == ["2.a", "3.a"]
        layer = torchmto.make_method("gradnorm", layer="trunk.0")
        features = {"gradients": "representation", "features": "trunk", "stacked": True}
        for options in ({"method": layer}, {"method": "mgda", **features}):
            torchmto.MultiTask(run, torch.optim.SGD(model.parameters(), lr=0.1), tasks=("a", "b"), **options)
    assert runs[0] == runs[1]
    assert "trunk.0" in runs[0]


# ---------------------------------------------------------------------- where the channels are


class Wired(nn.Module):
    """Modules, and a function of them and the input."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.wired = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.wired(self, x)


MAPS = {
    "view": (lambda m, x: m.norm(m.layer(x).view(-1, 2, 2, 2)), nn.BatchNorm2d(2), "out"),
    "unflatten": (lambda m, x: m.norm(nn.Unflatten(1, (2, 2, 2))(m.layer(x))), nn.BatchNorm2d(2), "out"),
    "sequences": (lambda m, x: m.norm(m.layer(x).view(-1, 2, 4)), nn.BatchNorm1d(2), "out"),
    "groups": (lambda m, x: m.norm(m.layer(x).view(-1, 2, 4)), nn.GroupNorm(2, 2), "out"),
    "heads": (lambda m, x: m.norm(m.layer(x).view(-1, 4, 2)), nn.LayerNorm(2), "last"),
    "columns": (lambda m, x: m.norm(m.layer(x).view(-1, 2)), nn.BatchNorm1d(2), None),
}


@pytest.mark.parametrize("case", MAPS)
def test_outputs_that_become_maps_go_with_their_map_and_heads_with_their_place(case):
    forward, norm, kind = MAPS[case]
    model = Wired(forward, layer=nn.Linear(3, 8), norm=norm)
    nn.init.ones_(model.layer.weight)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    found = find_norm_pairs(model.eval(), forward=lambda: model(torch.randn(4, 3)))
    assert len(found) == (kind is not None)
    expected = torch.tensor([1.0, 4.0]).repeat_interleave(4) if kind == "out" else torch.tensor([1.0, 4.0]).repeat(4)
    for layer in [*found, *(find_norm_pairs(model, pairs=[("layer", "norm")]) if kind else [])]:
        strengths = layer.strengths(["a"])[0]
        torch.testing.assert_close(strengths / strengths[0], expected.double())


OTHER_AXES = {
    "tokens": (lambda m, x: m.b(m.a(x)), nn.Linear(3, 4), nn.BatchNorm1d(4), (2, 4, 3)),
    "grouped tokens": (lambda m, x: m.b(m.a(x)), nn.Linear(3, 4), nn.GroupNorm(2, 4), (2, 4, 3)),
    "width": (lambda m, x: m.b(m.a(x)), nn.Conv2d(3, 4, 1), nn.LayerNorm(4), (2, 3, 4, 4)),
    "height": (lambda m, x: m.b(m.a(x).transpose(1, 2)), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), (2, 3, 4, 4)),
    "pixels": (lambda m, x: m.b(m.a(x).flatten(2)), nn.Conv2d(3, 4, 1), nn.LayerNorm(4), (2, 3, 2, 2)),
    "mixer": (lambda m, x: m.b(m.a(x).transpose(1, 2)), nn.LayerNorm(4), nn.Linear(4, 3), (2, 4, 4)),
    "linear over width": (lambda m, x: m.b(m.a(x)), nn.BatchNorm2d(4), nn.Linear(4, 3), (2, 4, 4, 4)),
    "linear over tokens": (lambda m, x: m.b(m.a(x)), nn.BatchNorm1d(4), nn.Linear(4, 3), (2, 4, 4)),
    "conv over tokens": (lambda m, x: m.b(m.a(x)), nn.LayerNorm(4), nn.Conv1d(4, 3, 1), (2, 4, 4)),
    "flip": (lambda m, x: m.b(m.a(x).flip(1)), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), (2, 3, 4, 4)),
    "chunk": (lambda m, x: m.b(m.a(x).chunk(2, -1)[0]), nn.Linear(3, 8), nn.LayerNorm(4), (2, 3)),
    "largest of some": (lambda m, x: m.b(m.a(x).view(-1, 4, 2).amax(2)), nn.Linear(3, 8), nn.BatchNorm1d(4), (2, 3)),
    "packed": (
        lambda m, x: m.b(m.a(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)[0]),
        *(nn.Linear(3, 24), nn.LayerNorm(4), (2, 5, 3)),
    ),
}


@pytest.mark.parametrize("case", OTHER_AXES)
def test_norms_of_another_axis_or_of_a_part_are_no_pair(case):
    forward, first, second, shape = OTHER_AXES[case]
    model = Wired(forward, a=first, b=second)
    assert find_norm_pairs(model, forward=lambda: model(torch.randn(shape))) == []
    if case in ("chunk", "largest of some", "packed", "width"):
        assert find_norm_pairs(model) == [], "the names of the operations tell, too"


def test_permuted_pooled_and_joined_channels_are_still_pairs():
    conv, linear = nn.Conv2d(3, 4, 1), nn.Linear(3, 4)
    for forward, layer, norm, shape in [
        (lambda m, x: m.norm(m.layer(x).permute(0, 2, 3, 1)), conv, nn.LayerNorm(4), (2, 3, 4, 4)),
        (lambda m, x: m.norm(m.layer(x).flatten(2).transpose(1, 2)), conv, nn.LayerNorm(4), (2, 3, 2, 2)),
        (lambda m, x: m.norm(m.layer(x).transpose(1, 2)), linear, nn.BatchNorm1d(4), (2, 4, 3)),
        (lambda m, x: m.norm(F.max_pool2d(m.layer(x), 2).relu_()), conv, nn.BatchNorm2d(4), (2, 3, 4, 4)),
        (
            lambda m, x: m.norm(torch.cat([m.layer(x), x.repeat(1, 2, 1, 1)[:, :4]], 2)),
            conv,
            nn.BatchNorm2d(4),
            (2, 3, 4, 4),
        ),
        (lambda m, x: m.norm(m.layer(x).roll(1, 2)), conv, nn.BatchNorm2d(4), (2, 3, 4, 4)),
    ]:
        model = Wired(forward, layer=layer, norm=norm)
        state = torch.get_rng_state()
        assert pairs_of(model, forward=lambda model=model, shape=shape: model(torch.ones(shape))) == {
            "layer": "out norm"
        }
        assert torch.equal(torch.get_rng_state(), state)


ACTIVATIONS = [
    *(
        nn.ReLU(),
        nn.ReLU6(),
        nn.LeakyReLU(),
        nn.GELU(),
        nn.SiLU(),
        nn.Mish(),
        nn.ELU(),
        nn.SELU(),
        nn.CELU(),
        nn.Tanh(),
    ),
    *(nn.Sigmoid(), nn.Hardtanh(), nn.Hardswish(), nn.Hardsigmoid(), nn.Softplus(), nn.Softsign(), nn.LogSigmoid()),
    *(nn.PReLU(), nn.RReLU(), nn.Softshrink(), nn.Hardshrink(), nn.Tanhshrink(), nn.Threshold(0.1, 0.0)),
    *(nn.Dropout(), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Identity()),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda module: type(module).__name__)
def test_activations_and_dropout_keep_channels_apart(activation):
    model = Wired(lambda m, x: m.norm(m.act(m.layer(x))), layer=nn.Linear(3, 4), norm=nn.LayerNorm(4), act=activation)
    assert pairs_of(model, forward=lambda: model(torch.randn(5, 3))) == {"layer": "out norm"}


CELLS = nn.GRUCell(4, 4), nn.LSTMCell(4, 4), nn.RNNCell(4, 4), nn.RNNCell(4, 4, nonlinearity="relu")
MIXING = {
    **{f"RNN {kind}": nn.RNN(4, 4, nonlinearity=kind, batch_first=True) for kind in ("tanh", "relu")},
    **{kind.__name__: kind(4, 4) for kind in (nn.GRU, nn.LSTM)},
    "GRUCell": lambda x: CELLS[0](x[0]),
    "LSTMCell": lambda x: CELLS[1](x[0])[0],
    "RNNCell tanh": lambda x: CELLS[2](x[0]),
    "RNNCell relu": lambda x: CELLS[3](x[0]),
    "inner": lambda x: torch.inner(x, torch.ones(4, 4)),
    "addbmm": lambda x: torch.addbmm(torch.ones(3, 4), x, torch.ones(len(x), 4, 4)),
    "fft": lambda x: torch.fft.fft(x).real,
    "sort": lambda x: x.sort(-1).values,
    "softmin": lambda x: F.softmin(x, -1),
    "difference": lambda x: x - x.mean(-1, keepdim=True),
    "matrix": lambda x: x @ torch.ones(4, 4),
    **{name: lambda x, name=name: getattr(torch, name)(x, -1) for name in ("cumsum", "cumprod", "logcumsumexp")},
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_channels_ends_the_search(name):
    def forward(model, x):
        y = MIXING[name](model.layer(x))
        return model.norm(y[0] if isinstance(y, tuple) else y)

    model = Wired(forward, layer=nn.Linear(3, 4), norm=nn.LayerNorm(4))
    assert find_norm_pairs(model, forward=lambda: model(torch.randn(2, 3, 3))) == []
    if name != "difference":
        assert record_mixes(model), "its name tells, too, where there are no numbers"


def record_mixes(model):
    with record_dataflow(model) as recording:
        model(torch.randn(2, 3, 3))
    return any(node.mixes for node in recording.nodes if node.module is None)


def fields(result):
    leaves = result if isinstance(result, (tuple, list)) else [result]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore")
def test_operations_that_mix_channels_are_known_by_name():
    """Of all of torch's, by what NaN in one channel reaches; but for those that move or join channels, or reduce them."""
    other = {
        *(
            "adjoint",
            "flip",
            "fliplr",
            "roll",
            "rot90",
            "t",
            "t_copy",
            "transpose",
            "swapaxes",
            "swapdims",
            "movedim",
            "moveaxis",
        ),
        *(
            "select",
            "select_copy",
            "unbind",
            "unbind_copy",
            "split",
            "stack",
            "logit",
            "amax",
            "amin",
            "aminmax",
            "max",
            "min",
        ),
        *(
            "mean",
            "median",
            "mode",
            "prod",
            "std",
            "std_mean",
            "sum",
            "var",
            "var_mean",
            "logsumexp",
            "trapezoid",
            "trapz",
        ),
        "transpose_copy",
    }
    schemas = {schema.name.removeprefix("aten::") for schema in torch._C._jit_get_all_schemas()}
    unsafe = re.compile("eig|svd|qr|lu|cholesky|solve|det|inv|rm|rand|poisson|binomial|quant|cudnn")
    named = [name for name in dir(torch) if name in schemas and name.strip("_") == name]
    names = [name for name in named if name not in other and not unsafe.search(name)]
    assert len(names) > 200
    x, missing = torch.rand(4, 4), []
    poisoned = x.clone()
    poisoned[:, 1] = torch.nan
    for name in names:
        for rest in ((), (1,), (x,)):
            try:
                clean, found = (list(fields(getattr(torch, name)(y.clone(), *rest))) for y in (x, poisoned))
            except Exception:  # noqa: BLE001 - it takes something else
                continue
            spoilt = [
                a.isfinite() & b.isnan() for a, b in zip(clean, found, strict=True) if a.shape == b.shape == x.shape
            ]
            missing += [name for entries in spoilt if entries[:, [0, 2, 3]].any() and not Node(name).mixes]
    assert sorted(set(missing)) == []


def test_tracing_leaves_other_threads_alone():
    """What others run meanwhile isn't traced, and others that trace wait, so that `nn.Module` is as before in the end."""
    before, seen = nn.Module.__call__, []
    entered, left = threading.Event(), threading.Event()
    other = nn.Linear(2, 2)

    class Second(nn.Module):
        def forward(self, x):
            entered.set()
            left.wait(5)
            return x

    class First(nn.Module):
        def forward(self, x):
            run = threading.Thread(target=lambda: seen.append((other(torch.ones(1, 2)), other.weight)))
            run.start()
            run.join()
            tracing.start()
            entered.wait(0.2)
            return self.layer(x)

    first, second = First(), Second()
    first.layer, second.layer = nn.Linear(2, 2), nn.Linear(2, 2)
    tracing = threading.Thread(target=trace_subtrees, args=(second,))
    assert trace_subtrees(first)
    left.set()
    tracing.join()
    assert nn.Module.__call__ is before
    assert isinstance(seen[0][0], torch.Tensor)
    assert seen[0][1] is other.weight
