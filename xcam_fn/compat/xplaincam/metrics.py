"""XplainCAM's metrics, which take one image; the metrics of `xcam_fn` take batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xcam_fn import checks, metrics, plot
from xcam_fn.compat.xplaincam.utils import saved_and_shown, unit_map
from xcam_fn.maps import resize
from xcam_fn.metrics.judged import one_class_scoring
from xcam_fn.perturb import blurred

__all__ = ["AvgDropConf", "InsertionDeletion"]


class AvgDropConf:
    """How much of the probability is lost when the heatmap masks the image, and whether it rises.

    Args:
        model: the network, in evaluation mode.
        heatmap: one map, a tensor or an array of any range and size.
        input_tensor: (1, C, H, W), preprocessed.
        class_idx: None for the predicted class.
        alpha: the power that the heatmap is raised to.
    """

    def __init__(
        self, model: nn.Module, heatmap: Any, input_tensor: Tensor, class_idx: Any = None, alpha: float = 1.0
    ) -> None:
        self.model, self.heatmap, self.input_tensor, self.alpha = model, heatmap, input_tensor, alpha
        x = _one("input_tensor", input_tensor)
        shown = resize(torch.as_tensor(heatmap).detach().squeeze().to(x), x.shape[2:]) ** alpha
        with torch.no_grad(), one_class_scoring(model, x, class_idx) as scoring:
            own = float(scoring.explained.own)
            masked = float(scoring.shown(shown[None, None, None], torch.zeros_like(x)))
        self.avg_drop, self.avg_increase = max(0.0, own - masked) / (own + 1e-8), int(masked > own)

    def summary(self) -> dict[str, float]:
        """Both numbers, as "avg_drop" and "avg_increase"."""
        return {"avg_drop": float(self.avg_drop), "avg_increase": float(self.avg_increase)}


class InsertionDeletion:
    """The probability as pixels are inserted (into a blurred image) or deleted, the most relevant first.

    Args:
        model: the network, in evaluation mode.
        step: the number of pixels per step.
        blur_fn: maps the image to the start of insertion; None for `xcam_fn.perturb.blurred`.
        device: where to compute; None for the model's device.
        mode: "Insertion" or "Deletion", the default of `compute`.
    """

    def __init__(
        self, model: nn.Module, step: int = 448, blur_fn: Callable[[Tensor], Tensor] | None = None,
        device: Any = None, mode: str = "Insertion",
    ) -> None:  # fmt: skip
        self.model, self.step, self.blur_fn, self.mode = model, step, blur_fn or blurred, _checked(mode)
        self.device = device or next(model.parameters()).device

    def compute(
        self, image: Tensor, heatmap: Tensor, class_idx: Any = None, mode: str | None = None,
        return_steps: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Return {"auc": area}, and with return_steps also "steps", the probabilities (n,), float32."""
        x, cam = _one("image", image).to(self.device), heatmap.detach().squeeze()
        order = cam.flatten().argsort(descending=True)  # not a stable sort: ties are ordered as in XplainCAM
        rank = torch.arange(len(order), dtype=torch.float64, device=cam.device)
        ranked = torch.empty_like(rank).scatter(0, order, -rank).reshape(1, *cam.shape)
        inserts = _checked(mode or self.mode) == "Insertion"
        metric, baseline = (metrics.insertion, self.blur_fn) if inserts else (metrics.deletion, 0.0)
        how: Any = {"baseline": baseline, "pixels_per_step": self.step}
        curve = metric(self.model, x, ranked, class_idx, **how)
        steps = curve.scores[0].float().cpu().numpy()
        area = (steps.sum() - steps[0] / 2 - steps[-1] / 2) / (len(steps) - 1)
        return {"auc": area, "steps": steps} if return_steps else {"auc": area}

    @staticmethod
    def plot_curves(
        results: Mapping[str, Any], mode: str = "Insertion", image: Tensor | None = None,
        cam: Tensor | None = None, alpha: float = 0.5, title: str | None = None, save_path: Any = None,
    ) -> None:  # fmt: skip
        """Draw one result of `compute` and its overlay, or several by name in one plot; save and show it."""
        best, one = "highest" if _checked(mode) == "Insertion" else "lowest", "steps" in results
        if one and (image is None or cam is None):
            raise ValueError("image or cam is None; the plot of a single result needs both")
        beside: Any = (image, unit_map(cam)) if image is not None and cam is not None and one else ()
        named = {title or "heatmap": results} if one else results
        curves = {name: _curve(name, found) for name, found in named.items()}
        title = f"{mode} curve" if one else title or f"{mode} curves"
        figure = plot.curves(
            curves, *beside, best=best, alpha=alpha, alpha_follows_heatmap=False, colormap="jet", title=title
        )
        saved_and_shown(figure, save_path, dpi=300, closed=True)


def _curve(name: str, found: Any) -> metrics.Curve:
    if "steps" not in found:
        raise ValueError(f"results[{name!r}] has no 'steps'; call compute with return_steps=True")
    steps = torch.as_tensor(found["steps"])
    return metrics.Curve(torch.linspace(0, 1, len(steps)), steps[None], torch.tensor([float(found["auc"])]))


def _one(name: str, x: Tensor) -> Tensor:
    checks.check_tensor(name, x)
    if len(x) != 1:
        raise ValueError(f"{name} has {len(x)} images; expected one (the metrics of xcam_fn take batches)")
    return x.detach()


def _checked(mode: str) -> str:
    checks.check_choice("mode", mode, ("Insertion", "Deletion"))
    return mode
