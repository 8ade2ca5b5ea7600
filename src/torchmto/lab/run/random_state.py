"""All random generators a run may draw from."""

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), NumPy and Python."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - other people's code draws from it
    torch.manual_seed(seed)


def seed_of_rank(seed: int, rank: int, step: int) -> int:
    """The seed of a process that goes on from ``step`` without a random state of its own.

    Example:
        >>> seed_of_rank(0, 1, 0) == seed_of_rank(0, 1, 0), seed_of_rank(0, 1, 0) == seed_of_rank(0, 1, 7)
        (True, False)
    """
    return int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0])


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of all generators, as values that ``torch.load(weights_only=True)`` reads.

    Args:
        device: Where this process computes; of the CUDA devices only its own has a state to save.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put all generators back; that of the CUDA device where one was saved and is used again."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


@contextlib.contextmanager
def random_state_of_evaluation(seed: int, rank: int, device: torch.device) -> Iterator[None]:
    """Generators that a Run's evaluations start from, the same ones each time, inside the block; as before after it.

    So a model that draws in evaluation, too, gives the same figures again, and trains on alike however often it is evaluated.
    """
    before = random_state(device)
    seed_everything(seed_of_rank(seed, rank, 0))
    try:
        yield
    finally:
        restore_random_state(before, device)
