"""A right call of every public function on a tiny network, for the fuzz to bend."""

import functools
import inspect
import operator
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import networks
import xcam_fn as xf
from odd_values import theirs
from xcam_fn import maps, perturb, projections, targets, weights
from xcam_fn.evaluate import report
from xcam_fn.methods.catalog import WRAPPERS
from xcam_fn.models.images import Preset


class Net(nn.Module):
    """Two resolutions, one ReLU that runs twice, one linear layer after the pooled maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.bn, self.relu, self.drop = nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.relu(self.stem(x)))))
        return self.fc(self.drop(x.mean((2, 3))))


class World:
    """What a right call is made of; every draw is the seed's."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.batch = self.rng.choice([1, 2, 2])
        self.size = (self.rng.choice([12, 16]), self.rng.choice([12, 16]))
        self.x = self.randn(self.batch, 3, *self.size)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    @functools.cached_property
    def is_transformer(self) -> bool:
        return self.rng.random() < 0.25

    @functools.cached_property
    def model(self) -> nn.Module:
        if self.is_transformer:
            return xf.testing.small_transformer(3, self.batch, self.size).model.float()
        model = Net()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(self.randn(*parameter.shape) * 0.6)
        return model.eval()

    @property
    def layer(self) -> Any:
        if self.is_transformer:
            return self.rng.choice(["blocks.1.norm1", "blocks.0", None])
        return self.rng.choice([None, "conv", "relu#2", "relu", self.model.conv])

    @property
    def cls(self) -> Any:
        return self.rng.choice([None, 1, [2] * self.batch, targets.logit(1), theirs(lambda y: y[:, 2])])

    @property
    def heatmap(self) -> Tensor:
        return self.rand(self.batch, *self.size)

    def network(self) -> dict[str, Any]:
        return {"model": self.model, "layer": self.layer, "x": self.x}

    def called(self) -> dict[str, Any]:
        return {**self.network(), "cls": self.cls}


class Right(NamedTuple):
    """A function, the arguments of a right call, and what else it takes."""

    function: Callable[..., Any]
    arguments: Callable[[World], dict[str, Any]]
    others: tuple[str, ...] = ()


CALLS: dict[str, Right] = {}


def enter(
    name: str, function: Callable[..., Any], arguments: Callable[[World], dict[str, Any]], *others: str
) -> None:
    """Put a right call into `CALLS`, with the keywords of the function's own signature."""
    parameters = inspect.signature(function).parameters.values()
    own = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    CALLS[name] = Right(function, arguments, (*dict.fromkeys((*own, *others)),))


# -- methods --------------------------------------------------------------------------------------------------


def _method(name: str, world: World) -> dict[str, Any]:
    world.is_transformer = name in networks.OF_ATTENTION or (
        world.is_transformer
        and name not in ("cam", "cameras", "refinecam", "guided_backprop", "guided_gradcam", "fullgrad")
    )
    found = {**world.called(), **networks.QUICK.get(name, {})}
    if name == "cam":
        found["layer"] = world.rng.choice(["relu#2", "relu"])
    if name in networks.OF_ATTENTION:
        found["layer"] = world.rng.choice([None, "blocks.1.norm1"])
    if name == "refinecam":
        found["layer"] = None
    if name == "finercam" and callable(found["cls"]):
        found["cls"] = None
    return found


for _name, _each in xf.METHODS.items():
    enter(_name, _each, functools.partial(_method, _name))


def _enter_wrapper(name: str, **options: Any) -> None:
    own = [p for p in inspect.signature(WRAPPERS[name]).parameters if p != "method"]

    def called(**given: Any) -> Any:
        wrapping = {key: given.pop(key) for key in ("method", *own) if key in given}
        method = WRAPPERS[name](**wrapping)
        return method(**given)

    def arguments(world: World) -> dict[str, Any]:
        world.is_transformer = False
        layer = {"layer": None} if name == "multi_layer" else {}
        return {"method": "gradcam", **options, **world.called(), **layer}

    enter(name, called, arguments, *own, "postprocess", "create_graph", "to_spatial")


_FEW = {"sess": {"num_scales": 2, "window": 8, "step": 6}, "smoothgrad": {"num_samples": 2}}
for _name in WRAPPERS:
    _enter_wrapper(_name, **_FEW.get(_name, {}))


def _own(make: Callable[..., Any], parts: tuple[str, ...]) -> Callable[..., Any]:
    def called(**given: Any) -> Any:
        method = make(**{key: given.pop(key) for key in parts if key in given})
        return method(**given)

    return called


def _parts(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


enter(
    "from_gradients",
    _own(xf.from_gradients, _parts(xf.from_gradients)),
    lambda w: {"weighting": theirs(lambda A, G: G.mean((2, 3))), "name": "own", **w.called()},
    *_parts(xf.from_gradients), "postprocess", "create_graph", "to_spatial",
)  # fmt: skip
enter(
    "from_features",
    _own(xf.from_features, _parts(xf.from_features)),
    lambda w: {"projection": theirs(lambda A: A.sum(1)), "name": "own", **w.called()},
    *_parts(xf.from_features), "postprocess", "create_graph", "to_spatial",
)  # fmt: skip
enter(
    "find_method",
    lambda name, variant=None, options=None, **given: (
        xf.find_method(name, variant=variant, **({} if options is None else options))(**given)
    ),
    lambda w: {
        "name": w.rng.choice(["gradcam", "smooth(gradcam)", "gradcam+scorecam", "eigen_smooth(layercam)"]),
        **w.called(),
    },
    "variant", "options",
)  # fmt: skip
enter(
    "explain_all",
    xf.explain_all,
    lambda w: {**w.called(), "methods": ["gradcam", "eigencam", "reciprocam"], "chunk_size": 8},
    "chunk_size", "postprocess", "create_graph", "to_spatial", "eps",
)  # fmt: skip
enter("concepts", xf.concepts, lambda w: {**w.network(), "num_concepts": 2})
enter("latency.timings", xf.latency.timings, lambda w: {**w.called(), "methods": ["gradcam"], "rounds": 1})

# -- the network cut at a layer --------------------------------------------------------------------------------


def _split(**given: Any) -> Any:
    found = xf.split(**given)
    features, residual = found.trunk(given["x"])
    return features, found.head(features, residual)


enter("split", _split, World.network, "to_spatial")
enter("features", xf.features, World.network)
enter("feature_and_grad", xf.feature_and_grad, World.called)
enter("layers", xf.layers, lambda w: {"model": w.model, "x": w.x})
enter("default_layer", xf.default_layer, lambda w: {"model": w.model, "x": w.x})
enter(
    "bind",
    lambda model, fn, layer, x, cls: xf.gradcam(xf.bind(model, fn), layer, x, cls),
    lambda w: {"fn": lambda net, x: net(x), **w.called()},
)

# -- metrics ---------------------------------------------------------------------------------------------------


def _judging(world: World) -> dict[str, Any]:
    return {"model": world.model, "x": world.x, "heatmap": world.heatmap, "cls": world.cls}


for _name in ("average_drop", "increase_in_confidence", "insertion", "deletion", "road",
              "symmetric_relevance_gain", "irof"):  # fmt: skip
    enter(_name, getattr(xf, _name), lambda w: _judging(w) | {"chunk_size": 16})
enter("average_gain", xf.average_gain, lambda w: _judging(w) | {"cls": 0})  # of a probability
for _name in ("faithfulness_correlation", "sensitivity_n", "infidelity"):
    enter(_name, getattr(xf, _name), lambda w: _judging(w) | {"chunk_size": 16, "num_subsets": 5})
_OF_SAMPLES = ("max_sensitivity", "average_sensitivity", "local_lipschitz")
_CHEAP = {name: {"num_samples": 2} for name in _OF_SAMPLES} | {"random_logit": {"cls": 0}}
for _name in ("adcc", "coherency", *_OF_SAMPLES, "parameter_randomization", "efficient_mprt", "random_logit"):
    enter(
        _name,
        getattr(xf, _name),
        lambda w, name=_name: {
            "method": w.rng.choice(["gradcam", xf.eigencam]), **w.called(), **_CHEAP.get(name, {})
        },
        "postprocess", "create_graph", "to_spatial", "projection",
    )  # fmt: skip
for _name in ("complexity", "entropy", "sparseness"):
    enter(_name, getattr(xf, _name), lambda w: {"heatmap": w.heatmap})


def _region(world: World) -> Any:
    return world.rng.choice([[[2, 3, 9, 8]] * world.batch, world.rand(world.batch, *world.size) > 0.5])


enter(
    "pointing_game", xf.pointing_game, lambda w: {"heatmap": w.heatmap, "region": _region(w), "tolerance": 1}
)
for _name in ("energy_pointing_game", "relevance_rank_accuracy", "mask_iou", "pixel_auc"):
    enter(_name, getattr(xf, _name), lambda w: {"heatmap": w.heatmap, "region": _region(w)})
enter("grid_pointing", xf.grid_pointing, lambda w: {"heatmap": w.heatmap, "cell": [3] * w.batch})
enter(
    "mosaics",
    xf.mosaics,
    lambda w: {
        "images": w.randn(5, 3, *w.size), "classes": torch.arange(5), "probabilities": 0.5 + w.rand(5) / 2, "count": 2
    },
)  # fmt: skip
enter(
    "evaluate.judged",
    xf.evaluate.judged,
    lambda w: {
        "model": w.model, "x": w.x, "heatmaps": {"a": w.heatmap, "b": w.heatmap}, "cls": w.cls,
        "metric_names": ("average_drop", "insertion"),
    },
    "chunk_size", "precision", "scorer", "progress",
)  # fmt: skip
enter("metrics.pearson", xf.metrics.pearson, lambda w: {"first": w.heatmap, "second": w.heatmap})
enter("metrics.spearman", xf.metrics.spearman, lambda w: {"first": w.heatmap, "second": w.heatmap})
enter("metrics.relevance_rank", xf.metrics.relevance_rank, lambda w: {"heatmap": w.heatmap})
enter("metrics.step_pixels", xf.metrics.step_pixels, lambda w: {"x": w.x, "steps": 8})

# -- formulas --------------------------------------------------------------------------------------------------

enter("heatmap", xf.heatmap, lambda w: {"cam": w.randn(w.batch, 4, 6), "size": w.size})
for _name in ("resized_minmax", "minmax_resized", "own_size", "corners_minmax", "resize"):
    enter(f"maps.{_name}", getattr(maps, _name), lambda w: {"cam": w.randn(w.batch, 4, 6), "size": w.size})
enter("maps.minmax", maps.minmax, lambda w: {"cam": w.randn(w.batch, 4, 6), "axes": 2})
for _name in ("gradcam", "gradcam_pp", "xgradcam", "layercam", "hirescam", "liftcam", "gradcam_elementwise", "absolute",
              "unioncam"):  # fmt: skip
    enter(
        f"weights.{_name}",
        getattr(weights, _name),
        lambda w: {"A": w.randn(w.batch, 5, 4, 6), "G": w.randn(w.batch, 5, 4, 6)},
    )
enter(
    "weights.smoothgradcam_pp",
    weights.smoothgradcam_pp,
    lambda w: {key: w.randn(w.batch, 5, 4, 6) for key in ("A", "first", "second", "third")},
)
enter(
    "weights.percentile",
    weights.percentile,
    lambda w: {"values": w.randn(w.batch, 4, 6), "theta": 20.0, "axes": 2},
)
enter(
    "weights.weighted_sum",
    weights.weighted_sum,
    lambda w: {
        "A": w.randn(w.batch, 5, 4, 6),
        "weights": w.rng.choice([w.randn(w.batch, 5), w.randn(w.batch, 5, 4, 6)]),
    },
)
for _name in ("principal_component", "kernel_component", "peak_component"):
    enter(f"projections.{_name}", getattr(projections, _name), lambda w: {"A": w.randn(w.batch, 5, 4, 6)})


def _pair(world: World) -> dict[str, Any]:
    return {"first": world.heatmap, "second": world.heatmap}


enter("denoise", xf.denoise, lambda w: {"maps": w.heatmap, "theta": 30.0})
enter("combine", xf.combine, lambda w: _pair(w) | {"gains": (w.randn(w.batch), w.randn(w.batch))})
enter("agree", xf.agree, _pair)
enter(
    "fuse",
    xf.fuse,
    lambda w: {
        "gradient_map": w.heatmap, "region_map": w.heatmap,
        "gain": theirs(lambda *maps: [m.flatten(1).mean(1) for m in maps]),
    },
)  # fmt: skip
enter(
    "gain",
    lambda heatmaps, **given: xf.gain(**given)(*heatmaps),
    lambda w: {"model": w.model, "x": w.x, "cls": w.cls, "heatmaps": [w.heatmap, w.heatmap]},
    *(p for p in inspect.signature(xf.gain).parameters if p != "options"), "chunk_size", "precision", "scorer",
)  # fmt: skip

# -- perturbations ---------------------------------------------------------------------------------------------

enter(
    "perturbation_scores",
    xf.perturbation_scores,
    lambda w: {
        "score": theirs(lambda images, which: images.flatten(1).mean(1, keepdim=True)), "x": w.x,
        "perturb": theirs(lambda image, shade: image * shade), "which": torch.tensor([0, w.batch - 1, 0]),
        "parameters": (w.rand(3),), "chunk_size": 2,
    },
)  # fmt: skip
enter("perturb.blurred", perturb.blurred, lambda w: {"x": w.x, "width": 5, "std": 2.0})
enter("perturb.baseline_images", perturb.baseline_images, lambda w: {"baseline": 0.5, "x": w.x})
enter("perturb.distinct_maps", perturb.distinct_maps, lambda w: {"A": w.randn(w.batch, 5, 4, 6)})
for _name in ("uniform", "normal"):
    enter(
        f"perturb.{_name}",
        getattr(perturb, _name),
        lambda w: {"seed": 3, "index": 2, "shape": (2, 3), "like": w.x},
    )
enter(
    "perturb.grid_mask",
    perturb.grid_mask,
    lambda w: {"seed": 3, "index": torch.tensor(1), "size": w.size, "grid": 3, "keep": 0.5, "like": w.x},
)

# -- targets ---------------------------------------------------------------------------------------------------


def _scored(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda output, **given: make(**given)(output)


for _name in ("logit", "probability", "log_odds", "sigmoid", "contrast"):
    enter(
        f"targets.{_name}",
        _scored(getattr(targets, _name)),
        lambda w: {"output": w.randn(w.batch, 5), "cls": w.rng.choice([1, [2] * w.batch, None])},
        *_parts(getattr(targets, _name)),
    )
enter(
    "targets.segment",
    _scored(targets.segment),
    lambda w: {"output": w.randn(w.batch, 5, 4, 6), "cls": 1, "mask": torch.ones(4, 6)},
)
enter(
    "targets.detection",
    _scored(targets.detection),
    lambda w: {
        "output": [{"boxes": torch.tensor([[0.0, 0, 5, 5], [2, 2, 9, 9]]), "labels": torch.tensor([1, 2]),
                    "scores": torch.tensor([0.9, 0.5])}] * w.batch,
        "box": [1.0, 1.0, 5.0, 6.0], "label": w.rng.choice([None, 1]),
    },
)  # fmt: skip
enter(
    "targets.similarity",
    _scored(targets.similarity),
    lambda w: {"output": w.randn(w.batch, 5), "embedding": w.randn(5)},
)
enter(
    "targets.regression", _scored(targets.regression), lambda w: {"output": w.randn(w.batch, 5), "index": 1}
)
enter(
    "targets.per_image",
    _scored(targets.per_image),
    lambda w: {"output": w.randn(w.batch, 5), "functions": [operator.itemgetter(1)] * w.batch},
)
enter("targets.class_index", targets.class_index, lambda w: {"cls": 1, "values": w.randn(w.batch, 5)})
enter("targets.resolve", lambda output, **given: targets.resolve(**given)(output), lambda w: {
    "output": w.randn(w.batch, 5), "cls": 1}, "default")  # fmt: skip
enter("targets.describe", targets.describe, lambda w: {"output": {"logits": w.x}})
enter("targets.logits", targets.logits, lambda w: {"output": w.randn(w.batch, 5)})
enter(
    "targets' sums",
    lambda output, first, second, factor: (targets.resolve(first) * factor - second + first)(output),
    lambda w: {
        "output": w.randn(w.batch, 5),
        "first": targets.logit(1),
        "second": targets.probability(2),
        "factor": 0.5,
    },
)

# -- pictures and tables --------------------------------------------------------------------------------------


def _picture(world: World) -> np.ndarray:
    return (world.rand(*world.size, 3).numpy() * 255).astype(np.uint8)


def _curve(world: World) -> Any:
    return xf.Curve(torch.linspace(0, 1, 5), world.rand(world.batch, 5), world.rand(world.batch))


enter("plot.overlay", xf.plot.overlay, lambda w: {"image": _picture(w), "heatmap": w.heatmap[0]})
enter("plot.heatmaps", xf.plot.heatmaps, lambda w: {"image": _picture(w), "maps": {"a": w.heatmap[0]}}, "colormap", "alpha",
      "alpha_follows_heatmap")  # fmt: skip
enter("plot.grid", xf.plot.grid, lambda w: {"image": _picture(w), "rows": [{"a": w.heatmap[0]}, {"a": w.heatmap[0]}]},
      "colormap", "alpha", "alpha_follows_heatmap")  # fmt: skip
enter(
    "plot.detections",
    xf.plot.detections,
    lambda w: {"image": _picture(w), "boxes": {"a": [0, 1, 4, 3]}, "maps": {"a": w.heatmap[0]}},
)
enter(
    "plot.concepts", xf.plot.concepts, lambda w: {"image": _picture(w), "maps": [w.heatmap[0], w.heatmap[0]]}
)
enter("plot.curves", xf.plot.curves, lambda w: {"curves": {"a": _curve(w)}}, "colormap", "alpha")
enter(
    "plot.frames",
    xf.plot.frames,
    lambda w: {"image": _picture(w), "heatmap": w.heatmap[0], "fractions": (0.0, 0.5)},
)
enter("plot.volume", xf.plot.volume, lambda w: {"image": w.rand(2, 5, 6), "heatmap": w.rand(2, 5, 6)}, "slices", "at",
      "spacing", "window")  # fmt: skip
enter(
    "plot.video",
    xf.plot.video,
    lambda w: {"clip": w.rand(2, 5, 6), "heatmap": w.rand(2, 5, 6)},
    "count",
    "fps",
)
enter(
    "plot.signal",
    xf.plot.signal,
    lambda w: {"values": w.rand(2, 20), "heatmap": w.rand(20)},
    "rate",
    "spectrogram",
)
enter("plot.animation", lambda clip, heatmap, **more: xf.plot.animation(clip, heatmap, **more).to_jshtml(), lambda w: {
    "clip": w.rand(2, 5, 6), "heatmap": w.rand(2, 5, 6)}, "fps", "window")  # fmt: skip
enter("images.load", xf.images.load, lambda w: {"image": _picture(w)})
enter(
    "images.prepare",
    lambda image, preset: xf.images.prepare(image, Preset(*preset)),
    lambda w: {"image": _picture(w), "preset": (12, 14, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear")},
)
enter("models.find_class", xf.models.find_class, lambda w: {"query": "cat", "categories": ["cat", "dog"]})
enter("testing.small_case", xf.testing.small_case, lambda w: {"seed": 1, "batch": 1, "size": (12, 16)})
enter(
    "testing.small_transformer",
    xf.testing.small_transformer,
    lambda w: {"seed": 1, "batch": 1, "size": (12, 16)},
)


enter("report.markdown", report.markdown, lambda w: {"rows": [["a", "b"], ["1", "2"]]})
