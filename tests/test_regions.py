"""Boxes and masks of photographs: read from files, moved to what the network sees, and what is wrong in them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

import networks
import xcam_fn as xf
from xcam_fn import cli, evaluate
from xcam_fn.evaluate import dataset, report
from xcam_fn.models import LoadedModel
from xcam_fn.models.images import Preset, load_mask, prepare_mask

BOXES = {"0": [(10, 5, 50, 40)], "1": [(0, 0, 20, 60), (60, 30, 80, 60)], "2": [(35, 20, 36, 21)]}
SIZE = (80, 60)


@pytest.fixture
def network() -> LoadedModel:
    model = networks.seeded(networks.Linearized()).eval()
    preset = Preset(32, 36, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return LoadedModel(model, preset, [f"class {i}" for i in range(5)], "small")


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in "0123":
        noise = np.random.default_rng(int(name)).integers(0, 256, (*SIZE[::-1], 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    return folder


def listed(data: Path) -> list[dataset.Photograph]:
    return dataset.photographs(data, [])


def coco(file: Path, *more: object, **changed: object) -> Path:
    """A COCO file of the boxes, with more annotations."""
    images = [{"id": int(n), "file_name": f"{n}.png", "width": SIZE[0], "height": SIZE[1]} for n in BOXES]
    boxes = [
        {"image_id": int(n), "bbox": [left, top, right - left, bottom - top]}
        for n, some in BOXES.items()
        for left, top, right, bottom in some
    ]
    file.write_text(json.dumps({"images": images, "annotations": [*boxes, *more]} | changed))
    return file


def voc(folder: Path, *more: str) -> Path:
    """A folder of VOC files of the boxes."""
    folder.mkdir()
    for n, some in BOXES.items():
        objects = "".join(
            f"<object><bndbox><xmin>{a + 1}</xmin><ymin>{b + 1}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
            for a, b, c, d in some
        )
        size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
        (folder / f"{n}.xml").write_text(f"<annotation>{size}{objects}{''.join(more)}</annotation>")
    return folder


def masks(folder: Path) -> Path:
    """A folder of mask images of the boxes, each of another mode."""
    folder.mkdir()
    for (n, some), mode in zip(BOXES.items(), ("L", "1", "P"), strict=True):
        mask = np.zeros(SIZE[::-1], np.uint8)
        for left, top, right, bottom in some:
            mask[top:bottom, left:right] = 1
        image = Image.fromarray(mask * 255).convert(mode) if mode != "P" else Image.fromarray(mask, "L")
        if mode == "P":
            image = image.convert("P")
            image.putpalette([200, 0, 0, 0, 0, 0])  # the number 0 is outside, whatever its color
            image.paste(0, (0, 0, *SIZE))
            image.putdata(mask.flatten().tolist())
        image.save(folder / f"{n}.png")
    return folder


def test_boxes_of_all_kinds_are_the_same_regions(data, tmp_path):
    sources = [coco(tmp_path / "boxes.json"), voc(tmp_path / "voc"), masks(tmp_path / "masks")]
    for source in sources:
        known = evaluate.located(listed(data), source)
        assert ([p.name for p in known.photographs], known.without, known.problems) == (
            ["0.png", "1.png", "2.png"], 1, [],
        )  # fmt: skip
        for photograph, boxes in zip(known.photographs, BOXES.values(), strict=True):
            expected = np.zeros(SIZE[::-1], bool)
            for left, top, right, bottom in boxes:
                expected[top:bottom, left:right] = True
            assert np.array_equal(photograph.region.drawn(SIZE), expected), source
    assert evaluate.located(listed(data), tmp_path / "voc" / "1.xml").without == 3


@pytest.mark.parametrize("resize", [36, (40, 50)])
def test_a_region_moves_as_the_photograph_does(resize):
    preset = Preset(32, resize, (0.0,) * 3, (1.0,) * 3)
    mask = np.zeros((60, 90), bool)
    mask[12:37, 22:65] = True
    _, picture = xf.images.prepare(Image.fromarray(mask.astype(np.uint8) * 255), preset)
    found = prepare_mask(mask, preset)
    assert np.array_equal(found.numpy(), picture[..., 0] >= 128)
    box = tv_tensors.BoundingBoxes([[22, 12, 65, 37]], format="XYXY", canvas_size=(60, 90))
    moved = v2.CenterCrop(32)(v2.Resize([resize] if isinstance(resize, int) else resize)(box))[0]
    rows, columns = found.any(1).nonzero(), found.any(0).nonzero()
    edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert (edges - moved).abs().max() <= 1


def test_a_run_of_photographs_with_boxes(network, data, tmp_path):
    known = evaluate.located(listed(data), coco(tmp_path / "boxes.json"))
    broken = known.photographs[1]._replace(region=known.photographs[1].region._replace(size=(60, 80)))
    photographs = [known.photographs[0], broken, known.photographs[2]]
    outcome = evaluate.run(
        network, photographs, ["gradcam", "eigencam"], output=tmp_path / "out", batch_size=3
    )
    assert outcome[:4] == (3, 2, 2, 0)
    found = report.read(tmp_path / "out")
    assert found.metrics == list(evaluate.LOCALIZATION)
    errors = [image.error or "" for image in found.images]
    assert errors[0] == ""
    assert errors[1].endswith(
        "boxes.json: image 1: it is for 60 x 80 pixels, but the photograph has 80 x 60; expected the same size"
    )
    assert "the region is empty, or outside the network's crop" in errors[2]  # less than half a pixel
    x, _ = xf.images.prepare(data / "0.png", network.preset)
    region = prepare_mask(photographs[0].region.drawn(SIZE), network.preset)[None]
    for method in ("gradcam", "eigencam"):
        heat = xf.METHODS[method](network.model, None, x, found.images[0].cls)
        for metric in evaluate.LOCALIZATION:
            assert found.values(method, metric)[0] == pytest.approx(
                getattr(xf, metric)(heat, region).item(), abs=1e-6
            )
    moved = [
        photographs[0]._replace(region=photographs[0].region._replace(boxes=((0, 0, 9, 9),))),
        *photographs[1:],
    ]
    with pytest.raises(ValueError, match="other settings: photographs was"):
        evaluate.run(network, moved, ["gradcam", "eigencam"], output=tmp_path / "out", batch_size=3)
    with pytest.raises(ValueError, match="photographs: 2 different kinds; expected all with a region"):
        evaluate.run(network, [*photographs, listed(data)[3]], ["gradcam"], output=tmp_path / "new")


def test_another_mask_under_the_same_name_is_computed_anew(network, data, tmp_path):
    known = evaluate.located(listed(data), masks(tmp_path / "masks"))
    score = lambda: report.read(tmp_path / "out").values("gradcam", "energy_pointing_game")[0]  # noqa: E731
    go = lambda: evaluate.run(network, known.photographs[:1], ["gradcam"], output=tmp_path / "out")  # noqa: E731
    go()
    before = score()
    Image.new("L", SIZE, 255).save(tmp_path / "masks" / "0.png")
    assert load_mask(tmp_path / "masks" / "0.png").all()
    go()
    assert before < 1 == pytest.approx(score())


WRONG = [
    (
        {"image_id": 0, "bbox": [-3, 2, 9, 9]},
        "annotation 5: the box (-3, 2, 6, 11) is negative, empty or outside",
    ),
    (
        {"image_id": 0, "bbox": [3, 2, 0, 9]},
        "annotation 5: the box (3, 2, 3, 11) is negative, empty or outside",
    ),
    ({"image_id": 0, "bbox": [3, 2, 90, 9]}, "left < right and top < bottom within 80 x 60 pixels"),
    ({"image_id": 0, "bbox": [3, 2, float("nan"), 9]}, "the box (3, 2, nan, 11) is negative"),
    ({"image_id": 0, "bbox": [3, 2, 9]}, "annotation 5: not enough values to unpack"),
    ({"image_id": 7, "bbox": [3, 2, 9, 9]}, "annotation 5: KeyError: 7; expected image_id of an image"),
    ({"bbox": [3, 2, 9, 9]}, "annotation 5: KeyError: 'image_id'"),
    ("box", "annotation 5: TypeError"),
]


@pytest.mark.parametrize(("entry", "words"), WRONG)
def test_a_wrong_entry_is_named_and_the_rest_goes_on(data, tmp_path, entry, words):
    known = evaluate.located(listed(data), coco(tmp_path / "boxes.json", entry))
    assert len(known.photographs) == 3
    (problem,) = known.problems
    assert problem.startswith(f"{tmp_path / 'boxes.json'}: annotation 5: ")
    assert words in problem
    assert "\n" not in problem


def test_wrong_files_among_others_are_named(data, tmp_path):
    wrong = "<object><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>abc</xmax><ymax>12</ymax></bndbox></object>"
    folder = voc(tmp_path / "voc", wrong)
    (folder / "broken.xml").write_text("<annotation><size>")
    (folder / "unknown.xml").write_text((folder / "0.xml").read_text().replace("abc", "12"))
    (folder / "notes.txt").write_text("nothing of ours")
    known = evaluate.located(listed(data), folder)
    assert len(known.photographs) == 3
    assert [Path(problem.partition(":")[0]).name for problem in known.problems] == [
        "0.xml", "1.xml", "2.xml", "broken.xml", "unknown.xml",
    ]  # fmt: skip
    assert "object 2: could not convert string to float: 'abc'" in known.problems[0]
    assert "unknown.xml: no photograph named 'unknown'; expected one" in known.problems[-1]


def test_the_command_with_boxes(network, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(xf.models, "load", lambda *_args, **_options: network)
    entries = [{"image_id": 0, "bbox": [3, 2, 0, 9]}] * 7
    file = coco(tmp_path / "boxes.json", *entries)
    command = ["evaluate", str(data), "--boxes", str(file), "--output", str(tmp_path / "out")]
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    assert out.startswith("3 photographs, 2 results in ")
    lines = err.splitlines()
    assert sum("is negative, empty or outside" in line for line in lines) == 5
    assert f"xcam: warning: 7 entries of {file} are left out in total" in lines
    assert "xcam: left out: 1 of 4 photographs have no region" in lines
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    assert "Pixel AUC ↑" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file or folder"),
        ("not json", "Expecting value: line 1 column 1 (char 0); expected COCO images and annotations"),
        ("[" * 100_000, "RecursionError"),
        ('{"images": [{"id": 1, "file_name": "0.png", "width": Infinity, "height": 1}]}', "OverflowError"),
        ("[1]", "TypeError: list indices must be integers"),
        ('{"images": [], "annotations": []}', "none of the 4 photographs has a region in it; expected a COCO file"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_boxes_is_one_line(network, data, tmp_path, monkeypatch, capsys, content, words):
    monkeypatch.setattr(xf.models, "load", lambda *_args, **_options: network)
    file = tmp_path / "boxes.json"
    if content is not None:
        file.write_text(content)
    assert cli.main(["evaluate", str(data), "--boxes", str(file), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert str(file) in line
    both = ["--mosaics", "2", "--boxes", str(file)]
    assert cli.main(["evaluate", str(data), *both, "--output", str(tmp_path / "out")]) == 2
    assert "--boxes and --mosaics exclude each other" in capsys.readouterr().err
