"""Gradient methods against one bare forward and against other libraries.

python -m benchmarks.gradient [--quick] [--networks resnet50 …] [--batches 1 16]
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from torch import Tensor
from torchcam.methods import GradCAM as TorchcamGradCAM

import xcam_fn as xf
from benchmarks import common
from benchmarks.common import Call, Network, Result, correlation, ratios, spread

BARE = "bare forward"
OURS = ("gradcam", "gradcam_pp", "layercam")
PEERS = ("grad-cam", "torchcam", "Captum")
SETUPS = 3

NOTES = """Each number is a time divided by that of one forward without gradients, round by round: the
median and the quartiles. All calls are timed in turn in one process; each runs once more, untimed, right
before it is timed. Each returns normalized maps at the input's size for the predicted class of each
image. The other libraries' objects are made beforehand, each on a deep copy of the network, and compute
Grad-CAM. ResNet-50, VGG-19 and DenseNet-121 have random weights, EfficientNet-Lite0 its published ones;
the input is a photograph, or 16 crops of it."""

PEER_NOTES = """How many times as long as our `gradcam` they take, round by round, and the correlation of
their maps with ours (the smallest of the batch). DenseNet-121 changes the output of `features` in place
(a ReLU), so that a library that reads it after that explains something else. EfficientNet-Lite0 runs one
ReLU6 twice: the other libraries get a copy in which the last activation is a module of its own."""

SETUP_NOTES = f"""The first call on a network traces it and checks the trace; what it learns is kept.
Medians of {SETUPS} fresh copies of the network, after a forward of each."""


class Case(NamedTuple):
    """One network and batch: what each call took, and what the first call on a fresh network takes."""

    network: str
    batch: int
    results: dict[str, Result]


class Setup(NamedTuple):
    """Seconds of the first call on a fresh network and of the next one."""

    network: str
    first: float
    later: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the report."""
    parser = common.arguments("Gradient methods against one bare forward.", list(common.NETWORKS))
    parser.add_argument(
        "--batches", nargs="+", type=int, choices=range(1, 17), metavar="1–16", help="batch sizes"
    )
    options = parser.parse_args(arguments)
    names = options.networks or (["resnet50", "lite0"] if options.quick else list(common.NETWORKS))
    batches = options.batches or ([1] if options.quick else [1, 16])
    load = common.load()
    cases, setups = [], []
    for network in common.networks(names):
        common.progress(f"{network.title}: setup")
        setups.append(measure_setup(network))
        for batch in batches:
            common.progress(f"{network.title}: {batch} image(s)")
            repeats = options.repeats or (5 if options.quick or batch > 1 else 15)
            cases.append(Case(network.title, batch, measure(network, batch, repeats)))
    stem = "gradient-quick" if options.quick else "gradient"
    common.write(options.output, stem, report(cases, setups, load), records(cases))


def measure(network: Network, batch: int, repeats: int) -> dict[str, Result]:
    """The bare forward, ours and the other libraries, in turn."""
    x = common.photographs(network.preset, batch)
    with contextlib.ExitStack() as stack:
        calls: dict[str, Call | None] = {BARE: lambda: bare_forward(network, x)}
        for name in OURS:
            calls[name] = lambda method=xf.METHODS[name]: method(network.model, network.layer, x)
        calls["grad-cam"] = common.guarded(lambda: grad_cam(network, x, stack))
        calls["torchcam"] = common.guarded(lambda: torchcam(network, x, stack))
        calls["Captum"] = common.guarded(lambda: captum(network, x))
        return common.measure(calls, repeats, primed=True)


def bare_forward(network: Network, x: Tensor) -> Tensor:
    """One forward without gradients."""
    with torch.no_grad():
        return network.model(x)


def grad_cam(network: Network, x: Tensor, stack: contextlib.ExitStack) -> Call:
    """pytorch-grad-cam's Grad-CAM; its hooks go with the stack."""
    model, layer = common.for_peer(network)
    cam = stack.enter_context(GradCAM(model, [model.get_submodule(layer)]))
    return lambda: cam(x, None)


def torchcam(network: Network, x: Tensor, stack: contextlib.ExitStack) -> Call:
    """TorchCAM's Grad-CAM; its hooks go with the stack."""
    model, layer = common.for_peer(network)
    cam = stack.enter_context(TorchcamGradCAM(model, layer))

    def run() -> Tensor:
        scores = model(x)
        maps = cam(scores.argmax(1).tolist(), scores, normalized=False)
        return common.normalized(maps[0], x.shape[2:])

    return run


def captum(network: Network, x: Tensor) -> Call:
    """Captum's Grad-CAM, upsampled; it explains the largest logit, so no forward goes into finding it."""
    model, layer = common.for_peer(network)
    cam = LayerGradCam(lambda x: model(x).amax(1), model.get_submodule(layer))

    def run() -> Tensor:
        attribution = cam.attribute(x, relu_attributions=True)
        assert isinstance(attribution, Tensor)
        return common.normalized(attribution.detach()[:, 0], x.shape[2:])

    return run


def measure_setup(network: Network) -> Setup:
    """What the first gradcam on a network costs, next to the second: medians over fresh copies of it."""
    x = common.photographs(network.preset, 1)
    firsts, laters = [], []
    for _ in range(SETUPS):
        fresh = network._replace(model=copy.deepcopy(network.model))
        bare_forward(fresh, x)
        for seconds in (firsts, laters):
            seconds.append(common.timed(lambda fresh=fresh: xf.gradcam(fresh.model, fresh.layer, x))[1])
    return Setup(network.title, float(np.median(firsts)), float(np.median(laters)))


def report(cases: Sequence[Case], setups: Sequence[Setup], load: float) -> str:
    """The tables, in Markdown."""
    columns = (*OURS, *PEERS)
    speed = [
        [
            case.network,
            str(case.batch),
            f"{case.results[BARE].median * 1000:.1f}",
            *(
                case.results[name].error or spread(ratios(case.results[name], case.results[BARE]))
                for name in columns
            ),
        ]
        for case in cases
    ]
    peers = [[case.network, str(case.batch), *(peer_cell(case, name) for name in PEERS)] for case in cases]
    first = [
        [setup.network, *(f"{1000 * s:.1f}" for s in (setup.first, setup.later, setup.first - setup.later))]
        for setup in setups
    ]
    return "\n\n".join(
        (
            "# Gradient methods",
            common.machine(load),
            "## In bare forwards",
            common.table(["Network", "B", "bare forward, ms", *columns], speed),
            NOTES,
            "## Other libraries against ours",
            common.table(["Network", "B", *(f"{name}: time, correlation" for name in PEERS)], peers),
            PEER_NOTES,
            "## Setup, once for each network",
            common.table(["Network", "first call, ms", "later, ms", "setup, ms"], first),
            SETUP_NOTES + "\n",
        )
    )


def peer_cell(case: Case, name: str) -> str:
    """How much longer a library takes than our gradcam, and how well its map agrees."""
    ours, theirs = case.results["gradcam"], case.results[name]
    if theirs.error or ours.error:
        return theirs.error or common.MISSING
    return f"{np.median(ratios(theirs, ours)):.2f} ×, {correlation(theirs.value, ours.value):.4f}"


def records(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The numbers, a row for each network, batch and call."""
    return [
        common.record(
            result,
            case.results[BARE],
            agreement(case, name),
            network=case.network,
            batch=case.batch,
            call=name,
        )
        for case in cases
        for name, result in case.results.items()
    ]


def agreement(case: Case, name: str) -> float | None:
    """The correlation of a library's map with our gradcam's."""
    if name not in PEERS or case.results[name].error or case.results["gradcam"].error:
        return None
    return correlation(case.results[name].value, case.results["gradcam"].value)


if __name__ == "__main__":
    main()
