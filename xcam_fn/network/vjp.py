"""Gradients of scores, with autograd, or with torch.func inside its transforms and while compiling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from xcam_fn import checks
from xcam_fn.torch_state import (
    in_strides,
    in_transform,
    is_batch_norm,
    is_readable,
    is_traced,
    pytree,
)

Pullback = Callable[[Tensor], Tensor]


def by_autograd(x: Tensor) -> bool:
    """True if autograd computes the gradients; it supports functions that torch.func does not."""
    return not in_transform() and is_readable(x)


def records_nothing(x: Tensor) -> bool:
    """True if parameters may be detached: autograd computes the gradients, and no graph is requested."""
    return by_autograd(x) and not torch.is_grad_enabled()


@contextlib.contextmanager
def recording(x: Tensor, create_graph: bool = False) -> Iterator[None]:
    """Record a graph only if one is requested or a transform is active."""
    wanted = create_graph or getattr(x, "requires_grad", False) or in_transform()  # x is checked within
    leave_inference = contextlib.nullcontext()
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        leave_inference = torch.inference_mode(False)
        wanted = False
    with leave_inference, torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
        yield


def vjp(run: Callable[[Tensor], Tensor], at: Tensor, where: str = "x") -> tuple[Tensor, Pullback]:
    """The scores `run(at)`, and the function that pulls a cotangent of them back to `at`.

    Args:
        run: maps a tensor to scores.
        at: where the gradient is taken. Under autograd a graph is kept only if one is being recorded.
        where: the name of `at` in errors.

    Raises:
        LostGradientError: when pulled back: under autograd, the scores do not depend on `at`.
    """
    if not by_autograd(at):
        found: Any = torch.func.vjp(lambda at: aligned(run(at)), at)
        scores, pullback = found
        return scores, lambda cotangent: pullback(cotangent)[0]
    wanted = torch.is_grad_enabled()
    at = at if wanted and at.requires_grad else at.detach().requires_grad_()
    with torch.enable_grad():
        scores = run(at)

    def pull(cotangent: Tensor) -> Tensor:
        found = gradient(scores, at, cotangent, create_graph=wanted)
        if found is None:
            raise checks.lost_gradient(where)
        checks.check_finite(found, f"the gradient of the score with respect to {where}")
        return found

    return (scores if wanted else scores.detach()), pull


def gradient(scores: Tensor, at: Tensor, cotangent: Tensor, *, create_graph: bool) -> Tensor | None:
    """The gradient by autograd, or None if the scores do not depend on `at`."""
    if not scores.requires_grad:
        return None
    with torch.enable_grad() if create_graph else contextlib.nullcontext():
        (found,) = differentiated(scores, at, cotangent, create_graph=create_graph, retain_graph=True)
    return found


def differentiated(*args: Any, **options: Any) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad, with None for inputs that do not affect the scores, and errors translated."""
    handles = _align_norms(args[0])
    try:
        return torch.autograd.grad(*args, **options, allow_unused=True)
    except RuntimeError as error:
        if checks.is_out_of_memory(error):
            raise
        raise ValueError(
            f"the gradient of the score cannot be computed: {error}; call torch's "
            "checkpoint with use_reentrant=False; if an operation has no derivative, use rise"
        ) from error
    finally:
        for handle in handles if not options.get("create_graph") else ():
            handle.remove()


def aligned(scores: Tensor) -> Tensor:
    """The scores, whose gradient passes rightly through the batch norms behind them, see `_align_norms`."""
    _align_norms(scores)
    return scores


def _align_norms(scores: Tensor) -> list[Any]:
    """Hand every batch norm behind the scores its gradient in the strides of its input; return the handles.

    For a single image on a CPU, torch takes maps in the order of tokens for maps in their own, and returns a
    wrong gradient. An instance norm of a single image is such a batch norm, of many channels.
    """
    if is_traced() or not scores.is_cpu or scores.grad_fn is None:
        return []
    return [node.register_prehook(in_strides(node)) for node in _nodes(scores) if is_batch_norm(node)]


def _nodes(values: Tensor) -> set[Any]:
    """The nodes of autograd's graph that values were computed by."""
    found: set[Any] = {values.grad_fn}
    stack: list[Any] = [values.grad_fn]
    while stack:
        behind = {node for node, _ in stack.pop().next_functions if node is not None} - found
        found |= behind
        stack.extend(behind)
    return found


def pulled_back(pullback: Pullback, scores: Tensor) -> Tensor:
    """The gradients of scores (B,) or (B, n) as (B, ...) or (B, n, ...)."""
    if scores.ndim == 1:
        return pullback(torch.ones_like(scores))
    if scores.shape[1] == 1:
        return pullback(torch.ones_like(scores))[:, None]
    classes = torch.arange(scores.shape[1], device=scores.device)
    # (n, B, n), traceable unlike one_hot
    chosen = (classes[:, None, None] == classes) * torch.ones_like(scores)
    if by_autograd(scores):  # one after the other: C++ functions such as roi_align cannot be mapped
        return torch.stack([pullback(one) for one in chosen], 1)
    return torch.vmap(pullback, out_dims=1)(chosen)


def detached(values: Any) -> Any:
    """The same value with all of its tensors detached."""
    return pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, values)
