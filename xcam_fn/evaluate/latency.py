"""How long methods take, beside the bare forward of the network."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.arguments import check
from xcam_fn.methods.together import Methods, named_methods
from xcam_fn.network.copies import unwrap
from xcam_fn.network.split import Layer
from xcam_fn.targets import Classes

BARE = "bare forward"
Batch = Float[Tensor, "B C *size"]


class Timing(NamedTuple):
    """Seconds per image.

    Attributes:
        mean: mean over the rounds.
        median: median over the rounds.
        fastest: the fastest round.
        slowest: the slowest round.
        deviation: the standard deviation over the rounds; 0 for one round.
        first: the first call, including one-time preparation.
    """

    mean: float
    median: float
    fastest: float
    slowest: float
    deviation: float
    first: float


def timings(
    model: nn.Module,
    layer: Layer,
    x: Batch | Sequence[Batch],
    methods: Methods,
    cls: Classes = None,
    *,
    rounds: int = 5,
    variant: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Timing]:
    """The time of each method, measured in turns so that other load on the machine affects all equally.

    Args:
        model: the network, in evaluation mode.
        layer: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), prepared images; or several batches, used in turn by the rounds.
        methods: names of methods.
        cls: as for every method.
        rounds: how often to time each after its first call, ≥ 1.
        variant: a library of `VARIANTS` whose definitions to use.
        options: keywords of the methods; at least one method must accept each.

    Returns:
        {name: timing}, first "bare forward", the network alone without gradients, then the methods.

    Raises:
        ValueError: a method is not known, or a value is out of range.
        TypeError: no method takes an option.
    """
    batches = [x] if isinstance(x, Tensor) else x
    check("x", batches, Sequence[Tensor])
    for batch in batches:
        checks.check_call(model, batch)
    checks.check_model(unwrap(model))
    checks.check_count("rounds", rounds)
    check("options", options, Mapping | None)
    chosen = named_methods(methods, variant, **(options or {}))

    calls: dict[str, Callable[[Tensor], Any]] = {BARE: functools.partial(_bare, model)}
    calls |= {name: lambda x, run=run: run(model, layer, x, cls) for name, run in chosen.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for batch in [batches[0], *itertools.islice(itertools.cycle(batches), rounds)]:
        for name, call in calls.items():
            taken[name].append(_seconds(call, batch))
    return {name: _timing(*seconds) for name, seconds in taken.items()}


@torch.no_grad()
def _bare(model: nn.Module, x: Tensor) -> None:
    try:
        model(x)
    except Exception as error:
        checks.fail(model, x, error, model)


def _timing(first: float, *rounds: float) -> Timing:
    mean, median, deviation = (f(rounds) for f in (statistics.mean, statistics.median, statistics.pstdev))
    return Timing(mean, median, min(rounds), max(rounds), deviation, first)


def _seconds(call: Callable[[Tensor], Any], x: Tensor) -> float:
    """What a call takes for each image, to the end of what it asked of the device."""
    wait = functools.partial(torch.get_device_module(x.device).synchronize, x.device)
    wait()
    start = time.perf_counter()
    call(x)
    wait()
    return (time.perf_counter() - start) / len(x)
