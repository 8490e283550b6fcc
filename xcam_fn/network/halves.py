"""A network's two halves at a target layer, from a trace or by running the whole network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.network import trace
from xcam_fn.network.calls import (
    ModuleCall,
    is_in_place,
    keeps_rows_apart,
    leaves_of,
    outputs_agree,
    run_changed,
)
from xcam_fn.network.copies import is_quantized
from xcam_fn.network.passes import Pass, Site
from xcam_fn.network.places import replaced
from xcam_fn.network.probe import made_up
from xcam_fn.perturb import normal
from xcam_fn.torch_state import in_transform, is_readable, is_wrapped, outside_transforms

_Made = TypeVar("_Made")


class Halves(NamedTuple):
    """A network cut at a target layer, `head(*trunk(x)) == model(x)`.

    Attributes:
        site: the target layer.
        trunk: maps x to the layer's own output and the residual, the other values of the trunk that the head
            reads.
        head: maps the layer's own output and the residual to the network's output.
        takes_any_batch: the head accepts any number of rows, because it reads nothing else.
        is_traced: the head runs only what follows the layer.
    """

    site: Site
    trunk: Callable[[Tensor], tuple[Tensor, Any]]
    head: Callable[[Tensor, Any], Any]
    takes_any_batch: bool
    is_traced: bool

    def run_trunk(self, x: Tensor) -> tuple[Tensor, Any]:
        """The layer's output arranged on the image, and the residual, with what the arrangement drops."""
        own, residual = self.trunk(x.clone())
        return (own, residual) if self.site.to_spatial is None else (self.site.placed(own), (own, residual))

    def run_head(self, features: Tensor, residual: Any) -> Any:
        """The network's output for features arranged on the image."""
        if self.site.to_spatial is None:
            return self.head(features, residual)
        own, rest = residual
        return self.head(replaced(self.site.to_spatial, own, features), rest)

    def alone(self, own: Tensor, which: Tensor) -> Any:
        """The residual of a head that takes any batch, for rows of the layer's own output."""
        return () if self.site.to_spatial is None else (own[which], ())


def halves(found: Pass, x: Tensor, *, differentiable: bool = False) -> Halves:
    """Cut the network at a pass's target layer, with a trace made for this call, else by running all of it.

    Args:
        found: a pass of this network on images like x.
        x: (B, C, *size).
        differentiable: the halves will be differentiated, so a trace must have the network's gradients.
    """
    site = found.site
    alone = found.output if is_readable(x) and len(x) == 1 else None
    cut = cut_at(site, found.calls, x, alone, differentiable=differentiable)
    if cut is not None:
        trunk, head = cut.trunk, cut.head
        any_batch = cut.residual_is_empty and len(found.own) == len(x)
        if any_batch and is_readable(found.own):
            any_batch = keeps_rows_apart(lambda a: head(site.root, a), found.own[:1].detach())
        return Halves(
            site,
            lambda x: trunk(site.root, x),
            lambda features, residual: head(site.root, features, *residual),
            takes_any_batch=any_batch,
            is_traced=True,
        )

    def trunk_by_replacing(x: Tensor) -> tuple[Tensor, Any]:
        seen: list[Tensor] = []
        site.run(x, lambda value: seen.append(value.clone()) or value)
        return seen[0], x

    def head_by_replacing(features: Tensor, x: Tensor) -> Any:
        if in_transform() and is_in_place(site.module):
            raise checks.StructureError(
                f"layer {site.shown!r} modifies its input in place, unsupported by torch.func; choose another"
            )
        return site.run(x, lambda _: features.clone())

    return Halves(site, trunk_by_replacing, head_by_replacing, takes_any_batch=False, is_traced=False)


def cut_at(
    site: Site, calls: list[ModuleCall], x: Tensor, output: Any = None, *, differentiable: bool = False
) -> trace.Cut | None:
    """Cut the network's trace at a target layer and compare it with the network, as in `traced_model`."""
    call = next(c for c in calls if c.key == (site.name, site.number))

    def cut(found: trace.Trace) -> trace.Cut | None:
        node = dict(enumerate(found.calls.get(call.name, ()), 1)).get(call.number)
        return None if node is None else trace.cut(found, node)

    def run(found: trace.Cut, x: Tensor) -> Any:
        own, residual = found.trunk(site.root, x.clone())
        return found.head(site.root, own, *residual)

    return _of_trace(site.root, x, output, cut, run, differentiable)


def traced_model(root: nn.Module, x: Tensor, *, differentiable: bool = False) -> trace.Trace | None:
    """Trace the model and compare the trace with it on two images; None if it cannot be traced.

    Args:
        root: the network; it is only read.
        x: (B, C, *size).
        differentiable: compare gradients too, since a user's autograd functions may define their own.
    """

    def run(found: trace.Trace, x: Tensor) -> Any:
        return trace.run(found, root, x)

    return _of_trace(root, x, None, lambda found: found, run, differentiable)


def _of_trace(
    root: nn.Module,
    x: Tensor,
    output: Any,
    make: Callable[[trace.Trace], _Made | None],
    run: Callable[[_Made, Tensor], Any],
    differentiable: bool,
) -> _Made | None:
    """What is made of the model's trace, if running it agrees with the model.

    Args:
        root: the network; it is only read.
        x: (B, C, *size).
        output: of the network for the first image; None where it is not known.
        make: the trace, compared on the first image, to what is made of it, or to None.
        run: what was made, and images, to the network's output; it is compared on another image.
        differentiable: compare gradients too.
    """
    if is_wrapped(next(iter(root.parameters()), x.new_zeros(()))):
        return None  # under vmap over models a trace cannot be compared
    with outside_transforms(), torch.no_grad():
        sample = x[:1].detach() if is_readable(x) else made_up(x)
        other = sample.roll(1, -1) / 2
        found = None if any(map(is_quantized, root.modules())) else trace.trace(root)
        if found is None:  # quantized layers read whole numbers, and features are floats
            return None
        try:
            known = run_changed(root, sample) if output is None else output
            found = trace.audited(found, root, sample, known)
            made = None if found is None else make(found)
            if made is None or not outputs_agree(run(made, other), run_changed(root, other)):
                return None
            if not differentiable:
                return made
            traced = _input_gradient(lambda x: run(made, x), sample)
            own = _input_gradient(lambda x: run_changed(root, x), sample)
            return made if outputs_agree(traced, own) else None
        except Exception:  # the network may reject a single image
            return None


def _input_gradient(run: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """The input gradient of a weighted sum of all the network's outputs, with a different weight for each."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        leaves = [leaf for leaf in leaves_of(run(x)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        weights = [normal(0, 0, tuple(leaf.shape), like=leaf) for leaf in leaves]
        (found,) = torch.autograd.grad(leaves, x, weights, allow_unused=True) if leaves else (None,)
    return torch.zeros_like(x) if found is None else found
