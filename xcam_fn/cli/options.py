"""The options that commands share, each declared and documented once, and what they stand for."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import re
import runpy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

import xcam_fn as xf
from xcam_fn.names import check_file, check_model, letters, names_of_methods, unknown_method

Names = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]
Flag = Annotated[bool, Parameter(negative=(), show_default=False)]
ClassName = Annotated[str | None, Parameter(name="--class")]

_LARGEST = 2**13  # pixels of a side: 0.8 GB of floats
_EXPECTED = "expected FILE.py:NAME or package.module:NAME, such as my_methods.py:absolute_cam"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Network:
    """The network.

    Attributes:
        model: lite0, a torchvision classification model, or timm:NAME.
        weights: your own checkpoint (a state dict, or .safetensors), or random.
    """

    model: str = "lite0"
    weights: str | None = None

    def __post_init__(self) -> None:
        """Raise where the name is none of a network's."""
        check_model(self.model)

    def check_files(self) -> None:
        """Raise where a file that is named is not there, before torch is imported."""
        _home("model", self.model)
        if self.weights not in (None, "random"):
            check_file("weights", Path(self.weights), "a checkpoint file")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LayerOf(Network):
    """The network and its target layer.

    Attributes:
        model: lite0, a torchvision classification model, timm:NAME, or FILE.py:FUNCTION for your own function
            that returns a network.
        layer: the layer to explain; `xcam layers MODEL` lists them. [default: the last convolution's output]
    """

    model: str = "lite0"
    layer: str | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Question(LayerOf):
    """The network, its target layer, and the options of the methods.

    Attributes:
        variant: use another library's definition of the methods. [default: the papers']
        option: method option NAME=VALUE, such as num_samples=10; repeatable. [default: the methods' own]
        device: where to compute, such as cpu or cuda; `evaluate` spreads batches over several devices, as in
            cuda:0,cuda:1.
        image_size: resize whole photographs to a square of this side, in pixels. [default: resize and crop
            the center, as in training]
    """

    variant: Literal["xplaincam", "torchcam", "pytorch-grad-cam"] | None = None
    option: Annotated[list[str] | None, Parameter(negative=())] = None
    device: str = "cpu"
    image_size: int | None = None

    def __post_init__(self) -> None:
        """Raise where an option is wrong."""
        super().__post_init__()
        check_image_size(self.image_size)
        _ = self.options

    def load(self) -> xf.models.LoadedModel:
        """Return the network on its device; the classes of one's own have no names yet."""
        return sized(classifier(self.model, self.weights, self.device), self.image_size)

    @property
    def options(self) -> dict[str, Any]:
        """What --option NAME=VALUE says, VALUE as Python reads it and else as text."""
        found: dict[str, Any] = {}
        for text in self.option or ():
            name, equals, value = text.partition("=")
            if not (equals and name.isidentifier()):
                raise ValueError(f"--option {text!r}: expected NAME=VALUE, such as num_samples=10")
            if name in found:
                raise ValueError(f"--option {text!r}: {name} is given twice; expected one value")
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
    """The same, the example photograph, and how the maps are drawn.

    Attributes:
        example: explain a photograph of a cat that comes with the extra `demo`.
        output: the folder to write to.
        colormap: a matplotlib colormap, such as inferno or jet.
        alpha: opacity of the colors, 0 to 1.
        constant_alpha: use the same opacity everywhere. [default: opacity follows the heatmap]
    """

    example: Flag = False
    output: Path = Path("xcam_output")
    colormap: str = "inferno"
    alpha: float = 0.75
    constant_alpha: Flag = False

    @property
    def style(self) -> dict[str, Any]:
        """The keywords of `plot.heatmaps`."""
        follows = not self.constant_alpha
        return {"colormap": self.colormap, "alpha": self.alpha, "alpha_follows_heatmap": follows}

    def photographs(self, named: Sequence[Path | None], methods: Sequence[str]) -> list[Path]:
        """Return the photographs to explain; raises where one choice is wrong, before torch is imported."""
        check_folder(self.output)
        found = [photo for photo in named if photo is not None]
        if bool(found) == self.example:
            problem = "a photograph and --example" if found else "no photograph"
            raise ValueError(f"got {problem}; give photographs before the options, or --example")
        self.check_files()
        for name in methods:
            check_spelling(name)
        if len(found) == 1:
            check_file("image", found[0], "an image file")
        return found or [xf.images.example()]

    def shown(self, photo: Path) -> str:
        """The photograph as it is named in print."""
        return photo.name if self.example else str(photo)


def check_folder(output: Path) -> None:
    """Raise where a folder to write to is a file."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {str(output)!r} is a file; expected a folder")


def check_spelling(method: str) -> None:
    """Raise where a name, or one within "a+b" or "smooth(a)", is none of the methods'; needs no torch."""
    known = names_of_methods()
    if Path(method).is_file():
        raise ValueError(f"method {method!r} is a file; put photographs before --methods")
    if ":" in method or letters(method) in set(map(letters, known)):
        return
    for part in filter(None, re.split(r"[,()]|(?<!\+)\+(?!\+)", method)):
        if letters(part) not in {*map(letters, known), "all"}:
            raise ValueError(unknown_method(part, known))


def is_own(name: str) -> bool:
    """Whether a network or a method is FILE.py:NAME or module:NAME."""
    return ":" in name and not name.startswith("timm:")


def code_of(names: Iterable[str]) -> dict[str, str]:
    """What tells the files of one's own networks and methods from others, by the file's name."""
    found = {}
    for name in filter(is_own, (one for listed in names for one in _listed(listed))):
        home = name.rpartition(":")[0]
        spec = None if home.endswith(".py") else importlib.util.find_spec(home)
        file = Path(spec.origin if spec and spec.origin else home)
        if file.is_file():
            found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found


def classifier(model: str, weights: str | None, device: str = "cpu") -> xf.models.LoadedModel:
    """Return a network by name or of one's own, whose preset and classes are not known yet."""
    if is_own(model):
        return _own_network(model, weights, device)
    return xf.models.load(model, weights=weights, device=device).classifying()


def check_image_size(side: int | None) -> None:
    """Raise where --image-size is no number of pixels."""
    if side is not None and not 1 <= side <= _LARGEST:
        wanted = "at least 1 pixel" if side < 1 else f"at most {_LARGEST} pixels"
        raise ValueError(f"--image-size {side} is out of range; expected {wanted}")


def sized(loaded: xf.models.LoadedModel, side: int | None) -> xf.models.LoadedModel:
    """The network with whole photographs resized to that side, its classes numbered where it has no names."""
    import torch

    if side is None:
        return loaded
    loaded = loaded._replace(preset=loaded.preset._replace(crop=side, resize=(side, side)))
    return numbered(loaded, torch.zeros(1, 3, side, side, device=loaded.device))


def numbered(loaded: xf.models.LoadedModel, x: Any) -> xf.models.LoadedModel:
    """The network, its classes numbered by what it returns for x where nobody named them."""
    from xcam_fn.checks import check_call

    if loaded.categories:
        return loaded
    check_call(loaded.model, x)
    count = len(xf.models.describe.probabilities(loaded, x[:1]))
    return loaded._replace(categories=list(map(str, range(count))))


def unknown_size(name: str, remedy: str) -> ValueError:
    """Return the error for a network of one's own whose preprocessing is not known."""
    return ValueError(f"the preprocessing of {name} is unknown; pass {remedy}")


def class_index(name: str | None, loaded: xf.models.LoadedModel) -> int | None:
    """Return the index of the class of that name, if one was named."""
    return None if name is None else xf.models.find_class(name, loaded.categories)


def method_name(name: str) -> str:
    """The key in `METHODS` of a name as others write it; FILE.py:NAME stays."""
    from xcam_fn.methods.catalog import own_name

    return name if ":" in name else own_name(name)


def _listed(text: str) -> list[str]:
    """The names of methods in a list with commas, which titles and wrappers may have within them."""
    name = method_name(text)
    if name in xf.METHODS:
        return [name]
    return [method_name(part.strip()) for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _method(name: str, variant: str | None, options: dict[str, Any]) -> xf.Method:
    """The method of that name, or FILE.py:NAME, with options."""
    from xcam_fn.methods.catalog import with_accepted

    if ":" not in name:
        return xf.find_method(name, variant=variant, **options)
    names, home, attribute = _imported("method", name)
    if not isinstance(found := names.get(attribute), xf.Method):
        there = ", ".join(key for key, value in names.items() if isinstance(value, xf.Method))
        raise ValueError(
            f"method {name!r}: {home} has no method {attribute!r}; it has {there or 'none'}. "
            "xcam_fn.from_gradients makes one of a weighting function"
        )
    return with_accepted(found, options)


def _own_network(name: str, weights: str | None, device: str) -> xf.models.LoadedModel:
    """The network that a function of the reader's own returns, with a checkpoint where one is named."""
    from torch import nn

    from xcam_fn.models.checkpoints import filled, read_state
    from xcam_fn.models.load import checked_device

    place = checked_device(device)
    names, home, attribute = _imported("model", name)
    function = names.get(attribute)
    if not callable(function):
        raise ValueError(
            f"model {name!r}: {home} has no function {attribute!r}; expected one that returns a network"
        )
    model = function()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        filled(model, read_state(Path(weights)), name, Path(weights))
    unknown = xf.images.Preset(0, 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return xf.models.LoadedModel(model.eval().to(place), unknown, [], name)


def _home(what: str, name: str) -> tuple[str, str]:
    """The file or module of FILE.py:NAME or module:NAME, and the name in it."""
    home, _, attribute = name.rpartition(":")
    if ":" in name and not (home and attribute):
        raise ValueError(f"{what} {name!r}: {_EXPECTED}")
    if home.endswith(".py") and not Path(home).is_file():
        raise ValueError(f"{what} {name!r}: there is no file {home!r}; {_EXPECTED}")
    return home, attribute


def _imported(what: str, name: str) -> tuple[dict[str, Any], str, str]:
    """The names of a file or a module of the reader's own, where it is, and the name asked for in it."""
    home, attribute = _home(what, name)
    try:
        names = runpy.run_path(home) if home.endswith(".py") else vars(importlib.import_module(home))
    except ImportError as error:
        raise ValueError(f"{what} {name!r}: {home!r} cannot be imported ({error}); {_EXPECTED}") from None
    return names, home, attribute
