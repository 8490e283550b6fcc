"""Insertion and deletion, and a whole table of methods and metrics, against one image a forward.

python -m benchmarks.evaluate [--quick] [--networks resnet50 …]
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import xcam_fn as xf
from benchmarks import common
from benchmarks.common import Call, Network, Result
from benchmarks.perturbation import empty_compile_cache, scaled

NETWORKS = ("resnet50", "lite0")
LOOP = "plain loop"
EXACT = "ours"
WAYS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "ours, compiled": {"compile": True},
    "ours, bfloat16": {"precision": "bfloat16", "compile": True},
}
STEPS = 113
TABLE_LAYER = "_blocks.15"
SCALES = 2
GROUPS = 32
# What each method's own loop runs for K maps: so many whole forwards a map, and so many besides, one image
# each. Union-CAM and Fusion-CAM run Score-CAM anew, as where each method is an object of its own.
TABLE = {
    "gradcam": (0, 2),
    "gradcam_pp": (0, 2),
    "xgradcam": (0, 2),
    "layercam": (0, 2),
    "groupcam": (0, 2 * GROUPS + 2),
    "scorecam": (1, 1),
    "ablationcam": (1, 1),
    "iscam": (SCALES, 1),
    "unioncam": (1, 6),
    "fusioncam": (1, 6),
}
JUDGED = 2 * STEPS + 2  # forwards of the four metrics of one heatmap

NOTES = f"""Seconds for one photograph and how many times as fast as the plain loop, in turn in one process:
medians of the rounds. The loop runs one image a forward, float32 and contiguous; it was timed on as many
forwards as the brackets say and scaled. "Insertion and deletion" is {2 * STEPS} forwards for one heatmap.
"The whole table" is {len(TABLE)} methods and four metrics of each, at `{TABLE_LAYER}`, IS-CAM with {SCALES}
scales; a backward counts as one forward there. The methods are {", ".join(TABLE)}.
"compiled" is `compile=True`, "bfloat16" is `precision="bfloat16", compile=True`; "difference" is the largest
between an area or score and the exact one. ResNet-50 has random weights."""
SETUP_NOTE = "Setup is what the first call takes beyond the later ones; compilation starts with nothing.\n"


class Case(NamedTuple):
    """A network and a task, and what each way of doing it took.

    Attributes:
        network: its title.
        task: what was done.
        forwards: of the plain loop.
        sample: how many of them were timed.
        results: by way.
    """

    network: str
    task: str
    forwards: int
    sample: int
    results: dict[str, Result]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the report."""
    parser = common.arguments("Metrics and a whole table against one image a forward.", NETWORKS)
    parser.add_argument("--only-exact", action="store_true", help="leave the compiled and bfloat16 ways out")
    parser.add_argument("--no-bfloat16", action="store_true", help="for processors that only emulate it")
    options = parser.parse_args(arguments)
    names = options.networks or (["lite0"] if options.quick else list(NETWORKS))
    repeats = options.repeats or (1 if options.quick else 3)
    ways = dict(list(WAYS.items())[: 1 if options.only_exact else 2 if options.no_bfloat16 else None])
    load = common.load()
    cases = []
    with empty_compile_cache():
        for network in common.networks(names):
            sample = 32 if options.quick else 96
            common.progress(f"{network.title}: insertion and deletion")
            cases.append(curves(network, ways, sample, repeats))
            if network.name == "lite0":
                common.progress(f"{network.title}: the whole table")
                cases.append(table(network, ways, sample, repeats))
    stem = "evaluate-quick" if options.quick else "evaluate"
    common.write(options.output, stem, report(cases, list(ways), load), records(cases))


def curves(network: Network, ways: dict[str, Any], sample: int, repeats: int) -> Case:
    """Insertion and deletion of one heatmap."""
    x = common.photographs(network.preset, 1)
    heatmap = xf.gradcam(network.model, network.layer, x)
    model = copy.deepcopy(network.model)

    def ours(options: dict[str, Any]) -> Call:
        return lambda: torch.cat(
            [curve(model, x, heatmap, **options).auc for curve in (xf.insertion, xf.deletion)]
        )

    calls: dict[str, Call | None] = {LOOP: loop(network.model, x, heatmap[0], sample)}
    calls |= {way: ours(options) for way, options in ways.items()}
    results = common.measure(calls, repeats)
    forwards = 2 * STEPS
    results[LOOP] = scaled(results[LOOP], forwards / sample)
    return Case(network.title, "insertion and deletion", forwards, sample, results)


def table(network: Network, ways: dict[str, Any], sample: int, repeats: int) -> Case:
    """All methods and metrics of one photograph."""
    x = common.photographs(network.preset, 1)
    model = copy.deepcopy(network.model)
    K = xf.features(network.model, TABLE_LAYER, x).shape[1]

    def ours(options: dict[str, Any]) -> Call:
        def run() -> Tensor:
            maps = xf.explain_all(model, TABLE_LAYER, x, None, list(TABLE), num_samples=SCALES, **options)
            found = xf.evaluate.judged(model, x, maps, **options)
            scores = [score for row in found.values() for score in row.values()]
            return torch.cat([s.auc if isinstance(s, xf.Curve) else s for s in scores])

        return run

    calls: dict[str, Call | None] = {
        LOOP: loop(network.model, x, xf.gradcam(network.model, TABLE_LAYER, x)[0], sample)
    }
    calls |= {way: ours(options) for way, options in ways.items()}
    results = common.measure(calls, repeats)
    forwards = sum(each * K + once + JUDGED for each, once in TABLE.values())
    results[LOOP] = scaled(results[LOOP], forwards / sample)
    return Case(network.title, "the whole table", forwards, sample, results)


def loop(model: nn.Module, x: Tensor, heatmap: Tensor, forwards: int) -> Call:
    """The deletion curve as it is usually written, for some of its steps: one image a forward."""
    order = heatmap.flatten().argsort(descending=True)
    pixels = -(-order.numel() // (STEPS - 1))

    @torch.no_grad()
    def run() -> Tensor:
        cls = int(model(x).argmax())
        image = x.clone()
        scores = []
        for step in range(forwards):
            at = order[step * pixels : (step + 1) * pixels]
            image.flatten(2)[:, :, at] = 0
            scores.append(model(image).softmax(1)[0, cls])
        return torch.stack(scores)

    return run


# -- reports ------------------------------------------------------------------------------------------------


def report(cases: Sequence[Case], ways: Sequence[str], load: float) -> str:
    """The tables in Markdown."""
    header = ["Network", "task", "forwards", f"{LOOP}, s", *ways]
    rows = [
        [
            case.network,
            case.task,
            str(case.forwards),
            f"{case.results[LOOP].median:.1f} [{case.sample}]",
            *(cell(case, way) for way in ways),
        ]
        for case in cases
    ]
    setup = [
        [case.network, case.task, way, seconds(case, way), difference(case, way)]
        for case in cases
        for way in ways
    ]
    return "\n\n".join(
        [
            "# Metrics and whole tables",
            common.machine(load),
            common.table(header, rows),
            NOTES,
            common.table(["Network", "task", "", "setup, s", "difference"], setup),
            SETUP_NOTE,
        ]
    )


def cell(case: Case, way: str) -> str:
    """Seconds, and how many times as fast as the loop."""
    result = case.results[way]
    if result.error:
        return result.error
    speedup = case.results[LOOP].median / result.median
    return f"{result.median:.2f} s, {speedup:.1f} ×"


def seconds(case: Case, way: str) -> str:
    """What the first call took beyond the later ones."""
    result = case.results[way]
    return common.MISSING if result.error else f"{max(result.first - result.median, 0):.1f}"


def difference(case: Case, way: str) -> str:
    """The largest difference to the exact scores."""
    result = case.results[way]
    return common.MISSING if result.error else f"{(result.value - case.results[EXACT].value).abs().max():.1e}"


def records(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The numbers, a row for each case and way."""
    return [
        common.record(result, case.results[LOOP], None, network=case.network, task=case.task, way=way)
        for case in cases
        for way, result in case.results.items()
    ]


if __name__ == "__main__":
    main()
