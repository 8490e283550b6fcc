"""Whether maps are where the object is: regions, mosaics, and heads that see one cell each."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import bad_calls
import networks
import xcam_fn as xf
from xcam_fn import cli, evaluate
from xcam_fn.checks import StructureError
from xcam_fn.evaluate import dataset, report, store
from xcam_fn.models import LoadedModel
from xcam_fn.models.images import Preset

SIZE = (4, 6)
few = stnp.arrays(
    np.float64, (2, *SIZE), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])
)  # equal values among them
regions = stnp.arrays(np.bool_, (2, *SIZE))


# -- slow loops -----------------------------------------------------------------------------------------------------


def loop_rank_accuracy(heatmap: np.ndarray, region: np.ndarray) -> float:
    k, values, inside = int(region.sum()), heatmap.flatten().tolist(), region.flatten().tolist()
    if k == 0:
        return 0.0
    hits, left = 0.0, k
    for value in sorted(set(values), reverse=True):
        alike = [inside[i] for i in range(len(values)) if values[i] == value]
        taken = min(left, len(alike))
        hits, left = hits + taken * sum(alike) / len(alike), left - taken
    return hits / k


def loop_auc(heatmap: np.ndarray, region: np.ndarray) -> float:
    pairs = list(itertools.product(heatmap[region], heatmap[~region]))
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs) if pairs else 0.5


def loop_iou(heatmap: np.ndarray, region: np.ndarray, threshold: float) -> float:
    high = {i for i in range(heatmap.size) if heatmap.flat[i] > threshold * heatmap.max()}
    there = {i for i in range(heatmap.size) if region.flat[i]}
    return len(high & there) / len(high | there) if high | there else 0.0


@settings(deadline=None, max_examples=40)
@given(few, regions, st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_the_scores_of_a_region_equal_loops(heatmap, region, threshold):
    found = {
        "rank": xf.relevance_rank_accuracy(heatmap, region),
        "auc": xf.pixel_auc(torch.from_numpy(heatmap), region),
        "iou": xf.mask_iou(heatmap, region, threshold=threshold),
        "energy": xf.energy_pointing_game(heatmap, region),
    }
    for i in range(2):
        total = heatmap[i].sum()
        expected = {
            "rank": loop_rank_accuracy(heatmap[i], region[i]),
            "auc": loop_auc(heatmap[i], region[i]),
            "iou": loop_iou(heatmap[i], region[i], threshold),
            "energy": heatmap[i][region[i]].sum() / total if total else 0.0,
        }
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, abs=1e-12), name
        if 0 < region[i].sum() < region[i].size:
            assert found["auc"][i] == pytest.approx(roc_auc_score(region[i].ravel(), heatmap[i].ravel()))


@settings(deadline=None, max_examples=20)
@given(stnp.arrays(np.float64, (2, 6, 12), elements=st.floats(-1, 1, width=16)), st.sampled_from([1, 2, 3]))
def test_grid_pointing_equals_a_loop_and_the_shares_of_all_cells_are_one(raw, n):
    shares = [xf.grid_pointing(raw, [cell, cell], n=n) for cell in range(n * n)]
    for i, cell in itertools.product(range(2), range(n * n)):
        height, width = 6 // n, 12 // n
        top, left = cell // n * height, cell % n * width
        within, total = 0.0, 0.0
        for row, column in itertools.product(range(6), range(12)):
            positive = max(0.0, raw[i, row, column])
            total += positive
            within += positive * (top <= row < top + height and left <= column < left + width)
        assert shares[cell][i] == pytest.approx(within / total if total else 0.0)
    for i in range(2):
        assert sum(float(share[i]) for share in shares) == pytest.approx(float((raw[i] > 0).any()))


def test_a_perfect_map_and_maps_of_chance():
    region = torch.zeros(1, 8, 8, dtype=torch.bool)
    region[:, 2:5, 3:7] = True
    for metric in (
        xf.energy_pointing_game,
        xf.relevance_rank_accuracy,
        xf.pointing_game,
        xf.mask_iou,
        xf.pixel_auc,
    ):
        assert metric(region.double(), region).item() == 1
    constant = torch.full((1, 8, 8), 0.5)
    assert xf.relevance_rank_accuracy(constant, region).item() == pytest.approx(12 / 64)
    assert xf.pixel_auc(constant, region).item() == 0.5
    noise = torch.rand(400, 12, 12, generator=torch.Generator().manual_seed(0))
    cells = torch.arange(400) % 9
    assert xf.grid_pointing(noise, cells, n=3).mean().item() == pytest.approx(1 / 9, abs=0.003)
    mask = xf.metrics.mosaic.cell_masks(3, (12, 12))[cells]
    assert xf.relevance_rank_accuracy(noise, mask).mean().item() == pytest.approx(1 / 9, abs=0.01)
    assert xf.pixel_auc(noise, mask).mean().item() == pytest.approx(0.5, abs=0.01)


def test_half_precision_does_not_overflow():
    heatmap, region = torch.ones(1, 512, 512, dtype=torch.float16), torch.zeros(1, 512, 512, dtype=torch.bool)
    region[:, :256] = True
    for metric in (xf.energy_pointing_game, xf.relevance_rank_accuracy, xf.mask_iou, xf.pixel_auc):
        assert metric(heatmap, region).item() == 0.5


# -- mosaics --------------------------------------------------------------------------------------------------------

IMAGES = torch.arange(10.0)[:, None, None, None].expand(10, 3, 4, 6)
CLASSES = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5, 5])
SURE = torch.tensor([0.99, 0.98, 0.97, 0.9, 0.3, 0.8, 0.7, 0.6, 0.55, 0.5])


@pytest.mark.parametrize(("n", "count"), [(1, 3), (2, 1), (2, 5)])
def test_mosaics_hold_the_surest_images_of_distinct_classes(n, count):
    made = xf.mosaics(IMAGES, CLASSES, SURE, n=n, count=count, seed=3)
    assert made.images.shape == (count, 3, 4 * n, 6 * n)
    assert torch.equal(made.classes, CLASSES[made.members])
    for image, classes, members in zip(*made, strict=True):
        assert len(set(classes.tolist())) == n * n
        for cell, member in enumerate(members):
            top, left = cell // n * 4, cell % n * 6
            assert (image[:, top : top + 4, left : left + 6] == member).all()
    used = set(made.members.flatten().tolist())
    assert 4 not in used  # less than half sure
    if count == 1:
        assert min(SURE[list(used)]) >= 0.7 - 1e-6  # the surest of four classes
    assert torch.equal(made.members, xf.mosaics(IMAGES, CLASSES, SURE, n=n, count=count, seed=3).members)


def test_places_and_uses_are_spread():
    classes = torch.arange(10)
    made = xf.mosaics(IMAGES, classes, torch.ones(10), count=25)
    assert torch.bincount(made.members.flatten(), minlength=10).tolist() == [10] * 10
    places = [torch.bincount(made.members[:, cell], minlength=10).max().item() for cell in range(4)]
    assert max(places) <= 7  # no image keeps to one cell
    assert not torch.equal(
        made.members, xf.mosaics(IMAGES, classes, torch.ones(10), count=25, seed=1).members
    )


def test_mosaics_at_another_size():
    made = xf.mosaics(IMAGES, CLASSES, SURE, count=1, size=(8, 6))
    assert made.images.shape == (1, 3, 8, 6)
    torch.testing.assert_close(made.images[0, :, 1, 0], IMAGES[made.members[0, 0], :, 0, 0])


class Planted(nn.Module):
    """The score of class c is how much of the c-th channel there is: its map is where that is."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.fc = nn.Conv2d(4, 4, 1, bias=False), nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.eye(4)[:, :, None, None])
            self.fc.weight.copy_(torch.eye(4) * 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).relu().mean((2, 3)))


@pytest.mark.parametrize("name", ["gradcam", "layercam", "ablationcam", "scorecam"])
def test_a_planted_network_scores_one(name):
    images = torch.zeros(4, 4, 6, 6)
    for cls in range(4):
        images[cls, cls, 1:4, 2:5] = 1.0
    model = Planted().eval()
    probabilities, classes = model(images).softmax(1).detach().max(1)
    assert classes.tolist() == [0, 1, 2, 3]
    made = xf.mosaics(images, classes, probabilities, count=3)
    heat = xf.METHODS[name](model, "features", made.images, made.classes)
    cells = list(range(4)) * 3
    assert xf.grid_pointing(heat.flatten(0, 1), cells).tolist() == [1.0] * 12
    assert xf.grid_pointing(heat.flatten(0, 1), [*cells[1:], 0]).tolist() == [0.0] * 12


# -- heads that see one cell each -------------------------------------------------------------------------------------


class Disconnected(nn.Module):
    """Four cells with channels and a head of their own: the score of class i depends on cell i alone.

    The features of a cell are zero at its border, so that a map of the cell stays in it when it is resized.
    """

    where: Tensor
    wired: Tensor

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4 * channels, 2, stride=2)  # no window is of two cells
        self.relu, self.place = nn.ReLU(), nn.Identity()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4 * channels, 4)
        inner = torch.isin(torch.arange(12), torch.tensor([2, 3, 8, 9]))
        cells = xf.metrics.mosaic.cell_masks(2, (12, 12)) & inner & inner[:, None]
        self.register_buffer("where", cells.repeat_interleave(channels, 0).float())
        self.register_buffer("wired", torch.eye(4).repeat_interleave(channels, 1))
        networks.seeded(self)
        with torch.no_grad():
            self.conv.weight.abs_()
            self.conv.bias.abs_()
            self.fc.bias.abs_()
            self.fc.weight.copy_(self.fc.weight.abs() * self.wired)

    def forward(self, x: Tensor) -> Tensor:
        features = self.place(self.relu(self.conv(x)) * self.where)
        return self.fc(self.pool(features).flatten(1))


# Methods that leave the cell, rightly: they look at no class or at concepts of all cells, through random masks or
# windows across cells, at norms over the channels of all cells, or search among maps that are nowhere zero.
LEAVING = {
    "eigencam", "kpcacam", "fem", "randomcam", "deep_feature_factorization", "sidu", "sscam", "rise",
    "drise", "occlusion", "normgrad", "opticam", "curvecam",
}  # fmt: skip
LACKING = {*networks.OF_ATTENTION, "cameras", "refinecam"}  # no attention, one size, no other layer


def test_methods_stay_in_the_cell_that_the_head_sees():
    model, x = Disconnected().eval(), torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    leaving, lacking = set(), set()
    for name, method in xf.METHODS.items():
        options = networks.QUICK.get(name, {}) | {
            "score": "logit",
            "baseline": 0.0,
        }  # a probability is of all
        taken = {option: value for option, value in options.items() if option in method.own_options}
        try:
            heat = method(model, "place", x, [[0, 1, 2, 3]], **taken)[0]
        except StructureError:
            lacking.add(name)
            continue
        assert heat.flatten(1).amax(1).tolist() == pytest.approx([1.0] * 4), name
        if (xf.grid_pointing(heat, [0, 1, 2, 3]) < 1).any():
            leaving.add(name)
    assert (leaving, lacking) == (LEAVING, LACKING)


# -- data sets --------------------------------------------------------------------------------------------------------

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture
def network() -> LoadedModel:
    """Each class is a color, each channel the pixels of one: what is explained is exactly its cell."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )
    with torch.no_grad():
        model[0].weight.copy_((torch.tensor(list(COLORS.values())) / 127.5 - 1)[:, :, None, None])
        model[4].weight.copy_(torch.eye(4))
        for layer in (model[0], model[4]):
            layer.bias.zero_()
    preset = Preset(16, 18, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return LoadedModel(model.eval(), preset, list(COLORS), "colors")


@pytest.fixture
def data(tmp_path):
    """Two photographs of each class, one of them paler, which is less sure."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name, color in COLORS.items():
        pure = Image.new("RGB", (20, 20), color)
        pure.save(folder / f"{name}.png")
        Image.blend(pure, Image.new("RGB", (20, 20), "gray"), 0.4).save(folder / f"{name}_pale.png")
    return folder


def tiled(network, data, **options) -> list[evaluate.Mosaic]:
    photographs = dataset.photographs(data, network.categories)
    return evaluate.mosaics_of(network, photographs, **{"count": 2, **options}).mosaics


def test_photographs_are_seen_once_and_the_surest_taken(network, data):
    (data / "text.jpg").write_text("not an image")
    drawn = evaluate.mosaics_of(network, dataset.photographs(data, network.categories), count=1)
    assert (drawn.seen, list(drawn.unreadable)) == (8, ["text.jpg"])
    (mosaic,) = drawn.mosaics
    assert sorted(p.name for p in mosaic.members) == sorted(f"{name}.png" for name in COLORS)
    for photograph, label, probability in zip(
        mosaic.members, mosaic.label, mosaic.probabilities, strict=True
    ):
        x, _ = xf.images.prepare(photograph.path, network.preset)
        p = network.model(x).detach().softmax(1)[0]
        assert probability == pytest.approx(float(p.max()))
        assert network.categories[label] == photograph.path.stem
    x, picture = mosaic.prepared(network.preset)
    assert (x.shape, picture.shape) == ((1, 3, 32, 32), (16, 16, 3))
    assert tuple(picture[0, 0]) == COLORS[network.categories[mosaic.label[0]]]
    assert tuple(picture[-1, 0]) == COLORS[network.categories[mosaic.label[2]]]


def test_labels_give_the_class_and_its_probability(network, data):
    photographs = [p._replace(label=3) for p in dataset.photographs(data, network.categories)]
    with pytest.raises(ValueError, match=r"1 class\(es\) reach it \(2 of 8 images\).*add images of 3 more"):
        evaluate.mosaics_of(network, photographs, count=1, explain="label")
    photographs[0] = photographs[0]._replace(label=None)
    drawn = evaluate.mosaics_of(network, photographs, count=1, n=1, explain="label")
    assert drawn.seen == 7
    assert drawn.mosaics[0].members[0].name == "white.png"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_scores_of_mosaics_are_those_of_the_metrics(network, data, tmp_path, batch_size):
    made, methods = tiled(network, data), ["gradcam", "ablationcam", "eigencam"]
    names = [*evaluate.GRID, "energy_pointing_game", "mask_iou", "pixel_auc"]
    outcome = evaluate.run(network, made, methods, names, output=tmp_path / "out", batch_size=batch_size)
    assert outcome[:4] == (8, 0, 24, 0)
    found = report.read(tmp_path / "out")
    assert [image.cls for image in found.images] == [c for mosaic in made for c in mosaic.label]
    assert found.images[5].name == f"mosaic 2, cell 2: {made[1].members[1].name}"
    for (number, mosaic), method in itertools.product(enumerate(made), methods):
        x, _ = mosaic.prepared(network.preset)
        heat = xf.METHODS[method](network.model, None, x, [list(mosaic.label)])[0]
        masks = xf.metrics.mosaic.cell_masks(2, (32, 32))
        expected = {"grid_pointing": xf.grid_pointing(heat, [0, 1, 2, 3])}
        expected |= {name: getattr(xf, name)(heat, masks) for name in names[1:]}
        for name, values in expected.items():
            there = [found.values(method, name)[number * 4 + cell] for cell in range(4)]
            assert there == pytest.approx(values.tolist(), abs=1e-6), name
    assert set(found.values("gradcam", "grid_pointing").values()) == {1.0}
    assert np.mean(list(found.values("eigencam", "grid_pointing").values())) < 0.5
    p = network.model(made[0].prepared(network.preset)[0]).detach().softmax(1)[0]
    assert found.images[0].probability == pytest.approx(float(p[made[0].label[0]]))


def test_a_run_of_mosaics_goes_on_where_it_stopped_and_sees_other_files(network, data, tmp_path):
    made = tiled(network, data)
    go = lambda: evaluate.run(network, made, ["gradcam", "eigencam"], output=tmp_path / "out")  # noqa: E731
    first = go()
    with store.writing(tmp_path / "out", {}) as writer:
        for table in ("results", "heatmaps"):
            writer._connection.execute(f"DELETE FROM {table} WHERE number = 5")
    before = report.read(tmp_path / "out").scores
    assert np.isnan(before[5]).all()
    assert go() == first
    after = report.read(tmp_path / "out").scores
    assert not np.isnan(after).any()
    np.testing.assert_array_equal(np.delete(after, 5, 0), np.delete(before, 5, 0))
    made[0].members[3].path.write_bytes(b"no photograph any more")
    outcome = go()
    unreadable = {n for n, mosaic in enumerate(made) if made[0].members[3] in mosaic.members}
    assert outcome.unreadable == 4 * len(unreadable) > 0
    assert outcome.results == 16 - 8 * len(unreadable)


def test_a_method_that_fails_fails_on_each_cell(network, data, tmp_path):
    def failing(model, layer, x, cls):
        if len(x) > 1 or cls[0][0] == made[0].label[0]:
            raise RuntimeError("not that class")
        return xf.gradcam(model, layer, x, cls)

    made = tiled(network, data, count=3)
    outcome = evaluate.run(network, made, {"mine": failing}, output=tmp_path / "out", batch_size=3)
    wrong = sum(mosaic.label[0] == made[0].label[0] for mosaic in made)
    assert (outcome.results, outcome.failures) == (12 - 4 * wrong, 4 * wrong)
    assert {failure.error for failure in report.read(tmp_path / "out").failures} == {
        "RuntimeError: not that class"
    }


def test_the_command_from_beginning_to_end(network, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(xf.models, "load", lambda *_args, **_options: network)
    command = [
        "evaluate",
        str(data),
        "--mosaics",
        "2",
        "--num-images",
        "2",
        "--output",
        str(tmp_path / "out"),
    ]
    assert cli.main([*command, "--mosaic-size", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "2 mosaics of 8 out of 8 photographs, those with the highest predicted probability (0."
    )
    assert lines[0].endswith("a map that ignores the class scores 0.25")
    assert lines[1].startswith("8 cells, 8 results in ")
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "Grid pointing game ↑" in table[0]
    assert cli.main([*command]) == 2
    assert "other settings" in capsys.readouterr().err
    assert report.read(tmp_path / "out").settings["mosaics"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mosaics", "1"], "--mosaics 1: expected at least 2"),
        (["--mosaics", "3"], "4 class(es) reach it (8 of 8 images), but a mosaic needs 9; add images of 5 more class(es)"),
        (["--mosaics", "2", "--confidence", "0.999"], "0 class(es) reach it (0 of 8 images), but a mosaic needs 4; use confidence=0.87"),
        (["--mosaics", "2", "--confidence", "2"], "confidence=2.0 is out of range"),
        (["--mosaics", "2", "--mosaic-size", "17"], "mosaic of size (17, 17); expected height and width to be multiples of n=2"),
        (["--mosaics", "2", "--num-images", "0"], "--mosaics needs --num-images N"),
        (["--mosaics", "2", "--metrics", "insertion"], "--metrics insertion does not apply to mosaics"),
        (["--metrics", "pointing_game"], "--metrics pointing_game needs the object's region"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_the_command_says_what_is_wrong(network, data, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.setattr(xf.models, "load", lambda *_args, **_options: network)
    assert cli.main(["evaluate", str(data), *options, "--output", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(re.escape(words).replace(r"\.\*", ".*"), line), line
    assert not (tmp_path / "out").exists()


def test_heatmaps_are_judged_by_a_region(network):
    x, heat = torch.rand(2, 3, 16, 16), torch.rand(2, 16, 16)
    region = heat > 0.7
    found = evaluate.judged(network.model, x, {"mine": heat}, 0, ["pixel_auc", "mask_iou"], region=region)
    assert found["mine"]["pixel_auc"].tolist() == [1, 1]
    torch.testing.assert_close(found["mine"]["mask_iou"], xf.mask_iou(heat, region))
    with pytest.raises(ValueError, match="region is required; pass boxes or masks"):
        evaluate.judged(network.model, x, {"mine": heat}, 0, ["pixel_auc"])


MAPS = torch.rand(2, 6, 8)
BAD = {
    "cell range": (lambda: xf.grid_pointing(MAPS, [0, 4]), ValueError, r"cell=\[0.0, 4.0\]; expected 2 integers from 0 to 3 for n=2"),
    "cell count": (lambda: xf.grid_pointing(MAPS, [0]), ValueError, r"cell=\[0.0\]; expected 2 integers"),
    "cell word": (lambda: xf.grid_pointing(MAPS, "left"), TypeError, r"cell must be"),
    "size": (lambda: xf.grid_pointing(MAPS, [0, 1], n=3), ValueError, r"mosaic of size \(6, 8\); expected height and width to be multiples of n=3"),
    "n": (lambda: xf.grid_pointing(MAPS, [0, 1], n=0), ValueError, r"n=0 is out of range"),
    "axes": (lambda: xf.grid_pointing(MAPS[0], [0, 1]), ValueError, r"heatmap has shape \(6, 8\); expected \(B, H, W\)"),
    "threshold": (lambda: xf.mask_iou(MAPS, MAPS > 0, threshold=2), ValueError, r"threshold=2 is out of range"),
    "region": (lambda: xf.pixel_auc(MAPS, MAPS[:1] > 0), ValueError, r"region has shape \(1, 6, 8\) for heatmaps"),
    "count": (lambda: xf.mosaics(IMAGES, CLASSES, SURE, count=0), ValueError, r"count=0 is out of range"),
    "confidence": (lambda: xf.mosaics(IMAGES, CLASSES, SURE, count=1, confidence=-1.0), ValueError, r"confidence=-1.0 is out of range"),
    "sure": (lambda: xf.mosaics(IMAGES, CLASSES, SURE, count=1, confidence=0.8), ValueError, r"confidence=0.8: 3 class\(es\) reach it \(5 of 10 images\), but a mosaic needs 4; use confidence=0.699"),
    "classes": (lambda: xf.mosaics(IMAGES, CLASSES, SURE, count=1, n=3), ValueError, r"add images of 3 more class\(es\)"),
    "mosaic size": (lambda: xf.mosaics(IMAGES, CLASSES, SURE, count=1, size=(7, 8)), ValueError, r"multiples of n=2"),
}  # fmt: skip


test_the_error_says_what_is_wrong = bad_calls.refused(BAD)
