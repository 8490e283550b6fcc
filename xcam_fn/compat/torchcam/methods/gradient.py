"""TorchCAM's extractors of gradients."""

from xcam_fn.compat.torchcam.methods.core import (
    FinerCAM,
    GradCAM,
    GradCAMpp,
    LayerCAM,
    LeGrad,
    RefineCAM,
    SmoothGradCAMpp,
    XGradCAM,
)

__all__ = ["FinerCAM", "GradCAM", "GradCAMpp", "LayerCAM", "LeGrad", "RefineCAM", "SmoothGradCAMpp", "XGradCAM"]
