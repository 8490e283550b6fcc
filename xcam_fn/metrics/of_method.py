"""How good a method is: what its heatmaps do when the image or the network changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.arguments import check, unchecked
from xcam_fn.methods.catalog import find_method
from xcam_fn.metrics.judged import (
    Heatmap,
    Images,
    Judged,
    Values,
    checked,
    documented,
    entered,
    one_class_scoring,
    spearman,
)
from xcam_fn.metrics.of_map import average_drop, complexity
from xcam_fn.network.split import Layer
from xcam_fn.perturb import normal, uniform
from xcam_fn.targets import Classes

Similarity = Callable[[Tensor, Tensor], Tensor]
Explainer = Callable[..., Tensor]


def _method_metric(title: str):  # its type is that of the function within
    """Make of a formula over `Judged` the function of a method, a model and images that users call."""

    def made(formula: Callable[[Judged], Values]):
        def called(
            method: str | Explainer,
            model: nn.Module,
            layer: Layer,
            x: Images,
            cls: Classes = None,
            *,
            heatmap: Heatmap | None = None,
            **options: Any,
        ) -> Values:
            run, recorded = _explainer(method, options), options.get("create_graph", False)
            checks.check_flag("create_graph", recorded)
            with one_class_scoring(model, x, cls, create_graph=recorded) as scoring:
                explain = lambda images: run(model, layer, images, scoring.explained.cls)  # noqa: E731
                return formula(Judged(scoring, explain(x) if heatmap is None else heatmap, explain))

        return entered(called, formula, title, "highest")

    return made


def _explainer(method: str | Explainer, options: dict[str, Any]) -> Explainer:
    if not callable(run := find_method(method) if isinstance(method, str) else method):
        raise TypeError(f"method is a {type(method).__name__}; expected a method, or its name")

    def explained(model: nn.Module, layer: Layer, x: Tensor, cls: Classes) -> Tensor:
        maps = checked(run(model, layer, x, cls, **options))
        if len(maps) != len(x):
            raise ValueError(f"method returned shape {tuple(maps.shape)}; expected {len(x)} heatmaps")
        return maps

    return explained


@_method_metric("Coherency")
def coherency(judged: Judged) -> Values:
    """How alike the heatmap of an image and of what it shows are: the correlation, scaled to [0, 1].

    (1 + r) / 2 with r Pearson's correlation of CAM(x) and CAM(x ⊙ CAM(x)); r is 0 where one is constant.

    {method}
        heatmap: CAM(x) where it is there already.
        **options: passed to the method.

    Returns:
        (B,), in [0, 1], the higher the better.

    {raises}

    References:
        Poppi et al. (arXiv:2104.10252).
    """
    return judged.coherency


@_method_metric("ADCC")
def adcc(judged: Judged) -> Values:
    """One number for a method: the harmonic mean of coherency, 1 − complexity and 1 − average drop.

    {method}
        heatmap: the method's heatmap where it is there already.
        **options: passed to the method.

    Returns:
        (B,), in [0, 1], the higher the better; 0 where one of the three is 0.

    {raises}

    References:
        Poppi et al. (arXiv:2104.10252), equation 6.
    """
    covered, lost = complexity(judged.heatmap), average_drop.formula(judged)
    parts = torch.stack([judged.coherency, 1 - covered, 1 - lost])
    positive = (parts > 0).all(0)
    return torch.where(positive, 1 / (1 / torch.where(positive, parts, 1.0)).mean(0), 0.0)


@documented
def parameter_randomization(
    method: str | Explainer,
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    cascading: bool = True,
    seed: int = 0,
    similarity: Similarity | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """How alike the heatmap stays as the network forgets what it learned, from the output down.

    Each parameter is drawn anew from a normal distribution with its own mean and deviation, in a copy of the
    model. A heatmap that stays the same does not explain the network. A layer given as a module is looked for
    by its name in the copies.

    {method}
        cascading: keep what was randomized before; else randomize one layer at a time.
        seed: of the parameters.
        similarity: `(heatmaps, heatmaps) -> (B,)`; Spearman's rank correlation by default.
        **options: passed to the method.

    Returns:
        {name of the module randomized last: (B,)}, in the order of randomization.

    {raises}

    References:
        Adebayo et al., Sanity Checks for Saliency Maps (arXiv:1810.03292).
    """
    checks.check_seed(seed)
    checks.check_flag("cascading", cascading)
    check("similarity", similarity, Similarity | None)
    run, alike = _explainer(method, options), similarity or spearman
    fixed = _fixed(model, x, cls)
    if isinstance(layer, nn.Module):
        layer = next((name for name, module in model.named_modules() if module is layer), layer)
    expected = run(model, layer, x, fixed)
    learned = [name for name, module in model.named_modules() if any(True for _ in module.parameters(False))]
    twin, found = copy.deepcopy(model), {}
    for number, name in enumerate(reversed(learned)):
        if not cascading:
            twin = copy.deepcopy(model)
        for index, parameter in enumerate(twin.get_submodule(name).parameters(False)):
            values = parameter.detach()
            spread = values.std() if values.numel() > 1 else values.abs().squeeze()
            draws = unchecked(normal)(seed, number * 64 + index, tuple(values.shape), like=values)
            parameter.data = values.mean() + spread * draws
        found[name] = alike(expected, run(twin, layer, x, fixed))
    return found


@documented
def max_sensitivity(
    method: str | Explainer,
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    radius: float = 0.02,
    num_samples: int = 10,
    seed: int = 0,
    **options: Any,
) -> Values:
    """How far the heatmap moves, at most, when the image is changed a little; the lower the better.

    max over δ of ‖CAM(x + δ) − CAM(x)‖ / ‖CAM(x)‖, with each value of δ uniform in [−radius, radius]. For how
    far it moves along one direction, and not by chance, see `torch.func.jvp` of the method.

    {method}
        radius: of the changes, > 0, in units of x.
        num_samples: how many changes are tried, ≥ 1.
        seed: of the changes.
        **options: passed to the method.

    Returns:
        (B,), ≥ 0; 0 where the heatmap is zero and stays so.

    {raises}
        ValueError: a heatmap is zero and does not stay so, so that there is nothing to compare it with.

    References:
        Yeh et al., On the (In)fidelity and Sensitivity of Explanations (arXiv:1901.09392), definition 2.
    """
    checks.check_number("radius", radius, above=0)
    checks.check_count("num_samples", num_samples)
    checks.check_seed(seed)
    run, fixed = _explainer(method, options), _fixed(model, x, cls)
    first = run(model, layer, x, fixed)
    worst = torch.zeros_like(first.flatten(1)[:, 0])
    for number in range(num_samples):
        change = float(radius) * (
            2 * uniform(seed, number, tuple(x.shape[1:]), like=x) - 1
        )  # of every image alike
        moved = run(model, layer, x + change, fixed)
        worst = torch.maximum(worst, (moved - first).flatten(1).norm(dim=1))
    own = first.flatten(1).norm(dim=1)
    if checks.is_readable(own) and len(empty := ((own == 0) & (worst > 0)).nonzero()):
        has = f"the heatmap of image {int(empty[0])} is zero everywhere and moves from there"
        raise ValueError(f"max_sensitivity: {has}; leave the image out, or compare with postprocess=None")
    return torch.where(worst > 0, worst / own, 0.0)


def _fixed(model: nn.Module, x: Tensor, cls: Classes) -> Classes:
    """The class of each image as it is, so that other images are scored for it."""
    with one_class_scoring(model, x, cls) as scoring:
        return scoring.explained.cls
