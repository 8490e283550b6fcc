"""The records as Markdown tables and as figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.cases import GRADIENT, OTHERS, TABLE, TABLE_FORWARDS, TABLE_LAYER, TABLE_SCALES, TITLES, Case
from benchmarks.libraries import BARE, BFLOAT16, COMPILED, LOOP, OURS
from benchmarks.networks import NETWORKS
from benchmarks.records import Record

MISSING = "–"
COLORS = {
    OURS: "#0b6e4f",
    COMPILED: "#21a179",
    BFLOAT16: "#8bd3b0",
    "grad-cam": "#d1495b",
    "torchcam": "#edae49",
    "Captum": "#66529f",
    LOOP: "#777777",
    BARE: "#111111",
}

GRADIENT_NOTES = """Time relative to one forward pass of the same batch in the same round: median and
quartiles. Each call returns normalized maps at the images' size, for the predicted class of each image or
for the given number of classes. The other libraries' objects are created before timing starts."""

LOOP_NOTES = f"""Seconds for one photograph, and the speedup over a plain loop with one image per forward
pass in float32: medians. A percentage in brackets is the share of the work that was run; the time is scaled
to all of it. "compiled" is `compile=True`, "bfloat16" is `precision="bfloat16", compile=True`; the next table
has the one-time cost of compiling. SS-CAM and IS-CAM run 2 samples. {TITLES[TABLE]}: four metrics for each of
{", ".join(TABLE_FORWARDS)}, at `{TABLE_LAYER}`, IS-CAM with {TABLE_SCALES} scales; its loop counts a backward
pass as one forward pass."""

AGREEMENT_NOTES = """Agreement is the correlation with our exact map (the smallest of the batch), with the
library's own definition of the method if it has one; ± is the largest difference, of scores and of
XplainCAM's maps. Memory is the peak above that of a process with the network and images loaded; each
measurement has its own process. Setup is the extra time of the first call. EfficientNet-Lite0 has its
published weights, the other networks random ones; the images are crops of one photograph. DenseNet-121
modifies the layer's output in place, so a library that reads it afterward sees other values."""


def markdown(records: Sequence[Record], machine: str, command: str) -> str:
    """Return the report."""
    gradient = [r for r in records if r.task in (*GRADIENT, *OTHERS) or "," in r.task]
    others = [record for record in records if record not in gradient]
    parts = ["# Benchmarks", machine + f". `{command}` makes this page."]
    if gradient:
        parts += ["## Methods with few forward passes", gradient_table(gradient), GRADIENT_NOTES]
    if others:
        parts += ["## Perturbation methods and metrics", loop_table(others), LOOP_NOTES]
    return (
        "\n\n".join([*parts, "## Agreement, memory, setup", details_table(records), AGREEMENT_NOTES]) + "\n"
    )


def gradient_table(records: Sequence[Record]) -> str:
    """Return the times relative to a forward pass."""

    def cell(record: Record) -> str:
        return record.error.partition(":")[0] or _spread(record.in_forwards)

    def bare(of: dict[str, Record]) -> str:
        return f"{1000 * of[BARE].seconds[1]:.0f}" if BARE in of and of[BARE].seconds else MISSING

    names = _libraries(records, leave=(BARE, LOOP))
    rows = [
        [*_described(case), bare(of), *(cell(of[name]) if name in of else MISSING for name in names)]
        for case, of in _by_case(records)
    ]
    return table(["Method", "Network", "B", "pixels", "forward, ms", *names], rows, left=2)


def loop_table(records: Sequence[Record]) -> str:
    """Return seconds, and speedups over the plain loop."""

    def cell(record: Record) -> str:
        if record.error:
            return record.error.partition(":")[0]
        share = f" [{record.share:.0%}]" if record.share < 1 else ""
        times = f", {record.to_loop:.3g} ×" if record.to_loop is not None and record.library != LOOP else ""
        return f"{record.seconds[1]:.3g} s{share}{times}" if record.seconds else MISSING

    names = _libraries(records, leave=(BARE,))
    rows = [
        [case.title, NETWORKS[case.network][0], str(next(iter(of.values())).maps)]
        + [cell(of[name]) if name in of else MISSING for name in names]
        for case, of in _by_case(records)
    ]
    return table(["Task", "Network", "maps", *names], rows, left=2)


def details_table(records: Sequence[Record]) -> str:
    """Return how each library's map agrees with ours, its memory, and the cost of its first call."""

    def agreement(record: Record) -> str:
        if record.difference is not None:
            return f"± {record.difference:.1e}"
        return MISSING if record.correlation is None else f"{record.correlation:.4f}"

    rows = [
        [
            *_described(record.case),
            record.library,
            agreement(record),
            MISSING if record.memory is None else f"{record.memory:.0f}",
            MISSING if record.setup is None else f"{record.setup:.2f}",
        ]
        for record in records
        if record.library != LOOP and not record.error
    ]
    header = ["Method", "Network", "B", "pixels", "library", "agreement", "memory, MiB", "setup, s"]
    return table(header, rows, left=2)


def _described(case: Case) -> list[str]:
    return [case.title, NETWORKS[case.network][0], str(case.batch), str(case.size)]


def _by_case(records: Iterable[Record]) -> Iterable[tuple[Case, dict[str, Record]]]:
    found: dict[Case, dict[str, Record]] = {}
    for record in records:
        found.setdefault(record.case, {})[record.library] = record
    return found.items()


def _libraries(records: Iterable[Record], leave: Sequence[str]) -> list[str]:
    names = dict.fromkeys(record.library for record in records if record.library not in leave)
    order = [LOOP, OURS, COMPILED, BFLOAT16]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _spread(values: Sequence[float]) -> str:
    return f"{values[1]:.2f} ({values[0]:.2f}–{values[2]:.2f})" if values else MISSING


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; the first `left` columns are left-aligned, the others right-aligned."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [
        [
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in [header, rule, *rows]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- figures ------------------------------------------------------------------------------------------------


def figure(records: Sequence[Record]) -> Figure:
    """Draw each library's time as a multiple of ours, a row for each case."""
    cases = [(case, of) for case, of in _by_case(records) if OURS in of and of[OURS].seconds]
    names = _libraries([record for _, of in cases for record in of.values()], leave=(BARE,))
    drawn, axes = plt.subplots(figsize=(9, 1.4 + 0.27 * len(cases)), layout="constrained")
    for name in names:
        points = [
            (of[name].seconds[1] / of[OURS].seconds[1], -row)
            for row, (_, of) in enumerate(cases)
            if name in of and of[name].seconds
        ]
        if not points:
            continue
        marker = "D" if name == OURS else "o"
        axes.scatter(
            *zip(*points, strict=True), s=34, label=name, color=COLORS.get(name), marker=marker, zorder=3
        )
    labels = []
    for case, _ in cases:
        extra = [f"B = {case.batch}"] * (case.batch > 1) + [f"{case.size} px"] * (case.size != 224)
        labels.append(", ".join([case.title, NETWORKS[case.network][0], *extra]))
    axes.set_yticks([-row for row in range(len(cases))], labels, fontsize=8)
    axes.set_ylim(0.6 - len(cases), 0.6)
    axes.set_xscale("log")
    axes.set_xlabel("seconds, as a multiple of ours (exact)")
    axes.grid(axis="x", which="major", color="#dddddd")
    axes.grid(axis="y", color="#eeeeee")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower right", fontsize=8, frameon=True, edgecolor="none")
    return drawn


def growth_figure(panels: dict[str, list[tuple[float, Record]]]) -> Figure:
    """Draw seconds and peak memory against each growing quantity, a column each, on logarithmic axes."""
    drawn, rows = plt.subplots(
        2, len(panels), figsize=(3.4 * len(panels), 6), layout="constrained", squeeze=False
    )
    measures: list[tuple[str, Callable[[Record], float | None]]] = [
        ("seconds", lambda record: record.seconds[1] if record.seconds else None),
        ("peak memory, MiB", lambda record: record.memory),
    ]
    handles = {}
    for column, (title, points) in enumerate(panels.items()):
        for axes, (label, value) in zip(rows[:, column], measures, strict=True):
            for name in _libraries([record for _, record in points], leave=()):
                line = [(at, value(record)) for at, record in points if record.library == name]
                kept = [(at, number) for at, number in line if number]
                if kept:
                    handles[name] = axes.plot(
                        *zip(*kept, strict=True),
                        marker="o",
                        markersize=4,
                        linewidth=2 if name == OURS else 1.2,
                        color=COLORS.get(name),
                        zorder=4 if name == OURS else 3,
                    )[0]
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            ticks = sorted({at for at, _ in points})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
            axes.tick_params(axis="y", labelsize=8)
            axes.minorticks_off()
            axes.grid(color="#e5e5e5")
            axes.set_xlabel(title, fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(label)
    drawn.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False
    )
    return drawn
