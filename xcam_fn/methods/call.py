"""One question: a network at a layer, images and a class. Methods that share it reuse each other's work."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.arguments import check
from xcam_fn.network.calls import outputs_agree, run_model
from xcam_fn.network.copies import private_copy, unwrap
from xcam_fn.network.forward import forward_pass, share_guesses
from xcam_fn.network.halves import Halves, halves
from xcam_fn.network.levels import score_levels
from xcam_fn.network.modes import Rescale, StepByStep
from xcam_fn.network.passes import Pass
from xcam_fn.network.places import ToSpatial, replaced
from xcam_fn.network.split import checked_scores
from xcam_fn.network.target_layer import Layer, find
from xcam_fn.network.vjp import pulled_back, recording, records_nothing, vjp
from xcam_fn.perturb import perturbation_scores
from xcam_fn.scoring.running import Once, Running, Scoring, check_rows, mixing
from xcam_fn.scoring.score import TARGETS, Explained, check_score, explained_score
from xcam_fn.targets import Classes, Target, logit
from xcam_fn.torch_state import in_transform

Change = Callable[[Tensor, Tensor], Tensor]


class Call(Once):
    """A network at a target layer, images, and the class or target to explain.

    It is made for one call of a method, or of several methods that explain the same, and dropped afterwards.

    Attributes:
        model: the network.
        layer: a name, a module of the model, or None for the default layer.
        x: (B, C, *size), the images.
        cls: as for every method.
        to_spatial: arranges the layer's output on the image; None finds it.
        create_graph: whether the computation is recorded for gradients of the parameters.
        records: whether the first forward is recorded even if no gradient is needed yet.
        many: whether n classes per image are explained, as far as is known.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer,
        x: Tensor,
        cls: Classes = None,
        *,
        to_spatial: ToSpatial | None = None,
        create_graph: bool = False,
        records: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.layer, self.x, self.cls = model, layer, checks.plain(x), cls
        self.to_spatial, self.create_graph, self.records = to_spatial, create_graph, records
        self.many = False  # until n classes per image are found to be requested
        self._origin: nn.Module | None = None  # the user's model, once a copy of its structure is explained
        self._of_network: dict[str, Any] = {}  # values that do not depend on the class
        self._like: Call | None = None  # the call whose images these are changed copies of

    def _with(self, **changes: Any) -> Call:
        question = ("model", "layer", "x", "cls", "to_spatial", "create_graph", "records")
        other = Call(**({name: getattr(self, name) for name in question} | changes))
        other._origin = self._origin
        return other

    def of(self, x: Tensor, cls: Classes) -> Call:
        """The same question about other images, with the class and the layer fixed here."""
        other = self._with(x=x, cls=cls)
        other._like = self
        return other

    def at(self, layer: Layer) -> Call:
        """The same question at another layer; nothing is shared."""
        return self._with(layer=self._own(layer))

    def asking(self, cls: Classes) -> Call:
        """The same question about another class; the forward is shared."""
        if cls is self.cls:
            return self
        other = self._with(cls=cls)
        other._of_network = self._of_network
        return other

    @contextlib.contextmanager
    def running(self, *, once: bool = False) -> Iterator[None]:
        """Check the arguments, and record a graph if one is requested.

        Args:
            once: a single forward is enough. Else a copy of the model's structure is explained, which is not
                affected if another thread changes the model.
        """
        checks.check_to_spatial(self.to_spatial)
        if not torch.compiler.is_dynamo_compiling():
            check("create_graph", self.create_graph, bool)
            checks.check_call(self.model, self.x)
            checks.check_model(unwrap(self.model))
            if self._origin is None and not once:
                self._origin = unwrap(self.model)
                self.layer = self._own(self.layer)
                self.model = private_copy(self._origin, clone_buffers=False)
                share_guesses(self.model, self._origin)
        with recording(self.x, self.create_graph):
            yield

    def _own(self, layer: Layer) -> Layer:
        """The layer's name if it is a module of the user's model, which a copy replaces."""
        if self._origin is None or not isinstance(layer, nn.Module):
            return layer
        return find(self._origin, layer)[0]

    # -- at the layer ---------------------------------------------------------------------------------------

    def _pin(self) -> None:
        """Fix the layer that was found, and the layout of its output for images of this size."""
        like, self._like = self._like, None
        if like is not None and (self.layer is None or "pass" in like._of_network):
            site, self.layer = like._pass().site, like.shown
            self.to_spatial = site.to_spatial if like.x.shape[2:] == self.x.shape[2:] else self.to_spatial

    def _pass(self, *, records: bool = False) -> Pass:
        """The forward at the layer, run again if it was not recorded and a gradient is needed."""
        self._pin()
        found = self._of_network.get("pass")
        if found is None or (records and found.pull is None):
            records, layer = records or self.records, self.target_layer
            score = self._score if layer is None else None
            found = forward_pass(self.model, layer, self.x, self.to_spatial, records=records, score=score)
            self._of_network["pass"] = found
        return found

    @property
    def levels(self) -> list[str] | None:
        """The layers through which a detection depends on the image, see `score_levels`; else None."""
        whole = self.cls.whole if isinstance(self.cls, Target) else None
        if whole is not None and "levels" not in self._of_network:
            score = checked_scores(whole, self.x.shape[0])
            self._of_network["levels"] = score_levels(self.model, self.x, score)
        return self._of_network.get("levels")

    @property
    def target_layer(self) -> Layer:
        """The requested layer, or by default the one through which a detection depends on the image."""
        found = None if self.layer is not None else self.levels
        if found is not None and len(found) > 1:
            raise ValueError(
                f"layer=None: the score depends on several layers: {', '.join(found)}; "
                "name one of them, or add up their maps with multi_layer(method)"
            )
        return self.layer if found is None else found[0]

    @property
    def _score(self) -> Callable[[Any], Tensor]:
        return self.once("score", lambda: checked_scores(self.cls, self.x.shape[0]))

    @property
    def features(self) -> Tensor:
        """The layer's output, arranged on the image and in the precision of x, (B, K, *spatial)."""
        return self._pass().features.to(self.x.dtype)

    @property
    def output(self) -> Any:
        """The network's output for x."""
        return self._pass().output

    @property
    def shown(self) -> str:
        """The layer's name in messages."""
        return self._pass().site.shown

    def gradient(self, cls: Classes = None) -> Tensor:
        """The gradient of the score with respect to the features, (B, n, K, *spatial).

        Args:
            cls: the class or target; None for the call's own.
        """
        score = self._score if cls is None else checked_scores(cls, self.x.shape[0])
        return self.by_class(self._pass(records=True).gradient(score).to(self.x.dtype))

    def by_class(self, G: Tensor) -> Tensor:
        """Gradients (B, ...) or (B, n, ...) as (B, n, ...); sets `many`."""
        self.many = G.ndim > self.x.ndim
        return G if self.many else G[:, None]

    def curvature(self) -> tuple[Tensor, Tensor]:
        """The gradient, and the second derivative times the features, (B, n, K, *spatial) each."""
        with StepByStep():
            found = forward_pass(self.model, self.target_layer, self.x, self.to_spatial)
            self._of_network.setdefault("pass", found)
            G, HA = found.curvature(self._score)
        return self.by_class(G), self.by_class(HA)

    def gradient_at(self, replace: Callable[[Tensor], Tensor], cls: Classes) -> Tensor:
        """The gradient of the score at a replacement of the layer's own output."""
        found = forward_pass(self.model, self.target_layer, self.x, self.to_spatial, replace=replace)
        return self.by_class(found.gradient(checked_scores(cls, self.x.shape[0])))

    def multipliers(self) -> Tensor:
        """DeepLIFT's multipliers from the features to the score, (B, n, K, *spatial).

        They are a gradient in which each activation function has the slope between its value for zero
        features and its value for the features. Two forwards.
        """
        found, x = self._pass(), self.x
        site, own, detached = found.site, found.own, records_nothing(x)
        zeros = torch.zeros_like(found.features)
        reference = zeros if site.to_spatial is None else replaced(site.to_spatial, own, zeros)

        def run(features: Tensor, mode: Rescale) -> Any:
            return site.run(x, lambda _: mode.begin() or features.clone(), detached=detached)

        def pull(score: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
            with StepByStep(), Rescale() as kept:
                run(reference, kept)
            with StepByStep(), Rescale(kept.reference) as mode:
                scores, pullback = vjp(lambda own: score(run(own, mode)), own, f"layer {site.shown!r}")
            return scores, pulled_back(pullback, scores)

        return self.by_class(found._replace(pull=pull).gradient(self._score).to(x.dtype))

    # -- what is explained ----------------------------------------------------------------------------------

    def explained(self, score: str = "logit") -> Explained:
        """The score of each image, with its class fixed on the original image.

        Args:
            score: the kind of score of a class, "logit" or "probability".
        """
        check_score(score)
        found = explained_score(self.output, self.x.shape[0], self.cls, TARGETS[score])
        self.many = found.many
        return found

    def for_each_class(self, maps: Tensor) -> Tensor:
        """Repeat maps (B, 1, *spatial), which do not depend on the class, for each requested class."""
        if self.cls is None:
            return maps
        return maps.expand(-1, self.explained().own.shape[1], *maps.shape[2:])

    @property
    def fixed(self) -> Classes:
        """The class of the original images, to explain other images with."""
        return self.once("fixed", lambda: fixed_class(self.model, self.x, self.cls))

    def check_unmoved(self, how: str, remedy: str) -> None:
        """Raise where the target reads given places of the image, but inputs have their content elsewhere.

        Args:
            how: the method, and what it does to the inputs.
            remedy: what to do.
        """
        if isinstance(self.cls, Target) and self.cls.is_placed:
            raise checks.StructureError(
                f"{how}, and the target reads given places of the image, a box or pixels, where these inputs "
                f"have something else; {remedy}"
            )

    # -- scores ---------------------------------------------------------------------------------------------

    def scoring(self, score: str, how: Running) -> Scoring:
        """The scoring of perturbed images, shared by all methods with the same settings.

        Args:
            score: the kind of score of a class, "probability" or "logit".
            how: how the network is run.
        """
        make = lambda: Scoring(self.model, self.x, self.cls, score, how)  # noqa: E731
        found = self.once(("scoring", score, how), make)
        self.many = found.explained.many
        return found

    def head_scores(
        self, change: Change, which: Tensor, parameter: Tensor, *, score: str, **how: Any
    ) -> Tensor:
        """The scores (P, n) of the features of the images `which`, changed by `(features, parameter)`.

        Only the layers after the target layer run, if the network can be cut there, one chunk at a time.

        Args:
            change: maps features (K, *spatial) and one parameter to new features.
            which: (P,), the image whose features each change applies to.
            parameter: (P, ...), the parameter of each change.
            score: the kind of score of a class, "logit" or "probability".
            **how: chunk_size and progress, as for `perturbation_scores`, for runs of the head.
        """
        explained, head = self.explained(score), self.halves
        if not len(which):
            return self.x.new_zeros(0, explained.own.shape[-1])
        if not head.takes_any_batch:
            return self._one_by_one(change, which, parameter, explained, **how)

        def scores(changed: Tensor, images: Tensor) -> Tensor:
            changed = changed.to(self._pass().own.dtype)
            return explained.of(head.run_head(changed, head.alone(self._pass().own, images)), images)

        return perturbation_scores(scores, self.features, change, which, (parameter,), **how)

    @property
    def halves(self) -> Halves:
        """The network cut at the layer; if it can be traced, the head alone."""
        if "halves" not in self._of_network:
            found = self._pass()
            check_rows(found.output, functools.partial(run_model, self.model), self.x)
            self._of_network["halves"] = halves(found, self.x)
        return self._of_network["halves"]

    def _one_by_one(
        self, change: Change, which: Tensor, parameter: Tensor, explained: Explained, **how: Any
    ) -> Tensor:
        """The same for a head that also reads other values of its image: mapped over one image's changes."""
        x, head, scores = self.x, self.halves, []
        for image in range(len(x)):
            A, residual = head.run_trunk(x[image : image + 1])
            if checks.is_readable(x) and not outputs_agree(A, self.features[image : image + 1]):
                raise mixing()
            if image == 0 and not head.is_traced:
                self._check_head(A, residual)
            is_own = which == image if checks.is_readable(x) else slice(len(parameter) // len(x))
            own = parameter[is_own]
            if not len(own):
                continue
            here = torch.zeros(len(own), dtype=torch.int64, device=x.device)

            def score(
                changed: Tensor, images: Tensor, residual: Any = residual, image: int = image
            ) -> Tensor:
                index = images.new_tensor([image])
                run = lambda a: explained.of(head.run_head(a[None], residual), index)[0]  # noqa: E731
                return _mapped(run, changed)

            with StepByStep():  # the fused kernels of attention cannot be mapped
                scores.append(perturbation_scores(score, A, change, here, (own,), **how))
        return torch.cat(scores)

    def _check_head(self, A: Tensor, residual: Any) -> None:
        """Raise if the output does not depend on the layer's output."""
        if checks.is_readable(A):
            own, other = (self.halves.run_head(a, residual) for a in (A, 1 - 2 * A))
            if outputs_agree(own, other):
                raise checks.StructureError(
                    f"layer {self.shown!r}: the model's output does not depend on the layer's output; choose "
                    "a layer that it depends on, or use eigencam, scorecam or rise"
                )


def _mapped(score: Callable[[Tensor], Tensor], changed: Tensor) -> Tensor:
    """The scores of changed features, computed with vmap if the network allows it.

    A detector's number of boxes varies, which vmap does not support: it runs on one after the other.
    """
    try:
        return torch.vmap(score)(changed)
    except Exception:
        if in_transform():
            raise
        return torch.stack([score(a) for a in changed])


def fixed_class(model: nn.Module, x: Tensor, cls: Classes) -> Classes:
    """The class, with the predicted one filled in where the output decides it, so it is chosen only once.

    Args:
        model: the network, in evaluation mode.
        x: (B, C, *size), the images whose class is predicted.
        cls: as for every method.
    """
    if cls is not None and not hasattr(cls, "pinned"):
        return cls
    call = Call(model, None, x)
    with call.running(), torch.no_grad():
        return explained_score(run_model(model, x), len(x), cls, logit).cls
