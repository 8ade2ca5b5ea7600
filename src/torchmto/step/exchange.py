"""What the ranks tell each other before each backward: losses, counts, roles to agree on, failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from torchmto.gradients.ranks import Ranks, all_equal, fingerprint


@dataclass(frozen=True)
class Told:
    """What all ranks know after an exchange.

    Attributes:
        totals: Task index -> summed counts, of the tasks that at least one rank brought.
        weighted: Task index -> sum of count times loss, float64.
        disagree: Whether a rank knows of roles that the others may not know.
        even: Whether all ranks brought the same tasks and counts in the same micro-batches.
    """

    totals: dict[int, float]
    weighted: dict[int, Tensor]
    disagree: bool
    even: bool


class Exchange:
    """One small sum over the ranks, from which all of them draw the same conclusions.

    Args:
        ranks: The processes.
        num_tasks: K.
        step: What this step is about, for the check that all ranks are doing the same: its tasks, its random state.
    """

    def __init__(self, ranks: Ranks, num_tasks: int, step: str) -> None:
        self._ranks = ranks
        self._num_tasks = num_tasks
        self._step = step
        self._number = 0

    @torch.no_grad()
    def __call__(
        self,
        totals: Mapping[int, float],
        weighted: Mapping[int, Tensor],
        *,
        doing: str,
        device: torch.device,
        disagree: bool,
        counts: Sequence[object] | None = None,
        failure: Exception | None = None,
    ) -> Told:
        """Sum counts and losses; called by all ranks together.

        Args:
            totals: Task index -> count.
            weighted: Task index -> count times loss.
            doing: What these losses are for; must be the same everywhere.
            device: Where the process group can send from.
            disagree: Whether this rank knows of roles that the others may not know.
            counts: Tasks and counts of this rank's micro-batches; None if they aren't even among themselves.
            failure: What this rank's forward raised.

        Raises:
            RuntimeError: If another rank failed; this rank's own failure is raised as it is.
            ValueError: If the ranks aren't doing the same.
        """
        count = self._num_tasks
        self._number += 1
        here = f"{doing}, exchange {self._number} of a step {self._step}"
        marks = fingerprint(here), fingerprint(counts)
        vector = torch.zeros(2 * count + 7, dtype=torch.float64)
        for index, total in totals.items():
            vector[index] = total
        vector[2 * count :] = torch.tensor(
            [failure is not None, disagree, counts is None, *marks, *(mark * mark for mark in marks)]
        )
        vector = vector.to(device)
        if weighted:
            places = torch.tensor([count + index for index in weighted])
            vector[places.to(device)] = torch.stack([value.to(vector) for value in weighted.values()])
        values = self._ranks.sum_(vector).tolist()
        failed, disagreeing, uneven, doings, shapes, doings_squared, shapes_squared = values[2 * count :]
        if failed:
            raise_together(self._ranks, failure)
        if not all_equal(doings, doings_squared, self._ranks.size):
            everywhere = self._ranks.objects(here)
            other = next(rank for rank, text in enumerate(everywhere) if text != everywhere[0])
            raise ValueError(
                "The ranks aren't taking the same step: they need the same tasks, method, state and seed. "
                f"Rank 0: {everywhere[0]}. Rank {other}: {everywhere[other]}."
            )
        present = [index for index in range(count) if values[index] > 0]
        return Told(
            {index: values[index] for index in present},
            {index: vector[count + index] for index in present},
            bool(disagreeing),
            not uneven and all_equal(shapes, shapes_squared, self._ranks.size),
        )


class RankFailedError(RuntimeError):
    """Another rank failed, which ended the work on all: in a step, nothing has been updated then."""


def raise_together(ranks: Ranks, failure: Exception | None) -> NoReturn:
    """End the step on all ranks, because at least one has failed. Called by all ranks together.

    Raises:
        RankFailedError: On ranks that didn't fail themselves, with the first failed rank's message.
    """
    messages = ranks.objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    rank, message = next((rank, text) for rank, text in enumerate(messages) if text is not None)
    raise RankFailedError(f"Rank {rank} failed, so the step ended on all ranks. {message}")
