"""A network of one's own, FILE.py:FUNCTION, in every command that takes one."""

import json
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from xcam_fn import cli

NETWORK = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    body = nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    return nn.Sequential(*body)
"""
OWN = "--model", "mine.py:network"
SIZED = *OWN, "--image-size", "24"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a file of a network and two photographs."""
    (tmp_path / "mine.py").write_text(NETWORK)
    (tmp_path / "photographs").mkdir()
    for i in range(2):
        picture = Image.fromarray(skimage.data.astronaut()[i * 60 : i * 60 + 200, 50:300])
        picture.save(tmp_path / "photographs" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


EVALUATE = "evaluate", "photographs", "--output", "out", "--methods", "gradcam", "layercam"


@pytest.mark.usefixtures("unchecked")  # an export traces sizes that are no numbers
@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "photographs/0.png", "--class", "3", *SIZED),
        ("compare", "photographs/0.png", "--class", "3", "--methods", "gradcam", *SIZED),
        ("gallery", "photographs/0.png", "--class", "3", "--pairs", "gradcam+rise", "--option", "num_masks=8", *SIZED),
        ("latency", "--photo", "photographs/0.png", "--rounds", "1", *SIZED),
        ("layers", "mine.py:network", "--image-size", "24"),
        ("export", "--size", "24", "--class", "3", "--output", "mine.pt2", *OWN),
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_a_command_takes_it(arguments, capsys):
    assert cli.main(arguments) == 0, capsys.readouterr().err


def test_a_run_is_reported_with_numbered_classes(folder, capsys):
    (folder / "labels.csv").write_text("file,class\n0.png,3\n1.png,4\n")
    assert cli.main([*EVALUATE, *SIZED, "--labels", "labels.csv", "--explain", "label"]) == 0
    assert cli.main(["report", "out"]) == 0, capsys.readouterr().err
    assert "out/report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (EVALUATE, "pass --image-size N"),
        (("compare", "photographs/0.png"), "pass --image-size N"),
        (("gallery", "photographs/0.png"), "pass --image-size N"),
        (("latency",), "pass --image-size N"),
        (("layers", "mine.py:network"), "pass --image-size N"),
        (("layers", "lite0", "--image-size", "0"), "--image-size 0 is out of range"),
        (("export", "--output", "mine.onnx"), "pass --size N"),
        (("export", "--page", "page"), "give --output"),
        (("app",), "the app takes networks by name"),
        (("explain", "photographs/0.png", "--device", "nowhere"), "device 'nowhere' cannot be used"),
        (
            ("explain", "photographs/0.png", "--image-size", "24", "--output", "mine.py/x"),
            "'mine.py/x': Not a directory",
        ),
    ],
)
def test_what_is_missing_is_said(arguments, remedy, capsys):
    model = () if arguments[0] == "layers" else OWN
    assert cli.main([*arguments, *model]) == 2
    assert remedy in capsys.readouterr().err


@pytest.mark.parametrize("file", ["mine.py", "method.py"])
def test_a_run_is_not_continued_with_other_code(file, folder, capsys):
    method = "import xcam_fn as xf\ncam = xf.from_gradients(lambda A, G: G.mean((2, 3)), name='cam')\n"
    (folder / "method.py").write_text(method)
    command = ["evaluate", "photographs", "--output", "out", "--methods", "method.py:cam", *SIZED]
    assert cli.main(command) == cli.main(command) == 0
    assert json.loads((folder / "out" / "run.json").read_text())["rows"] == 2
    (folder / file).write_text((folder / file).read_text() + "\n# another line\n")
    capsys.readouterr()
    assert cli.main(command) == 2
    assert "other settings: code was {'m" in capsys.readouterr().err
    assert cli.main([*command, "--beside"]) == 0


def test_all_methods_leave_out_what_a_network_of_few_channels_lacks(capsys):
    few = ("--option", "num_masks=8", "--option", "num_samples=2")
    assert cli.main(["explain", "photographs/0.png", "--methods", "all", *few, *SIZED]) == 0
    assert "left out: groupcam: num_groups=32, but the layer has 4 channels" in capsys.readouterr().err
