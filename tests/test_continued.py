"""Runs that are continued, merged or reported after something has changed or failed."""

import contextlib
import functools
import sqlite3
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import networks
import xcam_fn as xf
from xcam_fn import cli, evaluate
from xcam_fn.evaluate import dataset, report, store
from xcam_fn.evaluate.dataset import Photograph
from xcam_fn.evaluate.mosaic import Mosaic
from xcam_fn.evaluate.regions import Region
from xcam_fn.perturb import blurred


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(skimage.data.astronaut()[i * 60 : i * 60 + 200, 50:300]).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("kind", [list, iter], ids=["by index", "in order"])
@pytest.mark.parametrize(
    "path", [Path, str, lambda path: Path(path).read_bytes()], ids=["path", "text", "bytes"]
)
def test_other_labels_names_and_boxes_are_computed_anew(kind, path, network, data, tmp_path):
    def found(*items):
        options = {"explain": "label", "output": tmp_path / "out", "metric_names": ["complexity"]}
        evaluate.run(network, kind(list(items)), ["gradcam"], **options)
        run = report.read(tmp_path / "out")
        return [(image.name, image.label, image.cls) for image in run.images], run.of("complexity").tolist()

    file = path(data / "0.png")
    (images, first), (_, again) = found((file, 0, "a"), (file, 1, "b")), found((file, 0, "a"), (file, 1, "b"))
    assert images == [("a", 0, 0), ("b", 1, 1)]
    assert first == again
    images, second = found((file, 1, "a"), (file, 1, "c"))
    assert images == [("a", 1, 1), ("c", 1, 1)]
    assert second == [first[1], first[1]]


def test_other_boxes_of_what_is_read_in_order_are_computed_anew(network, data, tmp_path):
    def found(box):
        photographs = (Photograph("a", data / "0.png", 0, Region("here", (box,))) for _ in range(2))
        evaluate.run(network, photographs, ["gradcam"], output=tmp_path / "out")
        return report.read(tmp_path / "out").of("energy_pointing_game").tolist()

    assert found((0, 0, 250, 200)) == [[1.0], [1.0]]
    assert found((60, 60, 120, 120)) != [[1.0], [1.0]]


def test_mosaics_of_another_side_are_another_run(network, data, tmp_path):
    members = dataset.photographs(data, network.categories)
    members = tuple(member._replace(label=0) for member in members)
    for side in (32, 64):
        mosaics = [Mosaic("mosaic 1", members, (1.0,) * 4, side)]
        evaluate.run(network, mosaics, ["gradcam"], output=tmp_path / f"of_{side}")
    with pytest.raises(ValueError, match=r"other settings: photographs was '\w+' and is '\w+'"):
        evaluate.run(network, mosaics, ["gradcam"], output=tmp_path / "of_32")


@pytest.mark.parametrize("is_read_again", [True, False])
def test_a_photograph_lost_between_its_methods_damages_nothing(is_read_again, network, data, tmp_path):
    options = {"methods": ["gradcam", "layercam"], "output": tmp_path / "out", "metric_names": ["complexity"]}
    photographs = dataset.photographs(data, network.categories)
    evaluate.run(network, photographs, **options)
    before = report.read(tmp_path / "out").scores.tolist()
    with contextlib.closing(sqlite3.connect(tmp_path / "out" / store.FILE)) as connection, connection:
        for table in ("results", "heatmaps"):  # as where the run was killed between the two
            connection.execute(f"DELETE FROM {table} WHERE number = 1 AND method = 'layercam'")
    file = (data / "1.png").read_bytes()
    (data / "1.png").unlink()
    assert evaluate.run(network, photographs, **options)[:4] == (4, 1, 6, 0)
    if is_read_again:
        (data / "1.png").write_bytes(file)
        assert evaluate.run(network, photographs, **options)[:4] == (4, 0, 8, 0)
        assert report.read(tmp_path / "out").scores.tolist() == before
    else:
        assert len(report.read(tmp_path / "out").failures) == 1


def test_a_result_that_failed_where_it_was_computed_twice_damages_nothing(network, data, tmp_path):
    settings = {"methods": {"gradcam": "Grad-CAM"}, "metrics": ["complexity"], "keep": store.KEPT}
    result = store.Result(0, "gradcam", {"complexity": store.Score(0.5)}, b"file")
    with store.writing(tmp_path, settings) as written:
        written.write([store.ImageRow(0, "a", picture=b"file"), result])
        written.write([result._replace(error="no memory", heatmap=None)])
    with store.reading(tmp_path) as found:
        assert found.counts() == (0, 1)


def other(baseline):
    return functools.partial(xf.scorecam, baseline=baseline)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (xf.find_method("rise", num_masks=4), xf.find_method("rise", num_masks=5)),
        (functools.partial(xf.rise, num_masks=4), functools.partial(xf.rise, num_masks=5)),
        (other(torch.zeros(3, 32, 32)), other(torch.linspace(0, 1, 3072).reshape(3, 32, 32).round())),
        (xf.smooth(xf.find_method("rise", num_masks=4)), xf.smooth(xf.find_method("rise", num_masks=5))),
    ],
    ids=["method", "partial", "tensor", "wrapped"],
)
def test_methods_with_other_options_are_another_run(first, second, network, data, tmp_path):
    options = {"output": tmp_path / "out", "metric_names": ["complexity"]}
    done = evaluate.run(network, data, {"one": first}, **options)
    assert evaluate.run(network, data, {"one": first}, **options) == done
    with pytest.raises(ValueError, match="other settings: own options was"):
        evaluate.run(network, data, {"one": second}, **options)


def test_a_function_among_the_options_is_the_same_in_the_next_process(network, data, tmp_path):
    options = {"output": tmp_path / "out", "metric_names": ["complexity"]}
    about = {"folder": {"of": PurePosixPath("a")}}  # no value that JSON knows
    evaluate.run(network, data, ["scorecam"], options={"baseline": blurred}, about=about, **options)
    kept = report.read(tmp_path / "out").settings
    assert kept["options"] == {"baseline": "xcam_fn.perturb.blurred"}
    assert kept["folder"] == {"of": "PurePosixPath('a')"}


class Failing(networks.Linearized):
    """A network that returns NaN, or raises, where the mean of an image is in the upper half."""

    def __init__(self, raises: bool):
        super().__init__()
        self.raises = raises

    def forward(self, x):
        is_bright = x.mean((1, 2, 3)) > 0
        if self.raises and is_bright.any():
            raise RuntimeError("too bright")
        return super().forward(x) + torch.where(is_bright, torch.nan, 0.0)[:, None]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("raises", [True, False], ids=["raises", "NaN"])
def test_a_network_that_fails_on_one_photograph_fails_there_alone(
    raises, batch_size, network, data, tmp_path
):
    pixels = [np.full((40, 40, 3), value, np.uint8) for value in (90, 250, 100, 80)]
    for i, each in enumerate(pixels):
        Image.fromarray(each + np.arange(40, dtype=np.uint8)[:, None] // 8).save(data / f"{i}.png")
    failing = network._replace(model=networks.seeded(Failing(raises)).eval())
    methods = ["gradcam", "eigencam", "fem"]  # the latter two do not ask for the output
    options = {"output": tmp_path / "out", "metric_names": ["complexity"], "batch_size": batch_size}
    outcome = evaluate.run(failing, data, methods, **options)
    assert outcome == evaluate.run(failing, data, methods, **options)
    assert outcome[1:4] == ((1, 9, 0) if raises else (0, 11, 1))
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    found = report.read(tmp_path / "out")
    assert [failure.number for failure in found.failures] == [1]
    assert found.images[1].probability is None
    assert ("RuntimeError: too bright" if raises else "NaN") in (tmp_path / "out" / "report.html").read_text()


# -- shards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(network, data, tmp_path) -> list[Path]:
    for number in (1, 2):
        options = {"output": tmp_path / f"{number}", "shard": f"{number}/2", "metric_names": ["complexity"]}
        evaluate.run(network, data, ["gradcam"], **options)
    return [tmp_path / "1", tmp_path / "2"]


def scores(folder: Path) -> list[float]:
    return report.read(folder).of("complexity")[:, 0].tolist()


def test_a_part_merged_into_a_whole_run_takes_nothing_out_of_it(shards, network, data, tmp_path):
    whole = tmp_path / "whole"
    evaluate.run(network, data, ["gradcam"], output=whole, metric_names=["complexity"])
    before = scores(whole)
    assert evaluate.merge(shards[:1], whole, partial=True).results == 4
    assert scores(whole) == before
    assert evaluate.merge(shards, whole).results == 4
    assert scores(whole) == before


def test_one_machine_is_named_once_and_what_cannot_be_read_is_counted(
    shards, network, data, tmp_path, capsys
):
    command = ["merge", *map(str, shards), "--output", str(tmp_path / "whole")]
    assert cli.main(command) == 0
    assert capsys.readouterr().err == ""
    (data / "3.png").write_text("not an image")
    evaluate.run(network, data, ["gradcam"], output=shards[1], shard="2/2", metric_names=["complexity"])
    assert cli.main(command) == 1
    assert "1 photographs could not be read" in capsys.readouterr().err


@pytest.mark.parametrize("notes", ["", "[]", "{", '{"rows": 4}'])
def test_a_shard_whose_notes_are_damaged_has_not_ended(notes, shards, tmp_path):
    (shards[0] / "run.json").write_text(notes)
    with pytest.raises(ValueError, match="shard 1/2 has not ended"):
        evaluate.merge(shards, tmp_path / "whole")


def test_a_run_that_holds_nothing_yet_is_reported(network, data, tmp_path):
    evaluate.run(network, data, ["gradcam"], output=tmp_path / "out", metric_names=["complexity"])
    with contextlib.closing(sqlite3.connect(tmp_path / "out" / store.FILE)) as connection, connection:
        for table in ("heatmaps", "pictures", "results", "images"):
            connection.execute(f"DELETE FROM {table}")
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    assert "gradcam,small,,,,0" in (tmp_path / "out" / "table.csv").read_text()
