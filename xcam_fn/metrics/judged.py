"""A heatmap to judge, with the scoring of its images; metrics are formulas over it."""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from inspect import Parameter
from numbers import Real
from typing import Annotated, Any, Concatenate, Literal, NamedTuple, ParamSpec, Protocol, TypeVar, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.arguments import Count, ReadableSignature, check
from xcam_fn.docstrings import documented
from xcam_fn.maps import ratio
from xcam_fn.methods.method import comparable, groups_of, options_of
from xcam_fn.methods.options import Groups
from xcam_fn.network.target_layer import Layer
from xcam_fn.perturb import Baseline, baseline_images
from xcam_fn.scoring.running import Once, Running, RunningOptions, Scoring, scoring_of
from xcam_fn.targets import Classes
from xcam_fn.targets.beyond_classes import finite

Images = Float[Tensor, "B C *size"]
Heatmap = Tensor | np.ndarray
Values = Float[Tensor, " B"]
Best = Literal["highest", "lowest"]
P = ParamSpec("P")
Found_co = TypeVar("Found_co", covariant=True)
Function = TypeVar("Function", bound=Callable[..., Any])
_SCORE = Parameter("score", Parameter.KEYWORD_ONLY, default="probability", annotation="str")


class ScoringOptions(RunningOptions, total=False):
    """How images are scored."""

    score: str


class StepOptions(ScoringOptions, total=False):
    """How many pixels a curve changes per step.

    Args:
        steps: number of steps, ≥ 1; 112 by default, which is 448 pixels per step at 224 × 224.
        pixels_per_step: instead of steps, the number of pixels per step, ≥ 1.
    """

    steps: Count | None
    pixels_per_step: Count | None


class SubsetOptions(ScoringOptions, total=False):
    """Which random subsets are removed.

    Args:
        num_subsets: number of subsets, ≥ 2.
        grid: cells along each axis, ≥ 1, from which subsets are drawn; None for single pixels.
        baseline: the value used for removed subsets: a number, a tensor or a callable of x.
        seed: seed of the subsets, which are the same for every image.
    """

    num_subsets: Annotated[int, ("at_least", 2)]
    grid: Count | None
    baseline: Baseline
    seed: int


_SCORING: dict[str, Any] = {"score": "probability", **Running._field_defaults}
_STEPS: dict[str, Any] = {"steps": None, "pixels_per_step": None}
SUBSETS: dict[str, Any] = {"num_subsets": 100, "grid": 14, "baseline": 0.0, "seed": 0}
_GROUPS: Groups = {
    ScoringOptions: _SCORING, StepOptions: _SCORING | _STEPS, SubsetOptions: _SCORING | SUBSETS,
}  # fmt: skip


class Explainer(NamedTuple):
    """A method with its network, layer and classes, from images to heatmaps."""

    method: Callable[..., Tensor]
    model: nn.Module
    layer: Layer
    cls: Classes

    def __call__(self, images: Tensor) -> Tensor:
        return self.method(self.model, self.layer, images, self.cls)


class Judged(Once):
    """A heatmap with its images and their scores; values that several metrics need are computed once.

    Attributes:
        scoring: the images, ready to be scored for one fixed class each.
        heatmap: (B, *size), a tensor or an array.
        explain: the method, for the same classes; ValueError if only its heatmap is known.
        region: the objects' region, as for `pointing_game`, if known.
    """

    def __init__(
        self, scoring: Scoring, heatmap: Heatmap, explain: Explainer | None = None, region: Any = None
    ) -> None:
        super().__init__()
        self.scoring, self.heatmap, self._explain, self.region = scoring, heatmap, explain, region
        self.x, self.own = scoring.x, scoring.explained.own[:, 0]

    @property
    def explain(self) -> Explainer:
        """The method, with the network, the layer and the classes to explain."""
        if self._explain is None:
            raise ValueError(
                "coherency, adcc and metrics of robustness and randomization need the method, not only its "
                "heatmap; call the metric with the method, as metrics.coherency(method, model, …)"
            )
        return self._explain

    @cached_property
    def mask(self) -> Tensor:
        """The heatmap in [0, 1] and in the images' dtype."""
        return checked(self.heatmap, self.x, unit=True).to(self.x.dtype)

    @cached_property
    def relevance(self) -> Tensor:
        """The heatmap's values in the images' dtype, but at least float32, since they are summed."""
        return checked(self.heatmap, self.x).to(torch.promote_types(self.x.dtype, torch.float32))

    @cached_property
    def rank(self) -> Tensor:
        """The rank of each pixel by relevance, see `relevance_rank`."""
        return relevance_rank(checked(self.heatmap, self.x))

    @property
    def inside(self) -> Any:
        """The region, which is required."""
        if self.region is None:
            raise ValueError("region is required; pass boxes or masks of the objects")
        return self.region

    @cached_property
    def coherency(self) -> Tensor:
        """The correlation of the heatmap with that of the masked image, scaled to [0, 1]; (B,)."""
        return (1 + pearson(self.mask, self.explain(self.x * self.mask[:, None]))) / 2

    def shown(self, baseline: Baseline = 0.0) -> Tensor:
        """The scores (B,) of the images masked by the heatmap."""

        def scores() -> Tensor:
            base = baseline_images(baseline, self.x)
            return self.scoring.shown(self.mask[None, :, None], base)[0, :, 0]

        return self.once(("shown", comparable(baseline)), scores)


@typing.runtime_checkable
class Metric(Protocol):
    """A function that scores a heatmap or a method, with its title for tables and plots.

    Attributes:
        name: its key in `METRICS`.
        title: its name in print.
        best: "highest" or "lowest".
        formula: from `Judged` to scores (B,), a `Curve` or a `Road`.
    """

    name: str
    title: str
    best: Best
    formula: Callable[[Judged], Any]


class HeatmapMetric(Metric, Protocol, typing.Generic[P, Found_co]):
    """A metric that is called as `metric(model, x, heatmap, cls, **options)`.

    Args:
        model: the network, in evaluation mode; it is never modified. None if `scorer` replaces it.
        heatmap: (B, *size), a tensor or an array, from any source; in [0, 1] unless only its order counts.
        cls: None for the predicted class of each image, an int, B ints, or a target, a callable from the
            output to one score per image. It is resolved once, on the original images.
        baseline: the value used for removed pixels: a number, a tensor or a callable of x; 0 by default, the
            mean color for most networks.
    """

    def __call__(
        self, model: Any, x: Any, heatmap: Any, cls: Any = None, *args: P.args, **options: P.kwargs
    ) -> Found_co: ...


def metric(
    title: str, *, best: Best, forwards: int | None = None
) -> Callable[[Callable[Concatenate[Judged, P], Found_co]], HeatmapMetric[P, Found_co]]:
    """Make a metric from a formula over `Judged` that scores `forwards` images per image, None for many."""

    def made(formula: Callable[..., Found_co]) -> HeatmapMetric[P, Found_co]:
        own = own_keywords(formula)
        known = (*groups_of(formula, _GROUPS), HeatmapMetric, RunningOptions)

        def called(
            model: nn.Module | None, x: Images, heatmap: Heatmap, cls: Classes = None, **options: Any
        ) -> Found_co:
            asked = taken(own, options)
            with one_class_scoring(model, x, cls, forwards_each=forwards, **options) as scoring:
                return formula(Judged(scoring, heatmap), **asked)

        *shared, _ = inspect.signature(called).parameters.values()
        written = inspect.signature(formula).parameters
        flat = [*shared, *(written.get(name, own[name]) for name in own), _SCORE, *by_name(Running)]
        called.__dict__["__signature__"] = inspect.signature(formula).replace(parameters=flat)
        return typing.cast(HeatmapMetric[P, Found_co], entered(called, formula, title, best, *known))

    return made


def of_heatmap(title: str, *, best: Best) -> Callable[[Function], Function]:
    """Make a metric from a function of the heatmap alone."""
    return lambda function: entered(function, lambda judged: function(judged.heatmap), title, best)


def own_keywords(formula: Callable[..., Any]) -> dict[str, Parameter]:
    """A metric's own keywords, including those of its group."""
    every = options_of(formula, 1, _GROUPS)
    return {name: every[name] for name in every if name not in _SCORING}


def taken(own: Mapping[str, Parameter], options: dict[str, Any]) -> dict[str, Any]:
    """Remove a metric's own keywords from the options, and return them, checked."""
    asked = {name: options.pop(name) for name in own.keys() & options.keys()}
    for name, value in asked.items():
        check(name, value, own[name].annotation)
    return asked


def by_name(options: Callable[..., Any]) -> list[Parameter]:
    """The parameters of a function or a named tuple, by name."""
    return [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(options).parameters.values()]


def entered(
    function: Function, formula: Callable[[Judged], Any], title: str, best: Best, *known: Any
) -> Function:
    """Register a function with its own signature as a `Metric` too, with its formula over `Judged`.

    Its docstring is completed from those of `known`.
    """
    if formula.__doc__ and not function.__doc__:
        function.__name__ = function.__qualname__ = formula.__name__
        function.__module__, function.__doc__ = formula.__module__, formula.__doc__
    signature = ReadableSignature.of(inspect.signature(function))
    about = {"name": function.__name__, "title": title, "best": best, "formula": formula}
    function.__dict__.update(about, __signature__=signature)
    return documented(function, *known)


# -- arguments ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_class_scoring(
    model: nn.Module | None,
    x: Tensor,
    cls: Classes,
    *,
    score: str = "probability",
    create_graph: bool = False,
    forwards_each: int | None = None,
    **running: Unpack[RunningOptions],
) -> Iterator[Scoring]:
    """The scoring of one call that explains one class per image, with checked arguments."""
    for name in running:
        if name not in Running._fields:
            known = ", ".join(sorted(("score", *Running._fields)))
            raise TypeError(f"there is no option {name!r}; the options are {known}")
    checks.check_input(x)
    few = None if forwards_each is None else forwards_each * len(x)
    how = Running(**running)
    with scoring_of(model, x, cls, score, how, create_graph=create_graph, forwards=few) as scoring:
        if scoring.explained.many:
            raise ValueError(f"cls={cls!r}; expected one class for each image, like the heatmaps")
        yield scoring


def checked(heatmap: Heatmap, x: Tensor | None = None, *, unit: bool = False) -> Tensor:
    """The heatmap as a tensor of finite values; with `unit` in [0, 1], with x one for each of its images."""
    if not isinstance(heatmap, (Tensor, np.ndarray)):
        raise TypeError(f"heatmap must be a tensor or an array (B, *size), got {type(heatmap).__name__}")
    maps = finite("heatmap", heatmap)
    maps = maps if x is None else maps.to(x.device)
    shape = f"heatmap has shape {tuple(maps.shape)}"
    if maps.ndim < 2 or maps.numel() == 0:
        raise ValueError(f"{shape}; expected (B, *size); heatmap[None] adds the batch")
    if unit:
        checks.check_unit("heatmap has values", maps)
    if x is not None and tuple(maps.shape) != (wanted := (len(x), *x.shape[2:])):
        remedy = "one for each image, of its size"
        raise ValueError(f"{shape}; expected {wanted}, {remedy} ({checks.FROM_RAW})")
    return maps


def is_share(value: Any) -> bool:
    """Whether a value is a number between 0 and 1, both excluded."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < 1


def shares_of(fractions: Iterable[float]) -> list[float]:
    """The fractions as a checked list of at least one."""
    shares = list(fractions) if isinstance(fractions, Iterable) else []
    if not shares or not all(map(is_share, shares)):
        wanted = "at least one number, each > 0 and < 1"
        raise ValueError(f"fractions={fractions!r}; expected {wanted}")
    return shares


# -- maps in order, and compared ----------------------------------------------------------------------------


def relevance_rank(heatmap: Heatmap) -> Int[Tensor, "B *size"]:
    """Return the rank of each pixel by relevance, the most relevant first.

    Args:
        heatmap: (B, *size), a tensor or an array.

    Returns:
        (B, *size), integers from 0; ties are broken by position.
    """
    maps = checked(heatmap)
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand_as(order)
    return torch.zeros_like(places).scatter(1, order, places).reshape(maps.shape)


def pearson(first: Heatmap, second: Heatmap) -> Values:
    """Pearson's correlation of maps (B, ...), (B,) in [−1, 1]; 0 where one is constant."""
    flat = [checked(maps).flatten(1) for maps in (first, second)]
    if flat[0].shape != flat[1].shape:
        shapes = " and ".join(str(tuple(maps.shape)) for maps in (first, second))
        raise ValueError(f"the heatmaps have shapes {shapes}; expected two of the same shape")
    one, other = (maps.double() - maps.double().mean(1, keepdim=True) for maps in flat)
    norm = one.norm(dim=1) * other.norm(dim=1)
    varies = torch.stack([maps.amax(1) > maps.amin(1) for maps in flat]).all(0)
    return torch.where(varies, ratio((one * other).sum(1), norm), 0.0).clamp(-1, 1).to(flat[0].dtype)


def spearman(first: Heatmap, second: Heatmap) -> Values:
    """Spearman's rank correlation of maps (B, ...), (B,) in [−1, 1]; equal values share their mean rank."""
    maps = [checked(heatmap) for heatmap in (first, second)]
    return pearson(*map(mean_ranks, maps)).to(maps[0].dtype)


def mean_ranks(maps: Tensor) -> Tensor:
    """The ranks of each map's values from 1, the lowest, (B, N); equal values share their mean rank."""
    from scipy.stats import rankdata  # noqa: PLC0415, slow to import, and needed here alone

    ranks = rankdata(maps.detach().flatten(1).double().cpu().numpy(), axis=1)
    return torch.from_numpy(ranks).to(maps.device)
