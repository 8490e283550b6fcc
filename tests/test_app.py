"""The app: what it does with a photograph, as functions, and the page in a real browser."""

import ast
import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import networks
import xcam_fn as xf
from xcam_fn import cli
from xcam_fn.app import photograph as app
from xcam_fn.models import LoadedModel
from xcam_fn.models import describe as words

SMALL = "shufflenet_v2_x0_5"
FEW = ("gradcam", "groupcam")
CHANNELS = 40


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    return app.load(SMALL, "random", "cpu")


@pytest.fixture
def cat(tmp_path) -> Path:
    Image.fromarray(skimage.data.chelsea()).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def asked(layer: str, cls: int = 1, methods: tuple[str, ...] = FEW, **others: object) -> app.Asked:
    return app.Asked("cat.png", SMALL, "random", layer, cls, "goldfish", methods)._replace(**others)


def judged(loaded: LoadedModel, wanted: app.Asked, x: torch.Tensor) -> app.Found:
    """All maps and all curves."""
    *_, found = app.explain(loaded, wanted, x, ignore)
    *_, found = app.judge(loaded, wanted, x, found, ignore)
    return found


def tiny() -> tuple[LoadedModel, torch.Tensor]:
    """A network of 40 channels, and an image for it."""
    parts = [
        nn.Conv2d(3, CHANNELS, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, 5),
    ]
    x = torch.randn(1, 3, 24, 20, generator=torch.Generator().manual_seed(5))
    preset = xf.images.Preset(24, 24, (0.5,) * 3, (0.5,) * 3)
    return LoadedModel(networks.seeded(nn.Sequential(*parts)), preset, list("01234"), "tiny"), x


def ignore(count: int) -> None:
    """A watch that lets all pass."""


# -- the choices --------------------------------------------------------------------------------------------


def test_layers_are_listed_with_their_sizes(small):
    choices, default = app.layer_choices(small, "cpu")
    x = torch.zeros(1, 3, 224, 224)
    shapes = xf.layers(small.model, x)
    assert default == xf.default_layer(small.model, x)
    for (text, name), (call, shape) in zip(choices, shapes.items(), strict=True):
        assert name in (call, call.partition("#")[0])
        assert text.startswith(f"{name}  {'×'.join(map(str, shape[1:]))}")
        assert text.endswith(", default") == (name == default)
        assert app.channels(choices, name) == shape[1]
    assert app.channels(choices, "elsewhere") is None


def test_classes_begin_with_the_five_likeliest(small, cat):
    seen = app.see(small, cat, "cpu")
    choices = app.class_choices(small.categories, seen.probabilities)
    top = seen.probabilities.topk(5)
    assert [cls for _, cls in choices[:5]] == top.indices.tolist()
    assert choices[0][0].endswith(f", {words.percent(float(top.values[0]))}")
    assert sorted(cls for _, cls in choices) == list(range(1000))
    assert app.class_choices(small.categories, None)[281] == ("tabby (class 281)", 281)


def test_methods_are_all_of_the_registry_with_their_price():
    shown = {name: text for text, name in app.method_choices(1280)}
    assert list(shown) == list(xf.METHODS)
    assert shown["gradcam"] == "Grad-CAM"
    assert shown["groupcam"] == "Group-CAM (32 forwards)"
    assert shown["rise"] == "RISE (slow: 4,000 forwards)"
    assert shown["sscam"] == "SS-CAM (slow: 44,800 forwards)"
    assert dict(app.method_choices(None))["RISE"] == "rise"


@pytest.mark.parametrize("name", ["scorecam", "iscam", "sscam", "unioncam", "fusioncam", "rise", "groupcam"])
def test_the_price_is_what_is_paid_at_most(name):
    loaded, x = tiny()
    paid = []
    found = app.explain(loaded, asked("1", methods=(name,)), x, paid.append)
    assert name in next(found).maps
    told = xf.METHODS[name].forwards(CHANNELS)
    assert told is not None
    few = 10 + told / CHANNELS  # the image, its baseline, and what a fusion is judged by
    assert told / 3 < sum(paid) <= told + few


# -- what comes in ------------------------------------------------------------------------------------------


def test_what_has_too_many_pixels_is_not_decoded(tmp_path, small, monkeypatch):
    Image.new("1", (9000, 6000)).save(tmp_path / "big.png")
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(app.images, "prepare", None)
    with pytest.raises(
        ValueError, match=r"'big.png' is 9000 x 6000 pixels \(54 megapixels\); expected at most 50"
    ):
        app.see(small, tmp_path / "big.png", "cpu")
    with pytest.raises(ValueError, match=r"'bomb.png' is far too large"):
        app.see(small, tmp_path / "bomb.png", "cpu")


def test_what_is_no_photograph_is_named_without_its_folder(tmp_path, small):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"^image 'text.png' is not an image file of a supported format;"):
        app.see(small, tmp_path / "text.png", "cpu")


def test_weights_are_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="weights of model 'resnet50' are not on this machine"):
        app.load("resnet50", None, "cpu")
    with pytest.raises(ValueError, match="did you mean 'resnet50'"):
        app.load("resnt50", "", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_weights_box_does_not_tell_which_files_there_are(tmp_path):
    said = set()
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    for name in ("missing.pth", "notes.txt", "other.pth", "."):
        path = str(tmp_path / name)
        with pytest.raises(
            ValueError, match=r"cannot load weights .*; expected a checkpoint of this model"
        ) as caught:
            app.load(SMALL, path, "cpu")
        said.add(str(caught.value).replace(path, "PATH"))
    assert len(said) == 1


# -- the explanation ----------------------------------------------------------------------------------------


def test_maps_and_curves_are_those_of_the_library():
    loaded, x = tiny()
    found = judged(loaded, asked("1"), x)
    assert list(found.maps) == list(found.curves) == list(FEW)
    for name in FEW:
        heatmap = xf.METHODS[name](loaded.model, "1", x, 1)
        assert heatmap.any()
        torch.testing.assert_close(found.maps[name], heatmap, atol=0, rtol=0)
        for metric in ("insertion", "deletion"):
            expected = getattr(xf, metric)(loaded.model, x, heatmap, 1)
            torch.testing.assert_close(found.curves[name][metric].scores, expected.scores, atol=1e-6, rtol=0)


def test_a_method_that_fails_is_a_remark_and_the_rest_goes_on(monkeypatch):
    def fail(*_: object, **__: object) -> torch.Tensor:
        raise ArithmeticError("no such\nmap")

    loaded, x = tiny()
    find = app.find_method
    monkeypatch.setattr(
        app, "find_method", lambda name, **how: fail if name == "layercam" else find(name, **how)
    )
    wanted = asked("1", methods=("layercam", "gradcam"))
    found = judged(loaded, wanted, x)
    assert found.remarks == {"layercam": "ArithmeticError: no such map"}
    assert list(found.maps) == list(found.curves) == ["gradcam"]
    page = app.overlays(np.zeros((24, 20, 3), np.uint8), found, wanted)
    assert "ArithmeticError: no such map" in page
    assert page.count("xcam-heatmap") == 1


def test_it_stops_between_two_forwards():
    loaded, x = tiny()
    paid = []

    def watch(count: int) -> None:
        if sum(paid) > 40:
            raise app.StoppedError
        paid.append(count)

    with pytest.raises(app.StoppedError):
        list(app.explain(loaded, asked("1", methods=("rise",)), x, watch))
    assert 40 < sum(paid) < 60


def test_the_code_makes_the_same_pictures(small, cat, monkeypatch):
    layer = app.layer_choices(small, "cpu")[1]
    seen = app.see(small, cat, "cpu")
    wanted = asked(layer)
    *_, found = app.explain(small, wanted, seen.x, ignore)
    next(app.judge(small, wanted, seen.x, found, ignore))  # Grad-CAM's curves alone
    monkeypatch.chdir(cat.parent)
    made: dict = {}
    assert "insertion" not in app.code(wanted, 0.3)
    exec(app.code(wanted, 0.3, curves=True), made)
    assert {file.name for file in cat.parent.iterdir()} == {
        "cat.png", "overlays.png", "insertion.png", "deletion.png",
    }  # fmt: skip
    shown = pictures(app.overlays(seen.picture, found, wanted))
    assert [np.array_equal(picture, seen.picture) for picture in shown[:2]] == [True, True]
    cover = [0.3 * picture[..., 3:] / 255 for picture in shown[2::2]]
    pairs = zip(shown[2::2], cover, strict=True)
    blended = [seen.picture, *((1 - a) * seen.picture + a * heat[..., :3] for heat, a in pairs)]
    panels = [axis.images[0].get_array() for axis in made["overlays"].axes if axis.images]
    assert len(panels) == len(blended) == 3
    for panel, picture in zip(panels, blended, strict=True):
        np.testing.assert_allclose(panel, picture, atol=1)
    area = made["scores"]["Grad-CAM"]["deletion"].auc
    torch.testing.assert_close(area, found.curves["gradcam"]["deletion"].auc)


def pictures(page: str) -> list[np.ndarray]:
    """The images of a piece of the page, without the legend's."""
    urls = re.findall(r"data:image/png;base64,([^\"]+)", page.partition("xcam-panels")[2])
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url)))) for url in urls]


def test_the_code_says_device_and_names_as_they_are():
    code = app.code(asked("conv2", device="cuda", photo='a "b"\\é.png', weights=None), 0.5)
    assert 'load("shufflenet_v2_x0_5", device="cuda")' in code
    assert 'prepare("a \\"b\\"\\\\é.png", network.preset)\nx = x.to("cuda")\n' in code
    compile(code, "code", "exec")


@given(
    category=st.text() | st.sampled_from(["cat\nimport os\r\x0cos.abort()", "\0", "a\u2028b"]),
    cls=st.integers(0, 999),
)
def test_no_class_name_adds_a_line_to_the_code(category, cls):
    code = app.code(asked("conv2", cls, category=category), 0.5)
    assert len(code.splitlines()) == len(app.code(asked("conv2", cls), 0.5).splitlines())
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(app.code(asked("conv2", cls), 0.5)))


def test_what_people_write_is_text_on_the_page():
    assert app.safe("<img src=x>${1}") == "&lt;img src=x&gt;&#36;{1}"


# -- the command --------------------------------------------------------------------------------------------


def test_help_needs_no_gradio():
    code = (
        "import sys, xcam_fn\n"
        "from xcam_fn import cli\n"
        "assert cli.main(['--help']) == cli.main(['app', '--help']) == 0\n"
        "assert not {'gradio', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--no-browser" in done.stdout


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["app"]) == 2
    expected = 'xcam: error: xcam app needs gradio, which is not installed; pip install "xcam-fn[app]"\n'
    assert capsys.readouterr().err == expected


def test_a_port_that_is_taken(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["app", "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"xcam: error: --port {port} of 127.0.0.1 cannot be used (")
    assert cli.main(["app", "--port", "70000"]) == 2
    assert "expected 1 to 65535" in capsys.readouterr().err


# -- the page -----------------------------------------------------------------------------------------------


def test_a_photograph_is_deleted_once_no_tab_shows_it(small, cat):
    import gradio as gr

    from xcam_fn.app.page import _Desk

    desk = _Desk(lambda _model, _weights: small, "cpu")
    one, two = (gr.Request(session_hash=name) for name in ("one", "two"))
    other = Path(shutil.copy(cat, cat.with_name("other.png")))
    layer = app.layer_choices(small, "cpu")[1]
    for tab in (one, one, two):
        list(desk.photo_chosen(str(cat), SMALL, "random", layer, 0.5, tab))
    list(desk.photo_chosen(str(other), SMALL, "random", layer, 0.5, one))
    assert cat.exists()
    desk.left(two)
    assert (cat.exists(), other.exists()) == (False, True)
    list(desk.photo_chosen(None, SMALL, "random", layer, 0.5, one))
    assert not other.exists()


def test_a_photograph_is_explained_at_once_and_judged_when_asked(small):
    import gradio as gr

    from xcam_fn.app.page import _Desk

    desk, tab = _Desk(lambda _model, _weights: small, "cpu"), gr.Request(session_hash="one")
    layer = app.layer_choices(small, "cpu")[1]
    example = desk.example()
    first, *_, last = desk.photo_chosen(example, SMALL, "random", layer, 0.5, tab)
    assert "Predicted class: " in first[1]
    assert first[2].count("<img") == 1
    assert f"; {SMALL}, layer {layer}." in last[1]
    assert last[2].count("xcam-heatmap") == 1
    assert 'download="chelsea_gradcam.png"' in last[2]
    assert (last[3], last[5].visible) == ("", True)  # no curves, and the button that asks for them
    answer = last[7]
    *_, last = desk.judge(answer, 0.5, tab)
    assert last[2].count("<img") == 2
    assert last[4].visible is False
    assert desk.stops == {}
    desk.left(tab)
    assert not Path(example).exists()


def test_the_legend_of_curves_is_text_that_wraps():
    loaded, x = tiny()
    found = judged(loaded, asked("1"), x)
    page = app.curves(found)
    areas = [
        float(area)
        for area in re.findall(r"Grad-CAM <b>(.*?)</b>|Group-CAM <b>(.*?)</b>", page)
        for area in area
        if area
    ]
    assert len(areas) == 4
    assert areas[0] >= areas[1]
    assert areas[2] <= areas[3]
    assert 'stroke-dasharray="6.4 4.8"' in page


needs_a_browser = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="the browser chromium is not installed on this machine"
)


class running:  # noqa: N801 - reads as a verb
    """The command in a process of its own, whose folders are all below one."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.arguments = arguments
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.places = [folder / name for name in ("home", "work", "tmp")]
        for place in self.places:
            place.mkdir()
        home, self.work, self.tmp = self.places
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "GRADIO_", "HF_", "MPL"))}
        self.environment = kept | {"HOME": str(home), "TMPDIR": str(self.tmp), "OMP_NUM_THREADS": "1"}

    def __enter__(self) -> str:
        code = "from xcam_fn.cli import main; raise SystemExit(main())"
        arguments = ["app", "--no-browser", "--port", str(self.port), *self.arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], cwd=self.work, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return re.search(r"http://\S+", line).group().rstrip("/")

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=30)

    def written(self) -> list[Path]:
        return [path for place in self.places for path in place.rglob("*") if path.is_file()]


@pytest.fixture
def page():
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


def choose(page, label: str, words: str) -> None:
    """Search in a list by words, and take what comes first."""
    page.get_by_label(label, exact=True).click()
    page.get_by_label(label, exact=True).fill("")
    page.get_by_label(label, exact=True).press_sequentially(words)
    page.get_by_role("option").filter(has_text=words).first.click()


def explained(page, words: str) -> np.ndarray:
    """Press the button, and the heatmap that comes."""
    page.get_by_role("button", name="Explain").click()
    page.locator("#status").get_by_text(f"Explained: {words}").wait_for(timeout=60_000)
    url = page.locator("#overlays img.xcam-heatmap").first.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def status_of(url: str, headers: dict[str, str], photo: Path | None = None) -> int:
    """The status of a request, or with a photograph of its upload."""
    data = None
    if photo is not None:
        head = 'Content-Disposition: form-data; name="files"; filename="cat.png"'
        data = f"--part\r\n{head}\r\n\r\n".encode() + photo.read_bytes() + b"\r\n--part--\r\n"
        headers = headers | {"Content-Type": "multipart/form-data; boundary=part"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_other_hosts_and_other_origins_are_refused(tmp_path, cat):
    server = running(tmp_path, "--model", SMALL, "--weights", "random")
    with server as address:
        upload = f"{address}/gradio_api/upload"
        assert status_of(address, {}) == status_of(address, {"Host": f"localhost:{server.port}"}) == 200
        assert status_of(address, {"Host": "evil.example"}) == 400
        others = ("http://evil.example", "null", "http://localhost:1", f"https://127.0.0.1:{server.port}")
        assert [status_of(upload, {"Origin": origin}, cat) for origin in others] == [403] * len(others)
        assert not [path for path in server.written() if path.suffix == ".png"]
        assert status_of(upload, {"Origin": address}, cat) == 200
        assert [path.name for path in server.written() if path.suffix == ".png"] == ["cat.png"]


def answer_of(address: str, session: str, number: int, values: list) -> list:
    """What an event gives, asked for as the page's own script does."""
    body = json.dumps({"data": values, "fn_index": number, "session_hash": session}).encode()
    join = urllib.request.Request(
        f"{address}/gradio_api/queue/join", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(join, timeout=30).close()
    given: list = []
    with urllib.request.urlopen(
        f"{address}/gradio_api/queue/data?session_hash={session}", timeout=120
    ) as lines:
        for line in lines:
            message = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if message.get("msg") == "process_completed":
                assert message["success"], message
                return given or message["output"]["data"]
            if message.get("msg") == "process_generating" and not given:
                given = message["output"]["data"]
    raise AssertionError("no answer")


def test_the_example_is_explained_over_http_without_a_browser(tmp_path):
    with running(tmp_path, "--model", SMALL, "--weights", "random") as address:
        with urllib.request.urlopen(f"{address}/config", timeout=30) as config:
            page = json.load(config)
        kinds = {part["id"]: part for part in page["components"]}
        named = {
            part["props"].get("value"): part["id"] for part in page["components"] if part["type"] == "button"
        }
        events = {
            target: i
            for i, event in enumerate(page["dependencies"])
            for target in map(tuple, event["targets"])
        }
        (photo,) = answer_of(address, "tab", events[named["Use the example photograph"], "click"], [])
        assert photo["orig_name"] == "chelsea.png"
        (file,) = (number for number, part in kinds.items() if part["type"] == "file")
        seen = next(e for e in page["dependencies"] if len(e["outputs"]) == 10 and e["inputs"][:1] == [file])
        values = [photo, *(kinds[number]["props"]["value"] for number in seen["inputs"][1:])]
        cls, status, overlays, *_ = answer_of(address, "tab", page["dependencies"].index(seen), values)
        assert len(cls["choices"]) == 1000
        assert "Predicted class: " in status
        assert "the photograph as the network sees it" in overlays


@needs_a_browser
def test_a_photograph_in_the_browser_from_beginning_to_end(tmp_path, cat, page):
    requested = []
    page.on("request", lambda request: requested.append(request.url))
    server = running(tmp_path)
    with server as address:
        with pytest.raises(OSError, match="refused"):  # would answer too if it listened everywhere
            socket.create_connection(("127.0.0.2", server.port), timeout=5).close()
        page.goto(address)
        page.get_by_text("No photograph yet").wait_for()
        page.set_input_files("input[type=file]", cat)
        page.locator("#status").get_by_text("Explained: tiger cat (class 282)").wait_for(timeout=60_000)
        loaded = xf.models.load("lite0")
        x, picture = xf.images.prepare(cat, loaded.preset)
        maps = []
        for name, cls in (("tiger cat", 282), ("zebra", 340)):
            choose(page, "Class to explain", name)
            maps.append(explained(page, name).astype(int))
            heatmap = xf.gradcam(loaded.model, None, x, cls)[0]
            expected = xf.plot.overlay(picture, heatmap, alpha=1.0, alpha_follows_heatmap=False)
            assert np.abs(maps[-1][..., :3] - expected).mean() < 0.5
        assert np.abs(maps[0] - maps[1]).mean() > 5  # another class, another map
        page.get_by_role("button", name="Insertion and deletion curves").click()
        page.locator("#curves img").nth(1).wait_for(timeout=60_000)
        assert "cls = 340  # zebra" in page.locator(".cm-content").inner_text()
        slider = page.get_by_role("spinbutton")
        slider.fill("0.2")
        slider.press("Tab")
        page.get_by_text("alpha=0.2)").wait_for()
        style = "getComputedStyle(document.querySelector('.xcam-heatmap')).opacity"
        assert page.evaluate(style) == "0.2"
        choose(page, "Methods", "RISE")
        page.get_by_role("button", name="Explain").click()
        page.get_by_text("RISE: ").wait_for(timeout=60_000)
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text("Canceled. Finished results are kept.").wait_for(timeout=20_000)
        assert page.locator("#overlays img.xcam-heatmap").count() == 1
        assert page.get_by_role("button", name="Explain").is_enabled()
        cat.with_name("text.png").write_text("not a picture")
        page.get_by_label("Clear").first.click()
        page.get_by_text("No photograph yet").wait_for()
        page.set_input_files("input[type=file]", cat.with_name("text.png"))
        page.locator("#status").get_by_text(
            "image 'text.png' is not an image file of a supported format"
        ).wait_for()
        (kept,) = server.tmp.iterdir()
        assert [path.name for path in server.written() if path.suffix == ".png"] == ["text.png"]
        assert all(path.is_relative_to(kept) for path in server.written())
    assert server.process.returncode == 0
    assert [path for place in server.places for path in place.rglob("*")] == []
    assert all(url.startswith((address, "blob:", "data:")) for url in requested)
