"""Exported files compute what is computed here, without torch, and say what stands in the way."""

import base64
import copy
import functools
import hashlib
import http.server
import importlib
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import skimage.data
import torch
from PIL import Image
from torch import nn

import networks
import xcam_fn as xf

PAGE = importlib.import_module("xcam_fn.export.page")  # the name is the function's
pytestmark = pytest.mark.usefixtures("unchecked")  # it does not take a symbolic length for an integer

RUN_WITHOUT_TORCH = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.savez(sys.argv[3], *session.run(None, {"image": numpy.load(sys.argv[2])}))
assert "torch" not in sys.modules
"""


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 24, 20, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("method", xf.export.METHODS_THAT_EXPORT)
def test_an_onnx_file_gives_what_the_method_gives(tmp_path, method):
    model = networks.seeded(networks.Residual())
    before = copy.deepcopy(model.state_dict())
    done = xf.export.onnx(model, "relu#2", images(), tmp_path / "out.onnx", method)
    assert done.difference < 1e-4
    run = session(done.path)
    assert [i.name for i in run.get_inputs()] == ["image"]
    assert [o.name for o in run.get_outputs()] == ["logits", "heatmap", "class"]
    for batch in (1, 2, 5, 16):
        x = images(batch)
        logits, heatmap, cls = run.run(None, {"image": x.numpy()})
        np.testing.assert_allclose(logits, model(x).detach(), atol=1e-5)
        np.testing.assert_allclose(heatmap, xf.METHODS[method](model, "relu#2", x), atol=1e-4)
        np.testing.assert_array_equal(cls, model(x).argmax(1))
    assert list(tmp_path.iterdir()) == [done.path]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_class_of_ones_own(tmp_path):
    model, x = networks.seeded(networks.Residual()), images(3)
    done = xf.export.onnx(model, None, x, tmp_path / "out.onnx", cls=2)
    _, heatmap, cls = session(done.path).run(None, {"image": x.numpy()})
    np.testing.assert_allclose(heatmap, xf.gradcam(model, None, x, 2), atol=1e-5)
    assert cls.tolist() == [2, 2, 2]


def test_a_program_is_saved_and_loaded(tmp_path):
    model, x = networks.seeded(networks.Residual()), images(3)
    done = xf.export.pt2(model, "conv2", x, tmp_path / "out.pt2", "layercam")
    loaded = torch.export.load(str(done.path)).module()
    for batch in (1, 4):
        found = loaded(images(batch))[1]
        torch.testing.assert_close(found, xf.layercam(model, "conv2", images(batch)), atol=1e-5, rtol=0)


def test_torchvision_networks(tmp_path):
    loaded = xf.models.load("resnet18", weights="random")
    x = xf.export.sample_images(64)
    assert xf.export.onnx(loaded.model, None, x, tmp_path / "out.onnx").difference < 1e-4


class Sorted(nn.Module):
    """Its head has an operator whose backward has no counterpart in ONNX."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(torch.special.i0e(self.conv(x)).mean((2, 3)))


def test_an_operator_in_the_way_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"Sorted cannot be exported: .*operator prims\.bessel_i0e"):
        xf.export.onnx(networks.seeded(Sorted()), "conv", images(), tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_traced(tmp_path):
    with pytest.raises(ValueError, match="DataDependent cannot be exported"):
        xf.export.onnx(networks.seeded(networks.DataDependent()), "block", images(), tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_there_is_stays_where_an_export_fails(tmp_path):
    file = tmp_path / "out.onnx"
    file.write_text("mine")
    with pytest.raises(ValueError, match="cannot be exported"):
        xf.export.onnx(networks.seeded(Sorted()), "conv", images(), file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "scorecam"}, "method 'scorecam' cannot be exported; expected one of gradcam"),
        ({"method": "grandcam"}, "method 'grandcam' is not known"),
        ({"layer": "conv9"}, "layer 'conv9' is not in Residual"),
        ({"cls": 7}, "7"),
    ],
)
def test_bad_input(tmp_path, options, message):
    options = {"layer": "conv2"} | options
    with pytest.raises(ValueError, match=message):
        xf.export.onnx(
            networks.seeded(networks.Residual()), x=images(), path=tmp_path / "out.onnx", **options
        )


def test_a_path_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="is not a folder"):
        xf.export.onnx(networks.seeded(networks.Residual()), None, images(), tmp_path / "no" / "out.onnx")
    with pytest.raises(OSError, match="is a folder"):
        xf.export.pt2(networks.seeded(networks.Residual()), None, images(), tmp_path)


def test_a_batch_of_another_size_is_refused_by_the_runtime(tmp_path):
    done = xf.export.onnx(networks.seeded(networks.Residual()), None, images(), tmp_path / "out.onnx")
    with pytest.raises(Exception, match="image"):
        session(done.path).run(None, {"image": np.zeros((1, 3, 30, 20), np.float32)})
    with pytest.raises(Exception, match=r"expected: \(tensor\(float\)\)"):
        session(done.path).run(None, {"image": np.zeros((1, 3, 24, 20), np.float64)})


# -- the command and the page -------------------------------------------------------------------------------


def xcam(*arguments, cwd):
    command = [Path(sys.executable).with_name("xcam"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    done = xcam("export", "--page", folder / "site", "--cdn", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "loads ONNX Runtime from cdn.jsdelivr.net" in done.stdout
    return folder / "site"


def test_a_page_is_written_whole_and_its_network_runs_without_torch(site, tmp_path):
    names = {file.name for file in site.iterdir()}
    assert names == {"index.html", "page.css", "page.js", "image.js", "page.json", "model.onnx"}
    settings = json.loads((site / "page.json").read_text())
    assert settings["categories"][282] == "tiger cat"
    assert len(settings["colors"]) == 256
    assert settings["runtime"] == {"url": PAGE.RUNTIME, "files": PAGE.RUNTIME_FILES}
    assert PAGE.RUNTIME.startswith("https://cdn.jsdelivr.net/npm/onnxruntime-web@1.")
    assert "//" not in (site / "index.html").read_text().replace("<!doctype", "")  # nothing from elsewhere
    loaded = xf.models.load("lite0")
    x, _ = xf.images.prepare(skimage.data.chelsea(), loaded.preset)
    np.save(tmp_path / "x.npy", x.numpy())
    files = [str(path) for path in (site / "model.onnx", tmp_path / "x.npy", tmp_path / "y.npz")]
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT_TORCH, *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    logits, heatmap, cls = np.load(files[2]).values()
    assert cls == [282]
    np.testing.assert_allclose(logits, loaded.model(x).detach(), atol=1e-4)
    np.testing.assert_allclose(heatmap, xf.gradcam(loaded.model, None, x), atol=1e-4)


@pytest.fixture
def runtime(tmp_path, monkeypatch) -> Path:
    """A folder in the place of the CDN, with small files in the place of ONNX Runtime's."""
    folder = tmp_path / "published"
    folder.mkdir()
    hashes = {}
    for name in PAGE.RUNTIME_FILES:
        (folder / name).write_text(name)
        digest = hashlib.sha384(name.encode()).digest()
        hashes[name] = "sha384-" + base64.b64encode(digest).decode()
    monkeypatch.setattr(PAGE, "RUNTIME", folder.as_uri() + "/")
    monkeypatch.setattr(PAGE, "RUNTIME_FILES", hashes)
    return folder


def small() -> xf.models.LoadedModel:
    preset = xf.models.load("lite0", weights="random").preset._replace(crop=24, resize=24)
    return xf.models.LoadedModel(networks.seeded(networks.Residual()), preset, list("abcde"), "small")


def test_a_page_takes_its_runtime_into_its_folder(tmp_path, runtime):
    first, *_ = PAGE.RUNTIME_FILES
    site = tmp_path / "site"
    site.mkdir()
    (runtime / first).rename(site / first)  # what is there is not downloaded again
    xf.export.page(small(), site)
    assert json.loads((site / "page.json").read_text())["runtime"]["url"] == "./"
    assert all((site / name).read_text() == name for name in PAGE.RUNTIME_FILES)


def test_a_runtime_that_cannot_be_had(tmp_path, runtime):
    first, *_ = PAGE.RUNTIME_FILES
    (runtime / first).write_text("something else")
    with pytest.raises(
        OSError, match=r"returned a file with a wrong checksum; use cdn=True \(--cdn\), or copy"
    ):
        xf.export.page(small(), tmp_path / "site")
    (runtime / first).unlink()
    with pytest.raises(OSError, match=r"cannot be downloaded \(.*No such file.*\); use cdn=True"):
        xf.export.page(small(), tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_errors_of_the_command(tmp_path):
    done = xcam("export", "--output", "model.txt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected a name that ends in .onnx or .pt2" in done.stderr
    done = xcam("export", "--method", "rise", cwd=tmp_path)
    assert done.returncode == 2
    assert "method 'rise' cannot be exported" in done.stderr
    done = xcam("export", "--cdn", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--cdn needs --page FOLDER" in done.stderr
    assert list(tmp_path.iterdir()) == []


needs_a_browser = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("npm") is None,
    reason="the browser chromium or npm is not installed on this machine",
)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The files of ONNX Runtime that npm has."""
    folder = tmp_path_factory.mktemp("npm")
    package = "onnxruntime-web@" + PAGE.RUNTIME.split("@")[1].split("/")[0]
    command = ["npm", "install", "--no-audit", "--no-fund", package]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if installed.returncode != 0:
        pytest.skip("npm could not install onnxruntime-web: " + installed.stderr[-200:])
    return folder / "node_modules" / "onnxruntime-web" / "dist"


@needs_a_browser
@pytest.mark.parametrize("cdn", [False, True], ids=["without a network", "from the CDN"])
def test_the_page_sees_what_python_sees(site, published, tmp_path, cdn):
    """With the files that npm has, of which the page checks the hashes."""
    from playwright import sync_api

    if not cdn:
        site = shutil.copytree(site, tmp_path / "site")
        for name in PAGE.RUNTIME_FILES:
            shutil.copyfile(published / name, site / name)
        xf.export.page(xf.models.load("lite0"), site)
    Image.fromarray(skimage.data.chelsea()).save(site / "cat.png")
    (site / "text.png").write_text("not a picture")
    loaded = xf.models.load("lite0")
    x, _ = xf.images.prepare(site / "cat.png", loaded.preset)
    heatmap = xf.gradcam(loaded.model, None, x)[0]
    with serving(site) as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        requested = []
        page.on("request", lambda request: requested.append(request.url))
        page.route(PAGE.RUNTIME + "*", lambda route: from_npm(route, published))
        page.goto(f"{address}/index.html?photo=cat.png")
        page.wait_for_selector("body[data-state=done]", timeout=120_000)
        found = page.evaluate("({...document.body.dataset})")
        assert int(found["class"]) == int(loaded.model(x).argmax()) == 282
        assert int(found["peak"]) == int(heatmap.argmax())
        shares = [float(text.split()[0]) for text in page.locator("#classes span").all_inner_texts()]
        expected = 100 * loaded.model(x).softmax(1)[0].topk(5).values
        np.testing.assert_allclose(shares, expected.detach(), atol=0.3)
        assert "tiger cat" in page.inner_text("#caption")
        page.set_input_files("#file", site / "text.png")
        page.wait_for_selector("body[data-state=error]")
        assert "not a picture" in page.inner_text("#message")
        page.set_input_files("#file", site / "cat.png")
        page.wait_for_selector("body[data-state=done]")
        assert page.inner_text("#message") == ""
        elsewhere = {url for url in requested if not url.startswith((address, "blob:", "data:"))}
        assert elsewhere == ({PAGE.RUNTIME + name for name in PAGE.RUNTIME_FILES} if cdn else set())
        browser.close()


def from_npm(route, folder: Path) -> None:
    """Answer a request for a file of the CDN."""
    name = route.request.url.rpartition("/")[2]
    route.fulfill(path=folder / name, headers={"Access-Control-Allow-Origin": "*"})


class serving:  # noqa: N801 - reads as a verb
    """A folder behind an address of this machine."""

    def __init__(self, folder: Path) -> None:
        handler = functools.partial(Quiet, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that does not print."""

    def log_message(self, format: str, *args: object) -> None:
        pass
