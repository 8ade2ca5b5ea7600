"""Tables: parsing, statistics of the training rows only, missing and disjoint targets."""

import gzip

import numpy as np
import pytest
import scipy.io
import torch

from shared_data import data
from torchmto.lab.data import labelled_tasks, load_data
from torchmto.lab.data.tabular import hashed_ngrams, read_arff, read_csv, split_rows, standardize

ARFF = """% a comment
@relation 'small'
@attribute 'first one' numeric
@attribute second real
@ATTRIBUTE "goal" NUMERIC

@data
"""


def write_arff(path, rows):
    path.write_text(ARFF + "\n".join(rows) + "\n")
    return path


def test_arff(tmp_path):
    names, values = read_arff(write_arff(tmp_path / "a.arff", ["1,2.5,?", "% comment", "-3e2, 4,5"]))
    assert names == ["first one", "second", "goal"]
    assert np.array_equal(values, np.array([[1, 2.5, np.nan], [-300, 4, 5]], dtype=np.float32), equal_nan=True)


def test_csv(tmp_path):
    (tmp_path / "a.csv").write_text('"a",b,c\n1,,3\n4,5,?\n')
    names, values = read_csv(tmp_path / "a.csv")
    assert names == ["a", "b", "c"]
    assert np.isnan(values[0, 1])
    assert values[1, 0] == 4


@pytest.mark.parametrize("rows", [["1,2"], ["1,2,x"], [], ["{0 1}"]])
def test_bad_arff(tmp_path, rows):
    with pytest.raises(ValueError, match="should hold rows of 3 numbers"):
        read_arff(write_arff(tmp_path / "a.arff", rows))


def test_arff_with_names_is_refused(tmp_path):
    (tmp_path / "a.arff").write_text("@relation a\n@attribute colour {red,blue}\n@data\nred\n")
    with pytest.raises(ValueError, match=r"should have numeric attributes\. Found colour"):
        read_arff(tmp_path / "a.arff")


def test_statistics_come_from_the_training_rows():
    values = np.array([[1, 5, np.nan], [3, 5, 2], [np.nan, 5, 4], [1000, 7, 6]], dtype=np.float32)
    new, mean, std = standardize(values, np.array([0, 1, 2]))
    assert np.allclose(mean, [2, 5, 3])
    assert np.allclose(std, [1, 1, 1])
    assert np.allclose(new[3], [998, 2, 3])
    assert np.isnan(new[2, 0])


@pytest.mark.parametrize("offset", [0.0, 1e3, -1.7e9, 5.6e6])
def test_columns_far_from_zero_keep_their_digits(tmp_path, offset):
    """Readings, times and coordinates are standardised alike wherever they begin."""
    rows = np.random.default_rng(0).normal(size=(200, 2))
    (tmp_path / "a.csv").write_text("x,y\n" + "".join(f"{a + offset!r},{b + offset!r}\n" for a, b in rows.tolist()))
    bundle = load_data(f"rf1:{tmp_path / 'a.csv'}", targets=1)
    train = split_rows(200, 0)[0]
    exact = (rows[train] - rows[train].mean(axis=0)) / rows[train].std(axis=0)
    batch = bundle.train.batch(torch.arange(len(train)))
    assert np.allclose(batch["input"][:, 0], exact[:, 0], atol=2e-6)
    assert np.allclose(batch["targets"]["y"][:, 0], exact[:, 1], atol=2e-6)
    assert bundle.tasks[0].extra["mean"] == pytest.approx(offset + rows[train, 1].mean(), abs=1e-6)


@pytest.mark.parametrize("cell", ["inf", "-inf", "1e999"])
def test_infinite_cells_are_refused(tmp_path, cell):
    (tmp_path / "a.csv").write_text(f"a,b,y\n1,2,3\n4,{cell},6\n7,8,9\n1,2,3\n")
    with pytest.raises(ValueError, match=r"finite numbers. Found -?inf in `b`"):
        load_data(f"rf1:{tmp_path / 'a.csv'}", targets=1)


def test_tables_are_known_by_their_ending(tmp_path):
    text = "a,y\n" + "".join(f"{i},{i}\n" for i in range(10))
    for name in ("a.CSV", "b.txt"):
        (tmp_path / name).write_text(text)
    assert len(load_data(f"rf1:{tmp_path / 'a.CSV'}", targets=1).train) == 6
    with pytest.raises(ValueError, match="which is none of these"):
        load_data(f"rf1:{tmp_path / 'b.txt'}", targets=1)


@pytest.mark.parametrize("names", ["y,y", "y (m),y [m]"])
def test_targets_of_one_name_are_refused(tmp_path, names):
    (tmp_path / "a.csv").write_text(f"a,{names}\n" + "".join(f"{i},{i},{i}\n" for i in range(10)))
    with pytest.raises(ValueError, match="is there twice"):
        load_data(f"rf1:{tmp_path / 'a.csv'}", targets=2)


@pytest.mark.parametrize("count", [3, 4, 10, 101])
def test_parts_of_rows(count):
    parts = split_rows(count, seed=1)
    assert sorted(np.concatenate(parts)) == list(range(count))
    assert all(len(part) for part in parts)


def test_rf1_layout(tmp_path):
    generator = np.random.default_rng(0)
    rows = [",".join("?" if v < -1.5 else f"{v:.4f}" for v in row) for row in generator.normal(size=(100, 3))]
    bundle = load_data(f"rf1:{write_arff(tmp_path / 'a.arff', rows)}", targets=1)
    assert bundle.input_shape == (2,)
    assert [(task.name, task.kind) for task in bundle.tasks] == [("goal", "regression")]
    batch = bundle.train.batch(torch.arange(60))
    assert torch.isfinite(batch["input"]).all()
    target = batch["targets"]["goal"]
    assert target.shape == (60, 1)
    assert abs(target.nanmean()) < 1e-5
    assert torch.isnan(target).any()
    with pytest.raises(ValueError, match=r"`targets` should be in \[1, 3\)"):
        load_data(f"rf1:{tmp_path / 'a.arff'}", targets=3)


def test_real_river_flow():
    bundle = load_data(f"rf1:{data('tabular/rf1.arff')}")
    assert bundle.input_shape == (64,)
    assert len(bundle.tasks) == 8
    assert len(bundle.train) + len(bundle.validation) + len(bundle.test) == 9125
    inputs = bundle.train.batch(torch.arange(len(bundle.train)))["input"]
    assert abs(inputs.mean()) < 1e-4
    assert 0.9 < inputs.std() < 1.1


def write_school(path, sizes=(5, 8, 12), features=4):
    generator = np.random.default_rng(0)
    x, y = np.empty((1, len(sizes)), dtype=object), np.empty((1, len(sizes)), dtype=object)
    for k, size in enumerate(sizes):
        x[0, k], y[0, k] = generator.normal(size=(size, features)), generator.normal(size=(size, 1)) * 10
    scipy.io.savemat(path, {"X": x, "Y": y})
    return path, y


def test_school_layout(tmp_path):
    path, y = write_school(tmp_path / "school.mat")
    bundle = load_data(f"school:{path}")
    assert [task.name for task in bundle.tasks] == ["school_1", "school_2", "school_3"]
    seen = {task.name: [] for task in bundle.tasks}
    for split in ("train", "validation", "test"):
        batch = bundle.split(split).batch(torch.arange(len(bundle.split(split))))
        targets = torch.cat([batch["targets"][task.name] for task in bundle.tasks], dim=1)
        assert (torch.isfinite(targets).sum(1) == 1).all()
        assert labelled_tasks(batch, bundle.tasks) == tuple(seen)
        for task in bundle.tasks:
            values = batch["targets"][task.name]
            seen[task.name] += (values[torch.isfinite(values)] * task.extra["std"] + task.extra["mean"]).tolist()
    for k, values in enumerate(seen.values()):
        assert np.allclose(sorted(values), np.sort(y[0, k][:, 0]), atol=1e-3)
    scipy.io.savemat(tmp_path / "other.mat", {"Z": np.zeros(3)})
    with pytest.raises(ValueError, match="should hold cells `X` and `Y`"):
        load_data(f"school:{tmp_path / 'other.mat'}")


def test_real_school():
    bundle = load_data(f"school:{data('tabular/school.mat')}")
    assert len(bundle.tasks) == 139
    assert len(bundle.train) + len(bundle.validation) + len(bundle.test) == 15362
    batch = next(bundle.loader("train", 64).epoch(0))
    assert 30 < len(labelled_tasks(batch, bundle.tasks)) < 65


def test_ngrams_count_tokens():
    single = hashed_ngrams(["[NH4+]ClC", "CCl[NH4+]", "C%12"], 4096, 1)
    assert np.array_equal(single[0], single[1])
    assert np.isclose(np.expm1(single[0]).sum(), 3)
    assert np.isclose(np.expm1(single[2]).sum(), 2)
    pairs = hashed_ngrams(["[NH4+]ClC", "CCl[NH4+]"], 4096, 2)
    assert not np.array_equal(pairs[0], pairs[1])


def test_a_molecule_is_in_one_part_only(tmp_path):
    lines = ["a,smiles", *(f"{i % 2},{'C' * (1 + i // 3)}" for i in range(60))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    bundle = load_data(f"sider:{tmp_path / 'a.csv'}", features=64, ngram=1)
    inputs = [{tuple(row) for row in bundle.split(split).inputs.tolist()} for split in ("train", "validation", "test")]
    assert [len(part) for part in inputs] == [16, 2, 2]
    assert len(set.union(*inputs)) == 20


def test_tox21_layout(tmp_path):
    lines = ["NR-AR,SR.p53,mol_id,smiles"]
    lines += [f"{i % 2},{'' if i % 3 else 1},TOX{i},{'C' * (i + 1)}O" for i in range(30)]
    with gzip.open(tmp_path / "tox21.csv.gz", "wt") as file:
        file.write("\n".join(lines))
    bundle = load_data(f"tox21:{tmp_path / 'tox21.csv.gz'}", features=16, ngram=2)
    assert [(task.name, task.kind) for task in bundle.tasks] == [("NR-AR", "binary"), ("SR_p53", "binary")]
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (24, 3, 3)
    batch = bundle.train.batch(torch.arange(24))
    assert batch["input"].shape == (24, 16)
    assert torch.isfinite(batch["targets"]["NR-AR"]).all()
    assert 10 < torch.isnan(batch["targets"]["SR_p53"]).sum() < 20
    with pytest.raises(ValueError, match="`ngram` should be positive"):
        load_data(f"tox21:{tmp_path / 'tox21.csv.gz'}", ngram=0)


@pytest.mark.parametrize("text", ["", "a,b\n1,0\n", "smiles\nCC\n", "a,smiles\nx,CC\n", "a,smiles\n2,CC\n"])
def test_other_tables_of_molecules_are_refused(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=r"should (be a table|have 0, 1)"):
        load_data(f"sider:{tmp_path / 'a.csv'}")


@pytest.mark.parametrize(("name", "tasks", "rows", "missing"), [("tox21", 12, 8014, 0.17), ("sider", 27, 1427, 0)])
def test_real_molecules(name, tasks, rows, missing):
    bundle = load_data(f"{name}:{data(f'tabular/{name}.csv.gz')}", features=64, ngram=2)
    assert len(bundle.tasks) == tasks
    assert len(bundle.train) + len(bundle.validation) + len(bundle.test) == rows
    targets = torch.cat(list(bundle.train.targets.values()), dim=1)
    assert abs(torch.isnan(targets).float().mean() - missing) < 0.02
    rows = [{tuple(row) for row in bundle.split(split).inputs.tolist()} for split in ("train", "test")]
    assert len(rows[0] & rows[1]) < 0.1 * len(rows[1])  # only molecules with the same n-grams
    assert all("." not in task.name and " " not in task.name for task in bundle.tasks)
