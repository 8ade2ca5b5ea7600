"""Tables: River Flow, School and the toxicity sets, whose tasks have missing or disjoint labels."""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray

from torchmto.checks import check_tasks, found
from torchmto.lab.data.base import Task, TensorData
from torchmto.lab.data.registry import register, unknown_layout
from torchmto.lab.problem import Problem

FRACTIONS = (0.6, 0.15, 0.25)
"""Shares of training, validation and test rows where a table has no official split."""
_ATTRIBUTE = re.compile(r"@attribute\s+('(?:[^'\\]|\\.)*'|\"[^\"]*\"|\S+)\s+(\S+)", re.IGNORECASE)
_TOKEN = re.compile(r"\[[^\]]*\]|Br|Cl|%\d\d|.")
_MULAN = "https://github.com/tsoumakas/mulan (multi-target regression data sets)"
_DEEPCHEM = "https://github.com/deepchem/deepchem (MoleculeNet)"
Floats = NDArray[np.floating[Any]]


def split_rows(count: int, seed: int, fractions: Sequence[float] = FRACTIONS) -> list[NDArray[np.int64]]:
    """Random disjoint rows for training, validation and test, at least one each."""
    if count < 3:
        raise ValueError(f"{count} rows are too few to be split into training, validation and test.")
    validation, test = (max(1, round(count * fraction)) for fraction in fractions[1:])
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(part) for part in np.split(order, [count - validation - test, count - test])]


def standardize(
    values: Floats, train: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Columns with mean 0 and standard deviation 1 over the training rows; NaN stays NaN.

    Args:
        values: ``[N, D]``; in float64 where a column may be far from 0, as seconds since 1970 are.
        train: The training rows.

    Returns:
        The standardised values, the means and the standard deviations (1 for constant columns).
    """
    known = np.isfinite(values[train])
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, values[train], 0).sum(axis=0, dtype=np.float64) / count
    variance = (np.where(known, values[train] - mean, 0) ** 2).sum(axis=0) / count
    std = np.sqrt(variance)
    std = np.where(std > 1e-12 * np.maximum(np.abs(mean), 1), std, 1.0)
    return ((values - mean) / std).astype(np.float32), mean, std


def _bundle(
    tasks: Sequence[Task],
    inputs: Floats,
    targets: Floats,
    *,
    parts: Sequence[NDArray[np.int64]],
    citation: str,
) -> Problem:
    """A data set of vectors ``[N, D]`` with one column of ``targets`` ``[N, K]`` per task."""
    check_tasks(task.name for task in tasks)
    stored, columns = torch.from_numpy(inputs), torch.from_numpy(np.ascontiguousarray(targets.T))[..., None]

    def part(rows: NDArray[np.int64]) -> TensorData:
        chosen = torch.from_numpy(rows)
        return TensorData(tasks, stored[chosen], {task.name: columns[k, chosen] for k, task in enumerate(tasks)})

    data, shape = (part(parts[0]), part(parts[1]), part(parts[2])), (inputs.shape[1],)
    return Problem(tuple(tasks), *data, "mlp", input_shape=shape, citation=citation)


def _open_text(path: Path) -> io.TextIOBase:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def read_arff(path: Path) -> tuple[list[str], Floats]:
    """A dense ARFF file with numeric attributes.

    Args:
        path: ``.arff`` or ``.arff.gz``.

    Returns:
        The attributes' names and the values ``[N, D]``, NaN where the file has ``?``.

    Raises:
        ValueError: If the file isn't such a table.
    """
    names: list[str] = []
    with _open_text(path) as file:
        for line in file:
            text = line.strip()
            if text.lower().startswith("@data"):
                break
            if match := _ATTRIBUTE.match(text):
                if match[2].lower() not in {"numeric", "real", "integer"}:
                    raise ValueError(f"`{path}` should have numeric attributes. Found {match[1]} of type {match[2]}.")
                names.append(match[1].strip("'\""))
        rows = [line for line in file if line.strip() and not line.startswith("%")]
    return names, _parse_numbers(rows, names, path)


def read_csv(path: Path) -> tuple[list[str], Floats]:
    """A comma-separated table with a header line and numbers; empty cells and ``?`` are NaN."""
    with _open_text(path) as file:
        names = next(csv.reader([file.readline()]), [])
        rows = [line for line in file if line.strip()]
    names = [name.strip() for name in names]
    return names, _parse_numbers(rows, names, path)


def _parse_numbers(rows: list[str], names: Sequence[str], path: Path) -> Floats:
    columns = len(names)

    def number(cell: str) -> float:
        cell = cell.strip()
        return np.nan if cell in {"?", ""} else float(cell)

    try:
        values = np.array([[number(cell) for cell in row.split(",")] for row in rows], dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"`{path}` should hold rows of {columns} numbers: {error}") from error
    if values.ndim != 2 or values.shape[1] != columns or not columns:
        raise ValueError(f"`{path}` should hold rows of {columns} numbers. Found an array of shape {values.shape}.")
    if len(infinite := np.argwhere(np.isinf(values))):
        row, column = infinite[0]
        raise ValueError(f"`{path}` should hold finite numbers. Found {values[row, column]} in `{names[column]}`.")
    return values


@register(
    "rf1",
    "River Flow: 64 readings, the flow 48 hours on at 8 places as 8 regression tasks",
    source=_MULAN,
    layouts=("rf1.arff", "any ARFF or CSV table of numbers with the targets in its last columns"),
)
def load_rf1(path: Path, seed: int = 0, *, targets: int = 8) -> Problem:
    """River Flow 1, or another table of numbers whose last columns are to be predicted.

    Inputs and targets are standardised with the training rows' statistics (a task's ``extra`` has its ``mean`` and
    ``std``, to go back to the table's unit); a missing input becomes the training mean, a missing target stays
    missing. Rows are split at random 60 / 15 / 25 %, as is usual for this set, though neighbouring rows are an hour
    apart and alike.

    Args:
        path: ``.arff`` or ``.csv``, also with ``.gz``, in capitals or not.
        seed: Decides the split.
        targets: How many of the last columns are targets.

    Returns:
        The data set, one regression task per target.

    Source: Spyromitros-Xioufis, Tsoumakas, Groves and Vlahavas, Machine Learning 104, 2016.
    """
    readers = {".csv": read_csv, ".arff": read_arff}
    known = [readers[suffix.lower()] for suffix in path.suffixes if suffix.lower() in readers]
    if not known:
        raise unknown_layout(path, "rf1")
    names, values = known[-1](path)
    if not 1 <= targets < len(names):
        raise ValueError(f"Parameter `targets` should be in [1, {len(names)}). Found `targets = {targets}`.")
    parts = split_rows(len(values), seed)
    inputs, _, _ = standardize(values[:, :-targets], parts[0])
    outputs, mean, std = standardize(values[:, -targets:], parts[0])
    tasks = [
        Task(_key(name), "regression", 1, {"title": name, "mean": float(mean[k]), "std": float(std[k])})
        for k, name in enumerate(names[-targets:])
    ]
    citation = "Spyromitros-Xioufis et al., Multi-target regression via input space expansion, Machine Learning, 2016"
    return _bundle(tasks, np.nan_to_num(inputs, nan=0.0), outputs, parts=parts, citation=citation)


@register(
    "school",
    "exam scores of pupils of 139 schools as 139 disjoint regression tasks",
    source="https://github.com/jiayuzhou/MALSAR (data/school.mat)",
    layouts=("school.mat",),
)
def load_school(path: Path, seed: int = 0) -> Problem:
    """The Inner London Education Authority's exam scores: a task per school.

    The rows of every school are split at random 60 / 15 / 25 %; features and scores are standardised over the
    training rows of all schools (a task's ``extra`` has ``mean`` and ``std``).

    Args:
        path: ``school.mat`` with cells ``X`` and ``Y``, one per school.
        seed: Decides the split.

    Returns:
        The data set; a pupil has a target (score) in the own school's task only.

    Source: Argyriou, Evgeniou and Pontil, "Convex multi-task feature learning", Machine Learning 73, 2008.
    """
    try:
        cells = scipy.io.loadmat(path, variable_names=("X", "Y"))
        features = [np.asarray(cell, dtype=np.float64) for cell in cells["X"].ravel()]
        scores = [np.asarray(cell, dtype=np.float64).reshape(-1) for cell in cells["Y"].ravel()]
        inputs, score = np.concatenate(features), np.concatenate(scores)
        schools = np.repeat(np.arange(len(features)), [len(cell) for cell in features])
    except Exception as error:  # a damaged file can raise anything in SciPy
        raise ValueError(f"`{path}` should hold cells `X` and `Y` with one array per task: {error}") from error
    if inputs.ndim != 2 or len(inputs) != len(score):
        raise ValueError(f"`{path}` should have as many rows in `X` as in `Y`. Found {len(inputs)} and {len(score)}.")
    pieces: list[list[NDArray[np.int64]]] = [[], [], []]
    for school in range(len(features)):
        rows = np.flatnonzero(schools == school)
        for piece, part in zip(pieces, split_rows(len(rows), seed + school), strict=True):
            piece.append(rows[part])
    parts = [np.concatenate(piece) for piece in pieces]
    standard, _, _ = standardize(inputs, parts[0])
    marks, mean, std = standardize(score[:, None], parts[0])
    targets = np.full((len(inputs), len(features)), np.nan, dtype=np.float32)
    targets[np.arange(len(inputs)), schools] = marks[:, 0]
    extra = {"mean": float(mean[0]), "std": float(std[0])}
    tasks = [Task(f"school_{school + 1}", "regression", 1, extra) for school in range(len(features))]
    citation = "Argyriou, Evgeniou and Pontil, Convex multi-task feature learning, Machine Learning, 2008"
    return _bundle(tasks, standard, targets, parts=parts, citation=citation)


def hashed_ngrams(smiles: Sequence[str], features: int, longest: int) -> Floats:
    """Counts of token sequences of molecules, hashed into a fixed number of bins.

    Args:
        smiles: Molecules as SMILES strings.
        features: Number of bins.
        longest: Sequences of 1 to ``longest`` tokens (atoms, bonds, brackets, ring numbers) are counted.

    Returns:
        ``log(1 + count)``, ``[N, features]``. The hash is CRC-32, so features agree between machines and versions.

    Example:
        >>> hashed_ngrams(["CCO", "OCC"], 8, 1).tolist()[0] == hashed_ngrams(["OCC"], 8, 1).tolist()[0]
        True
    """
    counts = np.zeros((len(smiles), features), dtype=np.float32)
    for row, molecule in enumerate(smiles):
        tokens = [token.encode() for token in _TOKEN.findall(molecule)]
        bins = [
            zlib.crc32(b" ".join(tokens[start : start + length])) % features
            for length in range(1, longest + 1)
            for start in range(len(tokens) - length + 1)
        ]
        counts[row] = np.bincount(bins, minlength=features)
    return np.log1p(counts)


def _key(title: str) -> str:
    """A task's name that can be part of a module's path."""
    return re.sub(r"[^\w-]+", "_", title).strip("_")


def _molecules(name: str, summary: str, citation: str) -> None:
    """Enter a table of MoleculeNet."""

    @register(name, summary, source=_DEEPCHEM, layouts=(f"{name}.csv.gz",))
    def load(path: Path, seed: int = 0, *, features: int = 1024, ngram: int = 4) -> Problem:
        """A table of MoleculeNet, split at random 80 / 10 / 10 %, with equal SMILES strings in one part.

        Args:
            path: A ``.csv`` or ``.csv.gz``.
            seed: Decides the split.
            features: Number of bins of the hashed n-grams of the SMILES strings, which are the inputs.
            ngram: Length of the longest n-gram.

        Returns:
            The data set; a missing label is NaN.

        Source: Wu et al., "MoleculeNet", Chemical Science 9, 2018. Deviation: n-grams instead of circular fingerprints,
        which need a chemistry package.
        """
        for option, value in (("features", features), ("ngram", ngram)):
            if value < 1:
                raise ValueError(found(option, "positive", value))
        with _open_text(path) as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
        titles = [title for title in rows[0] if title not in {"smiles", "mol_id"}] if rows else []
        if not titles or "smiles" not in rows[0]:
            raise ValueError(f"`{path}` should be a table with a column `smiles` and one column per task.")
        try:
            labels = [[float(row[title]) if row[title] else np.nan for title in titles] for row in rows]
        except (ValueError, TypeError) as error:
            raise ValueError(f"`{path}` should have 0, 1 or nothing in the tasks' columns: {error}") from error
        targets = np.array(labels, dtype=np.float32)
        if not np.isin(targets[np.isfinite(targets)], (0, 1)).all():
            raise ValueError(f"`{path}` should have 0, 1 or nothing in the tasks' columns. Found other numbers.")
        molecules, which = np.unique([row["smiles"] for row in rows], return_inverse=True)
        parts = [np.flatnonzero(np.isin(which, part)) for part in split_rows(len(molecules), seed, (0.8, 0.1, 0.1))]
        inputs = hashed_ngrams([row["smiles"] for row in rows], features, ngram)
        inputs, _, _ = standardize(inputs, parts[0])
        tasks = [Task(_key(title), "binary", 1, {"title": title}) for title in titles]
        return _bundle(tasks, inputs, targets, parts=parts, citation=citation)


_molecules(
    "tox21",
    "toxicity of about 8,000 molecules, 12 yes/no tasks, 17 % of the labels missing",
    "Huang et al., Tox21Challenge, Frontiers in Environmental Science, 2016; Wu et al., MoleculeNet, 2018",
)
_molecules(
    "sider",
    "side effects of 1,427 drugs, 27 yes/no tasks",
    "Kuhn et al., The SIDER database of drugs and side effects, NAR, 2016; Wu et al., MoleculeNet, 2018",
)
