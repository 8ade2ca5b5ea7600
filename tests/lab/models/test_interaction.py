"""MTI-Net, cross-stitch and RotoGrad do what sets them apart."""

import pytest
import torch
from torch.nn.functional import mse_loss

from torchmto.lab.data.base import Task
from torchmto.lab.losses import OwnLoss, task_loss
from torchmto.lab.models import build_model
from torchmto.lab.models.mtinet import MTINet
from torchmto.lab.models.rotograd import RotoGrad

DENSE = (Task("seg", "segmentation", 5), Task("depth", "depth", 1), Task("normal", "normals", 3))
VECTOR = (Task("a", "regression", 2), Task("b", "regression", 1))
HRNET = {"width": 2, "modules": (1, 1, 1), "blocks": 1, "stem": 4, "decoder_width": 8}


def mti(**options):
    torch.manual_seed(0)
    return build_model("hrnet18", DENSE, (3, 32, 48), **HRNET, **options)


@pytest.mark.parametrize("task_norms", [True, False])
def test_initial_predictions(task_norms):
    model = mti(task_norms=task_norms)
    assert isinstance(model, MTINet)
    x = torch.randn(2, 3, 32, 48)
    in_training, outputs = model(x), model.eval()(x)
    for task in DENSE:
        assert [p.shape for p in in_training[task.name]] == [(2, task.channels, 32, 48)] * 5
        assert outputs[task.name].shape == (2, task.channels, 32, 48)
    depth, target = in_training["depth"], torch.rand(2, 1, 32, 48) + 0.5
    loss, count = task_loss(DENSE[1])(depth, target)
    assert torch.isclose(loss, sum((p - target).abs().mean() for p in depth))
    assert count == target.numel()
    own, _ = OwnLoss(DENSE[1], lambda output, target: (output - target).abs().mean())(depth, target)
    assert torch.isclose(own, loss)
    loss.backward()
    assert all(scale.predict["depth"].weight.grad.any() for scale in model.initial)
    assert model.initial[0].predict["seg"].weight.grad is None


def test_tasks_inform_each_other():
    model = mti()
    model(torch.randn(2, 3, 32, 48), ("seg",))["seg"][0].mean().backward()
    assert model.initial[0].refine["depth"][0].conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.heads["depth"].parameters())


def test_one_task():
    model = build_model("hrnet18", DENSE[:1], (3, 32, 32), **HRNET)
    assert model.eval()(torch.randn(2, 3, 32, 32))["seg"].shape == (2, 5, 32, 32)


def test_cross_stitch_mixes_columns():
    x = torch.randn(4, 3)
    for own, informed in ((1.0, False), (0.7, True)):
        torch.manual_seed(0)
        model = build_model("cross_stitch", VECTOR, (3,), widths=(4, 4), own=own)
        assert torch.allclose(model.trunk.mixtures[0].sum(dim=1), torch.ones(2))
        model(x, ("a",))["a"].sum().backward()
        other = model.trunk.rows[0][1][0].weight.grad
        assert bool(other.abs().sum() > 0) == informed


def rotograd(shape=(6,), name="mlp"):
    torch.manual_seed(0)
    plain = build_model(name, VECTOR, shape, widths=(8, 4))
    return plain, RotoGrad(plain, 4)


@pytest.mark.parametrize(("name", "shape"), [("mlp", (6,)), ("convnet", (1, 8, 8))])
def test_rotations_start_as_identity_and_stay_orthogonal(name, shape):
    plain, model = rotograd(shape, name)
    x = torch.randn(5, *shape)
    assert all(torch.allclose(model(x)[task], plain(x)[task], atol=1e-5) for task in ("a", "b"))
    sum(output.square().mean() for output in model(x).values()).backward()
    assert all(p.grad is None for p in model.rotations.parameters())

    targets = {"a": torch.randn(5, 2), "b": torch.randn(5, 1)}

    def losses(outputs):
        return {task: mse_loss(output, targets[task]) for task, output in outputs.items()}

    gradients = model.feature_gradients(x, losses)
    rotate = torch.optim.SGD(model.rotations.parameters(), lr=1.0)
    values = []
    for _ in range(20):
        rotate.zero_grad()
        loss = model.rotation_loss(gradients)
        loss.backward()
        rotate.step()
        values.append(loss.item())
    assert values[-1] < values[0]
    for rotation in model.rotations.values():
        assert torch.allclose(rotation.weight @ rotation.weight.mT, torch.eye(4), atol=1e-5)


def test_rotations_align_gradients():
    _, model = rotograd()
    gradients = {"a": torch.tensor([[1.0, 0, 0, 0]]), "b": torch.tensor([[0.0, 1, 0, 0]])}
    rotate = torch.optim.Adam(model.rotations.parameters(), lr=0.05)
    for _ in range(150):
        rotate.zero_grad()
        model.rotation_loss(gradients).backward()
        rotate.step()
    back = [model.rotations[task].weight.mT @ gradients[task][0] for task in ("a", "b")]
    assert torch.dot(*back) > 0.95
