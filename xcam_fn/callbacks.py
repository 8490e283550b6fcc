"""What a network in training looks at, logged by Lightning: `from xcam_fn.callbacks import LogOverlays`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.maps import minmax
from xcam_fn.methods import find_method
from xcam_fn.network.copies import private_copy
from xcam_fn.plot.draw import Style, check_style, overlay
from xcam_fn.plot.inputs import Picture
from xcam_fn.targets import Classes

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError('lightning is not installed; pip install "xcam-fn[lightning]"') from error


class LogOverlays(Callback):
    """Logs overlays of the heatmaps of a few fixed images during training.

    The trained module is only read: a copy in evaluation mode that shares its weights is explained. Weights,
    buffers, modes and random states are the same as without the callback.

    Args:
        x: (B, C, H, W), the same images each time, prepared as for the network.
        layer: a name in the LightningModule, or None for the default layer.
        cls: as for every method.
        method: a method, or its name.
        every: optimizer steps between two logs, ≥ 1.
        pictures: one per image, as for `plot.overlay`; None draws x, with 1 or 3 channels, each image scaled
            from its minimum to its maximum.
        key: the name of the pictures in the log.
        **style: colormap, alpha and alpha_follows_heatmap, as for `plot.overlay`.

    Raises:
        ValueError: a value is out of range; when training begins, no logger accepts images.
        TypeError: an argument has the wrong type.
        ImportError: Lightning is not installed (the extra `lightning`).
    """

    def __init__(
        self,
        x: Float[Tensor, "B C H W"],
        layer: str | None = None,
        cls: Classes = None,
        *,
        method: str | Callable[..., Tensor] = "gradcam",
        every: int = 100,
        pictures: Sequence[Picture] | None = None,
        key: str = "explanations",
        **style: Unpack[Style],
    ) -> None:
        super().__init__()
        checks.check_input(x)
        checks.check_count("every", every)
        check_style(**style)
        if pictures is None and x.shape[1] not in (1, 3):
            raise ValueError(f"x has {x.shape[1]} channels and cannot be drawn; pass pictures=")
        if pictures is not None and len(pictures) != len(x):
            raise ValueError(f"pictures has {len(pictures)} entries for {len(x)} images; expected one each")
        self.x, self.layer, self.cls, self.every, self.key, self.style = x, layer, cls, every, key, style
        self.method = find_method(method) if isinstance(method, str) else method
        self.pictures = _pictures_of(x) if pictures is None else pictures
        self._logged = 0  # the step of the last logging

    def overlays(self, module: nn.Module) -> list[np.ndarray]:
        """The pictures under the module's heatmaps as it is now, (H, W, 3) each, uint8."""
        network = private_copy(module).eval()
        x = self.x.to(next(module.parameters()).device)
        maps = self.method(network, self.layer, x, self.cls)
        return [overlay(p, heatmap, **self.style) for p, heatmap in zip(self.pictures, maps, strict=True)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Raise where no logger takes images."""
        if not any(map(_taker, trainer.loggers)):
            found = ", ".join(type(one).__name__ for one in trainer.loggers) or "none"
            raise ValueError(
                f"LogOverlays: the trainer's loggers ({found}) cannot log images; use one that can, such as "
                "Trainer(logger=TensorBoardLogger(...)) or WandbLogger"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Log the overlays where `every` steps have gone by."""
        step = trainer.global_step
        if step // self.every == self._logged // self.every or not trainer.is_global_zero:
            return
        self._logged, images = step, self.overlays(pl_module)
        for log in filter(None, map(_taker, trainer.loggers)):
            log(self.key, images, step)


def _taker(logger: Any) -> Callable[[str, list[np.ndarray], int], Any] | None:
    """The logger's own call for images, by key, images and step; None where it has none."""
    if callable(getattr(logger, "log_image", None)):  # Weights & Biases
        return lambda key, images, step: logger.log_image(key=key, images=images, step=step)
    add = getattr(logger.experiment, "add_images", None)  # TensorBoard
    return add and (lambda key, images, step: add(key, np.stack(images), step, dataformats="NHWC"))


def _pictures_of(x: Tensor) -> list[np.ndarray]:
    """Images (C, H, W) as pictures (H, W, 3), each from its least value, black, to its largest."""
    values = minmax(x.detach(), 3).expand(-1, 3, -1, -1)
    return list(values.cpu().movedim(1, -1).numpy())
