"""Methods for transformers, which look at the attention itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.maps import heatmap
from xcam_fn.methods.gradient import finish
from xcam_fn.methods.method import Postprocess, method_of
from xcam_fn.network.attention import StepByStep
from xcam_fn.network.split import (
    Layer,
    ModuleCall,
    attention_blocks,
    head_after,
    place_patches,
    pulled_back,
    recording,
    run_changed,
    with_features,
)
from xcam_fn.scoring.running import explained_score
from xcam_fn.targets import Classes, logit

Images = Float[Tensor, "B C *size"]


class _Run(NamedTuple):
    """One block of a forward, ready to be run again by itself."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def _legrad(
    model: nn.Module,
    layer: Layer,
    x: Images,
    cls: Classes = None,
    *,
    num_blocks: int | None = None,
    postprocess: Postprocess | None = heatmap,
    create_graph: bool = False,
) -> Tensor:
    """LeGrad: how much the score of each block's tokens rises with the attention that it pays to each patch.

    s_l is the score that the network's head gives to block l's own tokens, A_l the block's attention; the map
    is the mean over blocks, heads and queries of ReLU(∂s_l/∂A_l), for each key that is a patch. Each block is
    run again by itself on what it was given, its attention computed from its own weights. The layer is not
    used but for what `to_spatial` places.

    {arguments}    num_blocks: how many of the last blocks take part, ≥ 1; None takes all.

    {returns}

    References:
        Bousselham et al. (arXiv:2404.03214), equations 6 to 9.
    """
    checks.check_call(model, x)
    checks.check_model(model, x)
    blocks = attention_blocks(model, x)
    if not blocks:
        raise _no_attention(model)
    if num_blocks is not None:
        checks.check_count("num_blocks", num_blocks)
        blocks = blocks[-num_blocks:]
    with recording(x, create_graph), checks.explained(model, x):
        runs, output = _recorded_blocks(model, x, blocks)
        explained = explained_score(lambda _: output, x, cls, logit)
        every = torch.arange(len(x), device=x.device)

        head = head_after(model, x, blocks[-1]) or _head_by_itself(model, x, blocks, runs)
        found = [_relevance(run, lambda tokens: explained.of(head(tokens), every)) for run in runs]
        relevances = [each for each in found if each is not None]
        if not relevances:
            raise _no_attention(model)
        total: Any = sum(relevances)
        maps = place_patches(layer, model, x, blocks[-1], total / len(relevances))
        return finish(maps if explained.many else maps.squeeze(1), x, postprocess)


def _no_attention(model: nn.Module) -> checks.StructureError:
    return checks.StructureError(
        f"legrad differentiates attention over all patches, and {type(model).__name__} has no block with it; "
        "use gradcam"
    )


def _head_by_itself(
    model: nn.Module, x: Tensor, blocks: Sequence[ModuleCall], runs: Sequence[_Run]
) -> Callable[[Tensor], Any]:
    """The head of a model that cannot be cut: a forward in which no block computes anything."""
    changed = {(b.name, b.number): _returning(run.output) for b, run in zip(blocks, runs, strict=True)}
    last = (blocks[-1].name, blocks[-1].number)

    def head(tokens: Tensor) -> Any:
        output = with_features(runs[-1].output, lambda _: tokens)
        return run_changed(model, x, changed | {last: _returning(output)})

    return head


def _recorded_blocks(model: nn.Module, x: Tensor, blocks: Sequence[ModuleCall]) -> tuple[list[_Run], Any]:
    """What each block was given and returned in a forward, and the model's output."""
    runs: dict[tuple[str, int], _Run] = {}

    def recording_as(key: tuple[str, int]) -> Callable[..., Any]:
        def recorded(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            runs[key] = _Run(forward, args, kwargs, output)
            return output

        return recorded

    keys = [(block.name, block.number) for block in blocks]
    output = run_changed(model, x, {key: recording_as(key) for key in keys})
    return [runs[key] for key in keys], output


def _returning(output: Any) -> Callable[..., Any]:
    return lambda forward, *args, **kwargs: output  # noqa: ARG005


def _relevance(run: _Run, score_of: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The mean over heads and queries of the positive gradient to one block's attention, (B, n, keys).

    None where its keys are not the tokens that it returns, as where it makes them fewer.
    """
    probabilities: list[Tensor] = []

    def remember(values: Tensor) -> Tensor:
        probabilities.append(values)
        return values

    with torch.no_grad(), StepByStep(remember):
        run.forward(*run.args, **run.kwargs)
    count = _tokens_of(run.output).shape[1]
    if len(probabilities) != 1 or probabilities[0].shape[-1] != count:
        return None

    def score(zero: Tensor) -> Tensor:
        with StepByStep(lambda values: values + zero):
            output = run.forward(*run.args, **run.kwargs)
        with StepByStep():
            return score_of(_tokens_of(output))

    pulled: Any = torch.func.vjp(score, torch.zeros_like(probabilities[0]))
    scores, pullback = pulled
    return pulled_back(pullback, scores).relu().mean((2, 3))


def _tokens_of(output: Any) -> Tensor:
    found: list[Tensor] = []
    with_features(output, lambda tokens: found.append(tokens) or tokens)
    return found[0]


legrad = method_of(
    _legrad,
    family="gradient",
    title="LeGrad",
    paper="arXiv:2404.03214",
    summary="how the score of each block's tokens rises with its attention to each patch",
    needs="attention over all patches",
)
