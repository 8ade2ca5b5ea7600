"""Split norms: what is copied, under which keys, and which copy a call uses."""

import _thread
import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchmto.structure import (
    SplitNorm,
    active_task,
    active_tasks,
    current_tasks,
    find_norm_pairs,
    has_split_norms,
    is_norm,
    split_norms,
    stacked,
)

TASKS = ("seg", "depth")


class LlamaRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class PreNorm(nn.Module):  # a wrapper, not a norm
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = nn.Linear(width, width)

    def forward(self, x):
        return x + self.fn(self.norm(x))


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm2d(4), (6, 4, 3, 3)),
        (nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
        (nn.BatchNorm2d(4, affine=False), (6, 4, 3, 3)),
        (nn.LayerNorm(4), (6, 4)),
        (nn.GroupNorm(2, 4), (6, 4, 3)),
        (nn.InstanceNorm2d(4, affine=True), (6, 4, 3, 3)),
        (nn.InstanceNorm1d(4, affine=True), (4, 5)),
        (nn.InstanceNorm2d(4, track_running_stats=True), (6, 4, 3, 3)),
        (nn.RMSNorm(4), (6, 4)),
        (LlamaRMSNorm(4), (6, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_kind_of_norm_gets_a_copy_per_task(norm, shape):
    plain = nn.Sequential(nn.Identity(), norm)
    model = split_norms(copy.deepcopy(plain), TASKS)
    assert has_split_norms(model)
    assert not has_split_norms(plain)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for task in TASKS:
        with active_task(task):
            torch.testing.assert_close(model(x), copy.deepcopy(plain)(x), rtol=0, atol=0)
    keys = set(model.state_dict())
    assert {f"1.{task}.{key}" for task in TASKS for key in norm.state_dict()} <= keys
    assert {key.rsplit(".", 1)[1] for key in keys} <= {*norm.state_dict(), "running_group_var"}


def test_norms_without_state_and_other_modules_keep_their_place():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.LocalResponseNorm(2), nn.BatchNorm2d(4))
    before = list(model)
    assert split_norms(model, TASKS) is model
    assert list(model)[:3] == before[:3]
    assert isinstance(model[3], SplitNorm)
    assert model[3].seg is not model[3].depth


def test_wrappers_are_no_norms_and_sync_batch_norm_is_one():
    assert not is_norm(PreNorm(4))
    assert is_norm(nn.SyncBatchNorm(4))
    model = split_norms(PreNorm(4), TASKS)
    assert sorted(model.norm.state_dict()) == ["depth.bias", "depth.weight", "seg.bias", "seg.weight"]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(split_norms(nn.Sequential(nn.BatchNorm2d(3)), TASKS))
    assert isinstance(converted[0].copy_for("seg"), nn.SyncBatchNorm)


def test_running_statistics_belong_to_the_task():
    model = split_norms(nn.Sequential(nn.BatchNorm1d(2)), TASKS)
    with active_task("seg"):
        model(torch.randn(8, 2) + 5)
    assert model[0].seg.running_mean.abs().min() > 0.1
    assert torch.equal(model[0].depth.running_mean, torch.zeros(2))


def test_tied_norms_and_tied_parameters_stay_tied():
    shared = nn.LayerNorm(3)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "c": nn.LayerNorm(3)})
    model["c"].weight = shared.weight
    model["a"].again = shared
    split_norms(model, TASKS)
    assert model["a"][0] is model["a"].again is model["b"][0]
    assert has_split_norms(model["b"])
    assert model["c"].seg.weight is model["a"][0].seg.weight
    assert model["c"].seg.weight is not model["c"].depth.weight


def test_modules_and_exclude_choose_the_part():
    def build():
        return nn.ModuleDict({"trunk": nn.Sequential(nn.LayerNorm(2)), "head": nn.Sequential(nn.LayerNorm(2))})

    for options in ({"exclude": "head"}, {"modules": ["trunk"]}, {"exclude": ["head"]}):
        model = split_norms(build(), TASKS, **options)
        assert has_split_norms(model["trunk"])
        assert not has_split_norms(model["head"])
    model = build()
    split_norms(model, TASKS, modules=[model["head"]])
    assert has_split_norms(model["head"])
    assert not has_split_norms(model["trunk"])
    with pytest.raises(ValueError, match="no module 'haed'"):
        split_norms(build(), TASKS, exclude="haed")
    with pytest.raises(ValueError, match="modules of the model"):
        split_norms(build(), TASKS, modules=[nn.LayerNorm(2)])


def test_splitting_again():
    model = split_norms(nn.Sequential(nn.LayerNorm(2)), TASKS)
    keys = list(model.state_dict())
    assert list(split_norms(model, TASKS).state_dict()) == keys
    with pytest.raises(ValueError, match="already split"):
        split_norms(model, ["other"])


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ("seg", TypeError, "Found `tasks = 'seg'`"),
        ([1, 2], TypeError, "a sequence of strings"),
        ([], ValueError, "at least one task"),
        (["a", "a"], ValueError, "there twice"),
        (["a", ""], ValueError, "non-empty names"),
        (["a.b"], ValueError, "part of a state key"),
        (["weight"], ValueError, "attribute of BatchNorm2d"),
        (["train"], ValueError, "attribute of"),
        (["task_names"], ValueError, "attribute of"),
    ],
)
def test_bad_task_names(tasks, error, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(error, match=message):
        split_norms(model, tasks)
    assert not has_split_norms(model)


def test_a_norm_can_not_replace_itself():
    with pytest.raises(ValueError, match="itself a norm"):
        split_norms(nn.LayerNorm(3), TASKS)


def test_calls_without_a_known_task():
    model = split_norms(nn.Sequential(nn.LayerNorm(2)), TASKS)
    with pytest.raises(RuntimeError, match="no task is active"):
        model(torch.zeros(1, 2))
    with active_task("normals"), pytest.raises(RuntimeError, match="'normals'"):
        model(torch.zeros(1, 2))
    with pytest.raises(TypeError, match="name of a task"), active_task(None):
        pass


def test_active_task_nests_and_is_restored_after_errors():
    def fail():
        with active_task("depth"):
            raise KeyError

    with active_task("seg"):
        with active_task("depth"):
            assert current_tasks() == ("depth",)
        with pytest.raises(KeyError):
            fail()
        assert current_tasks() == ("seg",)
    assert current_tasks() == ()


def asked_by_a_worker():
    """What a thread sees that wasn't started by Python's threading, as those of autograd aren't."""
    seen, done = [], threading.Event()

    def ask():
        try:
            seen.append(current_tasks())
        except RuntimeError as error:
            seen.append(str(error))
        done.set()

    _thread.start_new_thread(ask, ())
    done.wait()
    return seen[0]


def test_workers_see_the_task_of_the_thread_that_trains():
    assert asked_by_a_worker() == ()
    with active_task("seg"):
        assert asked_by_a_worker() == ("seg",)
    assert asked_by_a_worker() == ()


def test_every_thread_has_its_own_active_task():
    inside, done = threading.Event(), threading.Event()
    seen = []

    def train():
        seen.append(current_tasks())
        with active_task("depth"):
            inside.set()
            done.wait()
            seen.append(current_tasks())

    thread = threading.Thread(target=train)
    with active_task("seg"):
        thread.start()
        inside.wait()
        assert current_tasks() == ("seg",)
        # For whom a worker runs a checkpointed block again can't be told.
        assert "Several threads train different tasks" in asked_by_a_worker()
        done.set()
        thread.join()
    assert seen == [(), ("depth",)]


@pytest.mark.cpu  # a thread has a default device of its own
def test_two_threads_train_two_models_as_one_after_the_other():
    def build(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return split_norms(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1)), TASKS)

    def train(model, seed):
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(50):
            with active_task(TASKS[(step + seed) % 2]):
                optimizer.zero_grad()
                x = torch.randn(4, 3, generator=generator)
                checkpoint(model, x, use_reentrant=False).square().sum().backward()
                optimizer.step()

    alone, beside = [build(0), build(1)], [build(0), build(1)]
    for seed, model in enumerate(alone):
        train(model, seed)
    threads = [threading.Thread(target=train, args=(model, seed)) for seed, model in enumerate(beside)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, beside, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_are_recomputed_with_the_active_task(use_reentrant):
    model = split_norms(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), TASKS)
    nn.init.constant_(model[1].depth.weight, 2.0)
    x = torch.randn(4, 3, requires_grad=True)
    with active_task("depth"):
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    found, x.grad = x.grad, None
    with active_task("depth"):
        model(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)
    assert model[1].seg.weight.grad is None


def test_attributes_are_read_from_the_active_copy():
    model = split_norms(nn.Sequential(nn.LayerNorm(3, eps=1e-3)), TASKS)
    norm = model[0]
    assert norm.eps == 1e-3
    assert norm.normalized_shape == (3,)
    with active_task("depth"):
        assert norm.weight is norm.depth.weight
    with pytest.raises(AttributeError, match="differs between tasks"):
        _ = norm.weight
    for name in ("reset_parameters", "no_such_thing"):
        with pytest.raises(AttributeError):
            getattr(norm, name)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_layer(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain = copy.deepcopy(layer).train(training)
    split_norms(layer, TASKS).train(training)
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), active_task("seg"):
        torch.testing.assert_close(layer(x), plain(x))
    with torch.no_grad(), active_tasks(TASKS):
        torch.testing.assert_close(layer(torch.cat([x, x])), plain(x).repeat(2, 1, 1))


def test_copy_pickle_state_and_dtype():
    model = split_norms(nn.Sequential(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4)), TASKS)
    nn.init.uniform_(model[1].depth.weight)
    clone = copy.deepcopy(model)
    assert clone[1].depth.weight is not model[1].depth.weight
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = split_norms(nn.Sequential(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4)), TASKS)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    loaded = pickle.loads(pickle.dumps(model)).double()
    x = torch.randn(3, 2, 5)
    with active_task("depth"):
        expected = model.eval()(x)
        assert torch.equal(clone.eval()(x), expected)
        assert torch.equal(fresh.eval()(x), expected)
        assert loaded.eval()(x.double()).dtype == torch.float64


def test_the_scale_of_each_group_is_tracked_in_training_only():
    model = split_norms(nn.Sequential(nn.GroupNorm(2, 4)), TASKS)
    x = torch.randn(64, 4, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1, 3, 3])[:, None]
    with active_task("seg"):
        for _ in range(60):
            model(x)
        tracked = model[0].seg.running_group_var.clone()
        torch.testing.assert_close(tracked, torch.tensor([1.0, 9.0]), rtol=0.15, atol=0)
        model.eval()(x * 10)
    assert torch.equal(model[0].seg.running_group_var, tracked)
    assert torch.equal(model[0].depth.running_group_var, torch.ones(2))


def test_compiled_models_use_the_active_task():
    model = split_norms(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), TASKS)
    nn.init.constant_(model[1].depth.weight, 2.0)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 3)
    for task in (*TASKS, *TASKS):
        with active_task(task):
            assert torch.equal(compiled(x), model(x))


def conv_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2)),
        *(nn.GroupNorm(2, 4), nn.Flatten(2), nn.LayerNorm(9)),
    )
    split_norms(net, TASKS)
    for name, parameter in net.named_parameters():
        if "depth" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return net.double()


def test_stacked_tasks_give_the_numbers_of_separate_passes():
    plain, batched = conv_net(), conv_net()
    x = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    expected = {}
    for task in TASKS:
        with active_task(task):
            expected[task] = plain(x)
    found = stacked(batched)(x, TASKS)
    for task in TASKS:
        torch.testing.assert_close(found[task], expected[task])
    sum(value.square().mean() for value in expected.values()).backward()
    sum(value.square().mean() for value in found.values()).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), batched.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), (_, b) in zip(plain.named_buffers(), batched.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    alone = stacked(plain.eval())({"seg": x}, ["seg"])
    assert list(alone) == ["seg"]


def test_stacked_inputs_per_task_and_structured_outputs():
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(2)

        def forward(self, x, factor=1):
            return {"a": self.norm(x), "b": [factor * x]}

    trunk = split_norms(Trunk(), TASKS)
    inputs = {"seg": torch.ones(2, 2), "depth": torch.zeros(2, 2)}
    outputs = stacked(trunk)(inputs, TASKS, factor=3)
    assert torch.equal(outputs["seg"]["b"][0], 3 * torch.ones(2, 2))
    assert torch.equal(outputs["depth"]["b"][0], torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"Missing: .'depth'"):
        stacked(trunk)({"seg": torch.ones(2, 2)}, TASKS)
    with pytest.raises(ValueError, match="one size"):
        stacked(trunk)({"seg": torch.ones(2, 2), "depth": torch.ones(3, 2)}, TASKS)
    with pytest.raises(RuntimeError, match="one equal part per task"):
        stacked(lambda x: x.sum())(torch.ones(2, 2), TASKS)
    with active_tasks(TASKS), pytest.raises(RuntimeError, match="one equal chunk per task"):
        trunk(torch.ones(3, 2))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_hugging_face_backbones(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        )
        x = torch.randn(2, 3, 32, 32)
    else:
        config = transformers.ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
        )
        x = torch.randn(2, 3, 16, 16)
    plain = (transformers.AutoBackbone if kind == "resnet" else transformers.AutoModel).from_config(config).eval()
    model = split_norms(copy.deepcopy(plain), TASKS)

    def features(net):
        output = net(x)
        return output.feature_maps[0] if kind == "resnet" else output.last_hidden_state

    with torch.no_grad(), active_task("depth"):
        torch.testing.assert_close(features(model), features(plain), rtol=0, atol=0)
    assert not any(is_norm(module) for name, module in model.named_modules() if name.split(".")[-1] not in TASKS)
    with torch.no_grad():
        both = stacked(lambda batch: model(batch)[0])(x, TASKS)
        torch.testing.assert_close(both["seg"], plain(x)[0], rtol=1e-4, atol=1e-5)


def test_a_block_may_be_entered_within_itself_and_decorates():
    block = active_task("depth")
    with block:
        with block:
            assert current_tasks() == ("depth",)
        assert current_tasks() == ("depth",)
    assert current_tasks() == ()
    assert active_task("seg")(current_tasks)() == ("seg",)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_without_running_statistics_the_variance_is_tracked_beside(norm):
    """A BatchNorm's is what it would track itself, but for the bias."""
    model = split_norms(nn.Sequential(nn.Conv1d(2, 2, 1), norm(2, affine=True, track_running_stats=False)), TASKS)
    plain = copy.deepcopy(model[1].seg)
    x = torch.randn(64, 2, 8) * torch.tensor([1.0, 3.0])[:, None] + torch.randn(64, 1, 1)
    with active_task("seg"):
        for _ in range(60):
            assert torch.equal(model[1](x), plain(x))
    variance = x.transpose(0, 1).flatten(1).var(1) if norm is nn.BatchNorm1d else x.var(2, unbiased=False).mean(0)
    torch.testing.assert_close(model[1].seg.running_group_var, variance, rtol=1e-2, atol=0)
    assert torch.equal(model[1].depth.running_group_var, torch.ones(2))
    (layer,) = find_norm_pairs(model)
    expected = model[0].weight.detach().square().sum((1, 2)) / (model[1].seg.running_group_var + 1e-5)
    torch.testing.assert_close(layer.strengths(TASKS)[0].float(), expected)


def test_lazy_norms_want_a_run_first():
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="'1' has parameters without a shape"):
        split_norms(model, TASKS)
    model(torch.ones(2, 3, 4, 4))
    assert has_split_norms(split_norms(model, TASKS))
