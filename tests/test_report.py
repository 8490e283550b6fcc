"""The report's statistics against plain loops, the ranking's advice, and files of an older version."""

import csv
import itertools
import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from scipy import stats

from xcam_fn import cli
from xcam_fn.evaluate import comparison, report, store
from xcam_fn.evaluate.batch import encoded

RNG = np.random.default_rng(0)


# -- statistics -----------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_a_bootstrap():
    values = RNG.normal(size=(40, 3)) + RNG.normal(size=(40, 1))
    values[:7, 1] = np.nan
    values[1:, 2] = np.nan
    values[12] = np.nan
    mean, low, high, count = comparison.intervals(values)
    assert count.tolist() == [39, 32, 1]
    for i in range(2):
        column = values[~np.isnan(values[:, i]), i]
        assert mean[i] == pytest.approx(column.mean())
        found = stats.bootstrap(
            (column,), np.mean, n_resamples=4999, method="percentile", rng=1
        ).confidence_interval
        assert (low[i], high[i]) == pytest.approx(tuple(found), abs=0.05 * column.std())
    assert np.isnan([low[2], high[2]]).all()
    assert np.isnan(comparison.intervals(np.full((3, 1), np.nan))[0]).all()


@pytest.mark.parametrize("n", [1, 2, 6, 12])
def test_signs_of_few_photographs_are_flipped_in_all_ways(n):
    values = RNG.normal(size=(n, 3)).round(1)
    values[0, 2] = np.nan
    for p, (i, j) in zip(comparison.sign_flips(values), itertools.combinations(range(3), 2), strict=True):
        each = values[:, i] - values[:, j]
        each = each[~np.isnan(each)]
        sums = [abs(each @ signs) for signs in itertools.product([1, -1], repeat=len(each))]
        assert p == pytest.approx(np.mean([s >= abs(each.sum()) - 1e-9 for s in sums]))


def test_signs_of_many_photographs_are_flipped_at_random():
    values = RNG.normal((0.0, 0.1, 0.0), size=(900, 3))  # in two blocks of signs
    values[::50, 0] = np.nan
    found = comparison.sign_flips(values)
    for p, (i, j) in zip(found, itertools.combinations(range(3), 2), strict=True):
        each = values[:, i] - values[:, j]
        each = each[~np.isnan(each)]
        z = each.sum() / np.sqrt((each**2).sum())  # the sums of random signs are nearly normal
        assert p == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.03)
    same = np.repeat(values[:, :1], 2, axis=1)
    assert comparison.sign_flips(same).tolist() == [1.0]


def test_ranks_are_friedmans_and_the_difference_nemenyis():
    values = RNG.integers(0, 6, (30, 4)) + np.arange(4)  # with ties
    ranks = comparison.ranked(values.astype(float), "highest")
    assert ranks.mean == pytest.approx(stats.rankdata(-values, axis=1).mean(0))
    assert ranks.p == pytest.approx(stats.friedmanchisquare(*values.T).pvalue)
    assert ranks.critical == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 30)), rel=1e-3)  # Demšar's table 5
    lowest = comparison.ranked(values.astype(float), "lowest")
    assert lowest.mean == pytest.approx(5 - ranks.mean)
    spoiled = np.vstack([values, np.full((3, 4), np.nan)])
    assert comparison.ranked(spoiled, "highest").photographs == 30
    assert comparison.ranked(np.ones((5, 3)), "highest").p == 1
    alone = comparison.ranked(np.array([[1.0, 2.0]]), "highest")
    assert (alone.p, alone.critical) == (1, np.inf)


# -- rankings -------------------------------------------------------------------------------------------------------


def run(folder: Path, columns: dict[str, dict[str, list[float]]], model: str = "net", **more) -> report.Found:
    """A run with given scores, by metric and method."""
    methods = {name: name.upper() for values in columns.values() for name in values}
    settings = {"model": model, "methods": methods, "metrics": [*columns], "layer": "l", "categories": ["cat"],
                "variant": None, "versions": {}, **more}  # fmt: skip
    count = len(next(iter(next(iter(columns.values())).values())))
    with store.writing(folder, settings) as writer:
        writer.write([store.ImageRow(i, f"={i}.png", None, 0, 0.5) for i in range(count)])
        for i, name in itertools.product(range(count), methods):
            values = {metric: store.Score(columns[metric][name][i]) for metric in columns}
            writer.write([store.Result(i, name, values)])
    return report.read(folder)


def shifted(**shifts: float) -> dict[str, list[float]]:
    """Scores of 30 photographs that differ from method to method by what is given, and little else."""
    base = np.random.default_rng(1).uniform(0.3, 0.7, 30)
    noise = np.random.default_rng(2)
    return {name: list(base + shift + noise.normal(0, 0.02, 30)) for name, shift in shifts.items()}


def test_a_planted_leader_is_advised(tmp_path):
    found = run(
        tmp_path, {"insertion": shifted(a=0.2, b=0.0, c=0.001), "deletion": shifted(a=-0.2, b=0.1, c=0.0)}
    )
    board = report.board(found)
    insertion, deletion = board.rankings
    assert insertion.leaders == deletion.leaders == ["a"]
    assert insertion.ranks["a"] == deletion.ranks["a"] == 1
    assert next(iter(board.overall)) == "a"
    said = report.advice(board)
    assert said[0].startswith("A has the best mean rank over 2 metrics, 1.00 among 3 methods; ")
    assert said[1] == "Use A, the only method among the leaders of every metric."
    assert said[2] == "Leaders in Insertion ↑; Deletion ↓: A."


def test_metrics_that_disagree_are_named(tmp_path):
    columns = {"insertion": shifted(a=0.2, b=0.1, c=0.0), "grid_pointing": shifted(a=0.0, b=0.1, c=0.2)}
    found = run(tmp_path, {**columns, "complexity": shifted(a=0.0, b=0.0, c=0.0)})
    board = report.board(found)
    assert board.tau[0, 1] == pytest.approx(-1)
    said = report.advice(board)
    assert said[1].startswith("No method is among the leaders of every metric")
    assert "Leaders in Insertion ↑: A." in said
    assert "Leaders in Grid pointing game ↑: C." in said
    assert "Complexity ↓: no method differs significantly from the best." in said
    assert said[-1].startswith(
        "Insertion ↑ and Grid pointing game ↑ disagree most on the order of the methods (Kendall's τ -1.00"
    )
    assert said[-1].endswith("ranked first: A and C).")


def test_chance_and_single_methods_have_no_leader(tmp_path):
    few = {"insertion": {"a": [0.5, 0.6], "b": [0.4, 0.7]}}
    said = report.advice(report.board(run(tmp_path / "few", few)))
    assert said[1].startswith(
        "With 2 photographs, no method differs significantly from the best in any metric: evaluate more"
    )
    alone = report.board(run(tmp_path / "alone", {"insertion": {"a": [0.5, 0.6]}}))
    assert report.advice(alone) == [
        "No two methods have scores for the same photographs: there is nothing to rank."
    ]
    gaps = {"insertion": {"a": [0.5, np.nan], "b": [np.nan, 0.7]}}
    found = run(tmp_path / "gaps", gaps)
    assert not report.board(found).rankings
    assert report.pairs(found)[0].photographs == 0
    report.write(found, tmp_path / "gaps")


def test_runs_of_two_networks_in_one_report(tmp_path, capsys):
    run(tmp_path / "one", {"insertion": shifted(a=0.2, b=0.0, c=0.1)}, "resnet")
    run(tmp_path / "two", {"insertion": shifted(a=0.0, b=0.2), "deletion": shifted(a=0.0, b=0.2)}, "vit")
    folders, out = [str(tmp_path / name) for name in ("one", "two")], tmp_path / "out"
    assert cli.main(["report", *folders, "--output", str(out), "--format", "parquet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:6]] == [
        ["A", "resnet"], ["B", "resnet"], ["C", "resnet"], ["A", "vit"], ["B", "vit"],
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    assert "Insertion ↑, resnet" in page
    assert "Not ranked, because a run has no scores of them: C." in page
    assert (out / "ranks.png").stat().st_size > 1000
    with (out / "ranks.csv").open() as file:
        rows = {(row["run"], row["metric"], row["method"]): row for row in csv.DictReader(file)}
    assert len(rows) == 3 * 2
    assert (
        rows["resnet", "insertion", "a"]["mean rank"] == rows["vit", "insertion", "b"]["mean rank"] == "1.0"
    )
    long = pyarrow.parquet.read_table(out / "scores.parquet").to_pandas()
    assert list(long) == ["run", "image", "method", "metric", "value"]
    assert len(long) == 30 * (3 + 2 * 2)
    one = report.read(tmp_path / "one")
    kept = long[(long.run == "resnet") & (long.method == "b")].set_index("image").value
    assert {f"={n}.png": value for n, value in one.values("b", "insertion").items()} == kept.to_dict()
    same = report.read(tmp_path / "one")
    assert {row[1] for row in report.table(one, same)[1:]} == {
        f"{i}: resnet ({tmp_path / 'one'})" for i in (1, 2)
    }


def test_every_score_as_csv(tmp_path):
    found = run(tmp_path, {"insertion": {"a": [0.5, np.nan], "b": [0.25, 0.125]}})
    with report.write_scores(found, tmp_path, "csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["run", "image", "method", "metric", "value"],
        ["net", "'=0.png", "a", "insertion", "0.5"],
        ["net", "'=0.png", "b", "insertion", "0.25"],
        ["net", "'=1.png", "b", "insertion", "0.125"],
    ]


# -- the store ------------------------------------------------------------------------------------------------------


def test_mean_curves_are_those_of_a_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_CHUNK", 4)
    settings = {"model": "m", "methods": {"a": "A", "b": "B"}, "metrics": ["insertion"], "keep": ["curves"]}
    grid, other = np.linspace(0, 1, 5), np.linspace(0, 1, 9)
    curves = {name: RNG.random((7, 5)) for name in "ab"}
    with store.writing(tmp_path, settings) as writer:
        for i, name in itertools.product(range(7), "ab"):
            curve = curves[name][i]
            points = (grid, curve) if i % 3 else (other, np.interp(other, grid, curve))
            score = {"insertion": store.Score(0.5, *points)}
            writer.write([store.ImageRow(i, str(i)), store.Result(i, name, score)])
    found = report.read(tmp_path)
    for name in "ab":
        fractions, mean, error, photographs = found.curves["insertion"][name]
        assert photographs == 7
        at = np.array([np.interp(fractions, grid, curve) for curve in curves[name]])
        np.testing.assert_allclose(mean, at.mean(0), atol=1e-6)
        np.testing.assert_allclose(error, at.std(0, ddof=1) / 7**0.5, atol=1e-6)


@pytest.mark.parametrize("keep", [[], ["heatmaps"], ["pictures", "curves"]])
def test_what_is_not_kept_is_not_in_the_file(tmp_path, keep):
    settings = {"model": "m", "methods": {"a": "A"}, "metrics": ["insertion"], "keep": keep}
    with store.writing(tmp_path, settings) as writer:
        score = store.Score(0.5, np.linspace(0, 1, 3), np.ones(3))
        result = store.Result(0, "a", {"insertion": score}, b"p")
        writer.write([store.ImageRow(0, "0", picture=b"j"), result])
    found = report.read(tmp_path)
    assert found.values("a", "insertion") == {0: 0.5}
    assert set(found.curves) == {"insertion"} & {"insertion" * ("curves" in keep)}
    picture, heatmaps = found.files[0]
    assert (picture is not None, bool(heatmaps)) == ("pictures" in keep, "heatmaps" in keep)


@pytest.fixture
def old(tmp_path) -> Path:
    """A file of version 2, as the code of that time wrote it."""
    with sqlite3.connect(tmp_path / store.FILE) as connection:
        connection.executescript(Path(__file__).with_name("results_version_2.sql").read_text())
    connection.close()
    return tmp_path


def test_a_file_of_version_2_opens_and_goes_on(old):
    found = report.read(old)
    assert [image[:5] for image in found.images] == [
        (0, "0.png", None, 0, 0.5), (1, "1.png", None, 0, 0.625), (2, "2.png", None, None, None),
    ]  # fmt: skip
    assert found.failures == [(2, None, "not an image"), (1, "layercam", "RuntimeError: it is too dark")]
    assert found.values("gradcam", "insertion") == {0: 0.5, 1: 0.5625}
    assert found.values("layercam", "average_drop") == {0: 0.5}
    assert found.curves["insertion"]["gradcam"].mean.tolist() == [0.28125, 0.53125, 0.78125]
    assert found.files == {
        0: (b"jpeg", {"gradcam": b"png", "layercam": b"png"}),
        1: (b"jpeg", {"gradcam": b"png"}),
    }
    with store.writing(old, found.settings) as writer:
        assert writer.done(0, 3) == {(0, "gradcam"), (0, "layercam"), (1, "gradcam"), (1, "layercam")}
        assert writer.contents() == {0: "0000", 1: "0001", 2: None}
        assert writer.differing({"keep": list(store.KEPT)}) == []


def test_a_damaged_file_of_version_2_stays_as_it_is(old):
    with sqlite3.connect(old / store.FILE) as connection:
        connection.execute("UPDATE scores SET value = 1 WHERE number = 0")
    connection.close()
    before = (old / store.FILE).read_bytes()
    with pytest.raises(ValueError, match="is damaged: rows of 'scores' are changed or missing"):
        report.read(old)
    assert (old / store.FILE).read_bytes() == before


def test_a_file_of_version_2_is_left_to_the_run_that_writes_it(old):
    with store._locked(old), pytest.raises(ValueError, match="another run is writing there; wait for it"):
        report.read(old)


def test_fiftyone_shows_a_run_as_docs_metrics_says(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```python\n(import io\n.*?)^```", page, re.M | re.S)
    names: dict[str, Any] = {}
    x = np.linspace(0, 255, 12).round().astype(np.uint8).reshape(3, 4)
    file, picture = encoded(x, "PNG"), encoded(np.dstack([x] * 3), "JPEG")
    settings = {"methods": {"gradcam": "", "gradcam+rise": ""}, "metrics": [], "keep": list(store.KEPT)}
    with store.writing(tmp_path, settings) as run:
        images = [store.ImageRow(0, "a/cat.png", picture=picture), store.ImageRow(1, "text.png", error="no")]
        run.write([*images, *(store.Result(0, method, {}, file) for method in settings["methods"])])
    fo = pytest.importorskip("fiftyone", reason="fiftyone, which brings a database server, is in no extra")
    exec(recipe, names)
    (sample,) = names["samples"](tmp_path, tmp_path)
    assert (sample["photograph"], sample.filepath) == ("a/cat.png", str(tmp_path / "0.jpg"))
    assert Path(sample.filepath).read_bytes() == picture
    for method in settings["methods"]:
        assert isinstance(sample[method], fo.Heatmap)
        assert sample[method].range == [0, 1]
        np.testing.assert_allclose(sample[method].map, x / 255)
