"""What the combiners that are Adam themselves have in common."""

from typing import Any

import torch

from torchmto.checks import check_number, found, warn
from torchmto.methods import GradientCombiner, Properties, hyper
from torchmto.step import Network, StepContext, StepInfo


def _decays(name: str, given: Any) -> tuple[float, ...]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(found(name, "a pair of floats", given))
    return tuple(check_number(f"{name}[{i}]", decay, minimum=0, below=1) for i, decay in enumerate(given))


class AdamRule(GradientCombiner):
    """Base of the combiners whose rows' combination is a direction of Adam's, so that the optimizer should be plain SGD.

    Args:
        betas: Decays of the two moments, in [0, 1).
        **options: ``heads``.
    """

    adapts = True
    properties = Properties(homogeneity=None, identity=False, pareto=False)
    betas: tuple[float, float] = hyper.given((0.9, 0.999), _decays)
    _network: Network | None = None

    def step(self, context: StepContext) -> StepInfo:
        """As every combiner; parameters are known by the network's names."""
        self._network = context.network
        return super().step(context)

    def no_backward(self, num_sources: int) -> str:
        """It is an optimizer's rule itself."""
        return "takes the optimizer's step itself"

    def attach(self, network: Network) -> None:
        """Check that the optimizer doesn't adapt the learning rates a second time."""
        for optimizer in network.optimizers.all:
            if not isinstance(optimizer, torch.optim.SGD) or any(group["momentum"] for group in optimizer.param_groups):
                warn(
                    f"Method `{self.name}` is Adam's rule itself: give MultiTask a torch.optim.SGD without momentum. "
                    f"Found {type(optimizer).__name__}, which adapts or averages its directions once more.",
                )
