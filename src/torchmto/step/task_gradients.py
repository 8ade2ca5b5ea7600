"""The gradients of the tasks of one batch, as rows or, by an engine, their Gramian alone; and their combination."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from itertools import compress

import torch
from torch import Tensor

from torchmto.gradients.backwards import gradients_of, quiet
from torchmto.gradients.engine import Piece, Wanted
from torchmto.gradients.finite import plain
from torchmto.gradients.rows import Rows, gramian, wide_dtype
from torchmto.gradients.sharded import ShardedRows
from torchmto.step.finite import SkippedError, check_losses, check_task_gradients
from torchmto.step.forwards import forwards
from torchmto.step.losses import Chunk, Losses, Sums, empty_batch
from torchmto.step.messages import own_columns, settle, sum_gradients, sum_heads, take_shards
from torchmto.step.network import Heads, Network, Place
from torchmto.step.parts import Parts, Request
from torchmto.step.reduction import average, over_ranks, tell


class TaskGradients:
    """The present tasks' gradients: rows on the shared parameters, and each head's own.

    Attributes:
        indices: The present tasks, ascending; row i of everything below belongs to task ``indices[i]``.
        losses: Their losses, [k].
        gramian: G = J Jᵀ, float64 on the CPU, [k, k].
        heads: Parameters outside the shared ones -> the gradient of each task that reached them.
        reduced: The losses of the rows' tasks, with counts.
        all_losses: The losses of all tasks of the forward, more where more were asked for.
        precision: The machine precision of the rows, the coarsest of their parameters'.
        graph: Where the rows aren't kept: the losses with graph, of this rank.
    """

    def __init__(
        self,
        rows: Rows | ShardedRows,
        losses: Losses,
        gramian: Tensor,
        heads: Heads,
        everything: Losses,
        *,
        precision: float,
        graph: Sequence[Chunk] | None = None,
    ) -> None:
        self.rows = rows
        self.indices = losses.indices
        self.losses = losses.values
        self.reduced = losses
        self.all_losses = everything
        self.gramian = gramian
        self.heads = heads
        self.precision = precision
        self.graph = graph

    @property
    def matrix(self) -> Tensor:
        """J, the gradients of the present tasks on the shared parameters as rows, [k, P]. The live buffer, no copy."""
        return self.rows.matrix

    @property
    def parameters(self) -> list[Tensor]:
        """The shared parameters, in the order of their columns."""
        return self.rows.parameters

    @property
    def trained(self) -> list[bool]:
        """Of each of these whether it is trained now; the columns of others are zero."""
        trained = set(map(id, self.rows.trained))
        return [id(parameter) in trained for parameter in self.parameters]

    def has(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is one of the shared parameters."""
        return id(parameter) in self.rows.position

    def columns(self, parameter: Tensor) -> slice:
        """The columns of one shared parameter."""
        return self.rows.slices[self.rows.position[id(parameter)]]

    def view(self, parameter: Tensor) -> Tensor:
        """The gradients of one shared parameter, a view [k, *parameter.shape] of the matrix."""
        assert isinstance(self.rows, Rows), "methods that need whole rows are refused where rows are divided"
        return self.rows.view(parameter)


def present(parts: Parts, everything: Losses, request: Request) -> Losses:
    """The losses of the tasks whose gradients are wanted; there has to be one, and a parameter that tasks share."""
    losses = everything.only(request.wanted)
    if not everything.indices and request.asked == parts.asked:
        raise empty_batch(parts.asked, request.source)
    if not losses.indices:
        raise SkippedError("None of the tasks of this sub-step is present.", absent=True)
    if parts.network.roles.unshared and request.combined:
        raise ValueError(
            f"{parts.network.unshared()} A method that combines the gradients of tasks needs shared parameters; loss "
            "weightings, as `gd`, do without."
        )
    return losses


def factors_of(network: Network, losses: Losses) -> Tensor | None:
    """What turns every present task's summed gradient into its mean, float64 [k]; None for 1.

    It also undoes the scaler's scale and applies the user's loss weights.
    """
    if losses.factors is None and network.scaler is None and all(total == 1 for total in losses.totals.values()):
        return None
    factors = torch.tensor([1.0 / losses.totals[i] for i in losses.indices], dtype=torch.float64)
    scale = network.scale(network.device)
    if scale is not None:
        factors = factors / scale.to(factors)
    if losses.factors is not None:
        factors = factors * losses.factors.to(factors)
    return None if bool((factors == 1).all()) else factors


def hold(heads: Heads, task: int, parameter: Tensor, gradient: Tensor) -> None:
    """Add one task's gradient of a parameter outside the shared ones."""
    _, held = heads.setdefault(id(parameter), (parameter, {}))
    # A copy, because autograd may hand out one tensor for two parameters, or an expanded one.
    held[task] = held[task] + gradient if task in held else gradient.clone()


def rescale_heads(heads: Heads, losses: Losses, factors: Tensor) -> None:
    """Multiply every task's gradients of heads by its factor."""
    by_task = dict(zip(losses.indices, factors.tolist(), strict=True))
    for parameter, held in heads.values():
        heads[id(parameter)] = (parameter, {task: g * by_task[task] for task, g in held.items() if task in by_task})


def set_heads(network: Network, gradients: TaskGradients, weights: Tensor | None) -> None:
    """Set ``.grad`` of the heads: the sum of their tasks' gradients, times the tasks' weights [k] if there are any."""
    by_task = dict.fromkeys(gradients.indices, 1.0)
    if weights is not None:
        by_task = dict(zip(gradients.indices, weights.tolist(), strict=True))
    totals: list[tuple[Tensor, Tensor]] = []
    for parameter, held in gradients.heads.values():
        total: Tensor | None = None
        for task, gradient in held.items():
            part = gradient if by_task[task] == 1 else gradient * by_task[task]
            total = part if total is None else total + part
        if total is not None and parameter.requires_grad:
            totals.append((parameter, total))
    network.set_gradients(totals)


# ---------------------------------------------------------------------- rows: one backward per task


def gradients_with_rows(parts: Parts, request: Request) -> TaskGradients:
    """K backwards into the K x P matrix, and its Gramian.

    Sums over micro-batches and ranks turn into means, unscaled and weighted, by one factor per task.
    """
    network = parts.network
    parts.engine = "parameters"
    rows, heads = _begun(parts, request.source)
    everything = _collect(parts, request, rows, heads)
    losses = present(parts, everything, request)
    factors = factors_of(network, losses)
    if factors is not None:
        rows.matrix.mul_(factors.to(rows.matrix).unsqueeze(1))
        rescale_heads(heads, losses, factors)
    product = gramian(rows.matrix) if not parts.several else _summed_gramian(network, rows)
    check_losses(parts, everything, everything.raw.tolist(), source=request.source)
    check_task_gradients(parts, losses, product)
    return TaskGradients(rows, losses, product, heads, everything, precision=network.precision(rows.parameters))


def keep_rows(parts: Parts, request: Request) -> None:
    """One more micro-batch of a batch that is accumulated over several calls: its rows are added to those of earlier ones."""
    rows, heads = _begun(parts, request.source)
    _gather(parts, request, rows, heads, streamed=False)


def _begun(parts: Parts, source: int) -> tuple[Rows | ShardedRows, Heads]:
    """The rows and heads of a batch, empty unless earlier calls have left some."""
    rows = parts.network.rows_of(source)
    rows.trained = parts.network.parameters
    if parts.carried is None or source not in parts.carried:
        rows.begin()
    return rows, {} if parts.carried is None else parts.left_by_earlier_calls(source).heads


def _collect(parts: Parts, request: Request, rows: Rows | ShardedRows, heads: Heads) -> Losses:
    """Run the forwards of a batch and one backward per task. Gradients are sums over micro-batches and ranks.

    Among several processes, with one micro-batch, a task's row is on its way while the next task's backward runs. Rows that are
    divided among the ranks travel after every micro-batch, others once, after the last. FSDP averages gradients within each
    backward.

    Args:
        parts: The step's parts.
        request: Whose gradients on which batch.
        rows: Gets the gradients of the shared parameters.
        heads: Gets the gradients of the others.

    Returns:
        The losses, averaged over micro-batches and ranks.
    """
    network = parts.network
    number = len(parts.sources[request.source])
    if not parts.several and number == 1 and parts.carried is None and not network.split:
        (chunk,) = forwards(parts, request, apart=True)
        network.lay_out(rows, heads)
        _backwards(parts, chunk, [index for index in chunk.losses if index in request.wanted], rows, heads)
        return over_ranks(parts, [chunk])
    if not parts.several:
        sums, _ = _gather(parts, request, rows, heads, streamed=False)
        rows.sort()
        return average(parts, sums)
    divided = isinstance(rows, ShardedRows)
    streamed = not network.sharded and (number == 1 or divided) and parts.carried is None
    parts.doing = f"gradients {sorted(request.wanted)} of batch {request.source}"
    if divided or network.split:
        # There is more than one exchange per list, so all ranks need lists of one length.
        parts.doing += f" by {number} micro-batches"
    sums, failure = _gather(parts, request, rows, heads, streamed=streamed)
    if not streamed:
        sums, _ = tell(parts, sums)
    present = tuple(index for index in sums.totals if index in request.wanted)
    if network.sharded:
        rows.sort()
        settle(network, rows, heads)
        return average(parts, sums)
    if not streamed:
        network.lay_out(rows, heads)
        for index in present:
            rows.send(index)
    rows.wait()
    rows.sort()
    sum_heads(network, rows, heads, present, failure)
    return average(parts, sums)


def _gather(
    parts: Parts, request: Request, rows: Rows | ShardedRows, heads: Heads, *, streamed: bool
) -> tuple[Sums, BaseException | None]:
    """This rank's forwards and backwards; rows that are ``streamed`` are sent on the way.

    Returns:
        The losses, with those of earlier calls, and what failed where the other ranks wait for rows all the same.
    """
    network = parts.network
    sums = parts.left_by_earlier_calls(request.source).sums
    failure: BaseException | None = None
    for position, chunk in enumerate(forwards(parts, request, apart=True)):
        own = sums if not streamed else Sums()
        own.add(chunk)
        if streamed:
            own, _ = tell(parts, own)
            sums.merge(own)
        if position == 0 or not parts.several:
            network.lay_out(rows, heads)
        turn = [index for index in (own.totals if streamed else chunk.losses) if index in request.wanted]
        failure = _backwards(parts, chunk, turn, rows, heads, streamed=streamed, failure=failure)
    return sums, failure


def _backwards(
    parts: Parts,
    chunk: Chunk,
    turn: Sequence[int],
    rows: Rows | ShardedRows,
    heads: Heads,
    *,
    streamed: bool = False,
    failure: BaseException | None = None,
) -> BaseException | None:
    """One backward for each task in ``turn`` that this rank has.

    Returns:
        What failed, here or before, where the other ranks wait for rows all the same.
    """
    own = [index for index in turn if index in chunk.losses]
    # Asked here, too: where nothing is recomputed every step would pay for a context.
    again = parts.network.buffers_as_before() if parts.network.recomputes else contextlib.nullcontext()
    with chunk.activated(), again:
        for index in turn:
            if index in own and failure is None:
                try:
                    gradients = _backward(parts, chunk, index, last=index == own[-1])
                    _place(parts, rows, heads, index, gradients)
                    del gradients
                except BaseException as error:
                    if not streamed or parts.network.ranks.lost:
                        raise
                    failure = error
            if streamed:
                rows.send(index)
    return failure


def _backward(parts: Parts, chunk: Chunk, index: int, *, last: bool) -> Sequence[Tensor | None]:
    """One task's backward: the gradients of all trained parameters, times the loss's count."""
    network, loss, factor = parts.network, chunk.losses[index], chunk.counts[index]
    if network.sharded:
        # Its backwards leave gradients in `.grad`, averaged over the ranks.
        network.zero_grad()
        seed = torch.ones_like(loss) * (factor * network.ranks.size)
        with quiet(network.hooked()):
            torch.autograd.backward([loss], [seed], retain_graph=not last)
        gradients: Sequence[Tensor | None] = take_shards(network)
    else:
        gradients = gradients_of(loss, network.seed(loss, factor), network.parameters, retain=not last)
    parts.num_backward += 1
    if last:
        network.refuse_hidden()
    return gradients


def _place(parts: Parts, rows: Rows | ShardedRows, heads: Heads, task: int, gradients: Sequence[Tensor | None]) -> None:
    """Write one task's gradients: shared ones into its row, others to its head."""
    network = parts.network
    reached = [gradient is not None for gradient in gradients]
    place = network.places.get(task)
    if place is None or place.key != (reached, network.roles.changes, len(rows.parameters)):
        place = network.places[task] = _find_place(parts, rows, heads, task, reached)
    if network.has_complex or True in [gradient.is_sparse for gradient in gradients if gradient is not None]:
        gradients = [None if gradient is None else plain(gradient) for gradient in gradients]
    # The chosen ones are there.
    rows.add(task, place.positions, list(compress(gradients, place.shared)))  # type: ignore[arg-type]
    for parameter, gradient in zip(place.heads, compress(gradients, place.others), strict=True):
        hold(heads, task, parameter, gradient)  # type: ignore[arg-type]


def _find_place(parts: Parts, rows: Rows | ShardedRows, heads: Heads, task: int, reached: list[bool]) -> Place:
    """Where the gradients of a task belong that has ``reached`` these parameters; parameters may turn shared by that."""
    network, roles = parts.network, parts.network.roles
    mine = [there and network.reaches(task, p) for there, p in zip(reached, network.parameters, strict=True)]
    if roles.observe(task, compress(network.names(), mine)) and not parts.several:
        network.lay_out(rows, heads)
    shared = [there and id(p) in rows.position for there, p in zip(mine, network.parameters, strict=True)]
    others = [there and not known for there, known in zip(mine, shared, strict=True)]
    positions = [rows.position[id(p)] for p in compress(network.parameters, shared)]
    key = (reached, roles.changes, len(rows.parameters))
    return Place(key, shared, positions, others, list(compress(network.parameters, others)))


def _summed_gramian(network: Network, rows: Rows | ShardedRows) -> Tensor:
    """The Gramian of the rows; every rank computes that of its part of the columns, and they are summed."""
    matrix = rows.matrix
    total = torch.full((len(matrix), len(matrix)), torch.nan, dtype=torch.float64)
    try:
        total = sum((gramian(matrix[:, columns]) for columns in own_columns(network, rows)), torch.zeros_like(total))
    finally:
        # After an error, too: the other ranks wait for it.
        total = network.ranks.sum_(total.to(network.device)).cpu()
    return total


def combine_rows(parts: Parts, gradients: TaskGradients, weights: Tensor | None, vector: Tensor | None) -> None:
    """One matrix-vector product over the rows, in place where they are whole."""
    rows = gradients.rows
    if vector is None and isinstance(rows, Rows):
        assert weights is not None, "either weights or a vector"
        views = rows.weighted_sum_(weights)
    else:
        flat, views = rows.combined()
        if vector is None:
            assert weights is not None, "either weights or a vector"
            torch.mv(rows.matrix.T, weights.to(flat), out=flat)
        elif vector is not flat:
            flat.copy_(vector)
    if isinstance(rows, ShardedRows):
        rows.gather()
    parts.network.set_gradients(
        [(rows.parameters[i], views[i]) for i in rows.reached() if rows.parameters[i].requires_grad]
    )


def inner_products(network: Network, first: TaskGradients, second: TaskGradients) -> Tensor:
    """Inner products between the rows of two batches, [k1, k2]; see :meth:`torchmto.step.StepContext.inner_products`."""
    if network.shard_gradients and len(first.parameters) != len(second.parameters):
        raise ValueError(
            "A parameter became shared between two independent batches, which divides the columns differently. With "
            "shard_gradients=True give the shared parameters as `shared=`."
        )
    narrow = min(first.rows, second.rows, key=lambda rows: rows.matrix.shape[1])
    total = torch.zeros(len(first.indices), len(second.indices), dtype=torch.float64)
    for columns in own_columns(network, narrow):
        total += (first.matrix[:, columns] @ second.matrix[:, columns].T).to(total)
    return network.ranks.sum_(total.to(network.device)).cpu()


# ---------------------------------------------------------------------- no rows: an engine


def gradients_without_rows(parts: Parts, request: Request) -> TaskGradients:
    """The Gramian and the heads' gradients by the network's engine; the graphs stay for the combination."""
    network, engine = parts.network, parts.network.engine
    assert engine is not None
    several = parts.several
    number = len(parts.sources[request.source])
    if number > 1 and not engine.adds:
        raise ValueError(
            f'gradients="{engine.name}" works on one micro-batch: the Gramian of a sum of gradients needs the sums, which '
            'it doesn\'t keep. Use gradients="parameters" or "layerwise".'
        )
    parts.doing = f"gradients {sorted(request.wanted)} of batch {request.source}"
    if not parts.held:
        engine.begin()
    chunks = list(forwards(parts, request, apart=True))
    own_losses = [{i: loss for i, loss in chunk.losses.items() if i in request.wanted} for chunk in chunks]
    _observe(network, engine.read(own_losses), {index for losses in own_losses for index in losses})
    if not engine.pays(network.by_role()[0], sum(map(len, own_losses))):
        engine.forget()
        parts.held = chunks
        return gradients_with_rows(parts, request)
    parts.engine = engine.name
    everything = over_ranks(parts, chunks)
    losses = present(parts, everything, request)
    heads: Heads = {}

    def take(task: int, parameter: Tensor, gradient: Tensor) -> None:
        if network.reaches(task, parameter):
            hold(heads, task, parameter, gradient)

    # Telling the ranks has told this one which parameters others share.
    shared, others = network.by_role()
    pieces = [
        Piece(own, {i: network.seed(loss, chunk.counts[i]) for i, loss in own.items()}, chunk.activated)
        for own, chunk in zip(own_losses, chunks, strict=True)
    ]
    failure: BaseException | None = None
    product = torch.zeros(0)
    try:
        with network.buffers_as_before():
            product = engine.gramian(Wanted(pieces, losses.indices, shared, others, take))
        network.refuse_hidden()
    except BaseException as error:
        if not network.ranks.owing:
            raise
        failure = error
    parts.num_backward += sum(len(own) for own in own_losses)
    rows = Rows(0, network.ranks)
    if several:
        network.lay_out(rows, heads)
        sum_heads(network, rows, heads, losses.indices, failure)
    product = product.to(device="cpu", dtype=torch.float64)
    factors = factors_of(network, losses)
    if factors is not None:
        product = product * torch.outer(factors, factors)
        rescale_heads(heads, losses, factors)
    check_losses(parts, everything, everything.raw.tolist(), source=request.source)
    check_task_gradients(parts, losses, product)
    kept = [Chunk(own, chunk.counts, chunk.active) for own, chunk in zip(own_losses, chunks, strict=True)]
    return TaskGradients(rows, losses, product, heads, everything, precision=network.precision(shared), graph=kept)


def _observe(network: Network, reached: Mapping[int, int], tasks: Collection[int]) -> None:
    """Learn from the graph which task reaches which parameter."""
    for task in tasks:
        own = [p for p in network.parameters if reached.get(id(p), 0) >> task & 1 and network.reaches(task, p)]
        network.roles.observe(task, map(network.name, own))


def combine_graphs(parts: Parts, gradients: TaskGradients, weights: Tensor | None) -> None:
    """``weights @ J`` by one more backward through the graphs of the task gradients."""
    network, losses = parts.network, gradients.reduced
    assert weights is not None, "only Gramian methods do without rows"
    assert gradients.graph is not None
    assert network.engine is not None
    chunks, gradients.graph = gradients.graph, None
    if losses.factors is not None:
        weights = weights * losses.factors.to(weights)
    scale = network.scale(network.device)
    if scale is not None:
        weights = weights.to(scale.device, wide_dtype(scale.device)) * scale  # the scale is float32
    by_task = dict(zip(losses.indices, weights.unbind(), strict=True))
    pieces = [
        Piece(
            chunk.losses,
            {
                i: (by_task[i] * (chunk.counts[i] / losses.totals[i])).to(loss.device)
                for i, loss in chunk.losses.items()
            },
            chunk.activated,
        )
        for chunk in chunks
    ]
    shared, _ = network.by_role()
    failure: BaseException | None = None
    try:
        with network.buffers_as_before():
            parts.num_backward += network.engine.backward(pieces, shared)
        network.refuse_hidden(shared, [loss for chunk in chunks for loss in chunk.losses.values()])
    except BaseException as error:
        if not network.ranks.owing:
            raise
        failure = error
    network.tidy_sparse()
    sum_gradients(network, failure)
    reached = network.gradients(shared)
    if scale is not None and reached:
        torch._foreach_div_(reached, scale)
