"""A model and its explanation as one file: an ONNX graph or a torch.export program."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from xcam_fn import checks, weights
from xcam_fn.maps import heatmap
from xcam_fn.methods.catalog import METHODS
from xcam_fn.models.load import LoadedModel
from xcam_fn.network.split import Layer, default_layer, feature_and_grad, prepare, run_head, run_trunk
from xcam_fn.targets import logits

METHODS_THAT_EXPORT = ("gradcam", "gradcam_pp", "xgradcam", "layercam", "hirescam", "ablationcam")
OUTPUTS = ("logits", "heatmap", "class")
_ABLATED_AT_ONCE = 128
_TOLERANCE = 1e-3
_SLACK = 1e-2
_PAGE_INTERPOLATIONS = ("bilinear", "bicubic")

_aten = torch.ops.aten
# Operators of backward passes that ONNX lacks, each as operators that it has.
_BACKWARD = (
    _aten.avg_pool2d_backward,
    _aten.elu_backward,
    _aten.gelu_backward,
    _aten.glu_backward,
    _aten.hardsigmoid_backward,
    _aten.hardswish_backward,
    _aten.hardtanh_backward,
    _aten.leaky_relu_backward,
    _aten.max_pool2d_with_indices_backward,
    _aten.mish_backward,
    _aten.native_batch_norm_backward,
    _aten.native_dropout_backward,
    _aten.native_group_norm_backward,
    _aten.native_layer_norm_backward,
    _aten.select_backward,
    _aten.sigmoid_backward,
    _aten.silu_backward,
    _aten.slice_backward,
    _aten.softplus_backward,
    _aten.tanh_backward,
    _aten.threshold_backward,
    _aten._softmax_backward_data,
    _aten._log_softmax_backward_data,
)


class Exported(NamedTuple):
    """A file that was written and checked.

    Attributes:
        path: of the file.
        difference: the largest of a heatmap's values from those computed here, over the batches tried.
    """

    path: Path
    difference: float


def program(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    method: str = "gradcam",
    *,
    cls: int | None = None,
) -> torch.export.ExportedProgram:
    """The model and its explanation as one `torch.export` program, for batches of any length.

    Args:
        model: the network, in evaluation mode; it is never touched.
        layer: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), images of the size that the program is to take.
        method: one of `METHODS_THAT_EXPORT`.
        cls: the class that is explained; None for the predicted one of each image.

    Returns:
        The program: image (B, C, *size) to logits (B, classes), heatmap (B, *size) in [0, 1] and class (B,).

    Raises:
        ValueError: bad x, layer or class, a method that cannot be exported, or a model that cannot be traced.
        TypeError: an argument is of the wrong kind.
    """
    explained = _explanation(model, layer, x, method, cls)
    length = next(n for n in itertools.count(5) if n not in x.shape[1:])  # else that axis becomes dynamic too
    sample = x.detach()[:1].expand(length, *x.shape[1:]).clone()
    with _silent(), checks.explained(model, x):
        try:
            with _PlainMean():
                traced: Any = make_fx(
                    explained,
                    tracing_mode="symbolic",
                    _allow_non_fake_inputs=True,
                    decomposition_table=_table(),
                )(sample)
            batch = {0: torch.export.Dim("batch")}
            return torch.export.export(_named(traced), (sample,), dynamic_shapes=(batch,))
        except (ValueError, TypeError):
            raise
        except Exception as error:  # the tracer raises of every kind
            raise _cannot(model, method, error) from None


def onnx(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    path: str | os.PathLike[str],
    method: str = "gradcam",
    *,
    cls: int | None = None,
) -> Exported:
    """One ONNX file that predicts and explains, written and checked against what is computed here.

    The file takes `image` (batch, C, *size) and gives `logits` (batch, classes), `heatmap` (batch, *size) in
    [0, 1] and `class` (batch,), for any batch. onnxruntime runs it without torch.

    Args:
        model: the network, in evaluation mode; it is never touched.
        layer: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), images of the size that the file is to take; it is checked on them.
        path: where to write; what is there is replaced once the new file has been checked.
        method: one of `METHODS_THAT_EXPORT`.
        cls: the class that is explained; None for the predicted one of each image.

    Returns:
        `Exported(path, difference)`.

    Raises:
        ValueError: as `program`; or an operator has no ONNX counterpart, or the file computes something else.
        ImportError: the extra "export" is not installed.
        OSError: the file cannot be written.
    """
    try:
        import onnxruntime  # noqa: PLC0415 - an extra
        import onnxscript as _  # noqa: F401, PLC0415 - torch.onnx needs it and says so late
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed; pip install "xcam-fn[export]"') from error
    made = program(model, layer, x, method, cls=cls)

    def write(file: Path) -> None:
        with _silent():
            try:
                done = torch.onnx.export(
                    made,
                    dynamo=True,
                    input_names=["image"],
                    output_names=list(OUTPUTS),
                    dynamic_shapes=({0: "batch"},),
                    verbose=False,
                )
            except Exception as error:  # one kind for each stage of the exporter
                raise _cannot(model, method, error) from None
            assert done is not None
            done.save(str(file), external_data=False)

    def run(file: Path) -> Callable[[Tensor], list[Tensor]]:
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(file), quiet, providers=["CPUExecutionProvider"])
        return lambda images: [torch.as_tensor(y) for y in session.run(None, {"image": images.cpu().numpy()})]

    return _written(Path(path), write, run, _explanation(model, layer, x, method, cls), x)


def pt2(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    path: str | os.PathLike[str],
    method: str = "gradcam",
    *,
    cls: int | None = None,
) -> Exported:
    """One `.pt2` file that predicts and explains, for `torch.export.load`; written and checked as `onnx`.

    Args:
        model: the network, in evaluation mode; it is never touched.
        layer: a name, a module of the model, or None for `default_layer`.
        x: (B, C, *size), images of the size that the file is to take; it is checked on them.
        path: where to write; what is there is replaced once the new file has been checked.
        method: one of `METHODS_THAT_EXPORT`.
        cls: the class that is explained; None for the predicted one of each image.

    Returns:
        `Exported(path, difference)`.

    Raises:
        ValueError: as `program`; or the file computes something else.
        OSError: the file cannot be written.
    """
    made = program(model, layer, x, method, cls=cls)

    def write(file: Path) -> None:
        with _silent():
            torch.export.save(made, str(file))

    def run(file: Path) -> Callable[[Tensor], list[Tensor]]:
        module = torch.export.load(str(file)).module()
        return lambda images: list(module(images))

    return _written(Path(path), write, run, _explanation(model, layer, x, method, cls), x)


# -- what is traced -----------------------------------------------------------------------------------------


def _explanation(
    model: nn.Module, layer: Layer, x: Tensor, method: str, cls: int | None
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """What the file computes: images to logits, heatmaps and classes."""
    if method not in METHODS_THAT_EXPORT:
        raise ValueError(
            f"method {method!r} cannot be exported; expected one of {', '.join(METHODS_THAT_EXPORT)} (the "
            "others decide on their way what to run next, which a graph cannot)"
            if method in METHODS
            else f"method {method!r} is not known; expected one of {', '.join(METHODS_THAT_EXPORT)}"
        )
    if cls is not None and (isinstance(cls, bool) or not isinstance(cls, int)):
        raise TypeError(f"cls={cls!r}; expected a class index, or None for the predicted class")
    name = layer if isinstance(layer, nn.Module | str) else default_layer(model, x)
    explain = _ablated if method == "ablationcam" else _weighted
    explain(model, name, x[:1].detach(), method, cls)  # errors of the call itself come from here, untraced

    def explained(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cam, output = explain(model, name, images, method, cls)
        found = logits(output)
        asked = found.argmax(-1) if cls is None else torch.full_like(found[:, 0], cls, dtype=torch.int64)
        return found, heatmap(cam, tuple(images.shape[2:])), asked

    return explained


def _weighted(
    model: nn.Module, layer: str | nn.Module, x: Tensor, method: str, cls: int | None
) -> tuple[Tensor, Any]:
    """A gradient method's raw map, and the model's output."""
    found = feature_and_grad(model, layer, x, cls)
    return weights.weighted_sum(
        found.features, getattr(weights, method)(found.features, found.grads)
    ), found.output


def _ablated(
    model: nn.Module, layer: str | nn.Module, x: Tensor, _: str, cls: int | None
) -> tuple[Tensor, Any]:
    """Ablation-CAM's raw map without a look at the features' values, and the model's output."""
    parts = prepare(model, layer, x)
    A, residual = run_trunk(parts, x.clone())
    checks.check_features(A, x, parts.name)
    output = run_head(parts, A, residual)
    found = logits(output)
    index = (
        found.argmax(-1, keepdim=True)
        if cls is None
        else torch.full_like(found[:, :1], cls, dtype=torch.int64)
    )
    own = found.gather(-1, index)
    B, K = A.shape[:2]
    spatial = A.shape[2:]
    kept = 1 - torch.eye(K, dtype=A.dtype, device=A.device)
    scores = []
    for chunk in kept.split(_ABLATED_AT_ONCE):
        n = chunk.shape[0]

        def repeated(leaf: Any, n: int = n) -> Any:
            batched = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == B
            return leaf.repeat(n, *[1] * (leaf.ndim - 1)) if batched else leaf

        without = (A * chunk.reshape(n, 1, K, *[1] * len(spatial))).reshape(n * B, K, *spatial)
        ablated = logits(run_head(parts, without, pytree.tree_map(repeated, residual)))
        scores.append(ablated.gather(-1, index.repeat(n, 1)).reshape(n, B))
    scores = torch.cat(scores)
    share = (own - scores.T) / torch.where(own != 0, own, 1.0)
    return weights.weighted_sum(A, torch.where(own != 0, share, 0.0)), output


class _PlainMean(TorchFunctionMode):
    """Global average pooling as the mean that it is: its own kernel also sets strides, which ONNX has not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.adaptive_avg_pool2d and (args[1:] or tuple((kwargs or {}).values()))[0] in (
            1,
            (1, 1),
            [1, 1],
        ):
            return args[0].mean((-2, -1), keepdim=True)
        return func(*args, **(kwargs or {}))


def _table() -> dict[Any, Callable[..., Any]]:
    table = dict(get_decompositions(_BACKWARD))
    table[_aten._adaptive_avg_pool2d_backward.default] = _adaptive_average_backward
    table[_aten.convolution_backward.default] = _convolution_backward
    return table


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    _: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    __: list[int],
    groups: int,
    wanted: list[bool],
) -> Any:
    """The gradient to the input alone, which is a transposed convolution."""
    if transposed or wanted[1] or wanted[2]:
        return NotImplemented
    left_over = [
        int(x.shape[i + 2])
        - (
            (int(grad.shape[i + 2]) - 1) * stride[i]
            - 2 * padding[i]
            + dilation[i] * (weight.shape[i + 2] - 1)
            + 1
        )
        for i in range(len(stride))
    ]
    back = _aten.convolution.default(grad, weight, None, stride, padding, dilation, True, left_over, groups)
    return back, None, None


def _adaptive_average_backward(grad: Tensor, pooled: Tensor) -> Tensor:
    """Each output position's gradient, spread evenly over the positions that it is the mean of."""
    for axis in (-2, -1):
        positions, size = int(grad.shape[axis]), int(pooled.shape[axis])
        ends = [(i * size // positions, -(-(i + 1) * size // positions)) for i in range(positions)]
        rows = [[(start <= i < end) / (end - start) for i in range(size)] for start, end in ends]
        spread = torch.tensor(rows, dtype=grad.dtype, device=grad.device)
        grad = (grad.transpose(axis, -1) @ spread).transpose(axis, -1)
    return grad


def _named(traced: Any) -> nn.Module:
    """The traced graph with `image` as its input's name."""
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            node.target = node.name = "image"
    traced.recompile()
    return traced


# -- the file -----------------------------------------------------------------------------------------------


def _written(
    path: Path,
    write: Callable[[Path], None],
    run: Callable[[Path], Callable[[Tensor], list[Tensor]]],
    explained: Callable[[Tensor], tuple[Tensor, ...]],
    x: Tensor,
) -> Exported:
    """The file, written beside its place and moved there once it computes what is computed here."""
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"{str(path.parent)!r} is not a folder"
        raise OSError(f"path={str(path)!r}: {reason}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder) / path.name
        write(file)
        loaded, worst = run(file), 0.0
        for batch in (1, 2 * len(x) + 1):
            images = torch.cat([x.detach()] * 3)[:batch] if batch > 1 else x.detach()[:1]
            worst = max(worst, _difference(loaded(images), explained(images), path))
        file.replace(path)
    return Exported(path, worst)


def _difference(found: list[Tensor], expected: tuple[Tensor, ...], path: Path) -> float:
    """The largest difference of the heatmaps; an error where the file computes something else."""
    for name, a, b in zip(OUTPUTS, found, expected, strict=True):
        off = float((a.detach().to(b) - b.detach()).abs().max())
        scale = 1.0 if name == "heatmap" else max(1.0, float(b.detach().abs().max()))
        if a.shape != b.shape or not off <= (_SLACK if name == "logits" else _TOLERANCE) * scale:
            raise ValueError(
                f"{path.name}: {name} {tuple(a.shape)} differs by {off:.2g} from what the model computes, "
                f"{tuple(b.shape)}; nothing was written"
            )
    return float((found[1].detach().to(expected[1]) - expected[1].detach()).abs().max())


def _cannot(model: nn.Module, method: str, error: BaseException) -> ValueError:
    """What stands in the way, by its name, of all that the tracers say."""
    said = []
    reason: BaseException | None = error
    while reason is not None:
        said.append(str(reason))
        reason = reason.__cause__ or reason.__context__
    text = "\n".join(said)
    operator = re.search(r"OpOverload\(op='([\w.]+)'|(?:torch\.ops\.|function for )(aten\.[\w.]+)", text)
    what = type(model).__name__
    if operator:
        name = operator.group(1) or operator.group(2)
        return ValueError(
            f"{method} of {what} cannot be exported: its graph needs the operator {name}, which has no "
            "counterpart; another layer or method may do without it"
        )
    first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    return ValueError(f"{method} of {what} cannot be exported: {first[:300]}")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the exporters' warnings and prints, which are about their own insides."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# -- a page that uses it ------------------------------------------------------------------------------------


def page(
    loaded: LoadedModel,
    folder: str | os.PathLike[str],
    layer: Layer = None,
    method: str = "gradcam",
    *,
    cls: int | None = None,
) -> Path:
    """A folder with a page that explains photographs in the browser, and the ONNX file that it runs.

    `npm install` in the folder fetches the runtime; any file server shows the page then.

    Args:
        loaded: the network with its preset and categories, from `models.load`.
        folder: where to write; it is made where it is not there.
        layer: a name, a module of the model, or None for `default_layer`.
        method: one of `METHODS_THAT_EXPORT`.
        cls: the class that is explained; None for the predicted one.

    Returns:
        The path of the page.

    Raises:
        ValueError: as `onnx`; or the network's images are resized in a way that the page does not know.
        ImportError: the extra "export" is not installed.
        OSError: a file cannot be written.
    """
    preset = loaded.preset
    if preset.interpolation not in _PAGE_INTERPOLATIONS:
        raise ValueError(
            f"preset: interpolation={preset.interpolation!r}; the page knows "
            f"{' and '.join(_PAGE_INTERPOLATIONS)}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    x = sample_images(preset.crop, next(loaded.model.parameters()).device)
    name = layer if isinstance(layer, str | nn.Module) else default_layer(loaded.model, x)
    onnx(loaded.model, name, x, folder / "model.onnx", method, cls=cls)
    settings = {
        "file": "model.onnx",
        "model": loaded.name,
        "method": METHODS[method].title,
        "layer": name if isinstance(name, str) else type(name).__name__,
        "categories": loaded.categories,
        **preset._asdict(),
        "colors": _colors(),
    }
    (folder / "page.json").write_text(json.dumps(settings), encoding="utf-8")
    for file in _page_files():
        shutil.copyfile(file, folder / file.name)
    return folder / "index.html"


def sample_images(size: int, device: torch.device | str = "cpu") -> Float[Tensor, "2 3 h w"]:
    """Two images of noise, the same each time, for where only the size of the images is known."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, size, size, generator=generator).to(device)


def _colors() -> list[int]:
    """256 colors from low to high, each as one number 0xRRGGBB."""
    table = np.round(mpl.colormaps["viridis"](np.arange(256))[:, :3] * 255).astype(int)
    return (table @ np.array([1 << 16, 1 << 8, 1])).tolist()


def _page_files() -> list[Path]:
    """The page's own files: in a wheel beside this module, in a checkout among the documentation."""
    here = Path(__file__).parents[1]
    for folder in (here / "browser", here.parent / "docs" / "browser"):
        if folder.is_dir():
            return [
                folder / name for name in ("index.html", "page.css", "page.js", "image.js", "package.json")
            ]
    raise FileNotFoundError("the page's files were not installed with xcam_fn; install it again")
