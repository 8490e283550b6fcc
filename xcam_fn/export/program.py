"""A model and its explanation as a torch.export program."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from xcam_fn import weights
from xcam_fn.docstrings import documented
from xcam_fn.maps import heatmap, ratio
from xcam_fn.methods import METHODS
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import own_name
from xcam_fn.network.split import default_layer
from xcam_fn.network.target_layer import Layer
from xcam_fn.targets import class_index, logits
from xcam_fn.torch_state import decompositions, pytree

METHODS_THAT_EXPORT = ("gradcam", "gradcam_pp", "xgradcam", "layercam", "hirescam", "ablationcam")
OUTPUTS = ("logits", "heatmap", "class")
_ABLATED_AT_ONCE = 128


@documented
def program(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    method: str = "gradcam",
    *,
    cls: int | None = None,
) -> torch.export.ExportedProgram:
    """The model and its explanation as one `torch.export` program, for any batch size.

    Args:
        x: (B, C, *size), example images of the program's input size.
        method: one of `METHODS_THAT_EXPORT`.
        cls: the class to explain; None for the predicted class of each image.

    Returns:
        The program: image (B, C, *size) to logits (B, classes), heatmap (B, *size) in [0, 1] and class (B,).

    Raises:
        ValueError: the method cannot be exported, or the model cannot be traced.
    """
    return explanation(model, layer, x, method, cls).traced(x)


@dataclass(frozen=True)
class Explanation:
    """What the file computes: images to logits, heatmaps and classes."""

    model: nn.Module
    layer: str | nn.Module
    method: str
    cls: int | None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        call = Call(self.model, self.layer, images, self.cls)
        with call.running():
            ablated = self.method == "ablationcam"
            cam = _ablated(call) if ablated else METHODS[self.method].on(call, postprocess=None)
            found = logits(call.output)
            return found, heatmap(cam, tuple(images.shape[2:])), class_index(self.cls, found)

    def traced(self, x: Tensor) -> torch.export.ExportedProgram:
        """The program for images of the size of x."""
        length = next(n for n in itertools.count(5) if n not in x.shape[1:])  # else that axis is dynamic too
        sample = x.detach()[:1].expand(length, *x.shape[1:]).clone()
        options: dict[str, Any] = {"tracing_mode": "symbolic", "_allow_non_fake_inputs": True}
        with silent():
            try:
                with _PlainMean():
                    graph: Any = make_fx(self, decomposition_table=_decompositions(), **options)(sample)
                for node in graph.graph.find_nodes(op="placeholder"):
                    node.target = node.name = "image"
                graph.recompile()
                batch = {0: torch.export.Dim("batch")}
                return torch.export.export(graph, (sample,), dynamic_shapes=(batch,))
            except (ValueError, TypeError):
                raise
            except Exception as error:  # the tracer raises of every kind
                raise self.cannot(error) from None

    def cannot(self, error: BaseException) -> ValueError:
        """What stands in the way, by its name, of all that the tracers say."""
        text, reason = "", error
        while reason is not None:
            text += f"{reason}\n"
            reason = reason.__cause__ or reason.__context__
        operator = re.search(r"OpOverload\(op='([\w.]+)'|(?:torch\.ops\.|function for )(aten\.[\w.]+)", text)
        if operator:
            named = f"the operator {operator.group(1) or operator.group(2)}, which cannot be exported"
            why = f"its graph needs {named}; try another layer or method"
        else:
            why = next((line for line in text.splitlines() if line.strip()), type(error).__name__)[:300]
        return ValueError(f"{self.method} of {type(self.model).__name__} cannot be exported: {why}")


def explanation(model: nn.Module, layer: Layer, x: Tensor, method: str, cls: int | None) -> Explanation:
    """What a file for this call computes; raises as the call itself does, untraced."""
    method = own_name(method)
    if method not in METHODS_THAT_EXPORT:
        reason = "cannot be exported" if method in METHODS else "is not known"
        known = ", ".join(METHODS_THAT_EXPORT)
        raise ValueError(f"method {method!r} {reason}; expected one of {known}")
    if cls is not None and (isinstance(cls, bool) or not isinstance(cls, int)):
        raise TypeError(f"cls={cls!r}; expected a class index, or None for the predicted class")
    name = layer if isinstance(layer, nn.Module | str) else default_layer(model, x)
    explained = Explanation(model, name, method, cls)
    explained(x[:1].detach())
    return explained


def _ablated(call: Call) -> Tensor:
    """Ablation-CAM's raw map, (B, *spatial), without a look at the features' values."""
    halves, A, found = call.halves, call.features, logits(call.output)
    _, residual = halves.run_trunk(call.x)
    index = class_index(call.cls, found)[:, None]
    own = found.gather(-1, index)
    B, K = A.shape[:2]

    def scored(kept: Tensor) -> Tensor:
        """The class's score without each of some channels, (n, B)."""
        n = len(kept)

        def repeated(leaf: Any) -> Any:
            batched = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == B
            return leaf.repeat(n, *[1] * (leaf.ndim - 1)) if batched else leaf

        without = (A * kept.reshape(n, 1, K, *[1] * (A.ndim - 2))).reshape(n * B, *A.shape[1:])
        found = logits(halves.run_head(without, pytree.tree_map(repeated, residual)))
        return found.gather(-1, index.repeat(n, 1)).reshape(n, B)

    kept = 1 - torch.eye(K, dtype=A.dtype, device=A.device)
    scores = [scored(chunk) for chunk in kept.split(_ABLATED_AT_ONCE)]
    return weights.weighted_sum(A, ratio(own - torch.cat(scores).T, own))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without the exporters' warnings and prints, which are about their own insides."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# -- operators of backward passes that ONNX lacks, each as operators that it has ----------------------------

_aten = torch.ops.aten


class _PlainMean(TorchFunctionMode):
    """Global average pooling as the mean that it is: its own kernel also sets strides, which ONNX has not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sizes = (1, (1, 1), [1, 1])
        if func is F.adaptive_avg_pool2d and [*args[1:], *(kwargs or {}).values()][0] in sizes:
            return args[0].mean((-2, -1), keepdim=True)
        return func(*args, **(kwargs or {}))


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """What each operator is decomposed into: torch's own for every backward pass that it has one for."""
    return {
        **decompositions([getattr(_aten, name) for name in dir(_aten) if "_backward" in name]),
        _aten._adaptive_avg_pool2d_backward.default: _adaptive_average_backward,
        _aten.convolution_backward.default: _convolution_backward,
    }


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, _: Any, *options: Any) -> Any:
    """The gradient to the input alone, which is a transposed convolution."""
    stride, padding, dilation, transposed, _, groups, wanted = options
    if transposed or wanted[1] or wanted[2]:
        return NotImplemented
    sizes = zip(x.shape[2:], grad.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    left_over = [
        int(size) - ((int(out) - 1) * s - 2 * p + d * (kernel - 1) + 1)
        for size, out, kernel, s, p, d in sizes
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
