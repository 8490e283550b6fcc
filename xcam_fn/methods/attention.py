"""Methods for transformers, which look at the attention itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.arguments import Count
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import method
from xcam_fn.network.attention import StepByStep
from xcam_fn.network.calls import Key, ModuleCall, module_calls, run_changed, with_features
from xcam_fn.network.copies import unwrap
from xcam_fn.network.places import attention_positions, to_spatial_of
from xcam_fn.network.probe import Probe
from xcam_fn.network.target_layer import find
from xcam_fn.network.vjp import pulled_back, records_nothing, vjp
from xcam_fn.scoring.score import explained_score
from xcam_fn.targets import logit

__all__ = ["legrad"]


class _Block(NamedTuple):
    """One block of a forward, ready to be run again by itself."""

    call: ModuleCall
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@method(
    "LeGrad", family="gradient", paper="arXiv:2404.03214",
    summary="how the score of each block's tokens rises with its attention to each patch",
    needs="attention over all patches", variants={"torchcam": {}},
)  # fmt: skip
def legrad(
    call: Call,
    *,
    num_blocks: Count | None = None,
    blocks: Sequence[str | nn.Module] | None = None,
    head: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """LeGrad: how much the score of each block's tokens rises with the attention that it pays to each patch.

    s_l is the score that the network's head gives to block l's own tokens, A_l the block's attention; the map
    is the mean over blocks, heads and queries of ReLU(∂s_l/∂A_l), for each key that is a patch. Each block is
    run again by itself on what it was given, its attention computed from its own weights. The layer is not
    used but for what `to_spatial` places.

    Args:
        num_blocks: how many of the last blocks take part, ≥ 1; None takes all.
        blocks: in place of num_blocks, the blocks that take part, names or modules.
        head: what makes logits (B, classes) of a block's tokens (B, T, K); None takes the network's own.

    References:
        Bousselham et al. (arXiv:2404.03214), equations 6 to 9.
    """
    x, root = call.x, unwrap(call.model)
    calls = module_calls(root, x)
    found = [calls[position] for position in attention_positions(calls)]
    names = None if blocks is None else _names_of(call, root, blocks, found)
    if names is not None and num_blocks is not None:
        raise ValueError(f"num_blocks={num_blocks} and blocks={names}: expected one of them")
    if num_blocks is not None:
        found = found[-num_blocks:]
    recorded, output = _recorded(root, x, found)
    explained = explained_score(output, len(x), call.cls, logit)
    call.many = explained.many
    every = torch.arange(len(x), device=x.device)
    logits_of = head or _head_of(root, x, recorded)
    relevances = [
        _relevance(block, lambda tokens: explained.of(logits_of(tokens), every))
        for block in recorded
        if names is None or block.call.name in names
    ]
    relevances = [one for one in relevances if one is not None]
    if not relevances:
        raise checks.StructureError(
            f"legrad differentiates attention over all patches, and {type(root).__name__} has no block with "
            "it; use gradcam"
        )
    total: Any = sum(relevances)
    position = max(i for i, one in enumerate(calls) if one.key == found[-1].key)
    place = call.to_spatial or to_spatial_of(calls, position, Probe(root, x))
    values = (total / len(relevances)).movedim(1, -1)
    maps = values if place is None else place(values)
    checks.check_features(maps, x, found[-1].name)
    return maps


def _names_of(
    call: Call, root: nn.Module, blocks: Sequence[str | nn.Module], found: Sequence[ModuleCall]
) -> list[str]:
    """The names of the blocks that were asked for, checked to be among those with attention."""
    names, known = [find(root, call.at(one).layer or "")[0] for one in blocks], [one.name for one in found]
    if strange := [name for name in names if name not in known]:
        expected = f"expected one or more of {', '.join(known)}"
        raise ValueError(f"blocks holds {strange[0]!r}, which is no block with attention; {expected}")
    return names


def _recorded(root: nn.Module, x: Tensor, found: Sequence[ModuleCall]) -> tuple[list[_Block], Any]:
    """What each block was given and returned in a forward, and the network's output."""
    blocks: dict[Key, _Block] = {}

    def recording_as(call: ModuleCall) -> Callable[..., Any]:
        def recorded(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            blocks[call.key] = _Block(call, forward, args, kwargs, output)
            return output

        return recorded

    output = run_changed(
        root, x, {call.key: recording_as(call) for call in found}, detached=records_nothing(x)
    )
    return [blocks[call.key] for call in found], output


def _head_of(root: nn.Module, x: Tensor, blocks: Sequence[_Block]) -> Callable[[Tensor], Any]:
    """The network from the last block's tokens on: a forward in which no block computes anything."""

    def returning(output: Any) -> Callable[..., Any]:
        return lambda forward, *args, **kwargs: output  # noqa: ARG005

    def head(tokens: Tensor) -> Any:
        outputs = {block.call.key: returning(block.output) for block in blocks}
        last = with_features(blocks[-1].output, lambda _: tokens)
        return run_changed(
            root, x, outputs | {blocks[-1].call.key: returning(last)}, detached=records_nothing(x)
        )

    return head


def _relevance(block: _Block, score_of: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The mean over heads and queries of the positive gradient to one block's attention, (B, n, keys).

    None where its keys are not the tokens that it returns, as where it makes them fewer.
    """
    probabilities: list[Tensor] = []
    with torch.no_grad(), StepByStep(lambda values: probabilities.append(values) or values):
        block.forward(*block.args, **block.kwargs)
    if len(probabilities) != 1 or probabilities[0].shape[-1] != _tokens_of(block.output).shape[1]:
        return None

    def score(zero: Tensor) -> Tensor:
        with StepByStep(lambda values: values + zero):
            output = block.forward(*block.args, **block.kwargs)
        with StepByStep():
            return score_of(_tokens_of(output))

    scores, pullback = vjp(score, torch.zeros_like(probabilities[0]))
    return pulled_back(pullback, scores).relu().mean((2, 3))


def _tokens_of(output: Any) -> Tensor:
    found: list[Tensor] = []
    with_features(output, lambda tokens: found.append(tokens) or tokens)
    return found[0]
