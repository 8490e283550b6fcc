"""The program in a file, an ONNX graph or a .pt2, checked against what is computed here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import ExportedProgram

from xcam_fn.docstrings import documented
from xcam_fn.export.program import OUTPUTS, Explanation, explanation, silent
from xcam_fn.network.target_layer import Layer

Run = Callable[[Tensor], list[Tensor]]
_TOLERANCE = 1e-3
_SLACK = 1e-2


class Exported(NamedTuple):
    """A file that was written and checked.

    Attributes:
        path: the file.
        difference: the largest difference of a heatmap's values from PyTorch's, over the tested batches.
    """

    path: Path
    difference: float


@documented
def onnx(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    path: str | os.PathLike[str],
    method: str = "gradcam",
    *,
    cls: int | None = None,
) -> Exported:
    """Write one ONNX file that predicts and explains, checked against PyTorch's results.

    The file takes `image` (batch, C, *size) and gives `logits` (batch, classes), `heatmap` (batch, *size) in
    [0, 1] and `class` (batch,), for any batch size. onnxruntime runs it without torch.

    Args:
        x: (B, C, *size), example images of the file's input size, used to check it.
        path: the path to write to; an existing file is replaced once the new one has been checked.
        method: one of `METHODS_THAT_EXPORT`.
        cls: the class to explain; None for the predicted class of each image.

    Raises:
        ValueError: as for `program`; or an operator has no ONNX counterpart, or the file's results differ.
        ImportError: the extra "export" is not installed.
        OSError: the file cannot be written.
    """
    try:
        import onnxruntime  # noqa: PLC0415 - an extra
        import onnxscript as _  # noqa: F401, PLC0415 - torch.onnx needs it and says so late
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed; pip install "xcam-fn[export]"') from error

    explained, shapes = explanation(model, layer, x, method, cls), ({0: "batch"},)

    def write(made: ExportedProgram, file: Path) -> None:
        try:
            done = torch.onnx.export(
                made, dynamo=True, input_names=["image"], output_names=list(OUTPUTS), dynamic_shapes=shapes
            )
        except Exception as error:  # one kind for each stage of the exporter
            raise explained.cannot(error) from None
        assert done is not None
        done.save(str(file), external_data=False)

    def load(file: Path) -> Run:
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(file), quiet, providers=["CPUExecutionProvider"])
        return lambda images: [torch.as_tensor(y) for y in session.run(None, {"image": images.cpu().numpy()})]

    return _written(Path(path), write, load, explained, x)


def pt2(
    model: nn.Module,
    layer: Layer,
    x: Float[Tensor, "B C *size"],
    path: str | os.PathLike[str],
    method: str = "gradcam",
    *,
    cls: int | None = None,
) -> Exported:
    """One `.pt2` file that predicts and explains, for `torch.export.load`.

    It is written and checked as by `onnx`, and raises the same, but needs no extra.
    """

    def load(file: Path) -> Run:
        module = torch.export.load(str(file)).module()
        return lambda images: list(module(images))

    explained = explanation(model, layer, x, method, cls)
    return _written(Path(path), torch.export.save, load, explained, x)


documented(pt2, onnx)


def _written(
    path: Path,
    write: Callable[[ExportedProgram, Path], None],
    load: Callable[[Path], Run],
    explained: Explanation,
    x: Tensor,
) -> Exported:
    """The file, written beside its place and moved there once it computes what is computed here."""
    made = explained.traced(x)
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"{str(path.parent)!r} is not a folder"
        raise OSError(f"path={str(path)!r}: {reason}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder) / path.name
        with silent():
            write(made, file)
        run, x, worst = load(file), x.detach(), 0.0
        for images in (x[:1], torch.cat([x] * 3)[: 2 * len(x) + 1]):
            worst = max(worst, _difference(run(images), explained(images), path))
        file.replace(path)
    return Exported(path, worst)


def _difference(found: list[Tensor], expected: tuple[Tensor, ...], path: Path) -> float:
    """The largest difference of the heatmaps; an error where the file computes something else."""
    differences = {}
    for name, a, b in zip(OUTPUTS, found, (b.detach() for b in expected), strict=True):
        off = differences[name] = float((a.detach().to(b) - b).abs().max())
        scale = 1.0 if name == "heatmap" else max(1.0, float(b.abs().max()))
        if a.shape != b.shape or not off <= (_SLACK if name == "logits" else _TOLERANCE) * scale:
            what, other = f"{name} {tuple(a.shape)}", f"the model's, {tuple(b.shape)}"
            raise ValueError(f"{path.name}: {what} differs by {off:.2g} from {other}; nothing was written")
    return differences["heatmap"]
