"""How a model is run to score perturbed inputs: memory format, folding, precision, compilation."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from xcam_fn import checks
from xcam_fn.network.copies import unwrap
from xcam_fn.network.split import in_transform, recording, run_model, traced
from xcam_fn.perturb import perturbation_scores
from xcam_fn.scoring.folding import inference_copy, with_exact_head
from xcam_fn.targets.target import Classes, ClassScore, Target, class_index, logit, logits, probability

TARGETS: dict[str, Callable[[Classes], ClassScore]] = {"probability": probability, "logit": logit}
Precision = Literal["float32", "bfloat16"]
Run = Callable[[Tensor], Any]

# Models prepared for scoring, by the id of the model; an entry goes with its model.
_PREPARED: dict[int, tuple[weakref.ref[nn.Module], dict[tuple[Any, ...], tuple[Any, Run]]]] = {}


class Running(NamedTuple):
    """How the model is run for scoring: the keywords that every perturbation method takes.

    Attributes:
        precision: "float32", exact, or "bfloat16".
        compile: compile the scoring model once.
        scorer: a callable from images to outputs in the model's place.
        chunk_size: perturbed images in one forward; None chooses.
        progress: show a bar that counts forwards.
    """

    precision: Precision = "float32"
    compile: bool = False
    scorer: Run | None = None
    chunk_size: int | None = None
    progress: bool = False


class RunningOptions(TypedDict, total=False):
    """The keywords of `Running`, for functions that take them as `**options: Unpack[RunningOptions]`."""

    precision: Precision
    compile: bool
    scorer: Run | None
    chunk_size: int | None
    progress: bool


class Explained(NamedTuple):
    """A score that is fixed for each image of a batch, whatever the images are changed into.

    Attributes:
        of: output and which images it is of, (P,), to scores (P, n).
        own: the scores of the images as they are, (B, n).
        many: whether n classes of each image were asked for.
        cls: the class as it was fixed: indices where it was None or whole numbers, else the target.
    """

    of: Callable[[Any, Tensor], Tensor]
    own: Tensor
    many: bool
    cls: Classes


def check_running(how: Running, x: Tensor) -> None:
    """Raise where a keyword is out of range, or this machine cannot do what it asks."""
    if how.chunk_size is not None:
        checks.check_count("chunk_size", how.chunk_size)
    if how.precision not in get_args(Precision):
        raise ValueError(
            f"precision={how.precision!r}; expected one of {', '.join(map(repr, get_args(Precision)))}"
        )
    if how.scorer is not None and not callable(how.scorer):
        raise TypeError(
            f"scorer is a {type(how.scorer).__name__}; expected a callable from images to outputs"
        )
    if how.precision == "bfloat16" and not _convolves_in_bfloat16(x.device):
        raise ValueError(f"precision='bfloat16': {x.device} cannot compute convolutions in it; use 'float32'")
    if how.compile and x.device.type == "cpu" and not _has_compiler():
        raise ValueError("compile=True needs a C++ compiler, and none was found; install g++ or leave it out")


def _convolves_in_bfloat16(device: torch.device) -> bool:
    try:
        F.conv2d(
            torch.ones(1, 1, 2, 2, device=device).bfloat16(), torch.ones(1, 1, 1, 1, device=device).bfloat16()
        )
    except RuntimeError:
        return False
    return True


def _has_compiler() -> bool:
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ([named] if named else ["g++", "clang++", "c++", "cl"]))


def running_model(model: nn.Module, x: Tensor, how: Running) -> Run:
    """The callable that scores: the user's own, the model itself, or a copy prepared once for speed.

    The model itself runs where gradients or transforms have to pass through it.

    Args:
        model: the network, in evaluation mode.
        x: (B, C, *size), the images to perturb.
        how: precision, compilation and scorer.
    """
    if how.scorer is not None:
        return how.scorer
    if (
        torch.is_grad_enabled()
        or in_transform()
        or not checks.is_readable(x)
        or torch.is_autocast_enabled(x.device.type)
    ):
        return lambda images: run_model(model, images)
    return _prepared(unwrap(model), x, how)


def _prepared(root: nn.Module, x: Tensor, how: Running) -> Run:
    trace = traced(root, x)
    key = (how.precision, how.compile, x.device, x.dtype, id(trace))
    versions = tuple((id(t), t._version) for t in (*root.parameters(), *root.buffers()))
    reference, remembered = _PREPARED.get(id(root), (None, {}))
    if reference is None or reference() is not root:
        remembered = {}
        owner = id(root)
        _PREPARED[owner] = (weakref.ref(root, lambda _: _PREPARED.pop(owner, None)), remembered)
    if key not in remembered or remembered[key][0] != versions:
        remembered[key] = (versions, _prepare(root, trace, x, how))
    return remembered[key][1]


def _prepare(root: nn.Module, trace: Any, x: Tensor, how: Running) -> Run:
    """A private copy made for inference, convolutions in channels-last, in the precision asked for."""
    dtype = torch.bfloat16 if how.precision == "bfloat16" else x.dtype
    twin = inference_copy(root, trace.graph) if trace is not None else copy.deepcopy(root)
    exact: set[str] = set()
    if dtype != x.dtype and isinstance(twin, fx.GraphModule):
        exact = with_exact_head(twin, x.dtype)
    for name, parameter in (*twin.named_parameters(), *twin.named_buffers()):
        parameter.requires_grad_(False)
        parameter.data = _placed(parameter.data, x.dtype if name in exact else dtype)
    network: Run = torch.compile(twin, dynamic=False) if how.compile else twin

    def run(images: Tensor) -> Any:
        return _to_float(network(_placed(images, dtype)), x.dtype)

    return run


def _placed(value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.is_floating_point():
        value = value.to(dtype)
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def _to_float(output: Any, dtype: torch.dtype) -> Any:
    """The output with its tensors in x's precision, so that softmax and sums are computed in it."""
    convert = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return pytree.tree_map(convert, output)


def _padded(run: Run, length: int) -> Run:
    """The callable run on so many images at least: one length is compiled, not each that is left over."""

    def padded(images: Tensor) -> Any:
        n = len(images)
        if n >= length:
            return run(images)
        output = run(torch.cat([images, images[-1:].expand(length - n, *images.shape[1:])]))
        if isinstance(output, list) and all(isinstance(image, dict) for image in output):
            return output[:n]  # detections, a dict for each image
        is_batched = lambda v: isinstance(v, Tensor) and v.ndim > 0 and len(v) == length  # noqa: E731
        return pytree.tree_map(lambda v: v[:n] if is_batched(v) else v, output)

    return padded


def explained_score(
    run: Run, x: Tensor, cls: Classes, default: Callable[[Classes], ClassScore] = probability
) -> Explained:
    """The score of each image, its class fixed on the image as it is.

    Args:
        run: images to outputs.
        x: (B, C, *size), the unperturbed images.
        cls: as for every method.
        default: what is explained of a class.

    Raises:
        ValueError: a class out of range, or a target that returns another shape than one score for each
            image.
        TypeError: cls or what a target returns is of a wrong kind.
    """
    output = run(x)
    if callable(cls) and not isinstance(cls, Target):

        def of_function(output: Any, which: Tensor) -> Tensor:
            scores = cls(output)
            checks.check_scores(scores, len(which))
            return scores[:, None]

        return Explained(of_function, of_function(output, torch.arange(len(x))), many=False, cls=cls)
    target = (cls if isinstance(cls, Target) else default(cls)).pinned(output)
    fixed = target.fixed(output)
    own = fixed(output, None)
    checks.check_scores(own, len(x), many=True)
    many = own.ndim == 2

    def of_target(output: Any, which: Tensor) -> Tensor:
        scores = fixed(output, which)
        return scores if many else scores[:, None]

    if isinstance(cls, Target):
        chosen: Classes = target
    elif cls is None:
        assert isinstance(target, ClassScore)  # as every default is
        chosen = target.cls
    else:
        chosen = cls  # the same object, by which methods that explain it together see that they share a call
    return Explained(of_target, own if many else own[:, None], many=many, cls=chosen)


def fixed_class(model: nn.Module, x: Tensor, cls: Classes) -> Classes:
    """The class with what the output chooses (the predicted one) filled in, so that it is chosen once.

    Args:
        model: the network, in evaluation mode.
        x: (B, C, *size), the images whose class is predicted.
        cls: as for every method.
    """
    if cls is not None and not isinstance(cls, Target):
        return cls
    checks.check_model(model, x)
    with recording(x), checks.explained(model, x), torch.no_grad():
        output = run_model(model, x)
        return class_index(None, logits(output)) if cls is None else cls.pinned(output)


def class_of(explained: Explained) -> Classes:
    """The class without what is read off for it, so that a gradient is that of the logit."""
    cls = explained.cls
    return cls.cls if isinstance(cls, ClassScore) else cls


def default_chunk_size(x: Tensor, forwarded: nn.Module | None) -> int:
    """How many images one forward takes where nothing else is said.

    Networks of depthwise convolutions are bound by memory and want their activations to stay in the cache,
    plain convolutions want enough work for every core.
    """
    modules = [] if forwarded is None else list(forwarded.modules())
    convolutions = [m for m in modules if isinstance(m, nn.modules.conv._ConvNd)]
    depthwise = sum(m.groups > 1 and m.groups == m.in_channels for m in convolutions)
    if x.device.type != "cpu":
        return 64
    return 4 if depthwise * 4 > len(convolutions) else 8


def check_score(score: str) -> None:
    """Raise where `score` names nothing that is explained of a class."""
    checks.check_choice("score", score, tuple(TARGETS))


class Scoring:
    """The score of perturbed images of one call: a model ready to run, a class fixed for each image."""

    def __init__(self, model: nn.Module, x: Tensor, cls: Classes, score: str, how: Running) -> None:
        self.x, self.how = x, how
        self.chunk_size = how.chunk_size or default_chunk_size(x, None if how.scorer else model)
        self.run = running_model(model, x, how)
        if how.compile and how.scorer is None:
            self.run = _padded(self.run, self.chunk_size)
        self.explained = explained_score(self.run, x, cls, TARGETS[score])

    def of(self, images: Tensor, which: Tensor) -> Tensor:
        """The scores (P, n) of images (P, C, *size) that stand for those of x that `which` says."""
        return self.explained.of(self.run(images), which)

    def each(self, images: Tensor) -> Tensor:
        """The scores (B, n) of other images in the place of x."""
        every = torch.arange(len(images), device=images.device)
        parts = [self.of(images[chunk], chunk) for chunk in every.split(self.chunk_size)]
        return torch.cat(parts)

    def perturbed(
        self,
        perturb: Callable[..., Tensor],
        which: Tensor,
        parameters: tuple[Tensor, ...],
        *,
        beside: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """The scores (P, n) of perturbations of x, see `perturbation_scores`."""
        if not len(which):
            return self.x.new_zeros(0, self.explained.own.shape[-1])
        return perturbation_scores(
            self.of, self.x, perturb, which, parameters, beside=beside, chunk_size=self.chunk_size,
            progress=self.how.progress,
        )  # fmt: skip

    def shown(self, maps: Tensor, base: Tensor) -> Tensor:
        """The scores of x where maps show it, each of the class that its map is of.

        Args:
            maps: (m, B, n, *size), in [0, 1]: m sets of maps, one for each image and class.
            base: (B, C, *size), what is seen where a map hides the image.

        Returns:
            (m, B, n).
        """
        m, B, n = maps.shape[:3]
        which = torch.arange(B, device=maps.device)[None, :, None].expand(m, B, n).reshape(-1)
        scores = self.perturbed(_shown, which, (maps.flatten(0, 2),), beside=(base,))
        return scores.reshape(m, B, n, -1).diagonal(dim1=-2, dim2=-1)


def _shown(image: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    return base + mask * (image - base)


@contextlib.contextmanager
def scoring_of(
    model: nn.Module, x: Tensor, cls: Classes, score: str, how: Running, *, create_graph: bool = False
) -> Iterator[Scoring]:
    """The scoring of one call, its arguments checked; nothing is recorded meanwhile but what is asked for."""
    checks.check_call(model, x)
    checks.check_model(model, x)
    check_running(how, x)
    check_score(score)
    with recording(x, create_graph), checks.explained(model, x):
        yield Scoring(model, x, cls, score, how)
