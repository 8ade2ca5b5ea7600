"""`delta_m` recomputes the rows printed in the literature and says clearly what it can't compute."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchmto.metrics import delta_m

NYUD_DIRECTIONS = (False, True, False)  # depth rmse, segmentation mIoU, mean angle of the normals
NYUD_BASELINE = (0.667, 33.18, 20.75)
NYUD = {
    "Independent": (NYUD_BASELINE, 0.00),
    "GD": ((0.594, 38.67, 20.52), 9.53),
    "MGDA": ((0.603, 38.89, 20.58), 9.21),
    "PCGrad": ((0.596, 38.61, 20.50), 9.40),
    "CAGrad": ((0.595, 38.80, 20.38), 9.84),
    "Aligned-MTL": ((0.592, 39.02, 20.40), 10.17),
    "connection strength": ((0.565, 41.10, 19.54), 15.00),
}
PASCAL_DIRECTIONS = (True, True, True, False)  # segmentation, parts and saliency mIoU, mean angle
PASCAL_BASELINE = (60.30, 60.56, 67.05, 14.76)
PASCAL = {
    "Independent": (PASCAL_BASELINE, 0.00),
    "GD": ((62.17, 61.15, 67.99, 14.70), 1.47),
    "MGDA": ((61.75, 61.69, 67.32, 14.77), 1.15),
    "PCGrad": ((62.47, 61.46, 67.86, 14.59), 1.86),
    "CAGrad": ((62.22, 61.89, 67.46, 14.97), 1.14),
    "Aligned-MTL": ((62.43, 62.05, 67.94, 14.76), 1.83),
    "connection strength": ((63.86, 63.05, 68.30, 14.33), 3.70),
}
# The poster prints 10.32 for "phase 2" and 15.50 for "mixed"; the metrics beside them give these.
ABLATION = {
    "phase 1": ((0.581, 40.36, 19.55), 13.44),
    "phase 2": ((0.597, 39.23, 20.39), 10.15),
    "in sequence": ((0.574, 40.38, 19.56), 13.79),
    "mixed": ((0.565, 41.10, 19.54), 15.00),
}
ROWS = [
    *((f"NYUD-v2 {name}", row, NYUD_BASELINE, NYUD_DIRECTIONS, printed) for name, (row, printed) in NYUD.items()),
    *((f"PASCAL {name}", row, PASCAL_BASELINE, PASCAL_DIRECTIONS, printed) for name, (row, printed) in PASCAL.items()),
    *((f"ablation {name}", row, NYUD_BASELINE, NYUD_DIRECTIONS, printed) for name, (row, printed) in ABLATION.items()),
]


@pytest.mark.parametrize(
    ("values", "baseline", "directions", "printed"), [row[1:] for row in ROWS], ids=[r[0] for r in ROWS]
)
def test_printed_tables(values, baseline, directions, printed):
    assert delta_m(values, baseline, directions) == pytest.approx(printed, abs=0.01)


def test_mappings_ignore_order():
    values = {"depth": 0.565, "seg": 41.10}
    baseline = {"seg": 33.18, "depth": 0.667}
    directions = {"seg": True, "depth": False}
    assert delta_m(values, baseline, directions) == pytest.approx(
        delta_m([0.565, 41.10], [0.667, 33.18], [False, True])
    )


def test_arrays_and_negative_baselines():
    assert delta_m(np.array([2.0]), np.array([1.0]), np.array([True])) == 100.0
    assert delta_m([-0.5], [-1.0], [True]) == 50.0


positive = st.floats(0.1, 100)


@given(
    st.lists(st.tuples(positive, positive, st.booleans()), min_size=1, max_size=8),
    st.floats(0.1, 10),
    st.randoms(),
)
@settings(max_examples=30)
def test_properties(rows, unit, random):
    values, baseline, directions = zip(*rows, strict=True)
    result = delta_m(values, baseline, directions)
    close = pytest.approx(result, rel=1e-9, abs=1e-9)
    assert delta_m(baseline, baseline, directions) == 0
    assert delta_m([unit * v for v in values], [unit * b for b in baseline], directions) == close
    assert -delta_m(values, baseline, [not d for d in directions]) == close
    random.shuffle(rows)
    assert delta_m(*zip(*rows, strict=True)) == close


@pytest.mark.parametrize(
    ("values", "baseline", "directions", "error", "message"),
    [
        ([1.0], [0.0], [True], ValueError, "non-zero"),
        ({"a": 1.0}, {"a": 0.0}, {"a": True}, ValueError, r"baseline\['a'\] = 0.0"),
        ([], [], [], ValueError, "Found none"),
        ([1.0], [1.0, 2.0], [True], ValueError, "1 entries"),
        ([1.0], [1.0], [], ValueError, "`higher_is_better`"),
        ({"a": 1.0}, {"b": 1.0}, {"a": True}, ValueError, "tasks"),
        ({"a": 1.0}, [1.0], {"a": True}, TypeError, "mapping"),
        ([1.0], {"a": 1.0}, [True], TypeError, "sequence"),
        ([math.nan], [1.0], [True], ValueError, "finite"),
        ([1.0], [math.inf], [True], ValueError, "finite"),
    ],
)
def test_errors(values, baseline, directions, error, message):
    with pytest.raises(error, match=message):
        delta_m(values, baseline, directions)
