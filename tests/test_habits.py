"""Random networks of many habits are explained as hooks on a network of their own and plain loops explain them.

`python tests/test_habits.py SEED ...` runs single cases and says what came out.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import xcam_fn as xf
from habits import CLASSES, Network, Recipe, network, read, recipe

# XCAM_EXAMPLES=5000 draws that many, for once by hand.
EXAMPLES = int(os.environ.get("XCAM_EXAMPLES", "200"))
TOLERANCE = 2e-3  # of the largest value of an image's answer
REFUSED_AT_MOST = 0.05
STEPS, MASKS, GRID, PIXELS = 5, 6, 3, 90  # of integrated gradients, RISE and insertion

ACTIVATIONS = tuple(
    getattr(nn, name)
    for name in ("ReLU", "GELU", "SiLU", "Tanh", "ELU", "Softplus", "Mish", "LeakyReLU", "Hardswish", "ReLU6")
)


class LostError(Exception):
    """The score has no gradient there, as the network stops it on purpose."""


# -- the question -------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of a layer: the module's name, which call of it, of how many."""

    name: str
    number: int
    times: int


@dataclasses.dataclass
class Case:
    """A network, images and what is asked about them."""

    recipe: Recipe
    x: Tensor
    cls: Any
    layer: Call | None
    as_module: bool
    numbered: bool
    method: str
    jitter: float = 0.0  # by which share of itself a score is off: what rounding may do

    def __str__(self) -> str:
        size = "×".join(map(str, self.x.shape))
        cls = "a function" if callable(self.cls) else self.cls
        return f"seed {self.recipe.seed}: {self.recipe} | x {size} | {self.method} | layer {self.asked_name} | cls {cls}"

    @property
    def asked_name(self) -> str | None:
        if self.layer is None:
            return None
        return f"{self.layer.name}#{self.layer.number}" if self.numbered else self.layer.name

    def asked(self, net: nn.Module) -> Any:
        """The layer as it is handed to the library."""
        if self.layer is not None and self.as_module:
            return net.get_submodule(self.layer.name)
        return self.asked_name


def scored_elsewhere(output: Any) -> Tensor:
    return read(output)[:, 1] - 0.5 * read(output)[:, 2]


def draw(seed: int) -> Case | None:
    """Draw a question; None where the network does not run by itself."""
    made, rng = recipe(seed), random.Random(seed + 1)
    habits = made.habits
    sizes = (16, 18, 20, 22, 24) if "stem of patches" in habits else range(16, 25)
    batch = 1 if "stem for one image" in habits else rng.choice((1, 1, 2, 3))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, rng.choice(sizes), rng.choice(sizes), generator=generator)
    calls = candidates(made, x)
    if not calls:
        return None
    method = rng.choice(list(METHODS))
    layer = rng.choice(calls)
    cls = rng.choice((None, None, 1, 3, "many", scored_elsewhere))
    if not network(made)[0].output.is_read_by_the_library:
        cls = scored_elsewhere
    if cls == "many":
        n = rng.choice((1, 2))
        cls = [[rng.randrange(CLASSES) for _ in range(n)] for _ in range(batch)]
    if method == "insertion" and isinstance(cls, list):
        cls = [row[0] for row in cls]
    numbered = layer.times > 1 and (layer.number < layer.times or rng.random() < 0.5)
    as_module = not numbered and rng.random() < 0.2
    chosen = None if method == "default layer" else layer
    return Case(made, x, cls, chosen, as_module, numbered, method)


def candidates(made: Recipe, x: Tensor, *, every: bool = False) -> list[Call]:
    """The calls of convolutions and activations (or of all modules) that return maps; none where it fails."""
    net, _ = network(made)
    found: list[tuple[str, int]] = []
    counts: collections.Counter[str] = collections.Counter()

    def watch(name: str, module: nn.Module) -> None:
        def see(_: Any, args: Any, output: Any) -> None:
            counts[name] += 1
            kind = every or isinstance(module, (nn.Conv2d, *ACTIVATIONS)) or hasattr(module, "is_activation")
            is_map = isinstance(output, Tensor) and output.ndim == 4 and output.shape[0] == len(x)
            if kind and is_map and min(output.shape[1:]) > 1 and output.is_floating_point():
                found.append((name, counts[name]))

        module.register_forward_hook(see)

    for name, module in net.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            watch(name, module)
    try:
        with torch.no_grad():
            net(x.clone())
    except (RuntimeError, ValueError):
        return []
    return [Call(name, number, counts[name]) for name, number in found]


# -- the reference: hooks on a network of its own, one image and one perturbation at a time ----------------


class Scorer:
    """The score of one image, its class fixed on the image as it is."""

    def __init__(self, cls: Any, image: int, kind: str) -> None:
        self.cls, self.kind = cls[image] if isinstance(cls, list) else cls, kind

    def fix(self, output: Any) -> None:
        if self.cls is None:
            self.cls = int(read(output).argmax(1))

    def __call__(self, output: Any) -> Tensor:
        """The scores (n,) of an output for one image."""
        if callable(self.cls):
            return self.cls(output)
        y = read(output)
        y = y.softmax(1) if self.kind == "probability" else y
        return y[0, torch.tensor(self.cls).reshape(-1)]


def fresh(case: Case, *, opened: bool = False) -> Network:
    """A network of the reference's own; without backward hooks, which only watch."""
    net, _ = network(case.recipe, opened=opened, plain=True)
    for module in net.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module._backward_hooks.clear()
    return net


def hooked(
    case: Case,
    x: Tensor,
    change: Callable[[Tensor], Tensor],
    *,
    opened: bool = False,
    call: Call | None = None,
) -> Any:
    """The output for x where what the layer returns is changed; channels come first for `change`."""
    net = fresh(case, opened=opened)
    at = call or case.layer
    assert at is not None
    module, calls = net.get_submodule(at.name), [0]

    def hook(_: Any, args: Any, output: Tensor) -> Tensor | None:
        calls[0] += 1
        if calls[0] != at.number:
            return None
        is_last = hasattr(module, "is_channels_last")
        if getattr(module, "inplace", False):  # what is returned may be ignored: its input holds it too
            new = change(output.clone())
            return output.copy_(new)
        new = change(output.movedim(-1, 1) if is_last else output)
        return new.movedim(1, -1) if is_last else new

    module.register_forward_hook(hook)
    return net(x.clone())


def gradient(
    case: Case, image: int | slice, *, opened: bool, call: Call | None = None
) -> tuple[Tensor, Tensor]:
    """The layer's output for one image and the gradients of its n scores, (1, K, H, W) and (1, n, K, H, W)."""
    x = case.x[image : image + 1] if isinstance(image, int) else case.x
    seen: list[Tensor] = []

    def added(value: Tensor) -> Tensor:
        zero = torch.zeros_like(value).requires_grad_()
        seen[:] = [value.detach().clone(), zero]
        return value + zero

    output = hooked(case, x, added, opened=opened, call=call)
    A, zero = seen
    rows = []
    for i in range(len(x)):
        scorer = Scorer(case.cls, image if isinstance(image, int) else i, "logit")
        one = row_of(output, i, len(x))
        scorer.fix(one)
        for s in scorer(one):
            (G,) = (
                torch.autograd.grad(s, zero, retain_graph=True, allow_unused=True)
                if s.requires_grad
                else (None,)
            )
            if G is None:
                raise LostError
            rows.append(G[i])
    return A, torch.stack(rows).reshape(len(x), -1, *A.shape[1:])


def row_of(output: Any, i: int, count: int) -> Any:
    return output if count == 1 else read(output)[i : i + 1]


def joined(case: Case, of_image: Callable[[int], Tensor]) -> Tensor:
    return torch.cat([of_image(i) for i in range(len(case.x))])


def of_weights(weighted: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A gradient method's raw maps (B, n, H, W): Σ_k w_k A_k."""

    def answer(
        case: Case, *, opened: bool = False, together: bool = False, call: Call | None = None
    ) -> Tensor:
        def one(image: int | slice) -> Tensor:
            A, G = gradient(case, image, opened=opened, call=call)
            return torch.stack([weighted(A, g).sum(1) for g in G.unbind(1)], 1)

        return one(slice(None)) if together else joined(case, one)

    return answer


def whole_gradient(
    case: Case, *, opened: bool = False, together: bool = False, call: Call | None = None
) -> Tensor:
    if together:
        return gradient(case, slice(None), opened=opened, call=call)[1]
    return joined(case, lambda image: gradient(case, image, opened=opened, call=call)[1])


def scores_of(case: Case, image: int, kind: str, x: Tensor, scorer: Scorer | None = None) -> Tensor:
    """The scores (n,) of an image in the place of one of x."""
    if scorer is None:
        scorer = Scorer(case.cls, image, kind)
        scorer.fix(fresh(case)(case.x[image : image + 1].clone()))
    return scorer(fresh(case)(x.clone()))


@torch.no_grad()
def ablation(case: Case, *, call: Call | None = None) -> Tensor:
    """w_k = (s − s_k) / s and Σ_k w_k A_k."""

    def of_image(image: int) -> Tensor:
        x, seen, scorer = case.x[image : image + 1], [], Scorer(case.cls, image, "logit")
        output = hooked(case, x, lambda value: seen.append(value.clone()) or value, call=call)
        scorer.fix(output)
        s, A = scorer(output), seen[0]
        total = torch.zeros(1, len(s), *A.shape[2:])
        for k in range(A.shape[1]):

            def without(value: Tensor, k: int = k) -> Tensor:
                value = value.clone()
                value[:, k] = 0
                return value

            w = (s - scorer(hooked(case, x, without, call=call))) / s
            total += w[None, :, None, None] * A[:, None, k]
        return total

    return joined(case, of_image)


@torch.no_grad()
def masking(case: Case, *, call: Call | None = None) -> Tensor:
    """M_k = n(U(A_k)), w_k = p(x ⊙ M_k) − p(0) and Σ_k w_k A_k."""

    def of_image(image: int) -> Tensor:
        x, seen = case.x[image : image + 1], []
        hooked(case, x, lambda value: seen.append(value.clone()) or value, call=call)
        A = seen[0].float()
        hidden = scores_of(case, image, "probability", torch.zeros_like(x))
        total = torch.zeros(1, len(hidden), *A.shape[2:])
        for k in range(A.shape[1]):
            M = F.interpolate(A[:, k : k + 1], size=tuple(x.shape[2:]), mode="bilinear", align_corners=False)
            if float(A[:, k].max()) == float(A[:, k].min()):
                continue
            M = (M - M.min()) / (M.max() - M.min())
            w = scores_of(case, image, "probability", x * M) - hidden
            total += w[None, :, None, None] * A[:, None, k]
        return total

    return joined(case, of_image)


@torch.no_grad()
def random_masks(case: Case) -> Tensor:
    """Σ_n p(x ⊙ M_n) M_n / (N · P)."""

    def of_image(image: int) -> Tensor:
        x, total = case.x[image : image + 1], 0.0
        for n in range(MASKS):
            size = tuple(x.shape[2:])
            M = xf.perturb.grid_mask(0, torch.tensor(n), size, grid=GRID, keep=0.5, like=x)
            w = scores_of(case, image, "probability", x * M)
            total = total + w[None, :, None, None] * M / (MASKS * 0.5)
        return total

    return joined(case, of_image)


def relevance(case: Case) -> Tensor:
    shape = case.x[:, 0].shape
    return torch.rand(shape, generator=torch.Generator().manual_seed(case.recipe.seed))


@torch.no_grad()
def inserted(case: Case) -> Tensor:
    """The scores while the most relevant pixels are shown first, on black: (B, T)."""

    def of_image(image: int) -> Tensor:
        x, heat = case.x[image : image + 1], relevance(case)[image].flatten()
        order, scores = heat.argsort(descending=True), []
        for count in [*range(0, len(order), PIXELS), len(order)]:
            shown = torch.zeros_like(x)
            shown.flatten(2)[..., order[:count]] = x.flatten(2)[..., order[:count]]
            scores.append(scores_of(case, image, "probability", shown))
        return torch.cat(scores)[None]

    return joined(case, of_image)


def integrated(case: Case, *, opened: bool = False) -> Tensor:
    """(x − 0) times the gradient averaged on the path from 0 to x, summed over the image's channels.

    Between two points the gradient jumps from the one's to the other's, where the scores say.
    """

    def of_image(image: int) -> Tensor:
        x, scorer = case.x[image : image + 1], Scorer(case.cls, image, "logit")
        with torch.no_grad():
            scorer.fix(fresh(case)(x.clone()))
        nodes = []
        for i, t in enumerate(torch.linspace(0, 1, STEPS)):
            at = (t * x).requires_grad_()
            scores = scorer(fresh(case, opened=opened)(at.clone()))
            G = [
                torch.autograd.grad(s, at, retain_graph=True, allow_unused=True)[0]
                for s in scores
                if s.requires_grad
            ]
            if not G or any(g is None for g in G):
                raise LostError
            nodes.append((scores.detach() * (1 + case.jitter * (-1) ** i), torch.cat(G)))
        total, owed, length = torch.zeros_like(nodes[0][1]), torch.zeros_like(nodes[0][0]), 1 / (STEPS - 1)
        for (s0, g0), (s1, g1) in itertools.pairwise(nodes):
            before, after = ((g * x).flatten(1).sum(1) for g in (g0, g1))
            change = s1 - s0 + owed
            share = torch.full_like(change, 0.5)
            noise = 512 * torch.finfo(s0.dtype).eps * torch.maximum(s0.abs(), s1.abs()) / length
            differs = (before - after).abs() > torch.maximum(
                noise, 1e-3 * torch.maximum(before.abs(), after.abs())
            )
            share[differs] = ((change / length - after) / (before - after))[differs]
            share = share.clamp(0, 1)
            owed = change - length * (share * before + (1 - share) * after)
            share = share[:, None, None, None]
            total = total + length * (share * g0 + (1 - share) * g1)
        return (x * total).sum(1)[None]

    return joined(case, of_image)


# -- the methods --------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """How the library is asked and what is right.

    Attributes:
        ask: the network and the case to an answer, (B, n, ...) or (B, ...).
        right: the case to the answer, (B, n, ...).
        differentiates: whether regions that stop gradients matter.
    """

    ask: Callable[[nn.Module, Case], Tensor]
    right: Callable[..., Tensor]
    differentiates: bool = False


def raw(name: str, **options: Any) -> Callable[[nn.Module, Case], Tensor]:
    method = getattr(xf, name)
    return lambda net, case: method(net, case.asked(net), case.x, case.cls, postprocess=None, **options)


def ask_insertion(net: nn.Module, case: Case) -> Tensor:
    curve = xf.insertion(net, case.x, relevance(case), case.cls, baseline=0.0, pixels_per_step=PIXELS)
    return curve.scores


def ask_features(net: nn.Module, case: Case) -> Tensor:
    return xf.feature_and_grad(net, case.asked(net), case.x, case.cls).grads


def mean_weights(A: Tensor, G: Tensor) -> Tensor:
    return G.mean((2, 3), keepdim=True) * A


METHODS: dict[str, Family] = {
    "feature_and_grad": Family(ask_features, whole_gradient, differentiates=True),
    "gradcam": Family(raw("gradcam"), of_weights(mean_weights), differentiates=True),
    "layercam": Family(raw("layercam"), of_weights(lambda A, G: G.relu() * A), differentiates=True),
    "default layer": Family(raw("gradcam"), of_weights(mean_weights), differentiates=True),
    "ablationcam": Family(raw("ablationcam"), ablation),
    "scorecam": Family(raw("scorecam"), masking),
    "rise": Family(raw("rise", num_masks=MASKS, grid=GRID), random_masks),
    "insertion": Family(ask_insertion, inserted),
    # One point at a time: where two values tie, as for an image of zeros, the batch's size decides by its
    # rounding which of them a maximum takes.
    "integrated_gradients": Family(
        raw("integrated_gradients", steps=STEPS, chunk_size=1), integrated, differentiates=True
    ),
}


# -- what is right ------------------------------------------------------------------------------------------


class Right(NamedTuple):
    """Answers that are right, by what they are called, and why a refusal would be right too ("" where not)."""

    answers: dict[str, Tensor]
    refusal: str


def uses_layer(case: Case) -> bool:
    return case.layer is not None and case.method not in ("rise", "insertion", "integrated_gradients")


def is_empty(answer: Tensor) -> bool:
    return not bool(answer.abs().max() > 0)


def right_for(case: Case) -> Right:  # noqa: C901, a branch for each choice that is documented
    """All answers that are right for a case."""
    family, refusal = METHODS[case.method], why_refused(case)
    answers: dict[str, Tensor] = {}
    if refusal == "random":
        return Right({}, refusal)
    calls: list[Call | None] = [None]
    if case.method == "default layer":
        calls = [*candidates(case.recipe, case.x, every=True)]
    elif "two streams" in case.recipe.habits and not case.numbered and uses_layer(case):
        # Without a number the call that is of the image as it is may be taken.
        calls = [call for call in candidates(case.recipe, case.x) if call.name == case.layer.name]

    def add(name: str, call: Call | None, **options: Any) -> None:
        options = options if call is None else options | {"call": call}
        with contextlib.suppress(LostError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = family.right(case, **options)
            except RuntimeError as error:
                if "nference tensor" not in str(error):
                    raise
                return
            answers[f"{name} {call or ''}"] = found

    for call in calls:
        add("live", call)
        if family.differentiates and stops(case):
            add("opened", call, opened=True)
        if family.differentiates and refusal == "mixes" and case.method != "integrated_gradients":
            add("together", call, together=True)
    empty = [name for name, answer in answers.items() if is_empty(answer)]
    is_opened = any(name.startswith("opened") for name in answers)
    if len(empty) < len(answers) and (is_opened or case.method == "default layer"):
        # An empty map is right only where all are.
        answers = {name: answer for name, answer in answers.items() if name not in empty}
    if not refusal and (empty or not answers):
        refusal = "no gradient"
    if case.method == "integrated_gradients" and "stem for one image" in case.recipe.habits:
        refusal = refusal or "one image at a time"  # which the error says, and chunk_size=1 does
    if uses_layer(case) and hasattr(network(case.recipe)[0].get_submodule(case.layer.name), "is_mapped"):
        refusal = refusal or "inside vmap"
    if not refusal and family.differentiates and stops(case):
        refusal = "stopped gradient"
    return Right(answers, refusal)


def stops(case: Case) -> set[str]:
    stopping = {
        "no_grad", "inference_mode", "no_grad beside", "detached", "head of a detached mean", "no_grad decorator",
    }  # fmt: skip
    return case.recipe.habits & stopping


def why_refused(case: Case) -> str:
    """Why a network may or has to be refused whatever is asked, found by running it."""
    outputs = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            outputs.append(read(fresh(case)(case.x.clone())))
        if not torch.equal(*outputs):
            return "random"
        mixing = {"branch on the batch", "stem of the batch's statistics", "batch norm without statistics"}
        if "stem for one image" in case.recipe.habits:
            return "mixes" if case.recipe.habits & mixing else ""
        one, two = case.x[:1], case.x[-1:] * -2 + 1
        try:
            pair = read(fresh(case)(torch.cat([one, two])))
        except RuntimeError:  # it takes one image at a time, as what follows from one's strides
            return ""
        alone = torch.cat([read(fresh(case)(image.clone())) for image in (one, two)])
    tolerance = 0.05 if low_precision(case) else 1e-3
    is_mixed = (pair - alone).abs().max() > tolerance * alone.abs().max()
    return "mixes" if is_mixed or case.recipe.habits & mixing else ""


def low_precision(case: Case) -> bool:
    return "mixed precision" in case.recipe.habits


# -- the network as it was ----------------------------------------------------------------------------------


def state_of(value: Any, depth: int = 0) -> Any:  # noqa: PLR0911, one for each kind of value
    """What may be compared of a value: numbers, and what a mutable holds."""
    if isinstance(value, Tensor):
        return "tensor", id(value), value.detach().clone(), value.requires_grad
    if isinstance(value, nn.Module):
        return "module", id(value)
    if isinstance(value, dict):
        return type(value), id(value), [(key, state_of(part, depth)) for key, part in value.items()]
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value), len(value), [state_of(part, depth) for part in value]
    if isinstance(value, set):
        return type(value), sorted(map(repr, value))
    if isinstance(value, (int, float, str, type(None))):
        return value
    if isinstance(value, torch.Generator):
        return "generator", value.get_state()
    if hasattr(value, "__dict__") and not callable(value) and depth < 2:
        return type(value), state_of(vars(value), depth + 1)
    return "object", id(value)


def state(net: nn.Module, outside: list[Any]) -> dict[str, Any]:
    """Everything of a network that a call could leave behind, by name."""
    found: dict[str, Any] = {"outside": state_of(outside)}
    for name, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            found[name] = list(module.state_dict().values()), module.training
            continue
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = state_of(value)
        for key, parameter in module._parameters.items():
            found[f"{name}.{key}.grad"] = None if parameter is None else state_of(parameter.grad)
    found["random numbers"] = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    found["grad mode"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def touched(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in before | after if not same(before.get(name, ()), after.get(name, ()))]


# -- the verdict --------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What came of a case: equal, refused, wrongly refused, WRONG, CRASHED or TOUCHED, and what was seen."""

    kind: str
    said: str
    case: Case | None = None


def difference(found: Tensor, right: Tensor, floor: float) -> Tensor:
    """The largest difference of each image and class over the largest value there, (B, n)."""
    if found.shape != right.shape:
        found = found.unsqueeze(1) if found.ndim < right.ndim else found
        if found.shape != right.shape:  # of another layer
            return torch.full((len(right), 1), torch.inf)
    gap = (
        (found - right).abs().flatten(2).amax(2)
        if found.ndim > 2
        else (found - right).abs().amax(1, keepdim=True)
    )
    size: Tensor = right.abs().flatten(2).amax(2) if found.ndim > 2 else right.abs().amax(1, keepdim=True)
    return gap / size.clamp(min=floor)


@torch.no_grad()
def floor(case: Case) -> float:
    """What an answer is at least compared with: weights that are differences of scores are no more exact."""
    if case.method == "ablationcam":  # the share of a score that may be near zero
        least = min(
            float(scores_of(case, i, "logit", case.x[i : i + 1]).abs().min().clamp(min=1e-6))
            for i in range(len(case.x))
        )
        return 1e-3 / min(1.0, least)
    return 1e-9 if METHODS[case.method].differentiates else 1e-3


def steadiness(case: Case, name: str) -> Tensor:
    """How far an answer moves where x moves by as much as rounding does: what cannot be asked of anyone."""
    size = 4e-3 if low_precision(case) else 1e-6
    moved = []
    for sign in (1, -1):
        noise = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1))
        near = dataclasses.replace(case, x=case.x * (1 + sign * size * noise), jitter=sign * 3e-7)
        moved.append(right_for(near).answers.get(name))
    if any(answer is None for answer in moved):
        return torch.zeros(())
    right = right_for(case).answers[name]
    return torch.maximum(*(difference(answer, right, floor(case)) for answer in moved))


def compared(case: Case, found: Tensor) -> str:
    """ "" where an answer is right, else the sizes of the differences."""
    right = right_for(case)
    if not torch.isfinite(found).all():
        return "not finite"
    if not right.answers:
        return f"expected a refusal ({right.refusal}), found values up to {found.abs().max():.3g}"
    gaps = {
        name: difference(found.float(), answer.float(), floor(case)) for name, answer in right.answers.items()
    }
    nearest = min(gaps, key=lambda name: float(gaps[name].nan_to_num(1e9).max()))
    gap = gaps[nearest]
    tolerance = 2e-2 if low_precision(case) else TOLERANCE
    if (gap <= tolerance).all() or (gap <= tolerance + 10 * steadiness(case, nearest)).all():
        return ""
    if found.shape[-2:] != right.answers[nearest].shape[-2:]:
        return f"has shape {tuple(found.shape)}, expected {tuple(right.answers[nearest].shape)}"
    largest = right.answers[nearest].abs().flatten(1).amax(1)
    return f"differs from {nearest.strip()} by {numbers(gap.amax(1))} of the largest value {numbers(largest)}, found up to {numbers(found.abs().flatten(1).amax(1))}"


def numbers(values: Tensor) -> list[float]:
    return [float(f"{value:.2g}") for value in values.flatten().tolist()]


def judge(seed: int) -> Verdict:
    """Ask the library, compare, and look at what the network is afterwards."""
    case = draw(seed)
    if case is None:
        return Verdict("no network", "")
    net, maker = network(case.recipe)
    own = case.x.clone()
    before = state(net, maker.outside)
    error = found = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = METHODS[case.method].ask(net, case)
    except Exception as raised:  # a crash is a verdict too
        error = raised
    changed = touched(before, state(net, maker.outside))
    if not torch.equal(own, case.x):
        changed.append("x")
    try:
        verdict = verdict_on(case, found, error)
    except Exception as raised:
        verdict = Verdict("NO REFERENCE", "".join(traceback.format_exception(raised)[-3:]), case)
    if changed:
        return Verdict("TOUCHED", f"{', '.join(changed)}; and {verdict.kind}: {verdict.said}", case)
    return verdict


def verdict_on(case: Case, found: Tensor | None, error: Exception | None) -> Verdict:
    if isinstance(error, (ValueError, TypeError)):
        refusal = right_for(case).refusal
        said = f"{refusal}: {type(error).__name__}: {error}"
        return Verdict("refused" if refusal else "wrongly refused", said, case)
    if error is not None:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict("CRASHED", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})", case)
    assert found is not None
    said = compared(case, found)
    return Verdict("WRONG" if said else "equal", said, case)


def lines(verdicts: list[Verdict], kinds: set[str]) -> str:
    return "\n".join(f"{v.kind}: {v.case} | {v.said[:400]}" for v in verdicts if v.kind in kinds)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def test_networks_of_many_habits_are_explained_right_or_refused(unchecked):
    verdicts: list[Verdict] = []

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 200, database=None,
        phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(seed=st.integers(0, 2**31))
    def collected(seed: int) -> None:
        verdicts.append(judge(seed))

    with one_thread():
        collected()
    counts = collections.Counter(verdict.kind for verdict in verdicts)
    bad = {"WRONG", "CRASHED", "TOUCHED", "NO REFERENCE"}
    assert not bad & set(counts), f"{dict(counts)}\n{lines(verdicts, bad)}"
    wrongly = lines(verdicts, {"wrongly refused"})
    assert counts["wrongly refused"] < REFUSED_AT_MOST * len(verdicts), f"{dict(counts)}\n{wrongly}"
    assert counts["equal"] > len(verdicts) / 2, dict(counts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    start, seeds = time.time(), [int(seed) for seed in sys.argv[1:]]
    if len(seeds) == 2 and seeds[1] > seeds[0]:
        seeds = list(range(*seeds))
    found = [judge(seed) for seed in seeds]
    print(
        lines(
            found,
            {"WRONG", "CRASHED", "TOUCHED", "NO REFERENCE", "wrongly refused"}
            | ({"equal", "refused"} if len(seeds) == 1 else set()),
        )
    )
    print(dict(collections.Counter(v.kind for v in found)), f"{time.time() - start:.1f} s")
