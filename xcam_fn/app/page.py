"""The page of `xcam app`: gradio's components, and what happens when they are used."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
_SCROLL = """() => {  // to the results, where a narrow screen has them below the controls
    const status = document.querySelector("#status")
    if (status.getBoundingClientRect().top > innerHeight / 2) status.scrollIntoView({behavior: "smooth"})
}"""
_LISTED = 2000  # layers in the list, more than any network has
_EXPECTED = (ValueError, TypeError, OSError, RuntimeError)
_NOTHING = Found({}, {}, {})
_BEGIN = "No photograph yet: drop one into the frame, or click there to pick one."
_HOSTS = ["127.0.0.1", "localhost"]
_LABELS: dict[str, Any] = {
    name: {"label": label, "info": info}
    for name, label, info in (
        ("cls", "Class to explain", "The five likeliest come first; type to search by name."),
        ("methods", "Methods", "A map for each. Forwards are runs of the network: many take long."),
        ("model", "Network", "lite0 is EfficientNet-Lite0; or one of torchvision, or timm:NAME."),
        ("weights", "Weights", "A checkpoint's path, or random, then Enter; empty for the published ones."),
        ("layer", "Layer", "Whose maps are used: channels × height × width."),
    )
}
_INTRODUCTION = """\
# Where does the network look?
Drop a photograph: the network says what it sees. Choose one of its classes and press **Explain**: colors show
which parts of the photograph speak for that class.
"""


@dataclass(frozen=True)
class _Desk:
    """What the handlers of one app share."""

    load: Callable[[str, str], LoadedModel]  # by name and weights, kept when it was loaded before
    device: str
    stops: dict[str, threading.Event] = field(default_factory=dict)  # of each browser tab that waits
    photos: dict[str, str] = field(default_factory=dict)  # the file that each browser tab shows

    def photo_chosen(
        self, photo: str | None, model: str, weights: str, request: gr.Request
    ) -> tuple[Any, ...]:
        """The class, the status and emptied results, of another photograph."""
        self._keep(photo, request)
        empty = ("", gr.Slider(visible=False), gr.Code("", visible=False), None)
        try:
            loaded = self.load(model, weights)
            if photo is None:
                return self._classes(loaded, None), _said(_BEGIN), "", *empty
            seen = app.see(loaded, photo, self.device)
        except _EXPECTED as error:
            return gr.skip(), _problem(error), "", *empty
        (cls, probability), *_ = describe.likeliest(seen.probabilities)
        name, share = describe.class_name(cls, loaded.categories), describe.percent(probability)
        status = _said(f"The network takes this for: {name}, {share}. Press Explain to see why.")
        return self._classes(loaded, seen), status, app.overlays(seen.picture, _NOTHING), *empty

    def settings(self, model: str, weights: str, layer: str | None = None) -> tuple[Any, Any]:
        """The layers and methods of another network, or the same with what methods cost at another layer."""
        try:
            choices, default = app.layer_choices(self.load(model, weights), self.device)
        except _EXPECTED:
            return gr.skip(), gr.skip()  # what happens next, to the photograph, tells why
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
        """The status, the maps, the curves and the code, as they come."""
        unchanged = (*(gr.skip(),) * 5, *_buttons(running=False))
        if photo is None or cls is None or not methods:
            missing = "a photograph" if photo is None else "a class" if cls is None else "a method"
            yield _problem(f"Choose {missing} first."), *unchanged
            return
        try:
            loaded = self.load(model, weights)
            seen = app.see(loaded, photo, self.device)
            asked = Asked(Path(photo).name, model, weights or None, layer, cls, loaded.categories[cls],
                          tuple(methods), self.device)  # fmt: skip
            watch = _Watch(asked, progress, self.stops[str(request.session_hash)])
            shown: tuple[Any, ...] = ()
            for found in app.explain(loaded, asked, seen.x, watch):
                watch.step += 1
                shown = _shown(seen, found, asked, alpha)
                yield _said(""), *shown, *_buttons(running=True)
            about = describe.caption(loaded, cls, float(seen.probabilities[cls]), layer)
            yield _said(f"Explained: {about}."), *shown, *_buttons(running=False)
        except StoppedError:
            yield _said("Canceled. What was found until then stays."), *unchanged
        except _EXPECTED as error:
            yield _problem(error), *unchanged
        finally:
            self.stops.pop(str(request.session_hash), None)

    def begin(self, request: gr.Request) -> tuple[Any, ...]:
        """The status and the buttons while an explanation waits for its turn."""
        self.stops[str(request.session_hash)] = threading.Event()
        return _said("Waiting …"), *_buttons(running=True)

    def cancel(self, request: gr.Request) -> Any:
        """The button that was pressed; it stops at once what runs and else when its turn comes."""
        if stop := self.stops.get(str(request.session_hash)):
            stop.set()
        return gr.Button(interactive=False)

    def left(self, request: gr.Request) -> None:
        """Stop what a tab waits for, and forget its photograph."""
        self.cancel(request)
        self._keep(None, request)

    def _keep(self, photo: str | None, request: gr.Request) -> None:
        """Delete the photograph that a tab had before, unless it is in use."""
        before = self.photos.pop(str(request.session_hash), None)
        if photo:
            self.photos[str(request.session_hash)] = photo
        if before and before not in self.photos.values():
            Path(before).unlink(missing_ok=True)

    def _classes(self, loaded: LoadedModel, seen: app.Seen | None) -> Any:
        choices = app.class_choices(loaded.categories, seen and seen.probabilities)
        return gr.Dropdown(choices=choices, value=choices[0][1] if seen else None)


class _Watch:
    """Says how far an explanation is, and stops it when it is not wanted any more."""

    def __init__(self, asked: Asked, progress: gr.Progress, stop: threading.Event) -> None:
        titles = [METHODS[name].title for name in asked.methods]
        self.steps = [*titles, *(f"curves of {title}" for title in titles)]
        self.step, self._forwards, self._progress, self._stop = 0, 0, progress, stop

    def __call__(self, count: int) -> None:
        if self._stop.is_set():
            raise StoppedError
        self._forwards += count
        said = f"{self.steps[min(self.step, len(self.steps) - 1)]}: {self._forwards:,} forwards"
        self._progress((self.step, len(self.steps)), desc=said, unit="steps")


class _OwnOrigin:
    """Refuses what another site's page sends, and a browser tells by its Origin."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        is_own = headers.get("origin") in (None, f"http://{headers.get('host')}")
        answer = self.app if is_own else PlainTextResponse("Another site's page may not use this.", 403)
        await answer(scope, receive, send)


def _said(text: str, look: str = "") -> str:
    return f'<div class="xcam-status"><span class="{look}">{app.safe(text)}</span></div>'


def _problem(error: Exception | str) -> str:
    text = " ".join(str(error).split())
    gr.Warning(app.safe(text), duration=6)
    return _said(text, "xcam-problem")


def _buttons(*, running: bool) -> tuple[Any, Any]:
    return gr.Button(interactive=not running), gr.Button(interactive=running)


def _shown(seen: app.Seen, found: Found, asked: Asked, alpha: float) -> tuple[Any, ...]:
    done = asked._replace(methods=tuple(found.maps))
    slider = gr.Slider(visible=bool(found.maps))
    code = gr.Code(app.code(done, alpha) if found.maps else "", visible=bool(found.maps))
    return app.overlays(seen.picture, found, asked), app.curves(found), slider, code, done


def _recoded(asked: Asked | None, alpha: float) -> Any:
    return app.code(asked, alpha) if asked and asked.methods else gr.skip()


# -- the page -----------------------------------------------------------------------------------------------


def _controls(loaded: LoadedModel, weights: str, device: str) -> dict[str, Any]:
    """The components that a person chooses with, by name."""
    layers, default = app.layer_choices(loaded, device)
    classes, names = app.class_choices(loaded.categories, None), models.names()
    methods = app.method_choices(app.channels(layers, default))
    size = f"at most {app.MAX_MEGABYTES} MB, {app.MAX_MEGAPIXELS} megapixels"
    parts: dict[str, Any] = {
        "photo": gr.File(label=f"Photograph ({size})", file_types=["image"], height=150),
        "cls": gr.Dropdown(classes, value=None, **_LABELS["cls"]),
        "methods": gr.Dropdown(methods, value=["gradcam"], multiselect=True, **_LABELS["methods"]),
    }
    with gr.Row():
        parts["explain"] = gr.Button("Explain", variant="primary", min_width=100, scale=2)
        parts["cancel"] = gr.Button("Cancel", interactive=False, min_width=100)
    with gr.Accordion("Network and layer", open=True):
        parts["model"] = gr.Dropdown(names, value=loaded.name, allow_custom_value=True, **_LABELS["model"])
        parts["weights"] = gr.Textbox(weights, **_LABELS["weights"])
        parts["layer"] = gr.Dropdown(layers, value=default, num_choices_shown=_LISTED, **_LABELS["layer"])
    return parts


def _results() -> dict[str, Any]:
    """The components that show what was found, by name."""
    code: dict[str, Any] = {"label": "The same pictures in Python", "language": "python", "visible": False}
    return {
        "status": gr.HTML(_said(_BEGIN), elem_id="status"),
        "alpha": gr.Slider(0, 1, 0.5, step=0.05, label="Opacity of the colors", visible=False),
        "overlays": gr.HTML(elem_id="overlays"),
        "curves": gr.HTML(elem_id="curves"),
        "code": gr.Code(interactive=False, **code),
        "asked": gr.State(),
    }


def _wire(page: gr.Blocks, parts: SimpleNamespace, desk: _Desk) -> None:
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = private | {"show_progress": "hidden"}
    network = [parts.model, parts.weights]
    results = [parts.overlays, parts.curves, parts.alpha, parts.code, parts.asked]
    buttons = [parts.explain, parts.cancel]
    see: Any = (desk.photo_chosen, [parts.photo, *network], [parts.cls, parts.status, *results])
    settings = [parts.layer, parts.methods]
    question = [parts.photo, *network, parts.layer, parts.cls, parts.methods, parts.alpha]
    answer = [parts.status, *results, *buttons]
    parts.photo.change(*see, **quiet)
    another = gr.on([parts.model.change, parts.weights.submit], desk.settings, network, settings, **quiet)
    another.then(*see, **quiet)
    parts.layer.input(desk.settings, [*network, parts.layer], settings, **quiet)
    begun = parts.explain.click(desk.begin, None, [parts.status, *buttons], queue=False, **quiet)
    begun.then(desk.explain, question, answer, show_progress_on=parts.status, **private)
    parts.explain.click(None, None, None, js=_SCROLL, **private)
    parts.cancel.click(desk.cancel, None, parts.cancel, queue=False, **quiet)
    parts.alpha.change(None, parts.alpha, None, js=_BLEND, **private)
    parts.alpha.change(_recoded, [parts.asked, parts.alpha], parts.code, trigger_mode="always_last", **quiet)
    page.unload(desk.left)


def serve(
    model: str, weights: str, device: str, port: int, *, browser: bool, ready: Callable[[str], None]
) -> None:
    """Show the page at this machine's own address, until `KeyboardInterrupt`; `ready` gets the address."""
    load = functools.lru_cache(maxsize=2)(lambda name, chosen: app.load(name, chosen, device))
    desk, loaded = _Desk(load, device), load(model, weights)
    with gr.Blocks(title="xcam", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=340):
                controls = _controls(loaded, weights, device)
            with gr.Column(scale=3, min_width=340):
                results = _results()
        _wire(page, SimpleNamespace(**controls, **results), desk)
    page.queue(max_size=8, default_concurrency_limit=1, api_open=False)
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS), Middleware(_OwnOrigin)]
    try:
        _, address, _ = page.launch(
            server_name=_HOSTS[0], server_port=port, share=False, inbrowser=browser, quiet=True,
            prevent_thread_lock=True, max_file_size=f"{app.MAX_MEGABYTES}mb", footer_links=[],
            run_history=False, mcp_server=False, ssr_mode=False, pwa=False, enable_monitoring=False,
            css_paths=[_STYLE], app_kwargs={"middleware": guards},
            theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )  # fmt: skip
        ready(address)
        while True:
            time.sleep(1)
    finally:
        for stop in list(desk.stops.values()):
            stop.set()
        page.close(verbose=False)
