"""How scores change when a map's pixels are removed or shown alone, as arrays (B,)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xcam_fn.compat.common import evaluated
from xcam_fn.compat.pytorch_grad_cam.utils.image import opencv
from xcam_fn.metrics import complexity, pearson
from xcam_fn.metrics.curves import imputed
from xcam_fn.perturb import normal

Targets = Sequence[Callable[[Any], Tensor]]
_PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


@torch.no_grad()
def _scores(model: nn.Module, images: Tensor, targets: Targets) -> np.ndarray:
    outputs = zip(targets, evaluated(model)(images), strict=True)
    return np.array([target(output).cpu().numpy() for target, output in outputs], np.float32)


class PerturbationConfidenceMetric:
    """The change of the scores when each image is perturbed, `perturbation(image, map) -> image`."""

    finish: Callable[[Any], Any] = staticmethod(lambda change: change)

    def __init__(self, perturbation: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.perturbation = perturbation

    def __call__(
        self,
        input_tensor: Tensor,
        cams: np.ndarray,
        targets: Targets,
        model: nn.Module,
        return_visualization: bool = False,
        return_diff: bool = True,
    ) -> Any:
        pairs = zip(input_tensor.cpu(), torch.from_numpy(np.ascontiguousarray(cams)), strict=True)
        images = torch.stack([self.perturbation(*pair) for pair in pairs]).to(input_tensor.device)
        found = _scores(model, images, targets)
        found = self.finish(found - _scores(model, input_tensor, targets) if return_diff else found)
        return (found, images) if return_visualization else found


def multiply_tensor_with_cam(input_tensor: Tensor, cam: Tensor) -> Tensor:
    """The image times the map."""
    return input_tensor * cam


class CamMultImageConfidenceChange(PerturbationConfidenceMetric):
    """The change of the scores when the image is multiplied by the map."""

    def __init__(self) -> None:
        super().__init__(multiply_tensor_with_cam)


class DropInConfidence(CamMultImageConfidenceChange):
    """The drop of the scores, 0 if they rise."""

    finish = staticmethod(lambda change: np.maximum(-change, 0))


class IncreaseInConfidence(CamMultImageConfidenceChange):
    """1 if the score rises, else 0."""

    finish = staticmethod(lambda change: np.float32(change > 0))


class NoisyLinearImputer:
    """Imputes an image's pixels where a mask is 0 (a linear solve), plus the same noise at every call."""

    def __init__(self, noise: float = 0.01) -> None:
        self.noise = noise

    def __call__(self, img: Tensor, mask: Tensor) -> Tensor:
        return imputed(img, mask == 0, self.noise * normal(0, 0, tuple(img.shape), like=img))


class RemoveMostRelevantFirst:
    """Removes the pixels at or above a percentile of the map; "auto" takes Otsu's threshold."""

    def __init__(self, percentile: Any, imputer: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.percentile, self.imputer = percentile, imputer

    def __call__(self, input_tensor: Tensor, mask: Tensor) -> Tensor:
        if self.percentile == "auto":
            cv2, values = opencv(), np.uint8(mask.numpy() * 255)
            kept = torch.from_numpy(cv2.threshold(values, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1])
        else:
            kept = mask < np.percentile(mask.numpy(), self.percentile)
        return self.imputer(input_tensor, kept.float())


class RemoveLeastRelevantFirst(RemoveMostRelevantFirst):
    """The same for one minus the map."""

    def __call__(self, input_tensor: Tensor, mask: Tensor) -> Tensor:
        return super().__call__(input_tensor, 1 - mask)


class ROADMostRelevantFirst(PerturbationConfidenceMetric):
    """The change of the scores when the most relevant pixels are imputed."""

    def __init__(self, percentile: Any = 80) -> None:
        super().__init__(RemoveMostRelevantFirst(percentile, NoisyLinearImputer()))


class ROADLeastRelevantFirst(PerturbationConfidenceMetric):
    """The change of the scores when the least relevant pixels are imputed."""

    def __init__(self, percentile: Any = 20) -> None:
        super().__init__(RemoveLeastRelevantFirst(percentile, NoisyLinearImputer()))


class AveragerAcrossThresholds:
    """A metric's mean over percentiles."""

    def __init__(self, imputer: Callable[[Any], Any], percentiles: Sequence[Any] = _PERCENTILES) -> None:
        self.imputer, self.percentiles = imputer, percentiles

    def __call__(self, *args: Any, **options: Any) -> np.ndarray:
        return np.mean([self.imputer(p)(*args, **options) for p in self.percentiles], axis=0)


ROADMostRelevantFirstAverage = partial(AveragerAcrossThresholds, ROADMostRelevantFirst)
ROADLeastRelevantFirstAverage = partial(AveragerAcrossThresholds, ROADLeastRelevantFirst)


class ROADCombined:
    """Half the difference between the two orders of removal."""

    def __init__(self, percentiles: Sequence[Any] = _PERCENTILES) -> None:
        self.least = ROADLeastRelevantFirstAverage(percentiles)
        self.most = ROADMostRelevantFirstAverage(percentiles)

    def __call__(self, *args: Any, **options: Any) -> np.ndarray:
        return (self.least(*args, **options) - self.most(*args, **options)) / 2


class Complexity:
    """The mean of each map."""

    def __call__(self, grayscale_cams: np.ndarray) -> np.ndarray:
        return complexity(grayscale_cams).numpy()


class Coherency:
    """The correlation of a map with the map of the masked image, scaled to [0, 1]."""

    def __call__(
        self, input_tensor: Tensor, grayscale_cams: np.ndarray, targets: Targets, _: Any, base_method: Any
    ) -> np.ndarray:
        shown = input_tensor * torch.from_numpy(grayscale_cams)[:, None].to(input_tensor)
        again = base_method(input_tensor=shown, targets=targets)
        return (pearson(again, grayscale_cams).numpy() + 1) / 2


class ARCC:
    """The harmonic mean of coherency, 1 − complexity and ROAD, each from 0 to 1."""

    def __init__(self, base_method: Any, road_percentiles: Sequence[Any] = (20, 40, 60, 80)) -> None:
        self.base_method, self.road = base_method, ROADCombined(road_percentiles)

    def __call__(
        self, input_tensor: Tensor, grayscale_cams: np.ndarray, targets: Targets, model: nn.Module
    ) -> np.ndarray:
        given = input_tensor, grayscale_cams, targets, model
        coherency, road = Coherency()(*given, self.base_method), (self.road(*given) * 2).clip(0, 1)
        parts = [coherency, 1 - Complexity()(grayscale_cams), road]
        return 3 / (1 / (np.stack(parts) + 1e-8)).sum(0)
