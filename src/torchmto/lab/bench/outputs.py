"""What `torchmto bench` shows and writes."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import torchmto
from torchmto.lab.atomic import write_bytes
from torchmto.lab.bench.peers import missing_peers, peer_versions
from torchmto.lab.bench.timing import Measurement
from torchmto.lab.terminal import FramedTable

SCHEMA_VERSION = 1


def _ratio(measurement: Measurement, reference: str) -> str:
    value = (measurement.ratios or {}).get(reference)
    return "" if value is None else f"{value:.2f}"


def table(results: Sequence[Measurement]) -> FramedTable:
    """One row per contestant and case; below them why some failed."""
    header = ["model K: contestant", "ms", "IQR", "/gd*", "/lb*", "/lbm*", "own bound", "ratio", "peak MB", "tensors"]
    rows, notes = [], []
    for entry in results:
        name = f"{entry.model} {entry.num_tasks}: {entry.name}"
        if entry.failed or entry.seconds is None or entry.iqr is None:
            rows.append([name, "failed", *[""] * 8])
            notes.append(f"{entry.name} failed on {entry.model}, K={entry.num_tasks}: {entry.failed}")
            continue
        own = _ratio(entry, entry.bound)
        spread = "" if entry.ratio_iqr is None else f" ± {entry.ratio_iqr / 2:.2f}"
        peaks = ["" if size is None else f"{size / 1e6:.0f}" for size in (entry.peak_bytes, entry.tensor_bytes)]
        references = [_ratio(entry, name) for name in ("gd*", "lb*", "lbm*")]
        times = [f"{1e3 * entry.seconds:.1f}", f"{1e3 * entry.iqr:.1f}"]
        rows.append([name, *times, *references, entry.bound, own + spread, *peaks])
    title = "median step times; ratios are medians over interleaved rounds"
    return FramedTable(title, header, rows, notes)


def write_json(path: Path, results: Sequence[Measurement], settings: dict[str, Any]) -> None:
    """Everything measured, with what it was measured on."""
    versions = {"torchmto": torchmto.__version__, "torch": torch.__version__, "python": platform.python_version()}
    document = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings,
        "versions": {**versions, **peer_versions()},
        "missing": missing_peers(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if str(settings["device"]).startswith("cuda") else "cpu",
        },
        "results": [asdict(entry) for entry in results],
    }
    write_bytes(path, (json.dumps(document, indent=1) + "\n").encode())


def write_plot(path: Path, results: Sequence[Measurement]) -> None:
    """Ratio to the bound lb over K, one panel per model; and over P, at the largest K that all models have."""
    import matplotlib as mpl  # noqa: PLC0415  slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    done = [entry for entry in results if entry.ratios and "lb*" in entry.ratios]
    models = sorted({entry.model: entry.num_shared for entry in done}.items(), key=lambda item: item[1])
    names = list(dict.fromkeys(entry.name for entry in done))
    colours = dict(
        zip(names, plt.get_cmap("turbo")([i / max(len(names) - 1, 1) for i in range(len(names))]), strict=True)
    )
    figure, axes = plt.subplots(1, len(models) + 1, figsize=(4.2 * (len(models) + 1), 4), sharey=True, squeeze=False)
    counts = [{entry.num_tasks for entry in done if entry.model == model} for model, _ in models]
    common = max(set.intersection(*counts), default=None) if counts else None
    panels = [([e for e in done if e.model == model], "num_tasks", f"{model}, P = {size:,}") for model, size in models]
    panels.append(([e for e in done if e.num_tasks == common], "num_shared", f"K = {common}"))
    for axis, (entries, key, title) in zip(axes[0], panels, strict=True):
        for name in names:
            points = sorted((getattr(e, key), e.ratios["lb*"]) for e in entries if e.name == name and e.ratios)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=1, label=name, color=colours[name])
        axis.set(xscale="log", xlabel="K" if key == "num_tasks" else "P", title=title)
        # The powers of ten that a logarithmic axis marks say little about a few numbers of tasks.
        values = sorted({getattr(entry, key) for entry in entries})
        axis.set_xticks(
            values, [f"{value:.2g}" if value < 1000 else f"{value / 1e6:.3g}M" for value in values], minor=False
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="step time / lb", yscale="log")
    axes[0][-1].legend(fontsize=6, ncol=2, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
