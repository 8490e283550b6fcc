"""The names of pytorch-grad-cam 1.5.7: change the import to this package, and keep the rest."""

import sys

from xcam_fn.compat.pytorch_grad_cam import cams, metrics, utils
from xcam_fn.compat.pytorch_grad_cam.cams import *  # noqa: F403
from xcam_fn.compat.pytorch_grad_cam.utils import image as image
from xcam_fn.compat.pytorch_grad_cam.utils import model_targets as model_targets

_MODULES = {
    cams: (
        "ablation_cam ablation_layer activations_and_gradients base_cam eigen_cam eigen_grad_cam fem "
        "feature_factorization feature_factorization.deep_feature_factorization finer_cam fullgrad_cam "
        "grad_cam grad_cam_elementwise grad_cam_plusplus guided_backprop hirescam kpca_cam layer_cam "
        "random_cam refine_cam score_cam seg_eigen_cam sess shapley_cam xgrad_cam"
    ),
    metrics: "metrics.arcc metrics.cam_mult_image metrics.perturbation_confidence metrics.road",
    utils: "utils.find_layers utils.reshape_transforms utils.svd_on_activations",
}
for _home, _names in _MODULES.items():
    for _name in _names.split():
        sys.modules[f"{__name__}.{_name}"] = _home
        vars(_home).setdefault(_name.rpartition(".")[2], _home)
