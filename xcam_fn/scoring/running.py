"""Runs a model to score perturbed images: precision, chunks, and a copy made for the call."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from xcam_fn import checks
from xcam_fn.arguments import Count, check, hints_of
from xcam_fn.network.calls import first_agrees, first_rows, keeps_rows_apart, outputs_agree, run_model
from xcam_fn.network.copies import private_copy, unwrap
from xcam_fn.network.halves import traced_model
from xcam_fn.network.vjp import recording, records_nothing
from xcam_fn.perturb import perturbation_scores
from xcam_fn.scoring.folding import compiled, inference_copy
from xcam_fn.scoring.score import TARGETS, check_score, explained_score
from xcam_fn.targets import Classes
from xcam_fn.torch_state import Convolution, in_transform, pytree

Precision = Literal["float32", "bfloat16"]
Run = Callable[[Tensor], Any]
Found = TypeVar("Found")

_FEW = 32  # for fewer images, a copy of the network costs more than it saves


class RunningOptions(TypedDict, total=False):
    """How the model is run for scoring.

    Args:
        chunk_size: perturbed images per forward pass, ≥ 1; it changes speed and memory, not the map.
        precision: precision of scoring, "float32" (exact) or "bfloat16".
        compile: compile the scoring model, once per network structure.
        scorer: a callable from images to outputs, used for scoring instead of the model.
        progress: show a progress bar that counts forward passes.
    """

    chunk_size: Count | None
    precision: Precision
    compile: bool
    scorer: Run | None
    progress: bool


class Running(NamedTuple):
    """The defaults of `RunningOptions`."""

    precision: Precision = "float32"
    compile: bool = False
    scorer: Run | None = None
    chunk_size: Count | None = None
    progress: bool = False


def model_or_stand_in(model: nn.Module | None, scorer: Run | None) -> nn.Module:
    """The model, or if it is None an empty module in its place; the scorer then does all the work."""
    if model is None and scorer is None:
        raise ValueError("model=None; expected a model, or scorer=a callable from images to outputs")
    return nn.Identity().eval() if model is None else model


def check_running(how: Running, x: Tensor) -> None:
    """Raise if a keyword is out of range, or not supported on this machine."""
    for name, hint in hints_of(RunningOptions).items():
        check(name, getattr(how, name), hint)
    if how.precision == "bfloat16" and not _convolves_in_bfloat16(x.device):
        raise ValueError(f"precision='bfloat16': {x.device} does not support its convolutions; use 'float32'")
    if how.compile and x.device.type == "cpu" and not _has_compiler():
        raise ValueError("compile=True needs a C++ compiler, and none was found; install g++ or leave it out")


def _convolves_in_bfloat16(device: torch.device) -> bool:
    image, kernel = (torch.ones(1, 1, n, n, device=device).bfloat16() for n in (2, 1))
    try:
        F.conv2d(image, kernel)
    except RuntimeError:
        return False
    return True


def _has_compiler() -> bool:
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ([named] if named else ["g++", "clang++", "c++", "cl"]))


def running_model(
    model: nn.Module, x: Tensor, how: Running, *, forwards: int | None = None, length: int = 1
) -> tuple[Run, Any, bool]:
    """The function that scores (the user's, the model, or a copy made for this call), and its output for x.

    The model itself runs if gradients or transforms have to pass through it, if it reads values, if a copy
    costs more than it saves, and if a copy fails on x or computes something else. The last value returned is
    whether the model reads values, for example to branch on them.

    Args:
        model: the network, in evaluation mode.
        x: (B, C, *size), the images to perturb.
        how: precision, compilation and scorer.
        forwards: the number of images to score; None for many.
        length: the minimum number of images per forward of a compiled copy.
    """
    if how.scorer is not None:
        return how.scorer, how.scorer(x), False
    root = private_copy(unwrap(model), clone_buffers=False)  # changes by another thread do not affect scores
    detached = records_nothing(x)
    itself: Run = lambda images: run_model(root, images, detached=detached)  # noqa: E731
    expected, reads = watched(itself, x)
    plain = how.precision == "float32" and not how.compile
    if (
        reads
        or torch.is_grad_enabled()
        or in_transform()
        or not checks.is_readable(x)
        or torch.is_autocast_enabled(x.device.type)
        or (plain and forwards is not None and forwards < _FEW)
    ):
        return itself, expected, reads
    if not plain:
        copied = _copied(root, x, how)
        copied = _padded(copied, length) if how.compile else copied
        return copied, copied(x), False
    try:
        copied = _copied(root, x, how)
        found = copied(x)
        agrees = outputs_agree(found, expected)
    except Exception:  # a copy may fail in any way; the model itself still works
        return itself, expected, False
    return (_instead(copied, itself), found, False) if agrees else (itself, expected, False)


def _instead(run: Run, itself: Run) -> Run:
    """The copy, with the model as a fallback if the copy fails, as on another number of images."""

    def either(images: Tensor) -> Any:
        try:
            return run(images)
        except Exception as error:
            if checks.is_out_of_memory(error):
                raise
            return itself(images)

    return either


def _copied(root: nn.Module, x: Tensor, how: Running) -> Run:
    """A private copy for inference, in the requested precision, that gets channels-last images."""
    dtype = torch.bfloat16 if how.precision == "bfloat16" else x.dtype
    trace = traced_model(root, x)
    network: Run
    if trace is not None:
        twin = inference_copy(root, trace.graph, None if dtype == x.dtype else dtype)
        network = compiled(twin) if how.compile else twin
    else:
        copy = private_copy(root, detached=True)
        for module in copy.modules():
            for tensors in ("_parameters", "_buffers"):
                own = vars(module)[tensors].items()
                vars(module)[tensors] = {name: t if t is None else _placed(t, dtype) for name, t in own}
        network = torch.compile(copy, dynamic=False) if how.compile else copy

    def run(images: Tensor) -> Any:
        return _to_float(network(_placed(images, dtype)), x.dtype)

    return run


def _placed(value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.is_floating_point():
        value = value.to(dtype)
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def _to_float(output: Any, dtype: torch.dtype) -> Any:
    """The output with its tensors in x's precision, for softmax and sums."""
    convert = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return pytree.tree_map(convert, output)


def _padded(run: Run, length: int) -> Run:
    """The function, run on at least `length` images, so only one length is compiled, not every remainder."""

    def padded(images: Tensor) -> Any:
        n = len(images)
        if n >= length:
            return run(images)
        more = images[-1:].expand(length - n, *images.shape[1:])
        return first_rows(run(torch.cat([images, more])), n, length)

    return padded


def default_chunk_size(x: Tensor, forwarded: nn.Module | None) -> int:
    """The default number of images per forward.

    Networks with depthwise convolutions are limited by memory bandwidth, so their activations should fit in
    the cache; plain convolutions need enough work for every core.
    """
    modules = [] if forwarded is None else list(forwarded.modules())
    convolutions = [m for m in modules if isinstance(m, Convolution)]
    depthwise = sum(m.groups > 1 and m.groups == m.in_channels for m in convolutions)
    if x.device.type != "cpu":
        return 64
    return 4 if depthwise * 4 > len(convolutions) else 8


class _Reads(TorchFunctionMode):
    """Notes whether a forward reads values, for example to branch on them."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func in _READING
        return func(*args, **(kwargs or {}))


_READING = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, Tensor.tolist}


def watched(run: Run, x: Tensor) -> tuple[Any, bool]:
    """The output for x, and whether the forward reads values, for example to branch on them."""
    if not checks.is_readable(x):
        return run(x), False
    with _Reads() as reads:
        return run(x), reads.found


def check_rows(output: Any, run: Run, x: Tensor, *, reads: bool | None = None) -> None:
    """Raise if a network's output for an image depends on the other images of the batch.

    The first image is run alone; if a forward reads values, so are the others, since it may branch on them.

    Args:
        output: the network's output for x.
        run: the network.
        x: (B, C, *size).
        reads: whether a forward reads values; None finds out.
    """
    if not is_exact(x) or len(x) == 1:
        return
    alone, reads = watched(run, x[:1]) if reads is None else (run(x[:1]), reads)
    others = range(1, len(x) if reads else 1)
    if not first_agrees(output, len(x), alone) or not all(
        first_agrees(run(x.roll(-i, 0)), len(x), run(x[i, None])) for i in others
    ):
        raise mixing()


def mixing() -> ValueError:
    """The error for a network that mixes the images of a batch."""
    return ValueError(
        "model: its output for an image depends on the rest of the batch, for example through normalization "
        "or dynamic quantization over the batch; explain one image at a time"
    )


def is_exact(x: Tensor) -> bool:
    """Whether outputs for x can be compared: their values can be read, and are precise enough."""
    return checks.is_readable(x) and x.dtype in (torch.float32, torch.float64)


class Once:
    """An object that stores values computed once, for the lifetime of one call."""

    def __init__(self) -> None:
        self._found: dict[Any, Any] = {}

    def once(self, key: Any, compute: Callable[[], Found]) -> Found:
        """The value stored under the key, or else that of `compute`, stored for the rest of the call."""
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]


class Scoring(Once):
    """The score of perturbed images of one call: a model ready to run, a class fixed for each image."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        cls: Classes,
        score: str,
        how: Running,
        *,
        forwards: int | None = None,
    ) -> None:
        super().__init__()
        check_running(how, x)
        check_score(score)
        self.x, self.how = x, how
        self.chunk_size = how.chunk_size or default_chunk_size(x, None if how.scorer else model)
        self.run, output, reads = running_model(model, x, how, forwards=forwards, length=self.chunk_size)
        compared = how.precision == "float32" and how.scorer is None
        self.explained = explained_score(output, len(x), cls, TARGETS[score])
        if compared:
            check_rows(output, self.run, x, reads=reads)
        # Whether images can be scored together: determined with the first perturbations.
        self._takes_many = False if reads else None if compared else True

    def of(self, images: Tensor, which: Tensor) -> Tensor:
        """The scores (P, n) of images (P, C, *size), where image i replaces image `which[i]` of x.

        A network that fails on several images at once, or mixes them, gets one at a time.
        """
        count = images.shape[0]
        if self._takes_many is None and count > 1:
            self._takes_many = not is_exact(images) or keeps_rows_apart(self.run, images[:1])
        if self._takes_many is not False:
            return self.explained.of(self.run(images), which)
        return torch.cat([self.explained.of(self.run(images[i, None]), which[i, None]) for i in range(count)])

    def each(self, images: Tensor) -> Tensor:
        """The scores (B, n) of other images in place of x."""
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

    def every(
        self, perturb: Callable[..., Tensor], *parameters: Tensor, beside: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """The scores (B, P, n) of each image of x, perturbed in P ways: parameters (P, ...)."""
        B, P = len(self.x), len(parameters[0])
        which = torch.arange(B, device=self.x.device).repeat_interleave(P)
        rows = tuple(each.repeat(B, *[1] * (each.ndim - 1)) for each in parameters)
        return self.perturbed(perturb, which, rows, beside=beside).unflatten(0, (B, P))

    def shown(self, maps: Tensor, base: Tensor) -> Tensor:
        """The scores of x masked by maps, each for the map's own class.

        Args:
            maps: (m, B, n, *size), in [0, 1]: m sets of maps, one for each image and class.
            base: (B, C, *size), the image's replacement where a map hides it.

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
    model: nn.Module | None,
    x: Tensor,
    cls: Classes,
    score: str,
    how: Running,
    *,
    create_graph: bool = False,
    forwards: int | None = None,
) -> Iterator[Scoring]:
    """The scoring of one call, with checked arguments; inside, no graph is recorded unless requested."""
    x, network = checks.plain(x), model_or_stand_in(model, how.scorer)
    checks.check_call(network, x)
    checks.check_model(network)
    with recording(x, create_graph):
        yield Scoring(network, x, cls, score, how, forwards=forwards)
