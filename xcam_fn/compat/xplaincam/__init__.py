"""XplainCAM's classes, utilities, metrics and scripts: `from xcam_fn.compat.xplaincam.cam import GradCAM`."""
