"""The methods, and the registry `METHODS` that names them."""

from xcam_fn.methods.activation import cam, eigencam, fem, from_features, kpcacam, randomcam
from xcam_fn.methods.attention import legrad
from xcam_fn.methods.backward import fullgrad, guided_backprop, shapleycam
from xcam_fn.methods.catalog import METHODS, VARIANTS, find_method
from xcam_fn.methods.concepts import Concepts, concepts, deep_feature_factorization
from xcam_fn.methods.fusion import agree, combine, denoise, fuse, fusioncam, gain, unioncam
from xcam_fn.methods.gradient import (
    eigengradcam,
    finercam,
    from_gradients,
    gradcam,
    gradcam_elementwise,
    gradcam_pp,
    hirescam,
    integrated_gradients,
    layercam,
    segeigencam,
    smoothgradcam_pp,
    xgradcam,
)
from xcam_fn.methods.method import Method
from xcam_fn.methods.perturbation import (
    ablationcam,
    groupcam,
    iscam,
    reciprocam,
    rise,
    scorecam,
    sscam,
)
from xcam_fn.methods.together import explain_all
from xcam_fn.methods.wrappers import eigen_smooth, multi_layer, refinecam, sess, smooth

__all__ = [
    "METHODS",
    "VARIANTS",
    "Concepts",
    "Method",
    "ablationcam",
    "agree",
    "cam",
    "combine",
    "concepts",
    "deep_feature_factorization",
    "denoise",
    "eigen_smooth",
    "eigencam",
    "eigengradcam",
    "explain_all",
    "fem",
    "find_method",
    "finercam",
    "from_features",
    "from_gradients",
    "fullgrad",
    "fuse",
    "fusioncam",
    "gain",
    "gradcam",
    "gradcam_elementwise",
    "gradcam_pp",
    "groupcam",
    "guided_backprop",
    "hirescam",
    "integrated_gradients",
    "iscam",
    "kpcacam",
    "layercam",
    "legrad",
    "multi_layer",
    "randomcam",
    "reciprocam",
    "refinecam",
    "rise",
    "scorecam",
    "segeigencam",
    "sess",
    "shapleycam",
    "smooth",
    "smoothgradcam_pp",
    "sscam",
    "unioncam",
    "xgradcam",
]
