"""Methods for transformers that use the attention itself."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.arguments import Count
from xcam_fn.maps import precise
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import method
from xcam_fn.network.calls import Key, ModuleCall, features_of, module_calls, run_changed, with_features
from xcam_fn.network.copies import unwrap
from xcam_fn.network.modes import StepByStep
from xcam_fn.network.places import ToSpatial, UnplacedError, attention_positions, to_spatial_of
from xcam_fn.network.probe import Probe
from xcam_fn.network.target_layer import find
from xcam_fn.network.vjp import pulled_back, records_nothing, vjp
from xcam_fn.scoring.score import explained_score
from xcam_fn.targets import logit

__all__ = ["agcam", "attention_rollout", "chefer", "legrad"]

_NEEDS = "attention over all patches"


class _Block(NamedTuple):
    """One block of a forward, which can be run again by itself."""

    call: ModuleCall
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@method(
    "LeGrad", family="gradient", paper="arXiv:2404.03214",
    summary="how the score of each block's tokens rises with its attention to each patch",
    needs=_NEEDS, variants={"torchcam": {}},
)  # fmt: skip
def legrad(
    call: Call,
    *,
    num_blocks: Count | None = None,
    blocks: Sequence[str | nn.Module] | None = None,
    head: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """LeGrad: how much the score of each block's tokens rises with the block's attention to each patch.

    s_l is the score that the network's head gives to block l's tokens, A_l the block's attention; the map is
    the mean over blocks, heads and queries of ReLU(∂s_l/∂A_l), for each key that is a patch. Each block runs
    once more on its input, with its attention computed explicitly. The layer is not used, except for
    `to_spatial`.

    Args:
        num_blocks: how many of the last blocks to use, ≥ 1; None for all.
        blocks: instead of num_blocks, the blocks to use, names or modules.
        head: maps a block's tokens (B, T, K) to logits (B, classes); None for the network's own head.

    References:
        Bousselham et al. (arXiv:2404.03214), equations 6 to 9.
    """
    x, root = call.x, unwrap(call.model)
    calls = module_calls(root, x)
    found = [calls[position] for position in attention_positions(calls)]
    names = None if blocks is None else _names_of(call, root, blocks, found)
    if names is not None and num_blocks is not None:
        raise ValueError(f"num_blocks={num_blocks} and blocks={names}: pass only one of them")
    if num_blocks is not None:
        found = found[-num_blocks:]
    recorded, output = _recorded(root, x, found)
    explained = explained_score(output, len(x), call.cls, logit)
    call.many = explained.many
    every = torch.arange(len(x), device=x.device)
    logits_of = head or _head_of(root, x, recorded)

    def score_of(tokens: Tensor) -> Tensor:
        return explained.of(logits_of(tokens), every)

    chosen = [block for block in recorded if names is None or block.call.name in names]
    relevances = [one for block in chosen if (one := _relevance(block, score_of)) is not None]
    if not relevances:
        raise checks.StructureError(
            f"legrad needs attention over all patches, and {type(root).__name__} has no block with it; use "
            "gradcam"
        )
    total: Any = sum(relevances)
    positions = [i for i, one in enumerate(calls) if one in found]
    return _placed(call, calls, positions, total / len(relevances))


def _placed(call: Call, calls: Sequence[ModuleCall], positions: Sequence[int], values: Tensor) -> Tensor:
    """Arrange values of the blocks' output tokens, (B, n, T), on the image, (B, n, *spatial)."""
    place = call.to_spatial or _place_of(calls, positions, Probe(unwrap(call.model), call.x))
    tokens = values.movedim(1, -1)
    maps = tokens if place is None else place(tokens)
    checks.check_features(maps, call.x, calls[positions[0]].name)
    return maps


def _place_of(calls: Sequence[ModuleCall], positions: Sequence[int], probe: Probe) -> ToSpatial | None:
    """The layout of the tokens, from the first block that determines it, or else from a module in one.

    Tokens keep their positions from block to block.
    """
    first, length = calls[positions[0]], calls[positions[-1]].shape[1]
    inside = [i for i in range(first.start, positions[-1]) if calls[i].shape[:2] == (1, length)]
    for position in [*positions, *(i for i in inside if len(calls[i].shape) == 3)]:
        with contextlib.suppress(UnplacedError):
            return to_spatial_of(calls, position, probe)
    return to_spatial_of(calls, positions[0], probe)


def _names_of(
    call: Call, root: nn.Module, blocks: Sequence[str | nn.Module], found: Sequence[ModuleCall]
) -> list[str]:
    """The names of the requested blocks; each must be one with attention."""
    names, known = [find(root, call.at(one).layer or "")[0] for one in blocks], [one.name for one in found]
    if strange := [name for name in names if name not in known]:
        expected = f"expected one or more of {', '.join(known)}"
        raise ValueError(f"blocks holds {strange[0]!r}, which is not a block with attention; {expected}")
    return names


def _recorded(root: nn.Module, x: Tensor, found: Sequence[ModuleCall]) -> tuple[list[_Block], Any]:
    """The inputs and outputs of each block in a forward, and the network's output."""
    blocks: dict[Key, _Block] = {}

    def recorded(call: ModuleCall, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        blocks[call.key] = _Block(call, forward, args, kwargs, output)
        return output

    change = {call.key: functools.partial(recorded, call) for call in found}
    output = run_changed(root, x, change, detached=records_nothing(x))
    return [blocks[call.key] for call in found], output


def _head_of(root: nn.Module, x: Tensor, blocks: Sequence[_Block]) -> Callable[[Tensor], Any]:
    """The network after the last block's tokens: a forward in which the blocks compute nothing."""

    def returned(output: Any, *_: Any, **__: Any) -> Any:
        return output

    def head(tokens: Tensor) -> Any:
        outputs = {block.call.key: block.output for block in blocks}
        outputs[blocks[-1].call.key] = with_features(blocks[-1].output, lambda _: tokens)
        change = {key: functools.partial(returned, output) for key, output in outputs.items()}
        return run_changed(root, x, change, detached=records_nothing(x))

    return head


def _relevance(block: _Block, score_of: Callable[[Any], Tensor]) -> Tensor | None:
    """The mean over heads and queries of one block's positive attention gradient, (B, n, keys).

    None if its keys are not the tokens that it returns, as when it reduces their number.
    """
    probabilities: list[Tensor] = []
    with torch.no_grad(), StepByStep(lambda values, _: probabilities.append(values) or values):
        block.forward(*block.args, **block.kwargs)
    tokens = features_of(block.output)
    if tokens is None or len(probabilities) != 1 or probabilities[0].shape[-1] != tokens.shape[1]:
        return None

    def score(zero: Tensor) -> Tensor:
        with StepByStep(lambda values, _: values + zero):
            output = block.forward(*block.args, **block.kwargs)
        with StepByStep():
            return score_of(features_of(output))

    scores, pullback = vjp(score, torch.zeros_like(probabilities[0]))
    return pulled_back(pullback, scores).relu().mean((2, 3))


# -- attention and its gradient in the network as a whole ----------------------------------------------------


class _Attended(NamedTuple):
    """The attention of one forward: L blocks, T tokens.

    Attributes:
        calls: all calls of the forward.
        positions: the blocks' indices among the calls.
        A: (B, L, heads, T, T), the probabilities of each block's attention.
        logits: the same shape, the logits before the softmax.
        G: (B, n, L, heads, T, T), the gradient of the score with respect to the probabilities.
        many: whether n classes per image were requested.
    """

    calls: list[ModuleCall]
    positions: list[int]
    A: Tensor
    logits: Tensor
    G: Tensor
    many: bool

    @property
    def readers(self) -> Tensor:
        """The weights of the tokens that the score reads, (B, n, T): equal, with sum 1.

        The score reads a token if it depends on that token's row of the last attention.
        """
        is_read = (self.G[:, :, -1] != 0).any(-1).any(2).to(self.A)
        return is_read / is_read.sum(-1, keepdim=True).clamp(min=1)


def _attended(call: Call, name: str) -> _Attended:
    found = call.once("attended", lambda: _attention_and_gradient(call, name))
    call.many = found.many
    return found


def _attention_and_gradient(call: Call, name: str) -> _Attended:
    x, root, detached = call.x, unwrap(call.model), records_nothing(call.x)
    calls: list[ModuleCall] = []
    seen: list[tuple[Tensor, Tensor]] = []
    ended: list[int] = []  # the number of calls that had ended before each attention

    def see(probabilities: Tensor, logits: Tensor) -> Tensor:
        ended.append(len(calls))
        seen.append((probabilities, logits))
        return probabilities

    with StepByStep(see):
        output = run_changed(root, x, None, calls, detached=detached)
    positions = attention_positions(calls)
    inside = [[k for k, before in enumerate(ended) if calls[i].start <= before <= i] for i in positions]
    numbers = [of_block[0] for of_block in inside if len(of_block) == 1]
    shapes = {tuple(seen[k][0].shape) for k in numbers}
    tokens = calls[positions[-1]].shape[1] if positions else 0
    square = len(numbers) == len(inside) and {(s[0], *s[2:]) for s in shapes} == {(len(x), tokens, tokens)}
    if len(shapes) != 1 or not square:
        raise checks.StructureError(
            f"{name} needs attention over all patches in every block, which {type(root).__name__} does not "
            "have; use gradcam"
        )
    A, logits = (torch.stack(each, 1) for each in zip(*(seen[k] for k in numbers), strict=True))
    explained = explained_score(output, len(x), call.cls, logit)
    every = torch.arange(len(x), device=x.device)

    def score(zeros: Tensor) -> Tensor:
        count = itertools.count()

        def added(probabilities: Tensor, _: Tensor) -> Tensor:
            number = next(count)
            return probabilities + zeros[:, numbers.index(number)] if number in numbers else probabilities

        with StepByStep(added):
            return explained.of(run_changed(root, x, detached=detached), every)

    scores, pullback = vjp(score, torch.zeros_like(A))
    return _Attended(calls, positions, A, logits, pulled_back(pullback, scores), explained.many)


@method(
    "Attention Rollout", family="activation", paper="arXiv:2005.00928",
    summary="the attention of all blocks, multiplied back to the patches", needs=_NEEDS,
)  # fmt: skip
def attention_rollout(call: Call) -> Tensor:
    """Attention rollout: attention from the tokens that the score reads to the patches, through all blocks.

    Â_l = (mean_h A_lh + I) / 2, I for the skip connection; the map is the class token's row of Â_L ⋯ Â_1, at
    the patches. If the score reads other tokens after the last attention, such as the mean of the patches, it
    is the mean of their rows. It does not depend on the class. The layer is not used, except for
    `to_spatial`.

    References:
        Abnar and Zuidema (arXiv:2005.00928).
    """
    found = _attended(call, "attention_rollout")
    row = precise(found.readers)
    for A in reversed(precise(found.A).mean(2).unbind(1)):
        row = (row + row @ A) / 2
    return _placed(call, found.calls, found.positions, row)


@method(
    "Chefer", family="gradient", paper="arXiv:2103.15679",
    summary="attention times its gradient, where positive, multiplied through all blocks", needs=_NEEDS,
)  # fmt: skip
def chefer(call: Call, *, signed: bool = False) -> Tensor:
    """Relevance of self-attention, by Chefer, Gur and Wolf: rollout of attention times its gradient.

    R = I; block by block R ← R + Ā_l R with Ā_l = mean_h ReLU(∂s/∂A_lh ⊙ A_lh); the map is the class token's
    row of R − I, at the patches, or the mean of other rows as in `attention_rollout`. The layer is not used,
    except for `to_spatial`.

    Args:
        signed: omit the ReLU, so that heads and blocks that speak against a patch count; the map is then
            signed. It localizes better when an image holds several objects.

    References:
        Chefer et al., Generic Attention-model Explainability (arXiv:2103.15679), equations 5 and 6.
    """
    found = _attended(call, "chefer")
    readers = precise(found.readers)
    product = precise(found.G) * precise(found.A)[:, None]
    relevant = (product if signed else product.relu()).mean(3)
    row = readers
    for A in reversed(relevant.unbind(2)):
        row = row + torch.einsum("bnq,bnqk->bnk", row, A)
    return _placed(call, found.calls, found.positions, row - readers)


@method(
    "AG-CAM", family="gradient", paper="arXiv:2402.04563",
    summary="the attention's positive gradient, weighted by the sigmoid of its logits", needs=_NEEDS,
)  # fmt: skip
def agcam(call: Call, *, signed: bool = False) -> Tensor:
    """Attention-guided CAM: the positive gradient to the attention, weighted by the attention's logits.

    The map is Σ_lh ReLU(∂s/∂A_lh) ⊙ sigmoid(Z_lh) over blocks l and heads h, A = softmax(Z), Z = Q Kᵀ / √d:
    the class token's row, at the patches, or the mean of other rows as in `attention_rollout`. Unlike the
    softmax, the sigmoid has no peaks. The layer is not used, except for `to_spatial`.

    Args:
        signed: omit the ReLU, as in `chefer`.

    References:
        Leem and Seo (arXiv:2402.04563), equations 5 to 7.
    """
    found = _attended(call, "agcam")
    G = precise(found.G)
    guided = (G if signed else G.relu()) * precise(found.logits).sigmoid()[:, None]
    rows = torch.einsum("bnq,bnlhqk->bnk", precise(found.readers), guided)
    return _placed(call, found.calls, found.positions, rows)
