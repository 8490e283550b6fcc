"""The page of `xcam app`: gradio components and their event handlers."""

from __future__ import annotations

import functools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gradio as gr
from gradio.themes import Default
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from xcam_fn import models
from xcam_fn.app import photograph as app
from xcam_fn.app.photograph import Asked, Found, StoppedError
from xcam_fn.methods import METHODS
from xcam_fn.models import describe
from xcam_fn.models.load import LoadedModel

_STYLE = Path(__file__).parent / "templates" / "app.css"
_BLEND = "(alpha) => { document.documentElement.style.setProperty('--xcam-alpha', alpha) }"
_SCROLL = """() => {  // to the results: on a narrow screen they are above the controls
    const status = document.querySelector("#status"), top = status.getBoundingClientRect().top
    if (top < 0 || top > innerHeight / 2) status.scrollIntoView({behavior: "smooth"})
}"""
_LISTED = 2000  # layers shown in the list: more than any network has
_EXPECTED = (ValueError, TypeError, OSError, RuntimeError)
_NOTHING = Found({}, {}, {})
_BEGIN = "No photograph yet: drop one into the frame, or click the frame to choose one."
_HOSTS = ["127.0.0.1", "localhost"]
_LABELS: dict[str, Any] = {
    name: {"label": label, "info": info}
    for name, label, info in (
        ("cls", "Class to explain", "The five most likely come first; type to search by name."),
        ("methods", "Methods", "One map per method. Methods with many forward passes are slow."),
        ("model", "Network", "lite0 (EfficientNet-Lite0), a torchvision name, or timm:NAME."),
        ("weights", "Weights", "Path of a checkpoint, or random; press Enter. Empty: the published weights."),
        ("layer", "Layer", "The layer to explain, with its channels × height × width."),
    )
}
_INTRODUCTION = """\
# Where does the network look?
Drop a photograph: the network classifies it, and Grad-CAM shows which parts support the predicted class.
To explain other classes or use other methods, choose them and press **Explain**.
"""
_FIRST = ("gradcam",)  # run as soon as a photograph is chosen
_ALPHA = 0.75
# Colors and fonts of the documentation site.
_THEME = Default(
    primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    button_primary_background_fill="#3b1f5e", button_primary_background_fill_dark="#5b3a86",
    button_primary_background_fill_hover="#5b3a86", button_primary_background_fill_hover_dark="#6d4a9c",
    button_primary_text_color="white", button_primary_text_color_dark="white",
    slider_color="#1f857c", slider_color_dark="#43c59e",
)  # fmt: skip


class _Answer(NamedTuple):
    """A photograph, what was asked about it, and the results."""

    asked: Asked
    seen: app.Seen
    found: Found

    def code(self, alpha: float) -> str:
        done = self.asked._replace(methods=tuple(self.found.maps))
        return app.code(done, alpha, curves=bool(self.found.curves)) if self.found.maps else ""


@dataclass(frozen=True)
class _Desk:
    """The state that the handlers of one app share."""

    load: Callable[[str, str], LoadedModel]  # by name and weights, cached
    device: str
    stops: dict[str, threading.Event] = field(default_factory=dict)  # by browser tab, running or queued
    photos: dict[str, str] = field(default_factory=dict)  # the photograph's file, by browser tab

    def photo_chosen(
        self,
        photo: str | None,
        model: str,
        weights: str,
        layer: str,
        alpha: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (gradio looks for it here)
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the class, the status and the results of a new photograph, explained by Grad-CAM."""
        self._keep(photo, request)
        try:
            loaded = self.load(model, weights)
            if photo is None:
                yield self._classes(loaded, None), _said(_BEGIN), *_emptied(""), *_buttons(running=False)
                return
            seen = app.see(loaded, photo, self.device)
        except _EXPECTED as error:
            yield gr.skip(), _problem(error), *_emptied(""), *_buttons(running=False)
            return
        (cls, probability), *_ = describe.likeliest(seen.probabilities)
        name, share = describe.class_name(cls, loaded.categories), describe.percent(probability)
        picture = _emptied(app.overlays(seen.picture, _NOTHING))
        status = _said(f"Predicted class: {name}, {share}.")
        yield self._classes(loaded, seen), status, *picture, *_buttons(running=True)
        self.stops.setdefault(str(request.session_hash), threading.Event())
        for shown in self.explain(photo, model, weights, layer, cls, list(_FIRST), alpha, request, progress):
            yield gr.skip(), *shown

    def example(self) -> str:
        """Copy the example photograph to where the page may read it; the copy is deleted like an upload."""
        return shutil.copy(app.images.example(), tempfile.mkdtemp())

    def settings(self, model: str, weights: str, layer: str | None = None) -> tuple[Any, Any]:
        """Return the layers and methods of another network, or the methods' cost at another layer."""
        try:
            choices, default = app.layer_choices(self.load(model, weights), self.device)
        except _EXPECTED:
            return gr.skip(), gr.skip()  # photo_chosen runs next and shows the error
        prices = app.method_choices(app.channels(choices, layer or default))
        return gr.Dropdown(choices=choices, value=layer or default), gr.Dropdown(choices=prices)

    def explain(
        self,
        photo: str | None,
        model: str,
        weights: str,
        layer: str,
        cls: int | None,
        methods: list[str],
        alpha: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (gradio looks for it here)
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the status, the maps so far and the code."""
        if photo is None or cls is None or not methods:
            missing = "a photograph" if photo is None else "a class" if cls is None else "a method"
            yield _problem(f"Choose {missing} first."), *_unchanged()
            return

        def steps() -> Iterator[_Answer]:
            loaded = self.load(model, weights)
            seen = app.see(loaded, photo, self.device)
            asked = Asked(Path(photo).name, model, weights or None, layer, cls, loaded.categories[cls],
                          tuple(methods), self.device)  # fmt: skip
            watch = self._watch(asked, "{}", request, progress)
            for found in app.explain(loaded, asked, seen.x, watch):
                watch.step += 1
                yield _Answer(asked, seen, found)

        yield from self._results(steps(), alpha, request)

    def judge(
        self,
        answer: _Answer | None,
        alpha: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the same, with the curves of the maps on the page."""
        if answer is None:
            yield _said(_BEGIN), *_unchanged()
            return
        asked, seen, found = answer

        def steps() -> Iterator[_Answer]:
            loaded = self.load(asked.model, asked.weights or "")
            watch = self._watch(asked, "curves of {}", request, progress)
            for judged in app.judge(loaded, asked, seen.x, found, watch):
                watch.step += 1
                yield _Answer(asked, seen, judged)

        yield from self._results(steps(), alpha, request)

    def _results(
        self, steps: Iterator[_Answer], alpha: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Yield what the page shows after each step, and the error if one fails."""
        answer = None
        try:
            for answer in steps:
                yield _said(""), *_shown(answer, alpha), *_buttons(running=True)
            if answer is not None:
                asked, probability = answer.asked, float(answer.seen.probabilities[answer.asked.cls])
                loaded = self.load(asked.model, asked.weights or "")
                about = describe.caption(loaded, asked.cls, probability, asked.layer)
                yield _said(f"Explained: {about}."), *_shown(answer, alpha), *_buttons(running=False)
        except StoppedError:
            yield _said("Canceled. Finished results are kept."), *_unchanged()
        except _EXPECTED as error:
            yield _problem(error), *_unchanged()
        finally:
            self.stops.pop(str(request.session_hash), None)

    def _watch(self, asked: Asked, what: str, request: gr.Request, progress: gr.Progress) -> _Watch:
        stop = self.stops.setdefault(str(request.session_hash), threading.Event())
        return _Watch([what.format(METHODS[name].title) for name in asked.methods], progress, stop)

    def begin(self, request: gr.Request) -> tuple[Any, ...]:
        """Return the status and the buttons of a queued explanation."""
        self.stops[str(request.session_hash)] = threading.Event()
        return _said("Waiting …"), *_buttons(running=True)

    def cancel(self, request: gr.Request) -> Any:
        """Stop the tab's explanation, at once if it runs, or when its turn comes if it is queued."""
        if stop := self.stops.get(str(request.session_hash)):
            stop.set()
        return gr.Button(interactive=False)

    def left(self, request: gr.Request) -> None:
        """Stop the explanation of a closed tab, and delete its photograph."""
        self.cancel(request)
        self._keep(None, request)

    def _keep(self, photo: str | None, request: gr.Request) -> None:
        """Remember a tab's photograph, and delete its previous one unless another tab shows it."""
        before = self.photos.pop(str(request.session_hash), None)
        if photo:
            self.photos[str(request.session_hash)] = photo
        if before and before not in self.photos.values():
            Path(before).unlink(missing_ok=True)

    def _classes(self, loaded: LoadedModel, seen: app.Seen | None) -> Any:
        choices = app.class_choices(loaded.categories, seen and seen.probabilities)
        return gr.Dropdown(choices=choices, value=choices[0][1] if seen else None)


class _Watch:
    """Reports the progress of an explanation, and stops it when it is canceled."""

    def __init__(self, steps: list[str], progress: gr.Progress, stop: threading.Event) -> None:
        self.steps = steps
        self.step, self._forwards, self._progress, self._stop = 0, 0, progress, stop

    def __call__(self, count: int) -> None:
        if self._stop.is_set():
            raise StoppedError
        self._forwards += count
        said = f"{self.steps[min(self.step, len(self.steps) - 1)]}: {self._forwards:,} forwards"
        self._progress((self.step, len(self.steps)), desc=said, unit="steps")


class _OwnOrigin:
    """Refuses requests that other sites' pages send; browsers name the site in the Origin header."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        is_own = headers.get("origin") in (None, f"http://{headers.get('host')}")
        answer = self.app if is_own else PlainTextResponse("Requests from other sites are refused.", 403)
        await answer(scope, receive, send)


def _said(text: str, look: str = "") -> str:
    return f'<div class="xcam-status"><span class="{look}">{app.safe(text)}</span></div>'


def _problem(error: Exception | str) -> str:
    text = " ".join(str(error).split())
    gr.Warning(app.safe(text), duration=6)
    return _said(text, "xcam-problem")


def _buttons(*, running: bool) -> tuple[Any, Any]:
    return gr.Button(interactive=not running), gr.Button(interactive=running)


def _shown(answer: _Answer, alpha: float) -> tuple[Any, ...]:
    """The overlays, the curves, the slider, the button for curves, the code and the answer."""
    asked, seen, found = answer
    shown = bool(found.maps)
    pictures = app.overlays(seen.picture, found, asked), app.curves(found)
    ask = gr.Button(visible=shown and found.curves.keys() != found.maps.keys())
    code = gr.Code(answer.code(alpha), visible=shown)
    return *pictures, gr.Slider(visible=shown), ask, code, answer


def _emptied(overlays: str) -> tuple[Any, ...]:
    hidden = gr.Slider(visible=False), gr.Button(visible=False), gr.Code("", visible=False)
    return overlays, "", *hidden, None


def _unchanged() -> tuple[Any, ...]:
    return *(gr.skip(),) * 6, *_buttons(running=False)


def _recoded(answer: _Answer | None, alpha: float) -> Any:
    return answer.code(alpha) if answer and answer.found.maps else gr.skip()


# -- the page -----------------------------------------------------------------------------------------------


def _controls(loaded: LoadedModel, weights: str, device: str) -> dict[str, Any]:
    """Create the controls by name, except the photograph's."""
    layers, default = app.layer_choices(loaded, device)
    classes, names = app.class_choices(loaded.categories, None), models.names()
    methods = app.method_choices(app.channels(layers, default))
    parts: dict[str, Any] = {
        "cls": gr.Dropdown(classes, value=None, **_LABELS["cls"]),
        "methods": gr.Dropdown(methods, value=["gradcam"], multiselect=True, **_LABELS["methods"]),
    }
    with gr.Row():
        parts["explain"] = gr.Button("Explain", variant="primary", min_width=100, scale=2)
        parts["cancel"] = gr.Button("Cancel", interactive=False, min_width=100)
    with gr.Accordion("Network and layer", open=False):
        parts["model"] = gr.Dropdown(names, value=loaded.name, allow_custom_value=True, **_LABELS["model"])
        parts["weights"] = gr.Textbox(weights, **_LABELS["weights"])
        parts["layer"] = gr.Dropdown(layers, value=default, num_choices_shown=_LISTED, **_LABELS["layer"])
    return parts


def _results() -> dict[str, Any]:
    """Create the components that show results, by name."""
    code: dict[str, Any] = {"label": "Python code for these pictures", "language": "python", "visible": False}
    return {
        "status": gr.HTML(_said(_BEGIN), elem_id="status"),
        "overlays": gr.HTML(elem_id="overlays"),
        "alpha": gr.Slider(0, 1, _ALPHA, step=0.05, label="Heatmap opacity", visible=False),
        "ask": gr.Button("Insertion and deletion curves", visible=False),
        "curves": gr.HTML(elem_id="curves"),
        "code": gr.Code(interactive=False, **code),
        "answer": gr.State(),
    }


def _photograph() -> dict[str, Any]:
    """Create the upload and the example button, by name."""
    size = f"at most {app.MAX_MEGABYTES} MB, {app.MAX_MEGAPIXELS} megapixels"
    return {
        "photo": gr.File(label=f"Photograph ({size})", file_types=["image"], height=150),
        "example": gr.Button(
            "Use the example photograph", size="sm", visible=find_spec("skimage") is not None
        ),
    }


def _wire(page: gr.Blocks, parts: SimpleNamespace, desk: _Desk) -> None:
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = private | {"show_progress": "hidden"}
    slow: dict[str, Any] = private | {"show_progress_on": parts.status, "concurrency_id": "network"}
    network = [parts.model, parts.weights]
    results = [parts.overlays, parts.curves, parts.alpha, parts.ask, parts.code, parts.answer]
    buttons = [parts.explain, parts.cancel]
    question = [parts.photo, *network, parts.layer, parts.cls, parts.methods, parts.alpha]
    answer = [parts.status, *results, *buttons]
    chosen = [parts.photo, *network, parts.layer, parts.alpha]
    see: Any = (desk.photo_chosen, chosen, [parts.cls, *answer])
    settings = [parts.layer, parts.methods]
    parts.example.click(desk.example, None, parts.photo, **quiet)
    stopped = parts.photo.change(desk.cancel, None, parts.cancel, queue=False, **quiet)  # the previous one
    stopped.then(*see, **slow)
    another = gr.on([parts.model.change, parts.weights.submit], desk.settings, network, settings, **quiet)
    another.then(*see, **slow)
    parts.layer.input(desk.settings, [*network, parts.layer], settings, **quiet)
    begun = parts.explain.click(desk.begin, None, [parts.status, *buttons], queue=False, **quiet)
    begun.then(desk.explain, question, answer, **slow)
    parts.explain.click(None, None, None, js=_SCROLL, **private)
    judging = parts.ask.click(desk.begin, None, [parts.status, *buttons], queue=False, **quiet)
    judged = [parts.answer, parts.alpha]
    judging.then(desk.judge, judged, answer, **slow)
    parts.cancel.click(desk.cancel, None, parts.cancel, queue=False, **quiet)
    parts.alpha.change(None, parts.alpha, None, js=_BLEND, **private)
    parts.alpha.change(_recoded, [parts.answer, parts.alpha], parts.code, trigger_mode="always_last", **quiet)
    page.unload(desk.left)


def serve(
    model: str, weights: str, device: str, port: int, *, browser: bool, ready: Callable[[str], None]
) -> None:
    """Serve the page to this machine only, until `KeyboardInterrupt`; call `ready` with the address."""
    load = functools.lru_cache(maxsize=2)(lambda name, chosen: app.load(name, chosen, device))
    desk, loaded = _Desk(load, device), load(model, weights)
    with gr.Blocks(title="xcam", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(_INTRODUCTION)
        with gr.Row(elem_id="desk"):  # in the order of a narrow screen; app.css arranges a wide one
            with gr.Column(elem_id="photograph"):
                photograph = _photograph()
            with gr.Column(elem_id="results"):
                results = _results()
            with gr.Column(elem_id="controls"):
                controls = _controls(loaded, weights, device)
        _wire(page, SimpleNamespace(**photograph, **controls, **results), desk)
    page.queue(max_size=8, default_concurrency_limit=1, api_open=False)
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS), Middleware(_OwnOrigin)]
    try:
        _, address, _ = page.launch(
            server_name=_HOSTS[0], server_port=port, share=False, inbrowser=browser, quiet=True,
            prevent_thread_lock=True, max_file_size=f"{app.MAX_MEGABYTES}mb", footer_links=[],
            run_history=False, mcp_server=False, ssr_mode=False, pwa=False, enable_monitoring=False,
            css_paths=[_STYLE], app_kwargs={"middleware": guards}, theme=_THEME,
        )  # fmt: skip
        ready(address)
        while True:
            time.sleep(1)
    finally:
        for stop in list(desk.stops.values()):
            stop.set()
        page.close(verbose=False)
