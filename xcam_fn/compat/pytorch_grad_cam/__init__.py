"""The names of pytorch-grad-cam 1.5.7: an import with this package in its place, and the rest stays."""

import sys

from xcam_fn.compat.pytorch_grad_cam import cams as cams
from xcam_fn.compat.pytorch_grad_cam.cams import *  # noqa: F403
from xcam_fn.compat.pytorch_grad_cam.metrics import cam_mult_image as cam_mult_image
from xcam_fn.compat.pytorch_grad_cam.metrics import road as road
from xcam_fn.compat.pytorch_grad_cam.utils import image as image
from xcam_fn.compat.pytorch_grad_cam.utils import model_targets as model_targets
from xcam_fn.compat.pytorch_grad_cam.utils import reshape_transforms as reshape_transforms

_OF_A_CLASS = (
    "ablation_cam ablation_layer activations_and_gradients base_cam eigen_cam eigen_grad_cam fem finer_cam "
    "feature_factorization feature_factorization.deep_feature_factorization fullgrad_cam grad_cam "
    "grad_cam_elementwise grad_cam_plusplus guided_backprop hirescam kpca_cam layer_cam random_cam "
    "refine_cam score_cam seg_eigen_cam sess shapley_cam xgrad_cam"
)
sys.modules.update({f"{__name__}.{name}": cams for name in _OF_A_CLASS.split()})
