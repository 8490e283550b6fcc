"""The options that commands share, each declared and documented once, and what they stand for."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

import xcam_fn as xf

Names = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]
Flag = Annotated[bool, Parameter(negative=(), show_default=False)]
ClassName = Annotated[str | None, Parameter(name="--class")]

_EXPECTED = "expected FILE.py:NAME or package.module:NAME, such as my_methods.py:absolute_cam"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Network:
    """The network.

    Attributes:
        model: lite0, a classification model of torchvision, or timm:NAME.
        weights: a checkpoint of your own (a state dict, or .safetensors), or random.
    """

    model: str = "lite0"
    weights: str | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LayerOf(Network):
    """The network and its target layer.

    Attributes:
        layer: whose maps are used; `xcam layers MODEL` lists them. [default: the last convolution's]
    """

    layer: str | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Question(LayerOf):
    """The network, its target layer, and how methods are computed there.

    Attributes:
        variant: whose definitions to compute: xplaincam, torchcam or pytorch-grad-cam. [default: the papers']
        option: a keyword of the methods, such as num_samples=10, once for each. [default: the methods' own]
        device: where to compute, such as cpu or cuda; `evaluate` divides batches among several, as in
            cuda:0,cuda:1.
        image_size: of the square that whole photographs are resized to, pixels. [default: as the model was
            trained, which crops the center]
    """

    variant: str | None = None
    option: Annotated[list[str] | None, Parameter(negative=())] = None
    device: str = "cpu"
    image_size: int | None = None

    def load(self) -> xf.models.LoadedModel:
        """Return the network on its device."""
        loaded = xf.models.load(self.model, weights=self.weights, device=self.device).classifying()
        if (side := self.image_size) is None:
            return loaded
        if side < 1:
            raise ValueError(f"--image-size {side} is out of range; expected at least 1 pixel")
        return loaded._replace(preset=loaded.preset._replace(crop=side, resize=(side, side)))

    @property
    def options(self) -> dict[str, Any]:
        """What --option NAME=VALUE says, VALUE as Python reads it and else as text."""
        found: dict[str, Any] = {}
        for text in self.option or ():
            name, equals, value = text.partition("=")
            if not (equals and name.isidentifier()):
                raise ValueError(f"--option {text!r}: expected NAME=VALUE, such as num_samples=10")
            try:
                found[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found[name] = value
        return found

    def methods(self, names: Iterable[str], **more: Any) -> dict[str, xf.Method]:
        """The methods of these names ("all" is `METHODS`) with the options they take, by own name."""
        from xcam_fn.methods.together import named_methods

        options = self.options
        names = [name for listed in names for name in _listed(listed)]
        names = list(xf.METHODS) if names == ["all"] else names
        found = {name: _method(name, self.variant, more | options) for name in names}
        try:
            named_methods({method.name: method for method in found.values()}, **options)
        except TypeError as error:
            raise ValueError(f"--option: {error}") from None
        return found


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Drawing(Question):
    """The same, and how the maps are drawn.

    Attributes:
        output: the folder to write to.
        colormap: a name of matplotlib's, such as viridis or jet.
        alpha: how much the colors cover the photograph, 0 to 1.
    """

    output: Path = Path("xcam_output")
    colormap: str = "viridis"
    alpha: float = 0.5

    @property
    def style(self) -> dict[str, Any]:
        """The keywords of `plot.heatmaps`."""
        return {"colormap": self.colormap, "alpha": self.alpha}


def class_index(name: str | None, loaded: xf.models.LoadedModel) -> int | None:
    """Return the index of the class of that name, if one was named."""
    return None if name is None else xf.models.find_class(name, loaded.categories)


def method_name(name: str) -> str:
    """The name of a method as it is here; the reader's own keep theirs."""
    from xcam_fn.methods.catalog import own_name

    return name if ":" in name else own_name(name)


def _listed(text: str) -> list[str]:
    """The names of methods in a list with commas, which titles and wrappers may have within them."""
    name = method_name(text)
    if name in xf.METHODS:
        return [name]
    return [method_name(part.strip()) for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _method(name: str, variant: str | None, options: dict[str, Any]) -> xf.Method:
    """The method of that name, which may be one of the reader's own, with options."""
    from xcam_fn.methods.catalog import with_accepted

    if Path(name).is_file():
        raise ValueError(f"method {name!r} is not known; it is a file: photographs come before --methods")
    if ":" not in name:
        return xf.find_method(name, variant=variant, **options)
    home, _, attribute = name.rpartition(":")
    is_file = home.endswith(".py")
    if is_file and not Path(home).is_file():
        raise ValueError(f"method {name!r}: there is no file {home!r}; {_EXPECTED}")
    try:
        names = runpy.run_path(home) if is_file else vars(importlib.import_module(home))
    except ImportError as error:
        raise ValueError(f"method {name!r}: {home!r} cannot be imported ({error}); {_EXPECTED}") from None
    if not isinstance(found := names.get(attribute), xf.Method):
        there = ", ".join(key for key, value in names.items() if isinstance(value, xf.Method))
        raise ValueError(
            f"method {name!r}: {home} has no method {attribute!r}; it has {there or 'none'}. "
            "xcam_fn.from_gradients makes one of a weighting function"
        )
    return with_accepted(found, options)
