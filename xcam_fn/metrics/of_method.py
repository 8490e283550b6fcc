"""Metrics of a method: how its heatmaps change when the image or the network changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.arguments import Count, Positive, check
from xcam_fn.methods.catalog import as_method
from xcam_fn.metrics.judged import (
    Best,
    Explainer,
    Heatmap,
    Images,
    Judged,
    Values,
    checked,
    entered,
    one_class_scoring,
    own_keywords,
    taken,
)
from xcam_fn.metrics.of_map import average_drop, complexity
from xcam_fn.network.copies import name_of
from xcam_fn.network.target_layer import Layer
from xcam_fn.perturb import uniform
from xcam_fn.targets.classes import Classes

Run = Callable[..., Tensor]


class MethodMetric:
    """A metric that is called as `metric(method, model, layer, x, cls, **options)`.

    Args:
        method: a method, or its name.
        cls: None for the predicted class of each image, an int, B ints, or a target. It is resolved once, on
            the original images.
        heatmap: CAM(x), if already computed.
        radius: size of the perturbations, > 0, in units of x.
        num_samples: number of perturbations, ≥ 1.
        seed: seed of the perturbations.
        **options: passed to the method.
    """


def method_metric(title: str, best: Best = "highest"):  # its type is that of the inner function
    """Turn a formula over `Judged` into the public function of a method, a model and images."""

    def made(formula: Callable[..., Values]):
        own = own_keywords(formula)

        def called(
            method: str | Run,
            model: nn.Module,
            layer: Layer,
            x: Images,
            cls: Classes = None,
            *,
            heatmap: Heatmap | None = None,
            **options: Any,
        ) -> Values:
            asked = taken(own, options)
            run, recorded = checked_run(method, options), options.get("create_graph", False)
            check("create_graph", recorded, bool)
            with one_class_scoring(model, x, cls, create_graph=recorded) as scoring:
                explain = Explainer(run, model, named(model, layer), scoring.explained.cls)
                return formula(Judged(scoring, explain(x) if heatmap is None else heatmap, explain), **asked)

        signature = inspect.signature(called)
        *shared, heatmap, options = signature.parameters.values()
        written = inspect.signature(formula).parameters
        flat = [*shared, *(written[name] for name in own), heatmap, options]
        called.__dict__["__signature__"] = signature.replace(parameters=flat)
        return entered(called, formula, title, best, MethodMetric)

    return made


def checked_run(method: str | Run, options: dict[str, Any]) -> Run:
    """The method, given by name or as a function, with its options and with checked heatmaps."""
    run = as_method(method)

    def explained(model: nn.Module, layer: Layer, x: Tensor, cls: Classes) -> Tensor:
        maps = checked(run(model, layer, x, cls, **options))
        if len(maps) != len(x):
            raise ValueError(f"method returned shape {tuple(maps.shape)}; expected {len(x)} heatmaps")
        return maps

    return explained


def named(model: nn.Module, layer: Layer) -> Layer:
    """The layer's name, which also identifies it in copies of the model."""
    name = name_of(model, layer) if isinstance(layer, nn.Module) else None
    return layer if name is None else name


@method_metric("Coherency")
def coherency(judged: Judged) -> Values:
    """The correlation of an image's heatmap with that of the image masked by it, scaled to [0, 1].

    (1 + r) / 2 with r Pearson's correlation of CAM(x) and CAM(x ⊙ CAM(x)); r is 0 if one is constant.

    Returns:
        (B,), in [0, 1], higher is better.

    References:
        Poppi et al. (arXiv:2104.10252).
    """
    return judged.coherency


@method_metric("ADCC")
def adcc(judged: Judged) -> Values:
    """One number for a method: the harmonic mean of coherency, 1 − complexity and 1 − average drop.

    Returns:
        (B,), in [0, 1], higher is better; 0 if one of the three is 0.

    References:
        Poppi et al. (arXiv:2104.10252), equation 6.
    """
    covered, lost = complexity(judged.heatmap), average_drop.formula(judged)
    parts = torch.stack([judged.coherency, 1 - covered, 1 - lost])
    positive = (parts > 0).all(0)
    return torch.where(positive, 1 / (1 / torch.where(positive, parts, 1.0)).mean(0), 0.0)


# -- robustness ---------------------------------------------------------------------------------------------


@method_metric("Max-sensitivity", "lowest")
def max_sensitivity(
    judged: Judged, *, radius: Positive = 0.02, num_samples: Count = 10, seed: int = 0
) -> Values:
    """The largest relative change of the heatmap under small changes of the image; lower is better.

    max over δ of ‖CAM(x + δ) − CAM(x)‖ / ‖CAM(x)‖, with each value of δ uniform in [−radius, radius]. For the
    change along a given direction, use `torch.func.jvp` of the method.

    Returns:
        (B,), ≥ 0; 0 if the heatmap is zero and stays zero.

    Raises:
        ValueError: a heatmap is zero and does not stay zero, so there is nothing to compare with.

    References:
        Yeh et al., On the (In)fidelity and Sensitivity of Explanations (arXiv:1901.09392), definition 2.
    """
    distances, _ = _moved(judged, radius, num_samples, seed)
    return relative_change("max_sensitivity", distances.amax(0), _norm(judged))


@method_metric("Average sensitivity", "lowest")
def average_sensitivity(
    judged: Judged, *, radius: Positive = 0.02, num_samples: Count = 10, seed: int = 0
) -> Values:
    """The mean relative change of the heatmap under small changes of the image; lower is better.

    The mean over δ of the ratio in `max_sensitivity`, for the same perturbations.

    Returns:
        (B,), ≥ 0; 0 if the heatmap is zero and stays zero.

    Raises:
        ValueError: a heatmap is zero and does not stay zero, so there is nothing to compare with.

    References:
        Yeh et al. (arXiv:1901.09392); Bhatt et al. (arXiv:2005.00631), definition 2.
    """
    distances, _ = _moved(judged, radius, num_samples, seed)
    return relative_change("average_sensitivity", distances.mean(0), _norm(judged))


@method_metric("Local Lipschitz estimate", "lowest")
def local_lipschitz(
    judged: Judged, *, radius: Positive = 0.02, num_samples: Count = 10, seed: int = 0
) -> Values:
    """The largest change of the heatmap relative to the change of the image; lower is better.

    max over δ of ‖CAM(x + δ) − CAM(x)‖ / ‖δ‖, for the perturbations of `max_sensitivity`.

    Returns:
        (B,), ≥ 0.

    References:
        Alvarez-Melis and Jaakkola, On the Robustness of Interpretability Methods (arXiv:1806.08049),
        equation 2.
    """
    distances, lengths = _moved(judged, radius, num_samples, seed)
    return (distances / lengths[:, None]).amax(0)


def _moved(judged: Judged, radius: float, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """How far the heatmaps, (N, B), and images, (N,), move in N perturbations, the same for every image."""
    x = judged.x

    def found() -> tuple[Tensor, Tensor]:
        first, distances, lengths = checked(judged.heatmap, x), [], []
        for number in range(num_samples):
            change = float(radius) * (2 * uniform(seed, number, tuple(x.shape[1:]), like=x) - 1)
            distances.append((judged.explain(x + change) - first).flatten(1).norm(dim=1))
            lengths.append(change.norm())
        return torch.stack(distances), torch.stack(lengths)

    return judged.once(("moved", float(radius), num_samples, seed), found)


def _norm(judged: Judged) -> Tensor:
    return checked(judged.heatmap).flatten(1).norm(dim=1)


def relative_change(name: str, change: Tensor, own: Tensor) -> Tensor:
    """The change relative to the original, 0 if there is none."""
    if checks.is_readable(own) and len(empty := ((own == 0) & (change != 0)).nonzero()):
        has = f"the heatmap of image {int(empty[0])} is zero everywhere, so its relative change is undefined"
        raise ValueError(f"{name}: {has}; leave the image out, or pass postprocess=None")
    return torch.where(change != 0, change / own, 0.0)
