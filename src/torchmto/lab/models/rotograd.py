"""RotoGrad's rotations: each task sees the shared features from its own angle, learnt so that gradients agree."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from torchmto.lab.models.base import Features, Heads, MultiTaskModel


class RotoGrad(MultiTaskModel):
    r"""A model with a rotation between the trunk's features and each head.

    The rotations start as the identity, so at first the outputs are those of ``model``. The model's own losses must
    not train them (their gradient there is stopped); `rotation_loss` does, with an optimizer of its own::

        model = RotoGrad(model, dim=128)
        mt = MultiTask(model, optimizer, ...)                  # without model.rotations' parameters
        rotate = torch.optim.SGD(model.rotations.parameters(), lr=...)
        ...
        gradients = model.feature_gradients(x, losses_of)      # losses_of(outputs) -> {task: loss}
        rotate.zero_grad(); model.rotation_loss(gradients).backward(); rotate.step()

    Args:
        model: Its trunk has to give one tensor ``[B, dim, ...]``. Its trunk and heads are taken over, not copied.
        dim: Size of dimension 1 of the features.

    Source: Javaloy and Valera, RotoGrad: Gradient Homogenization in Multitask Learning, ICLR 2022. This is the
    rotation part ("rotate only"); its scaling of gradients is left to the method in use.
    """

    def __init__(self, model: MultiTaskModel, dim: int) -> None:
        super().__init__(model.trunk, dict(model.heads), model.tasks)
        self.rotations = Heads({task.name: _rotation(dim) for task in model.tasks})

    def output(self, task: str, features: Features, x: Tensor) -> Tensor:
        """One task's output from its rotated features."""
        return super().output(task, _rotate(self._matrix(task).detach(), features), x)

    def feature_gradients(
        self, x: Tensor, losses: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], tasks: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Gradients of each task's loss with respect to its rotated features, ``[B, dim, ...]``.

        Args:
            x: A batch of inputs.
            losses: Maps outputs to one scalar per task; tasks without a label may be left out.
            tasks: Names of tasks; all by default.

        Returns:
            One detached gradient per loss.
        """
        names = self.asked(tasks)
        with torch.no_grad():
            features = self.features(x, names)
            rotated = {name: _rotate(self._matrix(name), features[name]) for name in names}
        for value in rotated.values():
            value.requires_grad_()
        outputs = {name: MultiTaskModel.output(self, name, rotated[name], x) for name in names}
        found = losses(outputs)
        return {name: torch.autograd.grad(loss, rotated[name], retain_graph=True)[0] for name, loss in found.items()}

    def rotation_loss(self, gradients: Mapping[str, Tensor]) -> Tensor:
        r"""What the rotations minimise: minus the agreement of each task's gradient with the mean direction.

        :math:`-\sum_k \sum_n \langle R_k^\top g_{nk}, v_n \rangle / N`, where :math:`v_n` is the mean over tasks of
        the unit vectors along :math:`R_k^\top g_{nk}`, held fixed.

        Args:
            gradients: As `feature_gradients` gives them.

        Returns:
            A scalar with a gradient on the rotations.
        """
        back = {name: _rotate(self._matrix(name).mT, gradient) for name, gradient in gradients.items()}
        with torch.no_grad():
            units = [nn.functional.normalize(gradient, dim=1) for gradient in back.values()]
            target = torch.stack(units).mean(dim=0)
        agreement = torch.stack([(gradient * target).sum(dim=1).mean() for gradient in back.values()])
        return -agreement.sum()

    def _matrix(self, task: str) -> Tensor:
        weight = self.rotations[task].weight
        assert isinstance(weight, Tensor)
        return weight


def _rotation(dim: int) -> nn.Module:
    linear = nn.Linear(dim, dim, bias=False)
    rotation = orthogonal(linear)
    rotation.weight = torch.eye(dim)
    return rotation


def _rotate(matrix: Tensor, features: Tensor) -> Tensor:
    return torch.einsum("ij,bj...->bi...", matrix, features)
