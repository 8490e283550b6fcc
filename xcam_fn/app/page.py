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

from xcam_fn import models
from xcam_fn.app import photograph as app
from xcam_fn.app.photograph import Asked, Found, StoppedError
from xcam_fn.methods import METHODS
from xcam_fn.models import describe
from xcam_fn.models.load import LoadedModel

_STYLE = Path(__file__).parent / "templates" / "app.css"
_ALPHA = 0.5
_BLEND = "(alpha) => { document.documentElement.style.setProperty('--xcam-alpha', alpha) }"
_SCROLL = """() => {  // to the results, where a narrow screen has them below the controls
    const status = document.querySelector("#status")
    if (status.getBoundingClientRect().top > innerHeight / 2) status.scrollIntoView({behavior: "smooth"})
}"""
_LISTED = 2000  # layers in the list, more than any network has
_WAITING = 8  # how many may wait in the queue
_NETWORKS = 2  # how many are kept
_EXPECTED = (ValueError, TypeError, OSError, RuntimeError)
_NOTHING = Found({}, {}, {})
_BEGIN = "No photograph yet: drop one into the frame, or click there to pick one."
_INTRODUCTION = """\
# Where does the network look?
Drop a photograph: the network says what it sees. Choose one of its classes and press **Explain**: colors show
which parts of the photograph speak for that class.
"""


@dataclass(frozen=True)
class _Desk:
    """What the handlers of one app share.

    Attributes:
        load: a network by its name and weights, kept when it was loaded before.
        device: where networks run.
        stops: for each browser tab that waits for an explanation, what tells it to stop.
    """

    load: Callable[[str, str], LoadedModel]
    device: str
    stops: dict[str, threading.Event] = field(default_factory=dict)

    def photo_chosen(self, photo: str | None, model: str, weights: str) -> tuple[Any, ...]:
        """The class, the status and emptied results, of another photograph."""
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

    def network_chosen(self, model: str, weights: str) -> tuple[Any, Any]:
        """The layers and methods of another network."""
        try:
            choices, default = app.layer_choices(self.load(model, weights), self.device)
        except _EXPECTED:
            return gr.skip(), gr.skip()  # what happens next, to the photograph, tells why
        prices = app.method_choices(app.channels(choices, default))
        return gr.Dropdown(choices=choices, value=default), gr.Dropdown(choices=prices)

    def layer_chosen(self, model: str, weights: str, layer: str) -> Any:
        """The methods with what they cost at another layer."""
        try:
            choices, _ = app.layer_choices(self.load(model, weights), self.device)
        except _EXPECTED:
            return gr.skip()
        return gr.Dropdown(choices=app.method_choices(app.channels(choices, layer)))

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
        unchanged = (gr.skip(),) * 5
        if photo is None or cls is None or not methods:
            missing = "a photograph" if photo is None else "a class" if cls is None else "a method"
            yield _problem(f"Choose {missing} first."), *unchanged, *_buttons(running=False)
            return
        try:
            stop = self.stops[str(request.session_hash)]
            loaded = self.load(model, weights)
            seen = app.see(loaded, photo, self.device)
            asked = Asked(Path(photo).name, model, weights or None, layer, cls, loaded.categories[cls],
                          tuple(methods), self.device)  # fmt: skip
            watch = _Watch(asked, progress, stop)
            found = _NOTHING
            for found in app.explain(loaded, asked, seen.x, watch):
                watch.step += 1
                yield _said(""), *_shown(seen, found, asked, alpha), *_buttons(running=True)
            probability = float(seen.probabilities[cls])
            done = _said(f"Explained: {describe.caption(loaded, cls, probability, layer)}.")
            yield done, *_shown(seen, found, asked, alpha), *_buttons(running=False)
        except StoppedError:
            yield _said("Canceled. What was found until then stays."), *unchanged, *_buttons(running=False)
        except _EXPECTED as error:
            yield _problem(error), *unchanged, *_buttons(running=False)
        finally:
            self.stops.pop(str(request.session_hash), None)

    def begin(self, request: gr.Request) -> tuple[Any, ...]:
        """The status and the buttons while an explanation waits for its turn."""
        self.stops[str(request.session_hash)] = threading.Event()
        return _said("Waiting …"), *_buttons(running=True)

    def cancel(self, request: gr.Request) -> Any:
        """The button that was pressed; the explanation itself says when it has stopped."""
        self.left(request)
        return gr.Button(interactive=False)

    def left(self, request: gr.Request) -> None:
        """Stop what a tab waits for, at once where it runs and else when its turn comes."""
        if stop := self.stops.get(str(request.session_hash)):
            stop.set()

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
        step = min(self.step, len(self.steps) - 1)
        said = f"{self.steps[step]}: {self._forwards:,} forwards"
        self._progress((step, len(self.steps)), desc=said, unit="steps")


def _said(text: str) -> str:
    return f'<div class="xcam-status">{app.safe(text)}</div>'


def _problem(error: Exception | str) -> str:
    text = app.safe(" ".join(str(error).split()))
    gr.Warning(text, duration=6)
    return f'<div class="xcam-status"><span class="xcam-problem">{text}</span></div>'


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
    choices, default = app.layer_choices(loaded, device)
    prices = app.method_choices(app.channels(choices, default))
    size = f"at most {app.MAX_MEGABYTES} MB, {app.MAX_MEGAPIXELS} megapixels"
    cls_info = "The five likeliest come first; type to search by name."
    methods_info = "A map for each. Forwards are runs of the network: many take long."
    model_info = "lite0 is EfficientNet-Lite0; or one of torchvision, or timm:NAME."
    weights_info = "A checkpoint's path, or random, then Enter; empty for the published ones."
    layer_info = "Whose maps are used: channels × height × width."
    classes = app.class_choices(loaded.categories, None)
    parts: dict[str, Any] = {
        "photo": gr.File(label=f"Photograph ({size})", file_types=["image"], height=150),
        "cls": gr.Dropdown(classes, value=None, label="Class to explain", info=cls_info),
        "methods": gr.Dropdown(
            prices, value=["gradcam"], multiselect=True, label="Methods", info=methods_info
        ),
    }
    with gr.Row():
        parts["explain"] = gr.Button("Explain", variant="primary", min_width=100, scale=2)
        parts["cancel"] = gr.Button("Cancel", interactive=False, min_width=100)
    with gr.Accordion("Network and layer", open=True):
        parts["model"] = gr.Dropdown(
            models.names(), value=loaded.name, label="Network", allow_custom_value=True, info=model_info
        )
        parts["weights"] = gr.Textbox(weights, label="Weights", info=weights_info)
        parts["layer"] = gr.Dropdown(
            choices, value=default, label="Layer", info=layer_info, num_choices_shown=_LISTED
        )
    return parts


def _results() -> dict[str, Any]:
    """The components that show what was found, by name."""
    code = "The same pictures in Python"
    return {
        "status": gr.HTML(_said(_BEGIN), elem_id="status"),
        "alpha": gr.Slider(0, 1, _ALPHA, step=0.05, label="Opacity of the colors", visible=False),
        "overlays": gr.HTML(elem_id="overlays"),
        "curves": gr.HTML(elem_id="curves"),
        "code": gr.Code(label=code, language="python", interactive=False, visible=False),
        "asked": gr.State(),
    }


def _wire(page: gr.Blocks, parts: SimpleNamespace, desk: _Desk) -> None:
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = private | {"show_progress": "hidden"}
    network = [parts.model, parts.weights]
    results = [parts.overlays, parts.curves, parts.alpha, parts.code, parts.asked]
    of_photo: dict[str, Any] = {
        "fn": desk.photo_chosen,
        "inputs": [parts.photo, *network],
        "outputs": [parts.cls, parts.status, *results],
    } | quiet
    parts.photo.change(**of_photo)
    gr.on(
        [parts.model.change, parts.weights.submit], desk.network_chosen, network,
        [parts.layer, parts.methods], **quiet,
    ).then(**of_photo)  # fmt: skip
    parts.layer.input(desk.layer_chosen, [*network, parts.layer], parts.methods, **quiet)
    buttons = [parts.explain, parts.cancel]
    parts.explain.click(desk.begin, None, [parts.status, *buttons], queue=False, **quiet).then(
        desk.explain,
        [parts.photo, *network, parts.layer, parts.cls, parts.methods, parts.alpha],
        [parts.status, *results, *buttons],
        show_progress_on=parts.status,
        **private,
    )
    parts.explain.click(None, None, None, js=_SCROLL, **private)
    parts.cancel.click(desk.cancel, None, parts.cancel, queue=False, **quiet)
    parts.alpha.change(None, parts.alpha, None, js=_BLEND, **private)
    parts.alpha.change(_recoded, [parts.asked, parts.alpha], parts.code, trigger_mode="always_last", **quiet)
    page.unload(desk.left)


def _page(desk: _Desk, loaded: LoadedModel, weights: str) -> gr.Blocks:
    with gr.Blocks(title="xcam", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=340):
                controls = _controls(loaded, weights, desk.device)
            with gr.Column(scale=3, min_width=340):
                results = _results()
        _wire(page, SimpleNamespace(**controls, **results), desk)
    return page.queue(max_size=_WAITING, default_concurrency_limit=1, api_open=False)


def serve(
    model: str, weights: str, device: str, port: int, *, browser: bool, ready: Callable[[str], None]
) -> None:
    """Show the page at this machine's own address, until `KeyboardInterrupt`.

    Args:
        model: as for `models.load`, chosen at the beginning.
        weights: as for `models.load`, empty for the published ones.
        device: where networks run.
        port: of 127.0.0.1.
        browser: open one.
        ready: called with the address.
    """
    desk = _Desk(functools.lru_cache(_NETWORKS)(lambda name, kept: app.load(name, kept, device)), device)
    page = _page(desk, desk.load(model, weights), weights)
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1", server_port=port, share=False, inbrowser=browser, quiet=True,
            prevent_thread_lock=True, max_file_size=f"{app.MAX_MEGABYTES}mb", footer_links=[],
            run_history=False, mcp_server=False, ssr_mode=False, pwa=False, enable_monitoring=False,
            css_paths=[_STYLE],
            theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )  # fmt: skip
        ready(address)
        while True:
            time.sleep(1)
    finally:
        for stop in list(desk.stops.values()):
            stop.set()
        page.close(verbose=False)
