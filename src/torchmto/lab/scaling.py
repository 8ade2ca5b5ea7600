"""What a step costs on many processes: bytes sent, floating-point operations, and time on a given network."""

from dataclasses import dataclass

from torchmto.checks import check_choice, check_integer, found

FAMILIES = ("loss weighting", "gramian", "layerwise", "sequential", "task groups")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A training step on N ranks with replicated parameters.

    Attributes:
        tasks: K.
        shared: Entries of the shared parameters, P.
        heads: Entries of all other parameters.
        shared_tensors: How many tensors the shared parameters are.
        head_tensors: How many tensors the others are.
        ranks: N.
        family: "loss weighting", "gramian", "layerwise" (a Gramian method with ``gradients="layerwise"``), "sequential" or
            "task groups".
        groups: M, for "task groups".
        segments: For "layerwise": into how many parts the shared parameters are cut.
        shard_gradients: Whether the columns of the gradient matrix are divided among the ranks.
        bytes_per_entry: 4 for float32 (and for bfloat16 rows, which are float32 too).
    """

    tasks: int
    shared: int
    heads: int = 0
    shared_tensors: int = 1
    head_tensors: int = 0
    ranks: int = 2
    family: str = "gramian"
    groups: int = 1
    segments: int = 16
    shard_gradients: bool = False
    bytes_per_entry: int = 4

    def __post_init__(self) -> None:
        check_choice("family", self.family, FAMILIES)
        for name in ("tasks", "shared", "ranks", "groups", "segments", "bytes_per_entry"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("heads", "shared_tensors", "head_tensors"):
            check_integer(name, getattr(self, name), minimum=0)
        if self.shard_gradients and self.family != "gramian":
            raise ValueError(found("shard_gradients", "False where there is no gradient matrix", self.shard_gradients))

    @property
    def memory(self) -> float:
        """Bytes of the gradient matrix on one rank; for "layerwise" of the two segments that are held at a time."""
        if self.family == "layerwise":
            return 2 * self.tasks * self.shared * self.bytes_per_entry / self.segments
        if self.family != "gramian":
            return 0.0
        rows = self.tasks * self.shared * self.bytes_per_entry
        return rows / self.ranks + self.shared * self.bytes_per_entry if self.shard_gradients else float(rows)

    def collectives(self) -> list[tuple[str, float]]:
        """The step's collectives in order: what they carry, and the bytes one rank sends.

        All-reduce of S bytes: 2 S (N-1)/N; reduce-scatter and all-gather: S (N-1)/N.
        """
        once = (self.ranks - 1) / self.ranks
        exchange = ("losses and counts", 2 * once * 8 * (2 * self.tasks + 7))
        marks = ("which parameters were reached", 2 * once * (2 + self.shared_tensors + self.head_tensors))
        decided = ("what was decided", exchange[1])
        marks_and_heads = 2 + self.shared_tensors + self.head_tensors + self.heads
        heads = ("heads", 2 * once * self.bytes_per_entry * marks_and_heads)
        product = ("Gramian", 2 * once * 8 * self.tasks**2)
        if self.family == "layerwise":
            segment = 2 * once * self.bytes_per_entry * self.tasks * self.shared / self.segments
            return [
                exchange,
                ("where segments end", 2 * once * 8 * self.shared_tensors),
                *[("one segment's rows", segment)] * self.segments,
                product,
                heads,
                decided,
                marks,
                ("gradients", 2 * once * self.bytes_per_entry * self.shared),
                decided,
            ]
        if self.family != "gramian":
            substeps = {"loss weighting": 1, "sequential": self.tasks, "task groups": self.groups}[self.family]
            # In a sub-step only the heads of its tasks have a gradient.
            gradients = 2 * once * self.bytes_per_entry * (self.shared + self.heads / substeps)
            return [exchange, marks, ("gradients", gradients), decided] * substeps
        padded = -(-self.shared // self.ranks) * self.ranks if self.shard_gradients else self.shared
        passes = 1 if self.shard_gradients else 2
        return [
            exchange,
            *[("one task's row", passes * once * self.bytes_per_entry * padded)] * self.tasks,
            heads,
            product,
            decided,
            *([("combined gradient", once * self.bytes_per_entry * padded)] if self.shard_gradients else []),
            decided,
        ]

    def bytes_sent(self) -> float:
        """Bytes that one rank sends in a step.

        Example:
            >>> round(Setting(tasks=3, shared=1_000_000, ranks=2, family="gramian").bytes_sent() / 1e6, 2)
            12.0
            >>> round(Setting(tasks=3, shared=1_000_000, ranks=2, shard_gradients=True).bytes_sent() / 1e6, 2)
            8.0
        """
        return sum(size for _, size in self.collectives())

    def flops(self, forward: float) -> float:
        """Floating-point operations of one rank.

        Args:
            forward: Those of one forward of the rank's batch; a backward takes about twice as many.
        """
        passes = {
            "loss weighting": 3,
            "gramian": 1 + 2 * self.tasks,
            "layerwise": 3 + 2 * self.tasks,
            "sequential": 3 * self.tasks,
        }
        total = passes.get(self.family, 3 * self.groups) * forward
        width = self.shared / self.ranks
        if self.family in ("gramian", "layerwise"):
            total += 2 * self.tasks**2 * width
        if self.family == "gramian":
            total += 2 * self.tasks * (width if self.shard_gradients else self.shared)
        return total

    def seconds(self, *, forward: float, backward: float, bandwidth: float, latency: float = 0.0) -> float:
        """Simulate a step: one compute engine and one link per rank, which work at the same time where the step lets them.

        A task's row, or a segment's rows, leave while later backwards run; everything else waits for what is before it.

        Args:
            forward: Seconds of a forward.
            backward: Seconds of one backward.
            bandwidth: Bytes per second that a rank can send.
            latency: Seconds per collective.

        Returns:
            Seconds until the combined gradient is there; the optimizer step comes after.

        Example:
            >>> setting = Setting(tasks=4, shared=25_000_000, ranks=8)
            >>> round(setting.seconds(forward=0.05, backward=0.1, bandwidth=10e9), 3)  # 18 ms per row are hidden
            0.468
        """
        compute = link = 0.0
        for what, size in self.collectives():
            if what == "losses and counts":
                compute = max(compute, link) + forward
                compute += latency + size / bandwidth
                link = compute
            elif what in ("one task's row", "one segment's rows", "which parameters were reached"):
                compute += backward * (self.tasks / self.segments if what == "one segment's rows" else 1)
                link = max(link, compute) + latency + size / bandwidth
            else:
                link = max(link, compute) + latency + size / bandwidth
        return max(compute, link)
