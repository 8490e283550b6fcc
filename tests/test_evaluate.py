"""The evaluation of a data set: numbers, faults, interruption, and the report."""

import contextlib
import csv
import io
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import xcam_fn as xf
from xcam_fn import cli, evaluate
from xcam_fn.evaluate import dataset, report, seen, store

XCAM = Path(sysconfig.get_path("scripts")) / "xcam"
SMALL = ("--model", "squeezenet1_1", "--weights", "random")
METHODS = ["gradcam", "layercam", "ablationcam"]
PIXEL = seen.encoded(np.full((2, 2), 128, np.uint8), "PNG")


def five(folder: Path) -> Path:
    """A folder of five photographs, cut out of one."""
    folder.mkdir()
    for i in range(5):
        Image.fromarray(skimage.data.astronaut()[i * 60 : i * 60 + 200, 50:300]).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return five(tmp_path / "photographs")


def run(network, data, output, **options) -> evaluate.Outcome:
    photographs = dataset.photographs(data, network.categories)
    return evaluate.run(network, photographs, **({"methods": METHODS, "output": output} | options))


def facts(found: report.Found) -> str:
    """What was read of a run, but for its folder."""
    return repr(
        (found.settings, found.images, found.scores.tolist(), found.failures, found.curves, found.files)
    )


def dump(folder: Path) -> list[str]:
    """All that a run holds, but for its settings."""
    with sqlite3.connect(folder / store.FILE) as connection:
        return [line for line in connection.iterdump() if "INSERT" in line and '"settings"' not in line]


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_scores_are_those_of_the_metrics(network, data, tmp_path, batch_size):
    names = ["average_drop", "increase_in_confidence", "insertion", "deletion", "road", "complexity", "coherency", "adcc",
             "infidelity", "random_logit"]  # fmt: skip
    outcome = run(network, data, tmp_path / "out", metric_names=names, batch_size=batch_size)
    assert outcome[:4] == (5, 0, 15, 0)
    found = report.read(tmp_path / "out")
    for photograph, image in zip(dataset.photographs(data, network.categories), found.images, strict=True):
        x, _ = xf.images.prepare(photograph.path, network.preset)
        cls = int(network.model(x).argmax())
        assert (image.name, image.cls) == (photograph.name, cls)
        for method in METHODS:
            heatmap = xf.METHODS[method](network.model, None, x, cls)
            expected = {
                "average_drop": xf.average_drop(network.model, x, heatmap, cls),
                "increase_in_confidence": xf.increase_in_confidence(network.model, x, heatmap, cls),
                "insertion": xf.insertion(network.model, x, heatmap, cls).auc,
                "deletion": xf.deletion(network.model, x, heatmap, cls).auc,
                "road": xf.road(network.model, x, heatmap, cls).value,
                "complexity": xf.complexity(heatmap),
                "coherency": xf.coherency(method, network.model, None, x, cls),
                "adcc": xf.adcc(method, network.model, None, x, cls),
                "infidelity": xf.infidelity(network.model, x, heatmap, cls),
                "random_logit": xf.random_logit(method, network.model, None, x, cls),
            }
            assert set(expected) == set(names)
            for name, value in expected.items():
                assert found.values(method, name)[image.number] == pytest.approx(float(value), abs=1e-5), name


def test_labels_are_explained_where_asked(network, data, tmp_path):
    photographs = [p._replace(label=2) for p in dataset.photographs(data, network.categories)]
    evaluate.run(network, photographs, ["gradcam"], output=tmp_path / "out", explain="label")
    assert [(image.label, image.cls) for image in report.read(tmp_path / "out").images] == [(2, 2)] * 5


def test_heatmaps_from_elsewhere_are_judged(network, data):
    x, _ = xf.images.prepare(data / "0.png", network.preset)
    heatmap = torch.rand(1, 32, 32)
    found = evaluate.judged(network.model, x, {"mine": heatmap})
    torch.testing.assert_close(found["mine"]["insertion"].auc, xf.insertion(network.model, x, heatmap).auc)
    with pytest.raises(ValueError, match=r"coherency, adcc and metrics .* need the method"):
        evaluate.judged(network.model, x, {"mine": heatmap}, metric_names=["adcc"])


# -- faults ---------------------------------------------------------------------------------------------------------


def spoil(folder: Path) -> None:
    """Files that cannot be read as photographs."""
    whole = (folder / "0.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "corrupt.png").write_bytes(whole[:100] + bytes(200) + whole[300:])
    header = io.BytesIO()
    Image.new("1", (50_000, 50_000)).save(header, "PNG")
    (folder / "huge.png").write_bytes(header.getvalue())


def unusual(folder: Path) -> None:
    """Files of kinds that are read all the same."""
    picture = Image.open(folder / "0.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("L").save(folder / "gray.png")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[274] = 6
    picture.save(folder / "rotated.jpg", exif=exif)


def test_what_cannot_be_read_is_written_down_and_the_rest_goes_on(network, data, tmp_path):
    spoil(data)
    unusual(data)
    outcome = run(network, data, tmp_path / "out", methods=["gradcam"], batch_size=4)
    assert outcome[:4] == (15, 5, 10, 0)
    errors = {image.name: image.error for image in report.read(tmp_path / "out").images if image.error}
    assert errors.keys() == {"truncated.png", "empty.jpg", "text.jpg", "corrupt.png", "huge.png"}
    assert "too large" in errors["huge.png"]
    assert "not an image" in errors["text.jpg"]
    before = dump(tmp_path / "out")
    run(network, data, tmp_path / "out", methods=["gradcam"], batch_size=4)
    assert dump(tmp_path / "out") == before


def failing(model, layer, x, cls=None):
    """Grad-CAM that fails on photographs whose upper left corner is dark, and finds NaN where it is red."""
    heatmaps = xf.gradcam(model, layer, x, cls)
    if (x[:, :, 0, 0].sum(1) < -4).any():
        raise RuntimeError("it is\ntoo dark")
    return torch.where(x[:, 0, 0, 0, None, None] > x[:, 2, 0, 0, None, None] + 3, torch.nan, heatmaps)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_method_that_fails_on_one_photograph_fails_there_alone(network, data, tmp_path, batch_size):
    Image.new("RGB", (40, 40), "black").save(data / "5.png")
    Image.new("RGB", (40, 40), "red").save(data / "6.png")
    for i in range(5):
        with Image.open(data / f"{i}.png") as opened:
            Image.blend(opened.convert("RGB"), Image.new("RGB", opened.size, "gray"), 0.9).save(
                data / f"{i}.png"
            )
    methods = {"gradcam": "gradcam", "mine": failing}
    outcome = run(network, data, tmp_path / "out", methods=methods, batch_size=batch_size)
    assert (outcome.results, outcome.failures) == (12, 2)
    found = report.read(tmp_path / "out")
    errors = {(found.images[number].name, method): error for number, method, error in found.failures}
    assert errors == {
        ("5.png", "mine"): "RuntimeError: it is too dark",
        ("6.png", "mine"): "the heatmap holds NaN or infinite values",
    }
    report.write(found, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "it is too dark" in page
    assert "the heatmap holds NaN" in page
    again = run(network, data, tmp_path / "out", methods=methods, batch_size=batch_size)
    assert again == outcome
    healed = run(network, data, tmp_path / "out", methods={**methods, "mine": "gradcam"}, beside=True)
    assert healed.folder.name == "out_2"
    assert healed.failures == 0


def test_other_settings_are_refused_by_name_and_go_beside(network, data, tmp_path):
    run(network, data, tmp_path / "out", methods=["gradcam"])
    before = dump(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"other settings: methods was .*'gradcam'.* and is .*'layercam'.*--beside"
    ):
        run(network, data, tmp_path / "out", methods=["layercam"])
    with torch.no_grad():
        next(network.model.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"weights was"):
        run(network, data, tmp_path / "out", methods=["gradcam"])
    assert run(network, data, tmp_path / "out", methods=["gradcam"], beside=True).folder == tmp_path / "out_2"
    assert run(network, data, tmp_path / "out", methods=["gradcam"], beside=True).folder == tmp_path / "out_2"
    assert dump(tmp_path / "out") == before


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_photograph_replaced_under_its_name_is_computed_anew(network, data, tmp_path, batch_size):
    run(network, data, tmp_path / "out", batch_size=batch_size)
    before = dump(tmp_path / "out")
    os.utime(data / "3.png", (1, 1))  # the same photograph, copied
    run(network, data, tmp_path / "out", batch_size=batch_size)
    assert dump(tmp_path / "out") == before
    picture = Image.open(data / "1.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture.save(data / "1.png")
    (data / "2.png").write_bytes(b"no photograph any more")
    outcome = run(network, data, tmp_path / "out", batch_size=batch_size)
    assert outcome[:4] == (5, 1, 12, 0)
    whole = run(network, data, tmp_path / "whole", batch_size=batch_size)
    assert whole[:4] == outcome[:4]
    found, expected = (report.read(tmp_path / name) for name in ("out", "whole"))
    assert found.images == expected.images
    for method in METHODS:
        assert found.values(method, "insertion") == pytest.approx(
            expected.values(method, "insertion"), abs=1e-6
        )
    picture.save(data / "2.png")
    (data / "4.png").unlink()  # what was found of a file that is gone stays
    photographs = [dataset.Photograph(f"{i}.png", data / f"{i}.png", None) for i in range(5)]
    again = evaluate.run(network, photographs, METHODS, output=tmp_path / "out", batch_size=batch_size)
    assert again[:4] == (5, 0, 15, 0)


def test_methods_of_one_title_are_told_apart_by_name(network, data, tmp_path):
    methods = {
        "gradcam": "gradcam",
        "first layer": xf.gradcam.with_options(projection=None),
        "layercam": "layercam",
    }
    run(network, data, tmp_path / "out", methods=methods, metric_names=["complexity"])
    table = report.table(report.read(tmp_path / "out"))
    assert [row[0] for row in table[1:]] == ["gradcam", "first layer", "Layer-CAM"]


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8 on macOS")
def test_names_that_are_not_utf_8(network, data, tmp_path):
    (data / "1.png").rename(data / os.fsdecode(b"\xff.png"))
    assert run(network, data, tmp_path / "out", methods=["gradcam"])[:4] == (5, 0, 5, 0)
    found = report.read(tmp_path / "out")
    assert "\\udcff.png" in {image.name for image in found.images}
    report.write(found, tmp_path / "out")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    """A file of results."""
    folder = tmp_path_factory.mktemp("written")
    made(folder, {"one": [0.25, 0.5, 0.125], "other": [0.75, 0.5, 0.25]}, keep=store.KEPT)
    return (folder / store.FILE).read_bytes()


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        *((f"DROP TABLE {table}", f"its table '{table}' is missing") for table in ("settings", "images", "layouts", "results", "pictures", "heatmaps")),
        ("DELETE FROM settings WHERE name = 'metrics'", "rows of 'settings' are changed or missing"),
        ("DELETE FROM settings", "its settings are missing"),
        ("UPDATE settings SET value = '[' WHERE name = 'methods'", "rows of 'settings' are changed"),
        ("UPDATE results SET scores = zeroblob(8) WHERE number = 0", "rows of 'results' are changed"),
        ("UPDATE layouts SET fractions = '{}'", "rows of 'layouts' are changed"),
        ("UPDATE images SET name = CAST(x'ff' AS TEXT)", "Could not decode to UTF-8"),
        ("DELETE FROM layouts", "rows that 'results' refers to are missing"),
        ("DELETE FROM results WHERE number = 1", "rows of 'heatmaps' or of 'results' are missing"),
        ("DELETE FROM heatmaps WHERE number = 1", "rows of 'heatmaps' or of 'results' are missing"),
        ("DELETE FROM pictures WHERE number = 1", "rows of 'pictures' or of 'images' are missing"),
        ("DELETE FROM images WHERE number = 1", "rows that 'results' refers to are missing"),
    ],
)  # fmt: skip
def test_a_damaged_file_says_what_is_lost(written, tmp_path, statement, words):
    (tmp_path / store.FILE).write_bytes(written)
    with contextlib.closing(sqlite3.connect(tmp_path / store.FILE)) as connection, connection:
        connection.execute(statement)
    for opened in (lambda: report.read(tmp_path), lambda: store.writing(tmp_path, {}).__enter__()):
        with pytest.raises(ValueError, match=rf"is damaged: {words}.*or delete it and run again") as raised:
            opened()
        assert "\n" not in str(raised.value)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=3), st.booleans())
def test_flipped_bytes_are_said_in_one_line_or_change_nothing(written, tmp_path_factory, flips, is_cut):
    folder, spoiled = tmp_path_factory.mktemp("flipped"), bytearray(written)
    for place, change in flips:
        spoiled[place % len(written)] ^= change
    (folder / store.FILE).write_bytes(spoiled[: len(written) // (2 if is_cut else 1)])
    expected = folder / "as it was"
    expected.mkdir()
    (expected / store.FILE).write_bytes(written)
    said, found = "", None
    try:
        found = report.read(folder)
    except (ValueError, OSError) as error:
        said = str(error)
    assert facts(found) == facts(report.read(expected)) if found else str(folder) in said
    assert "\n" not in said


def test_what_a_killed_run_was_writing_is_rolled_back_when_it_is_read(written, tmp_path):
    (tmp_path / "killed").mkdir()
    (tmp_path / store.FILE).write_bytes(written)
    expected = facts(report.read(tmp_path))
    with contextlib.closing(sqlite3.connect(tmp_path / store.FILE, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN IMMEDIATE")
        for table in ("heatmaps", "results", "images"):
            connection.execute(f"DELETE FROM {table}")
        connection.execute(
            "CREATE TABLE large AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 9999) SELECT i FROM n"
        )
        for file in tmp_path.glob(f"{store.FILE}*"):
            shutil.copy(file, tmp_path / "killed")
    assert (tmp_path / "killed" / f"{store.FILE}-journal").stat().st_size
    assert (tmp_path / "killed" / store.FILE).read_bytes() != written
    assert facts(report.read(tmp_path / "killed")) == expected


def test_two_runs_in_one_folder(network, data, tmp_path):
    with store.writing(tmp_path / "out", {"a": 1}):
        with pytest.raises(ValueError, match="another run is writing there"):
            run(network, data, tmp_path / "out")
        with store.reading(tmp_path / "out") as reader:
            assert reader.settings() == {"a": 1}


def test_folders_that_cannot_hold_a_run(network, data, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        run(network, data, tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot be written to \(Not a directory\); choose another folder"):
        run(network, data, tmp_path / "file" / "below")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / store.FILE).write_text("this is not a database" * 100)
    with pytest.raises(ValueError, match="is not a file of results"):
        run(network, data, tmp_path / "text")
    (tmp_path / "other").mkdir()
    with sqlite3.connect(tmp_path / "other" / store.FILE) as connection:
        connection.execute("CREATE TABLE mine (a)")
    connection.close()
    with pytest.raises(ValueError, match="of another program"):
        run(network, data, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="holds no results"):
        report.read(tmp_path)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["gradcm"]}, "gradcm.*gradcam"),
        ({"metric_names": ["insert"]}, "metrics='insert'.*insertion"),
        ({"metric_names": ["deletion", "deletion"]}, "without repeats"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"explain": "label"}, "5 of 5 photographs have no label"),
        ({"explain": "best"}, "explain='best'"),
        ({"layer": "layer9"}, "layer 'layer9'"),
        ({"precision": "half"}, "precision='half'"),
    ],
)  # fmt: skip
def test_bad_arguments_leave_no_folder(network, data, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        run(network, data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unchecked")
def test_an_option_that_there_is_not_leaves_no_folder(network, data, tmp_path):
    with pytest.raises(TypeError, match="no option 'scorer'; its options are about, beside, chunk_size"):
        run(network, data, tmp_path / "out", scorer=network.model)
    assert not (tmp_path / "out").exists()


# -- interruption ---------------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> list[str]:
    methods = ["--methods", "gradcam", "layercam", "--metrics", "average_drop", "deletion"]
    size = ["--image-size", "64"]
    return [str(part) for part in (XCAM, "evaluate", *arguments, *SMALL, *methods, *size)]


THREE = ("--num-images", "3")
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def results_in(folder: Path) -> int:
    """How many results a run has written so far; it may be at work or not have begun."""
    if not (folder / store.FILE).is_file():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{folder / store.FILE}?mode=ro", uri=True)) as reading:
        try:
            return reading.execute("SELECT count(*) FROM results").fetchone()[0]
        except sqlite3.OperationalError:  # no table yet
            return 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    data = five(folder / "photographs")
    assert cli.main(command(data, "--output", folder, *THREE)[1:]) == 0
    assert len(dump(folder)) == 3 + 3 + 6 + 6 + 1  # images, pictures, results, heatmaps, a layout of curves
    return folder


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(data, whole, tmp_path):
    killed = tmp_path / "killed"
    moments = random.Random(0)
    kills = 0
    for results in (2, 5):
        process = subprocess.Popen(
            command(data, "--output", killed, *THREE),
            env=ALONE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and results_in(killed) < results:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.01))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills
    assert cli.main(command(data, "--output", killed, *THREE)[1:]) == 0
    assert sorted(dump(killed)) == sorted(dump(whole))
    for folder in (whole, killed):
        assert cli.main(["report", str(folder)]) == 0
    for name in ("table.csv", "table.md", "pairs.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="a process's files are limited in size on POSIX")
def test_a_full_disk_leaves_what_was_written(data, whole, tmp_path):
    full = tmp_path / "full"
    size = (whole / store.FILE).stat().st_size
    limited = f"import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({size - 4096}, resource.RLIM_INFINITY)); from xcam_fn.cli import main; sys.exit(main())"
    arguments = command(data, "--output", full, *THREE)
    stopped = subprocess.run(
        [sys.executable, "-c", limited, *arguments[1:]],
        env=ALONE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert stopped.returncode == 2
    assert re.search(r"could not be written \(.*\); earlier results are safe", stopped.stderr)
    kept = dump(full)
    assert 0 < len(kept) < len(dump(whole))
    assert set(kept) <= set(dump(whole))
    assert cli.main(arguments[1:]) == 0
    assert sorted(dump(full)) == sorted(dump(whole))


# -- the report -----------------------------------------------------------------------------------------------------


def made(folder: Path, drops: dict[str, list[float]], **more) -> report.Found:
    """A run with given average drops by method."""
    settings = {**more, "methods": {name: name.title() for name in drops}, "metrics": ["average_drop"], "model": "m", "layer": "l",
                "variant": None, "versions": {"torch": "2"}, "categories": ["cat"]}  # fmt: skip
    with store.writing(folder, settings) as writer:
        for i in range(len(next(iter(drops.values())))):
            scores = {
                name: store.Score(values[i], np.linspace(0, 1, 3), np.zeros(3))
                for name, values in drops.items()
            }
            results = [
                store.Result(i, name, {"average_drop": score}, PIXEL) for name, score in scores.items()
            ]
            writer.write([store.ImageRow(i, f"{i}.png", None, 0, 0.5, PIXEL), *results])
    return report.read(folder)


def test_means_intervals_and_pairs(tmp_path):
    generator = np.random.default_rng(0)
    base = generator.uniform(0.2, 0.8, 40)
    found = made(
        tmp_path / "out",
        {"good": list(base - 0.1), "bad": list(base), "alike": list(base + generator.normal(0, 0.1, 40))},
    )
    means = report.means(found)
    mean = means["bad"]["average_drop"]
    assert mean.value == pytest.approx(base.mean())
    error = base.std(ddof=1) / np.sqrt(40)
    assert mean.low == pytest.approx(base.mean() - 1.96 * error, abs=0.3 * error)
    assert mean.high == pytest.approx(base.mean() + 1.96 * error, abs=0.3 * error)
    by_pair = {(pair.first, pair.second): pair for pair in report.pairs(found)}
    assert by_pair["good", "bad"].better == "good"  # the lower drop
    assert by_pair["good", "bad"].difference == pytest.approx(-0.1)
    assert by_pair["bad", "alike"].better is None
    assert report.means(report.read(tmp_path / "out")) == means


def test_few_photographs_have_no_interval_and_no_winner(tmp_path):
    found = made(tmp_path / "out", {"one": [0.25], "other": [0.75]})
    assert report.table(found)[1][-1] == "0.2500"
    assert report.pairs(found)[0].better is None


def test_the_table_as_csv_has_every_digit(network, data, tmp_path):
    run(network, data, tmp_path / "out")
    found = report.read(tmp_path / "out")
    report.write(found, tmp_path / "out")
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    for method, row in report.means(found).items():
        assert float(rows[method]["insertion mean"]) == row["insertion"].value
        assert int(rows[method]["insertion photographs"]) == 5


def test_no_cell_of_a_table_is_a_formula_or_ends_early(tmp_path):
    names = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "<lambda>", "a\\|b\nc"]
    found = made(tmp_path / "out", {name: [0.1, 0.2 + i] for i, name in enumerate(names)})
    report.write(found, tmp_path / "out")
    for file in ("table.csv", "pairs.csv"):
        with (tmp_path / "out" / file).open(newline="") as opened:
            rows = list(csv.reader(opened))
        assert all(cell[:1] not in ("=", "+", "@") for row in rows for cell in row)
        assert all(float(cell) for row in rows for cell in row if cell[:1] == "-")  # numbers stay numbers
    assert any(float(row[3]) < 0 for row in rows[1:])
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(names)
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {5}
    assert r"A\\\|B C" in lines[-1]
    assert lines[-2].startswith(r"| \<")


@pytest.fixture
def page(network, data, tmp_path) -> Path:
    (data / "text.jpg").write_text("not <b>an</b> image")
    run(network, data, tmp_path / "out", methods={"gradcam": "gradcam", "<script>": "layercam"})
    report.write(report.read(tmp_path / "out"), tmp_path / "out")
    return tmp_path / "out" / "report.html"


def test_the_page_needs_nothing_but_itself(page):
    text = page.read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) >= 2 + 3
    assert all(source.startswith("data:image/") for source in sources)
    assert "http" not in re.sub(r"data:image/[^\"]*", "", text)
    assert "<script" not in text
    assert "text.jpg" in text


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="the browser chromium is not installed on this machine"
)
def test_a_browser_shows_the_page(page, tmp_path):
    """All pictures are decoded by a real browser, and no text is wider than its page."""
    probe = "<script>document.title = [...document.images].map(i => i.naturalWidth > 100).join() + ' ' + (document.documentElement.scrollWidth <= innerWidth)</script></body>"
    copy = tmp_path / "probed.html"
    copy.write_text(page.read_text().replace("</body>", probe))
    browser = [
        "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,2000",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", copy.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(browser, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>([\w,]+) (\w+)</title>", shown)
    assert found is not None, shown[:300]
    assert set(found[1].split(",")) == {"true"}
    assert found[2] == "true"


# -- the commands ---------------------------------------------------------------------------------------------------


def test_the_commands_from_beginning_to_end(data, tmp_path):
    spoil(data)
    arguments = command(data, "--output", tmp_path / "out")
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("10 photographs, 10 results in ")
    assert "warning: 5 of 10 photographs could not be read, and 0 results failed" in done.stderr
    done = subprocess.run([XCAM, "report", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["method", "model", "photographs"]
    assert lines[1].startswith("Grad-CAM")
    assert re.search(r"0\.\d{4} \(0\.\d{4} to 0\.\d{4}\)", lines[1])
    for name in ("report.html", "table.csv", "table.md", "pairs.csv", "deletion.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100


def test_nothing_that_can_be_read(tmp_path):
    (tmp_path / "only.jpg").write_text("not an image")
    assert cli.main(["evaluate", str(tmp_path), *SMALL, "--output", str(tmp_path / "out")]) == 1
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    assert "not an image" in (tmp_path / "out" / "report.html").read_text()


def test_latency_of_several_photographs_takes_the_next_in_each_round(data, network, capsys):
    photos = [str(data / f"{i}.png") for i in range(3)]
    size = ("--image-size", "64")
    assert (
        cli.main(["latency", *SMALL, "--methods", "gradcam", *size, "--rounds", "4", "--photo", *photos]) == 0
    )
    assert capsys.readouterr().out.startswith(
        "seconds per image, 3 photographs, 4 rounds; first: the first call"
    )
    seen = []
    method = lambda _model, _layer, x, _cls: seen.append(x) or torch.zeros(1, 32, 32)  # noqa: E731
    xs = list(torch.randn(2, 1, 3, 32, 32))
    xf.latency.timings(network.model, None, xs, {"mine": method}, rounds=3)
    assert [int(torch.equal(x, xs[1])) for x in seen] == [0, 0, 1, 0]
    with pytest.raises(ValueError, match="x is empty; expected at least one entry"):
        xf.latency.timings(network.model, None, [], ["gradcam"])


def test_whole_photographs_at_a_size_of_one_s_own(data, tmp_path, capsys):
    command = ["evaluate", str(data), *SMALL, "--metrics", "complexity", "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--image-size", "48"]) == 0
    found = xf.report.read(tmp_path / "out")
    assert found.settings["preset"][:2] == [48, [48, 48]]
    assert cli.main(command) == 2
    assert "holds a run with other settings: preset was [48, [48, 48], " in capsys.readouterr().err
    assert cli.main([*command, "--image-size", "0"]) == 2
    assert "--image-size 0 is out of range; expected at least 1 pixel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "nowhere"], "no such folder or CSV file"),
        (["evaluate", ".", "--methods", "gradcm"], "gradcam"),
        (["evaluate", ".", "--num-images", "-1"], "--num-images -1"),
        (["evaluate", ".", "--metrics", "insertions"], "insertion"),
        (["report", "nowhere"], "holds no results.sqlite"),
        (["compare", "nowhere.png"], "no such file"),
        (["latency", "--rounds", "0"], "rounds=0"),
    ],
)  # fmt: skip
def test_the_command_says_what_is_wrong(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 50)).save("a.png")
    model = [] if arguments[0] == "report" else SMALL
    assert cli.main([*arguments, *model]) == 2
    assert words in capsys.readouterr().err


def test_compare_shows_four_scores_for_each_method(data, tmp_path, capsys):
    assert cli.main(["compare", str(data / "0.png"), *SMALL, "--methods", "gradcam", "layercam", "--output", str(tmp_path / "out")]) == 0  # fmt: skip
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {
        line[0]: [float(value) for value in line[1:]]
        for line in lines
        if line and line[0] in ("Grad-CAM", "Layer-CAM")
    }
    assert all(len(values) == 4 and all(0 <= value <= 1 for value in values) for values in rows.values())
    assert len(rows) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0_compare.png",
        "0_deletion.png",
        "0_insertion.png",
    ]


def test_latency_times_the_bare_forward_and_each_method(tmp_path, capsys):
    file = tmp_path / "sub" / "latency.csv"
    assert cli.main(["latency", *SMALL, "--methods", "gradcam", "layercam", "--rounds", "2", "--output", str(file)]) == 0  # fmt: skip
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    assert [row["method"] for row in rows] == ["bare forward", "gradcam", "layercam"]
    for row in rows:
        assert 0 < float(row["fastest"]) <= float(row["median"]) <= float(row["slowest"])
    assert "bare forward" in capsys.readouterr().out
