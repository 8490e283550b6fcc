"""The command `xcam`, with real photographs and the real EfficientNet-Lite0."""

import inspect
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
import torchvision
from PIL import Image

import xcam_fn as xf
from xcam_fn import cli
from xcam_fn.cli.options import Drawing, Question

XCAM = Path(sysconfig.get_path("scripts")) / "xcam"
SMALL = "squeezenet1_1"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder of its own for each test, with a photograph of a cat."""
    Image.fromarray(skimage.data.chelsea()).save(tmp_path / "cat.png")
    (tmp_path / "notes.txt").write_text("not an image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def xcam(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    return subprocess.run([XCAM, *arguments], capture_output=True, text=True, timeout=120, check=False)


def explain(*arguments: str) -> int:
    """The same command in this process, on a small network: quick enough to be run many times."""
    return cli.main(["explain", *arguments, "--model", SMALL, "--weights", "random"])


# The real thing


def test_a_photograph_of_a_cat_from_beginning_to_end(folder):
    done = xcam(
        "explain", "cat.png", "--methods", "gradcam", "layercam", "--output", "out/deep", "--save-maps"
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "cat.png"
    top = [line.split() for line in lines[1:6]]
    assert {int(index) for index, *_ in top[:3]} == {281, 282, 285}
    assert all(percent.endswith("%") for *_, percent in top)
    assert lines[6].startswith("  explained: tiger cat (class 282), ")
    assert lines[7:] == [
        "  wrote out/deep/cat.png",
        "  wrote out/deep/cat_gradcam.npy",
        "  wrote out/deep/cat_layercam.npy",
    ]
    with Image.open("out/deep/cat.png") as figure:
        assert figure.width > figure.height > 200
    loaded = xf.models.load("lite0")
    x, _ = xf.images.prepare("cat.png", loaded.preset)
    for name in ("gradcam", "layercam"):
        saved = np.load(f"out/deep/cat_{name}.npy")
        expected = xf.METHODS[name](loaded.model, None, x, 282)[0].numpy()
        np.testing.assert_allclose(saved, expected, atol=1e-5)


def test_bad_input_is_one_line_and_status_2():
    done = xcam("explain", "cat.png", "--methods", "gradcm")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("xcam: error: method 'gradcm' is not known; did you mean 'gradcam'")


def test_help_and_wrong_names_need_no_torch():
    wrong = {
        "explain missing.jpg": "image 'missing.jpg': no such file",
        "explain missing.jpg cat.png --methods gradcm": "method 'gradcm' is not known; did you mean 'gradcam'",
        "explain cat.png --methods smth(gradcam)": "method 'smth' is not known; did you mean 'smooth'",
        "explain cat.png --variant captum": 'Choose from: "xplaincam"',
        "explain cat.png --methds gradcam": "Did you mean --methods?",
        "compare missing.jpg": "image 'missing.jpg': no such file",
        "gallery cat.png --pairs gradcam+sccam": "method 'sccam' is not known; did you mean 'sscam'",
        "evaluate nosuch": "data 'nosuch': no such folder",
        "evaluate . --metrics insertn": "metric 'insertn' is not known; did you mean 'insertion'",
        "explain --example --model resnt50": "model 'resnt50' is not known; did you mean 'resnet50'",
        "evaluate . --model Resnet-50": "model 'Resnet-50' is not known; did you mean 'resnet50'",
        "explain --example --model nets.py:mine": "model 'nets.py:mine': there is no file 'nets.py'",
        "explain --example --weights no.pth": "weights 'no.pth': no such file",
        "explain --example --option steps": "--option 'steps': expected NAME=VALUE",
        "latency --image-size 0": "--image-size 0 is out of range",
        "latency --image-size 100000": "--image-size 100000 is out of range; expected at most",
        "explain --example --model :net": "model ':net': expected FILE.py:NAME",
        "layers resnt50": "model 'resnt50' is not known; did you mean 'resnet50'",
        "report nosuch": "'nosuch' holds no results.sqlite",
        "report .": "'.' holds no results.sqlite",
        "merge . --output out": "'.' holds no results.sqlite",
        "evaluate . --labels no.csv": "labels 'no.csv': no such file",
        "evaluate . --boxes no.json": "boxes 'no.json': no such file",
        "evaluate . --output notes.txt": "--output 'notes.txt' is a file",
        "evaluate . --batch-size 0": "--batch-size 0: expected a number ≥ 1",
        "evaluate . --seed -1": "--seed -1: expected a number ≥ 0",
        "evaluate . --keep none curves": "--keep none curves: expected none alone",
        "evaluate . --option a=1 --option a=2": "--option 'a=2': a is given twice",
    }
    code = (
        "import sys\n"
        "from xcam_fn import cli\n"
        "assert cli.main(['--help']) == cli.main(['explain', '--help']) == 0\n"
        f"assert all(cli.main(words.split()) == 2 for words in {list(wrong)})\n"
        "assert not {'torch', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--save-maps" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == len(wrong)
    for line, reason in zip(lines, wrong.values(), strict=True):
        assert reason in line


def test_the_example_needs_no_torchvision(folder):
    code = (
        "import sys\n"
        "from xcam_fn import cli\n"
        "assert cli.main(['explain', '--example']) == 0\n"
        "assert 'torchvision' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("chelsea.png", "  wrote xcam_output/chelsea.png")
    assert cli.main(["explain", "cat.png", "--example"]) == 2
    assert list((folder / "xcam_output").iterdir()) == [folder / "xcam_output" / "chelsea.png"]


def test_the_look_is_plot_s():
    own = {name: p.default for name, p in inspect.signature(xf.plot.overlay).parameters.items()}
    assert Drawing().style == {name: own[name] for name in Drawing().style}
    assert Drawing(constant_alpha=True).style["alpha_follows_heatmap"] is False


def test_a_reader_that_has_enough_is_no_error():
    done = subprocess.run(f"'{XCAM}' methods | true", shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# Answers and names of files


@pytest.mark.parametrize("cls", ["281", "tabby cat"])
def test_a_class_is_taken_by_index_or_by_name(cls, capsys):
    assert explain("cat.png", "--class", cls) == 0
    assert "  explained: tabby (class 281), " in capsys.readouterr().out


def test_photographs_of_equal_names_do_not_overwrite_each_other(folder, capsys):
    for name in ("a", "b"):
        (folder / name).mkdir()
        Image.fromarray(skimage.data.astronaut()).save(folder / name / "cat.png")
    assert explain("cat.png", "a/cat.png", "b/cat.png", "--output", "out") == 0
    written = [
        line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  wrote")
    ]
    assert written == ["out/cat.png", "out/cat_2.png", "out/cat_3.png"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["cat.png", "cat_2.png", "cat_3.png"]


def test_a_photograph_is_never_written_over(folder, capsys):
    before = (folder / "cat.png").read_bytes()
    assert explain("cat.png", "--output", ".") == 0
    assert (folder / "cat.png").read_bytes() == before
    assert "  wrote cat_2.png" in capsys.readouterr().out


def test_methods_go_by_familiar_names_and_in_lists_with_commas():
    question = Question()
    found = question.methods(["Grad-CAM++, ScoreCAM", "Grad-CAM, elementwise", "XGradCAM"])
    assert list(found) == ["gradcam_pp", "scorecam", "gradcam_elementwise", "xgradcam"]
    assert list(question.methods(["all"])) == list(xf.METHODS)
    with pytest.raises(ValueError, match="method 'ScoreCM' is not known; did you mean 'scorecam'"):
        question.methods(["gradcam,ScoreCM"])


def test_methods_may_be_named_in_one_go_or_one_by_one(folder):
    assert (
        explain("cat.png", "--methods", "gradcam", "--methods", "hirescam", "--save-maps", "--output", "a")
        == 0
    )
    assert (
        explain("cat.png", "--methods", "gradcam", "hirescam", "gradcam", "--save-maps", "--output", "b") == 0
    )
    names = ["cat.png", "cat_gradcam.npy", "cat_hirescam.npy"]
    assert sorted(path.name for path in Path("a").iterdir()) == names
    assert sorted(path.name for path in Path("b").iterdir()) == names


def test_a_checkpoint_of_one_s_own_has_numbered_classes(folder, capsys):
    model = torchvision.models.squeezenet1_1(num_classes=3)
    torch.save({"state_dict": model.state_dict()}, "own.pth")
    assert cli.main(["explain", "cat.png", "--model", SMALL, "--weights", "own.pth", "--class", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines if line.endswith("%")} == {"0", "1", "2"}
    assert any(line.startswith("  explained: class 2, ") for line in lines)


@pytest.mark.parametrize(
    ("gain", "cause"),
    [(0.0, "the gradient vanished"), (-1.0, "all contributions are negative and clipped")],
)
def test_an_empty_heatmap_is_explained_in_words(gain, cause, capsys):
    model = torchvision.models.squeezenet1_1(num_classes=3)
    state = model.state_dict()
    state["classifier.1.weight"].fill_(gain)
    state["classifier.1.bias"].fill_(1e6)  # positive whatever the gain, since a ReLU follows
    torch.save(state, "own.pth")
    arguments = ["--model", SMALL, "--weights", "own.pth", "--layer", "features", "--class", "0"]
    assert cli.main(["explain", "cat.png", *arguments, "--methods", "gradcam"]) == 0
    out = capsys.readouterr().out
    assert "  Grad-CAM: the heatmap is zero everywhere" in out
    assert cause in out


def test_one_unreadable_photograph_among_many_is_reported_and_the_rest_done(capsys):
    assert explain("notes.txt", "cat.png", "missing.jpg") == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "  wrote xcam_output/cat.png"
    assert err.splitlines() == [
        "xcam: warning: image 'notes.txt' is not an image file of a supported format; expected JPEG, PNG, "
        "WEBP, TIFF, GIF, BMP, PPM, JPEG2000, AVIF, with 8 bits per channel, or gray with 16 bits or floats",
        "xcam: warning: image 'missing.jpg': no such file; check the path",
        "xcam: warning: 2 of 3 photographs could not be read",
    ]


def test_names_that_are_not_text_stop_no_run(folder, capfd):
    odd = os.fsdecode(b"ca\xfft.png")
    (folder / "odd").mkdir()
    for name in (odd, "notes.png"):
        shutil.copy("cat.png" if name == odd else "notes.txt", folder / "odd" / name)
    assert explain(f"odd/{odd}", "odd/notes.png") == 1
    assert "odd/ca\\udcfft.png\n" in capfd.readouterr().out
    assert (folder / "xcam_output" / odd).is_file()
    assert explain(f"odd/{odd}", "--output", f"odd/{odd}") == 2
    small = ["--model", SMALL, "--weights", "random", "--metrics", "complexity"]
    assert cli.main(["evaluate", "odd", *small, "--output", "found"]) == 1
    assert "2 photographs, 1 results" in capfd.readouterr().out


@pytest.mark.parametrize("methods", [["gradcam"], ["ablationcam", "rise"], ["all"]])
def test_a_wrong_number_of_channels_is_one_line_on_stderr(methods, monkeypatch, capfd):
    loaded = xf.models.load(SMALL, weights="random")
    loaded.model.features[0] = torch.nn.Conv2d(4, 64, 3, stride=2)
    monkeypatch.setattr(xf.models, "load", lambda *_args, **_kwargs: loaded)
    assert explain("cat.png", "--methods", *methods) == 2
    expected = "xcam: error: x has shape (1, 3, 224, 224); the model expects 4 channels\n"
    assert capfd.readouterr() == ("", expected)


def test_none_of_several_photographs_readable_is_status_1(capsys):
    assert explain("notes.txt", "missing.jpg") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("xcam: warning: 2 of 2 photographs could not be read\n")


def test_a_method_that_reports_progress_is_asked_to_only_for_a_person(monkeypatch, capsys):
    asked = []

    def slow(call, *, progress=False):
        asked.append(progress)
        return xf.gradcam.run(call)

    method = xf.Method(slow, "rise", "Slow", "perturbation")
    monkeypatch.setattr("xcam_fn.methods.catalog.METHODS", {"rise": method})
    assert explain("cat.png", "--methods", "rise") == 0
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert explain("cat.png", "--methods", "rise") == 0
    assert asked == [False, True]


# Lists


def test_methods_lists_every_method(capsys):
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(xf.METHODS)
    for line, method in zip(lines[1:], xf.METHODS.values(), strict=True):
        assert method.title in line
        assert method.summary in line


@pytest.mark.parametrize("model", [SMALL, "lite0"])
def test_layers_lists_what_runs_and_marks_the_default(model, capsys):
    assert cli.main(["layers", model, "--weights", "random"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    loaded = xf.models.load(model, weights="random")
    x = torch.zeros(1, 3, 224, 224)
    shapes = xf.layers(loaded.model, x)
    listed = [line[2:].split()[0] for line in lines]
    assert [name.partition("#")[0] for name in listed] == [name.partition("#")[0] for name in shapes]
    assert len(set(listed)) == len(shapes)
    assert all(
        xf.features(loaded.model, name, x).shape == shape
        for name, shape in zip(listed[-9:], list(shapes.values())[-9:], strict=True)
    )
    (marked,) = [line[2:].split()[0] for line in lines if line.startswith("*")]
    assert marked == xf.default_layer(loaded.model, x)
    assert cli.main(["explain", "cat.png", "--model", model, "--weights", "random"]) == 0
    assert f"; {model}, layer {marked}\n" in capsys.readouterr().out


def test_the_version_is_the_package_s(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == xf.__version__


# Bad input


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("explain", "got no photograph"),
        (
            "explain --methods gradcam cat.png",
            "got no photograph; give photographs before the options",
        ),
        (
            "explain cat.png --methods gradcam notes.txt",
            "method 'notes.txt' is a file; put photographs before",
        ),
        ("explain cat.png --methods gradcm", "method 'gradcm' is not known; did you mean 'gradcam'"),
        (
            "explain cat.png --methods zzz",
            "method 'zzz' is not known; expected the name of a method (`xcam methods`",
        ),
        ("explain missing.jpg", "image 'missing.jpg': no such file"),
        ("explain notes.txt", "image 'notes.txt' is not an image"),
        ("explain cat.png --model resnt50", "model 'resnt50' is not known; did you mean 'resnet50'"),
        ("explain cat.png --weights no.pth", "weights 'no.pth': no such file"),
        ("explain cat.png --weights notes.txt", "weights 'notes.txt' is not a checkpoint"),
        ("explain cat.png --class 1000", "class 1000 is out of range"),
        ("explain cat.png --class -1", "class -1 is out of range"),
        ("explain cat.png --class cat", "class 'cat' is ambiguous: 'tiger cat' (282)"),
        ("explain cat.png --layer features.99", "(`xcam layers MODEL` lists them all)"),
        (
            "explain cat.png --layer _fc --model lite0",
            "choose another layer (leaving out --layer finds one, `xcam layers MODEL` lists them)",
        ),
        ("explain cat.png --colormap virids", "colormap='virids' is not one of matplotlib's"),
        ("explain cat.png --alpha 2", "alpha=2.0 is out of range"),
        ("explain cat.png --alpha x", 'unable to convert "x" into float'),
        ("explain cat.png --device nowhere", "device 'nowhere' cannot be used"),
        ("explain cat.png --output notes.txt", "--output 'notes.txt' is a file; expected a folder"),
        ("explain cat.png --bogus", "--bogus"),
        ("layers resnt50", "model 'resnt50' is not known"),
        ("bogus", "bogus"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_said_in_one_line(arguments, reason, capsys):
    words = arguments.split()
    if words[0] == "explain" and not {"--model", "--weights"} & set(words):
        words += ["--model", SMALL, "--weights", "random"]
    if words[1:2] == ["--methods"] or words == ["explain"]:
        words = arguments.split()
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("xcam: error: ")
    assert reason in line


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(xf.models, "load", interrupted)
    assert explain("cat.png") == 130
    assert capsys.readouterr() == ("", "")


def test_options_reach_the_methods_and_what_they_fuse(capsys):
    arguments = ("cat.png", "--methods", "sscam", "gradcam+sscam", "--layer", "features.12", "--save-maps")
    assert explain(*arguments, "--option", "num_samples=1", "--option", "chunk_size=16") == 0
    assert capsys.readouterr().out.count("wrote") == 3
    assert explain("cat.png", "--option", "num_samples=1") == 2
    assert "no method takes the option 'num_samples'" in capsys.readouterr().err
    assert explain("cat.png", "--methods", "sscam", "--option", "num_sample=1") == 2
    assert "no method takes the option 'num_sample'; did you mean 'num_samples'" in capsys.readouterr().err
    assert explain("cat.png", "--option", "num_samples") == 2
    assert "expected NAME=VALUE" in capsys.readouterr().err


def test_a_variant_by_name(capsys):
    assert explain("cat.png", "--methods", "gradcam_pp", "--variant", "xplaincam") == 0
    assert explain("cat.png", "--variant", "captum") == 2
    assert 'Invalid value "captum" for --variant. Choose from: "xplaincam"' in capsys.readouterr().err


OWN = """
import xcam_fn as xf

def absolute(A, G, power=1.0):
    return (G.abs() ** power).mean((2, 3))

absolute_cam = xf.from_gradients(absolute, name="absolute_cam", title="Absolute")
"""


def test_a_method_of_one_s_own_is_named_by_its_file(folder, capsys):
    (folder / "mine.py").write_text(OWN)
    options = ["--methods", "mine.py:absolute_cam", "gradcam", "--option", "power=2", "--save-maps"]
    assert explain("cat.png", *options) == 0
    assert "xcam_output/cat_absolute_cam.npy" in capsys.readouterr().out
    own = xf.from_gradients(lambda A, G: (G**2).mean((2, 3)), name="own")
    loaded = xf.models.load(SMALL, weights="random")
    x, _ = xf.images.prepare("cat.png", loaded.preset)
    np.testing.assert_allclose(
        np.load("xcam_output/cat_absolute_cam.npy"), own(loaded.model, None, x)[0], atol=1e-5
    )
    small = ["--model", SMALL, "--weights", "random"]
    assert cli.main(["evaluate", ".", "--methods", "mine.py:absolute_cam", "--output", "found", *small]) == 0
    assert cli.main(["latency", "--methods", "mine.py:absolute_cam", "--rounds", "1", *small]) == 0
    assert "absolute_cam" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing.py:cam", "there is no file 'nothing.py'; expected FILE.py:NAME or package.module:NAME"),
        ("mine.py:absolute", "mine.py has no method 'absolute'; it has absolute_cam"),
        ("no_such_package:cam", "'no_such_package' cannot be imported"),
    ],
)
def test_a_method_of_one_s_own_that_is_not_there(folder, capsys, name, reason):
    (folder / "mine.py").write_text(OWN)
    assert explain("cat.png", "--methods", name) == 2
    assert reason in capsys.readouterr().err


def test_a_gallery_of_fusions(capsys):
    few = ("--option", "num_masks=8", "--option", "num_groups=2")
    status = cli.main(["gallery", "cat.png", "--class", "281", "--class", "goldfish", "--pairs", "gradcam+rise",
                       "layercam+groupcam", *few, "--model", SMALL, "--weights", "random"])  # fmt: skip
    assert (status, capsys.readouterr().out) == (0, "  wrote xcam_output/cat_gallery.png\n")
    with Image.open("xcam_output/cat_gallery.png") as figure:
        assert figure.width > figure.height > 400
    assert cli.main(["gallery", "cat.png", "--pairs", "gradcam"]) == 2
    assert "--pairs 'gradcam': expected two methods joined by +" in capsys.readouterr().err
