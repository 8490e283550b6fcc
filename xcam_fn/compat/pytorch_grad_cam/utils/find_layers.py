from xcam_fn.compat.pytorch_grad_cam.utils import *  # noqa: D100, F403
