from xcam_fn.compat.pytorch_grad_cam.metrics import *  # noqa: D100, F403
