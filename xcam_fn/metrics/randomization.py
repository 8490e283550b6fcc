"""Metrics of a method: whether its heatmaps depend on the network's parameters and on the class."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from xcam_fn.arguments import Count, NonNegative, check, unchecked
from xcam_fn.docstrings import documented
from xcam_fn.maps import minmax
from xcam_fn.metrics.judged import Explainer, Images, Judged, Values, checked, one_class_scoring, spearman
from xcam_fn.metrics.of_method import MethodMetric, Run, checked_run, method_metric, named, relative_change
from xcam_fn.network.target_layer import Layer
from xcam_fn.perturb import normal, uniform
from xcam_fn.targets.classes import Classes, class_index, logits

Similarity = Callable[[Tensor, Tensor], Tensor]


@method_metric("Random logit", "lowest")
def random_logit(judged: Judged, *, similarity: Similarity | None = None, seed: int = 0) -> Values:
    """The similarity of the heatmaps of the class and of another, random class; lower is better.

    Args:
        similarity: `(heatmaps, heatmaps) -> (B,)`; Spearman's rank correlation by default, structural
            similarity in the paper.
        seed: seed of the other class, whose offset from the explained class is the same for every image.

    Returns:
        (B,), as similarity returns it, by default in [−1, 1]; 1 for a heatmap that is the same for all
        classes.

    Raises:
        ValueError: the network has one class, or the target is not a class.

    References:
        Sixt et al., When Explanations Lie (arXiv:1912.09818), section 4.
    """
    explain, asked = judged.explain, judged.scoring.explained.logit_of
    if callable(asked):
        raise ValueError(f"random_logit: cls={asked!r} is not a class; expected None, an int or B ints")
    values = logits(judged.scoring.run(judged.x))
    if (count := values.shape[1]) < 2:
        raise ValueError("random_logit: the model has 1 class; expected 2 or more")
    draw = uniform(seed, 0, (1,), like=values.detach().float())
    step = (draw * (count - 1)).long().clamp(max=count - 2)  # the product may be rounded up
    other = (class_index(asked, values) + 1 + step) % count
    return (similarity or spearman)(checked(judged.heatmap), explain._replace(cls=other)(judged.x))


@method_metric("Efficient MPRT", "highest")
def efficient_mprt(judged: Judged, *, bins: Count = 100, seed: int = 0) -> Values:
    """How much more complex the heatmap becomes when all of the network's parameters are randomized.

    (H(CAM′(x)) − H(CAM(x))) / H(CAM(x)), where CAM′ explains the network with all parameters redrawn, as in
    the last step of `parameter_randomization`, and H is the entropy of the histogram of a heatmap's values.

    Args:
        bins: bins of the histogram, from the heatmap's minimum to its maximum, ≥ 1.
        seed: seed of the parameters.

    Returns:
        (B,), ≥ −1, higher is better; 0 if both heatmaps are constant.

    Raises:
        ValueError: the heatmap is constant, and that of the other network is not.

    References:
        Hedström et al., Sanity Checks Revisited (arXiv:2401.06465), section 4.2.
    """
    explain = judged.explain

    def forgotten() -> nn.Module:
        *_, (_, twin) = _randomized(explain.model, seed)
        return twin

    twin = judged.scoring.once(("forgotten", seed), forgotten)
    maps = (judged.heatmap, explain._replace(model=twin)(judged.x))
    before, after = (_histogram_entropy(checked(each), bins) for each in maps)
    return relative_change("efficient_mprt", after - before, before)


def _histogram_entropy(maps: Tensor, bins: int) -> Tensor:
    """The entropy (B,) of the histogram of each map's values; nats."""
    flat = maps.flatten(1)
    place = unchecked(minmax)(flat, 1) * bins
    ones, counts = torch.ones_like(flat), flat.new_zeros(len(flat), bins)
    counts = counts.scatter_add(1, place.long().clamp(max=bins - 1), ones)
    return torch.special.entr(counts / flat.shape[1]).sum(1)


def parameter_randomization(
    method: str | Run,
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    cascading: bool = True,
    seed: int = 0,
    similarity: Similarity | None = None,
    std: float = 0.0,
    num_samples: int = 1,
    **options: Any,
) -> dict[str, Tensor]:
    """The similarity of the heatmap to its original as parameters are randomized, from the output down.

    Each parameter is redrawn from a normal distribution with its own mean and deviation, in a copy of the
    model. A heatmap that stays the same does not explain the network. A layer given as a module is found by
    its name in the copies. With `std` and `num_samples` this is the smooth MPRT.

    Args:
        cascading: keep earlier modules randomized; False randomizes one module at a time.
        seed: seed of the parameters.
        similarity: `(heatmaps, heatmaps) -> (B,)`; Spearman's rank correlation by default.
        std: standard deviation of noise in the image, ≥ 0, in units of x; 0 uses the image itself.
        num_samples: number of noisy images that the compared heatmaps are averaged over, ≥ 1.

    Returns:
        {name of the module randomized last: (B,)}, in the order of randomization.

    References:
        Adebayo et al., Sanity Checks for Saliency Maps (arXiv:1810.03292); Hedström et al., Sanity Checks
        Revisited (arXiv:2401.06465), section 4.1, for the smooth MPRT.
    """
    check("std", std, NonNegative)
    check("num_samples", num_samples, Count)
    check("seed", seed, int)
    check("cascading", cascading, bool)
    check("similarity", similarity, Similarity | None)
    alike = similarity or spearman
    with one_class_scoring(model, x, cls) as scoring:
        fixed = scoring.explained.cls
    explain = Explainer(checked_run(method, options), model, named(model, layer), fixed)
    mean = functools.partial(_mean_under_noise, x=x, std=std, num_samples=num_samples, seed=seed)
    expected, twins = mean(explain), _randomized(model, seed, cascading=cascading)
    return {name: alike(expected, mean(explain._replace(model=twin))) for name, twin in twins}


documented(parameter_randomization, MethodMetric)


def _mean_under_noise(explain: Explainer, x: Tensor, std: float, num_samples: int, seed: int) -> Tensor:
    """The mean heatmap of x with normal noise added, the same noise for every image and network."""
    if std == 0:
        return explain(x)
    noise = (normal(seed, n, tuple(x.shape[1:]), like=x) * float(std) for n in range(num_samples))
    return torch.stack([explain(x + each) for each in noise]).mean(0)


def _randomized(model: nn.Module, seed: int, *, cascading: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield a copy of the model as its modules are randomized, last to first, and each module's name."""
    learned = [name for name, module in model.named_modules() if any(True for _ in module.parameters(False))]
    twin = copy.deepcopy(model)
    for number, name in enumerate(reversed(learned)):
        if not cascading:
            twin = copy.deepcopy(model)
        for index, parameter in enumerate(twin.get_submodule(name).parameters(False)):
            values = parameter.detach()
            spread = values.std() if values.numel() > 1 else values.abs().squeeze()
            draws = unchecked(normal)(seed, number * 64 + index, tuple(values.shape), like=values)
            parameter.data = values.mean() + spread * draws
        yield name, twin
