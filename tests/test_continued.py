"""A run that is continued after what it is of has changed."""

from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image

import networks
from xcam_fn import evaluate
from xcam_fn.evaluate import dataset, report
from xcam_fn.evaluate.dataset import Photograph
from xcam_fn.evaluate.mosaic import Mosaic
from xcam_fn.evaluate.regions import Region
from xcam_fn.models import LoadedModel
from xcam_fn.models.images import Preset


@pytest.fixture
def network() -> LoadedModel:
    preset = Preset(32, 36, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model = networks.seeded(networks.Linearized()).eval()
    classes = model(torch.zeros(1, 3, 32, 32)).shape[1]
    return LoadedModel(model, preset, [f"class {i}" for i in range(classes)], "small")


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
