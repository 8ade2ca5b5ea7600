"""Updates of the shared parameters that are bounded by themselves, whatever the heads do."""

from torch import Tensor


def clipped(weights: Tensor, gramian: Tensor, max_norm: float) -> Tensor:
    """The weights [k], made smaller where ``weights @ J`` is longer than ``max_norm``; G = J Jᵀ is [k, k].

    Example:
        >>> import torch
        >>> clipped(torch.tensor([1.0, 1.0]), torch.tensor([[9.0, 0.0], [0.0, 16.0]]), 1.0)
        tensor([0.2000, 0.2000])
    """
    lengths = gramian.diagonal().clamp_min(0).sqrt() * weights.abs()
    largest = lengths.max()
    if not bool(largest > 0):
        return weights
    # Squares of the weights or of G alone could overflow; the products of both can't.
    scaled = weights / largest
    norm = largest * (scaled @ (gramian @ scaled)).clamp_min(0).sqrt()
    return weights * (max_norm / norm).clamp_max(1) if bool(norm > 0) else weights
