"""The registry `METHODS`, the keywords that other libraries' definitions need, and methods found by name."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from xcam_fn.maps import corners_minmax, heatmap, minmax_resized, own_size
from xcam_fn.methods.activation import cam, eigencam, fem, kpcacam, randomcam
from xcam_fn.methods.attention import legrad
from xcam_fn.methods.backward import fullgrad, guided_backprop, shapleycam
from xcam_fn.methods.concepts import deep_feature_factorization
from xcam_fn.methods.fusion import fusioncam, unioncam
from xcam_fn.methods.gradient import (
    eigengradcam,
    finercam,
    gradcam,
    gradcam_elementwise,
    gradcam_pp,
    hirescam,
    integrated_gradients,
    layercam,
    segeigencam,
    smoothgradcam_pp,
    xgradcam,
)
from xcam_fn.methods.method import Method, accepted, with_options
from xcam_fn.methods.perturbation import (
    ablationcam,
    groupcam,
    iscam,
    reciprocam,
    rise,
    scorecam,
    sscam,
)
from xcam_fn.methods.wrappers import WRAPPERS, refinecam

Value = TypeVar("Value")

_ALL = (
    gradcam, gradcam_pp, smoothgradcam_pp, xgradcam, layercam, hirescam, gradcam_elementwise,
    eigengradcam, segeigencam, shapleycam, finercam, legrad,
    integrated_gradients, fullgrad, guided_backprop,
    cam, eigencam, kpcacam, fem,
    scorecam, sscam, iscam, ablationcam, reciprocam, groupcam, deep_feature_factorization, rise,
    unioncam, fusioncam, refinecam,
    randomcam,
)  # fmt: skip


class _Registry(Mapping[str, Value]):
    """What is looked up by name and not changed; unlike a mapping proxy it can be pickled."""

    def __init__(self, entries: Mapping[str, Value]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Value:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return repr(self._entries)


METHODS: Mapping[str, Method] = _Registry({method.name: method for method in _ALL})
"""Every method by its name, for the command line and for users."""

_RESIZE_FIRST = functools.partial(heatmap, resize_first=True)
_XPLAINCAM_SCORECAM: dict[str, Any] = {"increase": False, "summed": "masks", "mask": minmax_resized}
_XPLAINCAM_REGION = with_options(scorecam, **_XPLAINCAM_SCORECAM)
_GRAD_CAM_PP: dict[str, Any] = {"eps": 1e-6, "local": True}
_TORCHCAM_SCORES: dict[str, Any] = {"score": "logit", "softmax": True, "mask": minmax_resized}

_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "xplaincam": {
        "gradcam": {},
        "gradcam_pp": {"eps": 1e-8},
        "xgradcam": {},
        "layercam": {},
        "scorecam": _XPLAINCAM_SCORECAM,
        "sscam": {"postprocess": _RESIZE_FIRST},
        "iscam": {"scales": "cumulative", "score": "logit", "softmax": True, "postprocess": _RESIZE_FIRST},
        "ablationcam": {},
        "groupcam": {},
        "rise": {"num_masks": 8000, "keep": 0.1, "score": "logit"},
        "unioncam": {"region": _XPLAINCAM_REGION},
        "fusioncam": {"region": _XPLAINCAM_REGION},
    },
    "torchcam": {
        "gradcam": {},
        "gradcam_pp": {"divide": False},
        "smoothgradcam_pp": {"last": True, "eps": 1e-8},
        "xgradcam": {"eps": 1e-8},
        "layercam": {},
        "cam": {},
        "refinecam": {"method": with_options(gradcam_pp, divide=False), "each": own_size},
        "finercam": {},
        "legrad": {},
        "scorecam": _TORCHCAM_SCORES,
        "sscam": {**_TORCHCAM_SCORES, "noise": "mask"},
        "iscam": {**_TORCHCAM_SCORES, "scales": "cumulative"},
    },
    "pytorch-grad-cam": {
        "gradcam": {},
        "gradcam_pp": _GRAD_CAM_PP,
        "xgradcam": {"eps": 1e-7},
        "layercam": {},
        "hirescam": {},
        "gradcam_elementwise": {},
        "eigencam": {"center": True},
        "eigengradcam": {},
        "segeigencam": {},
        "kpcacam": {},
        "fem": {"summed": "features"},
        "randomcam": {},
        "shapleycam": {},
        "finercam": {"weight": 1.0, "weighting": "probability"},
        "fullgrad": {"eps": 1e-7},
        "guided_backprop": {},
        "deep_feature_factorization": {"init": "random", "max_iter": 200},
        "refinecam": {"method": with_options(gradcam_pp, **_GRAD_CAM_PP)},
        "scorecam": {"score": "logit", "increase": False, "softmax": True, "mask": corners_minmax},
        "ablationcam": {},
    },
}

VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = _Registry(
    {
        library: _Registry({name: _Registry(options) for name, options in methods.items()})
        for library, methods in _VARIANTS.items()
    }
)
"""For each library the methods that it has, and the keywords with which ours computes its map."""


def find_method(name: str, *, variant: str | None = None, **options: Any) -> Method:
    """The method of that name; "gradcam+sscam" is Fusion-CAM of the two, "smooth(gradcam)" is it smoothed.

    Args:
        name: a key of `METHODS`, or two of them with a plus: a gradient method's and a perturbation method's.
            Around either, "smooth(…)", "eigen_smooth(…)", "multi_layer(…)" and "sess(…)".
        variant: a library of `VARIANTS` whose definitions to take; None for the papers'.
        **options: other defaults, such as num_samples=10, for the method and for what it fuses. Those that
            neither takes are left out.

    Returns:
        The method, ready to be called as `method(model, layer, x, cls, **options)`.

    Raises:
        ValueError: the name or the variant is not known, or the library has no such method.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not known; expected one of {', '.join(VARIANTS)}")
    gradient, region = _around_plus(name)
    if region:
        parts = [find_method(part, variant=variant, **options) for part in (gradient, region)]
        title = f"Fusion-CAM of {parts[0].title} and {parts[1].title}"
        fused = with_options(fusioncam, title=title, name=name, gradient=parts[0], region=parts[1])
        return _with_accepted(fused, options)
    wrapper, opened, inner = name.removesuffix(")").partition("(")
    if opened and wrapper in WRAPPERS and name.endswith(")"):
        found = WRAPPERS[wrapper](find_method(inner, variant=variant, **options))
        return _with_accepted(found, options)
    if name not in METHODS:
        raise ValueError(_unknown(name))
    if variant is None:
        return _with_accepted(METHODS[name], options)
    if name not in VARIANTS[variant]:
        known = ", ".join(VARIANTS[variant])
        raise ValueError(f"variant {variant!r} has no method {name!r}; it has {known}")
    return with_options(METHODS[name], **{**VARIANTS[variant][name], **accepted(METHODS[name], options)})


def _around_plus(name: str) -> tuple[str, str]:
    """What stands before and after the first plus that is in no parentheses; all of it and "" without one."""
    for i, character in enumerate(name):
        if character == "+" and name[:i].count("(") == name[:i].count(")"):
            return name[:i], name[i + 1 :]
    return name, ""


def _with_accepted(method: Method, options: dict[str, Any]) -> Method:
    taken = accepted(method, options)
    return with_options(method, **taken) if taken else method


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, METHODS, n=3)
    if "(" in name:
        around = ", ".join(f"{wrapper}(…)" for wrapper in WRAPPERS)
        return f"method {name!r} is not known; expected one of {around} around a method"
    hint = f"did you mean {' or '.join(map(repr, near))}? (xcam methods lists them)"
    if not near:
        hint = f"expected one or more of {', '.join(METHODS)}"
    return f"method {name!r} is not known; {hint}"
