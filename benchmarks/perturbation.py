"""Perturbation methods against the plain loop and against other libraries, and the memory they take.

python -m benchmarks.perturbation [--quick] [--networks lite0 …] [--memory-seconds 900]
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_grad_cam import AblationCAM, ScoreCAM
from torch import Tensor, nn
from torch.nn import functional as F
from torchcam.methods import ScoreCAM as TorchcamScoreCAM

import xcam_fn as xf
from benchmarks import common
from benchmarks.common import Call, Network, Result, correlation

NETWORKS = ("lite0", "vgg19", "resnet50")
LOOP = "plain loop"
PEERS = ("grad-cam", "torchcam")
EXACT = "ours"
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "scorecam": {
        EXACT: {},
        "ours, compiled": {"compile": True},
        "ours, bfloat16": {"precision": "bfloat16", "compile": True},
    },
    "ablationcam": {EXACT: {}},
}
TITLES = {"scorecam": "Score-CAM", "ablationcam": "Ablation-CAM"}
MEMORY_CASES = ("bare forward", *TITLES)

NOTES = """Seconds for one image (a photograph), and how many times as fast as the plain loop, in turn in
one process: medians of the rounds. The plain loops run one image a forward, float32 and contiguous:
Score-CAM's runs one masked image a map, Ablation-CAM's the whole network a channel. Where a number of maps
is in brackets, the call was timed on so many, evenly chosen, and scaled to all. "compiled" is `compile=True`,
"bfloat16" is `precision="bfloat16", compile=True`. The other libraries run with their default batch sizes.
ResNet-50 and VGG-19 have random weights, EfficientNet-Lite0 its published ones."""

SETUP_NOTES = """Setup is what the first call takes beyond the later ones; compilation starts from an
empty cache. The correlation is with our exact map. The other libraries define Score-CAM differently (a
softmax over the logits of all maps), which the correlation shows too."""

MEMORY_NOTES = """Peak resident memory above that of the process with the network and its input loaded,
each in a process of its own, with the default chunk size."""


class Case(NamedTuple):
    """One network and method.

    Attributes:
        network: its title.
        method: its name.
        maps: how many maps the layer has.
        samples: on how many of them each call was timed.
        results: what each call took, scaled to all maps.
    """

    network: str
    method: str
    maps: int
    samples: dict[str, int]
    results: dict[str, Result]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the report."""
    parser = common.arguments("Perturbation methods against the plain loop.", NETWORKS)
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=list(TITLES), help="which methods")
    parser.add_argument("--only-exact", action="store_true", help="leave the compiled and bfloat16 ways out")
    parser.add_argument("--sample", type=int, help="maps that the plain loops run")
    parser.add_argument("--peer-sample", type=int, help="maps that the other libraries run (default: all)")
    parser.add_argument(
        "--memory-seconds", type=float, help="stop a measurement of memory after so long (0: measure none)"
    )
    options = parser.parse_args(arguments)
    names = options.networks or (["lite0"] if options.quick else list(NETWORKS))
    repeats = options.repeats or (1 if options.quick else 3)
    sample = options.sample or (64 if options.quick else 256)
    peer_sample = options.peer_sample or (64 if options.quick else sys.maxsize)
    limit = options.memory_seconds
    if limit is None:
        limit = 60 if options.quick else 900
    load = common.load()
    memory = measure_memory(
        "lite0" if options.quick else "resnet50", [1] if options.quick else [1, 16], limit
    )
    cases = []
    with empty_compile_cache():
        for network in common.networks(names):
            for method in options.methods:
                common.progress(f"{network.title}: {TITLES[method]}")
                ways = {EXACT: {}} if options.only_exact else WAYS[method]
                cases.append(measure(network, method, ways, sample, peer_sample, repeats))
    stem = "perturbation-quick" if options.quick else "perturbation"
    common.write(options.output, stem, report(cases, memory, load), records(cases))


# ---------------------------------------------------------------------------------------------------------
# What is timed
# ---------------------------------------------------------------------------------------------------------


def measure(
    network: Network,
    method: str,
    ways: dict[str, dict[str, Any]],
    sample: int,
    peer_sample: int,
    repeats: int,
) -> Case:
    """The plain loop, ours and the other libraries, in turn."""
    x = common.photographs(network.preset, 1)
    features = xf.features(network.model, network.layer, x)
    network = network._replace(model=copy.deepcopy(network.model))  # ours starts knowing nothing of it
    maps = features.shape[1]
    channels, peer_channels = evenly(maps, sample), evenly(maps, peer_sample)
    with contextlib.ExitStack() as stack:
        calls = {LOOP: plain_loop(network, method, x, features, channels, stack)}
        for name in PEERS:
            calls[name] = peer(network, method, name, x, peer_channels, stack)
        for way, options in ways.items():
            calls[way] = ours(network, method, x, options)
        results = common.measure(calls, repeats)
    samples = dict.fromkeys(calls, maps) | {name: len(peer_channels) for name in PEERS}
    samples[LOOP] = len(channels)
    scaled_results = {name: scaled(result, maps / samples[name]) for name, result in results.items()}
    return Case(network.title, method, maps, samples, scaled_results)


def evenly(maps: int, sample: int) -> list[int]:
    """Which maps are run: so many of them, evenly chosen, or all."""
    return torch.linspace(0, maps - 1, min(maps, sample)).round().long().tolist()


def scaled(result: Result, factor: float) -> Result:
    """What a sample took as what all maps would take."""
    return result._replace(first=result.first * factor, seconds=[s * factor for s in result.seconds])


def ours(network: Network, method: str, x: Tensor, options: dict[str, Any]) -> Call | None:
    """Our method, or None where it is not there or has no such options."""
    found = xf.METHODS.get(method)
    if found is None or not options.keys() <= inspect.signature(found).parameters.keys():
        return None
    return lambda: found(network.model, network.layer, x, **options)


def plain_loop(
    network: Network,
    method: str,
    x: Tensor,
    features: Tensor,
    channels: list[int],
    stack: contextlib.ExitStack,
) -> Call | None:
    """The method as it is usually written, on some of the channels."""
    if method == "scorecam":
        return masked_loop(network.model, x, features[:, channels])
    return ablated_loop(network, x, features, channels, stack)


def peer(
    network: Network, method: str, name: str, x: Tensor, channels: list[int], stack: contextlib.ExitStack
) -> Call | None:
    """Another library's method, on as many maps as there are channels; None where it has none."""
    if name == "grad-cam":
        kind = ScoreCAM if method == "scorecam" else AblationCAM
        return common.guarded(lambda: grad_cam(network, kind, x, channels, stack))
    return common.guarded(lambda: torchcam(network, x, channels, stack)) if method == "scorecam" else None


def masked_loop(model: nn.Module, x: Tensor, features: Tensor) -> Call:
    """Score-CAM as it is usually written: for each map, one image masked with it and one forward."""
    with torch.no_grad():
        probabilities = torch.stack([model(image).softmax(1)[0] for image in (x, torch.zeros_like(x))])
    cls = int(probabilities[0].argmax())

    @torch.no_grad()
    def run() -> Tensor:
        weights = []
        for k in range(features.shape[1]):
            mask = F.interpolate(features[:, k : k + 1], x.shape[2:], mode="bilinear", align_corners=False)
            span = mask.max() - mask.min()
            mask = (mask - mask.min()) / span if span > 0 else torch.zeros_like(mask)
            weights.append(model(x * mask).softmax(1)[0, cls] - probabilities[1, cls])
        return weighted(features, weights, x)

    return run


def ablated_loop(
    network: Network, x: Tensor, features: Tensor, channels: list[int], stack: contextlib.ExitStack
) -> Call:
    """Ablation-CAM by its definition: for each channel, the whole network with that channel set to 0."""
    model, layer = common.for_peer(network)
    with torch.no_grad():
        logits = model(x)[0]
    cls = int(logits.argmax())
    ablated = 0

    def ablate(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, ablated] = 0
        return changed

    stack.callback(model.get_submodule(layer).register_forward_hook(ablate).remove)

    @torch.no_grad()
    def run() -> Tensor:
        nonlocal ablated
        weights = []
        for channel in channels:
            ablated = channel
            weights.append((logits[cls] - model(x)[0, cls]) / logits[cls])
        return weighted(features[:, channels], weights, x)

    return run


def weighted(features: Tensor, weights: list[Tensor], x: Tensor) -> Tensor:
    """The heatmap of the channels, each with its weight."""
    cam = (features * torch.stack(weights)[None, :, None, None]).sum(1).relu()
    return common.normalized(cam, x.shape[2:])


def grad_cam(
    network: Network,
    method: Callable[..., Any],
    x: Tensor,
    channels: list[int],
    stack: contextlib.ExitStack,
) -> Call:
    """pytorch-grad-cam's method; its hooks go with the stack."""
    model, layer = common.for_peer(network)
    cam = stack.enter_context(
        method(model, [model.get_submodule(layer)], reshape_transform=lambda maps: maps[:, channels])
    )
    return common.quiet(lambda: cam(x, None))


def torchcam(network: Network, x: Tensor, channels: list[int], stack: contextlib.ExitStack) -> Call:
    """TorchCAM's Score-CAM; its hooks go with the stack."""
    model, layer = common.for_peer(network)
    cam = stack.enter_context(
        TorchcamScoreCAM(model, layer, reshape_transform=lambda maps: maps[:, channels])
    )

    @torch.no_grad()
    def run() -> Tensor:
        scores = model(x)
        return common.normalized(cam(scores.argmax(1).tolist(), normalized=False)[0], x.shape[2:])

    return run


@contextlib.contextmanager
def empty_compile_cache() -> Iterator[None]:
    """A cache of its own for the compiler, so that the setup is that of a first time."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def measure_memory(network: str, batches: Sequence[int], limit: float) -> list[list[str]]:
    """Rows of the table of memory, each case measured in a process of its own; none for a limit of 0."""
    rows = []
    for case in MEMORY_CASES if limit > 0 else ():
        row = [TITLES.get(case, case)]
        for batch in batches:
            common.progress(f"{network}: memory of {case}, {batch} image(s)")
            row.append(memory_of(network, case, batch, limit))
        rows.append(row)
    return [[common.NETWORKS[network][0], *(f"B = {batch}" for batch in batches)], *rows] if rows else []


def memory_of(network: str, case: str, batch: int, limit: float) -> str:
    """The peak of one case in MiB, "–" where there is no such method yet, or the error's class."""
    if case in TITLES and case not in xf.METHODS:
        return common.MISSING
    command = [sys.executable, "-m", "benchmarks.memory", network, case, str(batch), str(limit)]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        print(f"  {last}", file=sys.stderr)
        return last.partition(":")[0]
    found = json.loads(done.stdout.splitlines()[-1])
    stopped = "" if found["finished"] else f" (first {limit:.0f} s)"
    return f"{found['bytes'] / 2**20:.0f} MiB{stopped}"


# ---------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------


def report(cases: Sequence[Case], memory: Sequence[Sequence[str]], load: float) -> str:
    """The tables, in Markdown."""
    sections = ["# Perturbation methods", common.machine(load)]
    for method in dict.fromkeys(case.method for case in cases):
        chosen = [case for case in cases if case.method == method]
        columns = [name for name in chosen[0].results if name != LOOP]
        columns.sort(key=lambda name: name not in WAYS[method])
        rows = [
            [case.network, str(case.maps), loop_cell(case), *(cell(case, c) for c in columns)]
            for case in chosen
        ]
        sections += [f"## {TITLES[method]}", common.table(["Network", "maps", f"{LOOP}, s", *columns], rows)]
    sections += [NOTES, "## Setup and agreement"]
    rows = [
        [case.network, TITLES[case.method], name, setup_cell(case, name), agreement_cell(case, name)]
        for case in cases
        for name in case.results
        if name != LOOP
    ]
    sections += [common.table(["Network", "Method", "", "setup, s", "correlation"], rows), SETUP_NOTES]
    if memory:
        sections += ["## Memory", common.table(memory[0], memory[1:]), MEMORY_NOTES]
    return "\n\n".join(sections) + "\n"


def loop_cell(case: Case) -> str:
    """The loop's seconds, and on how many maps it ran."""
    loop = case.results[LOOP]
    return loop.error or f"{loop.median:.1f}{sample_note(case, LOOP)}"


def cell(case: Case, name: str) -> str:
    """Seconds, and how many times as fast as the loop."""
    result = case.results[name]
    times = speedups(case, name)
    if result.error or not times:
        return result.error or common.MISSING
    return f"{result.median:.2f} s{sample_note(case, name)}, {np.median(times):.1f} ×"


def sample_note(case: Case, name: str) -> str:
    """On how many maps a call was timed, where not on all."""
    return f" [{case.samples[name]}]" if case.samples[name] < case.maps else ""


def speedups(case: Case, name: str) -> list[float]:
    """How many times as fast as the loop, round by round."""
    return common.ratios(case.results[LOOP], case.results[name])


def setup_cell(case: Case, name: str) -> str:
    """What the first call took beyond the later ones. (Others set up when made, which is not timed.)"""
    result = case.results[name]
    if result.error or name not in WAYS[case.method]:
        return result.error or common.MISSING
    return f"{max(0.0, result.first - result.median):.1f}"


def agreement_cell(case: Case, name: str) -> str:
    """The correlation with our exact map."""
    found = agreement(case, name)
    return common.MISSING if found is None else f"{found:.4f}"


def agreement(case: Case, name: str) -> float | None:
    """The correlation with our exact map, where both ran on all maps."""
    result, exact = case.results[name], case.results[EXACT]
    if result.error or exact.error or case.samples[name] < case.maps:
        return None
    return correlation(result.value, exact.value)


def records(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The numbers, a row for each network, method and way."""
    return [
        common.record(
            result,
            case.results[LOOP],
            agreement(case, name),
            network=case.network,
            method=case.method,
            maps=case.maps,
            timed_maps=case.samples[name],
            call=name,
        )
        for case in cases
        for name, result in case.results.items()
    ]


if __name__ == "__main__":
    main()
