"""Overlays logged while a network is trained, which goes on as it would without."""

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import xcam_fn as xf

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402

from xcam_fn.callbacks import LogOverlays  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
X = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Trained(lightning.LightningModule):
    """Batch norm and dropout, which an evaluation on the side would disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(6, 5)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.body(x).mean((2, 3))))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.modes.append(all(module.training for module in self.modules()))
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def fitted(logger: object, *callbacks: LogOverlays) -> tuple[Trained, dict[str, Tensor], Tensor]:
    """Six steps of training: the module, its weights, and the state of the random numbers after them."""
    torch.manual_seed(3)
    model, loader = Trained(), DataLoader(TensorDataset(X, torch.arange(12) % 5), batch_size=4, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=2, logger=logger, callbacks=list(callbacks), accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader)
    return model, {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()


class Images(CSVLogger):
    """A logger that takes images as the one of Weights & Biases does."""

    def log_image(self, key: str, images: list[np.ndarray], step: int | None = None) -> None:
        self.__dict__.setdefault("images", {})[key, step] = images


def test_training_is_the_same_to_the_bit_and_the_overlays_are_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, weights, state = fitted(False)
    images = Images(tmp_path)
    callback = LogOverlays(X[:2], "body", 1, method="smoothgradcam_pp", every=2, key="cams", alpha=0.4)
    model, logged_weights, logged_state = fitted([TensorBoardLogger(tmp_path), images], callback)
    assert all(torch.equal(value, logged_weights[name]) for name, value in weights.items())
    assert torch.equal(state, logged_state)
    assert model.modes == [True] * 6
    assert list(images.images) == [("cams", 2), ("cams", 4), ("cams", 6)]
    (folder,) = (tmp_path / "lightning_logs").glob("version_*/events*")
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Images("cams")] == [2, 4, 6]
    heatmaps = xf.smoothgradcam_pp(model.eval(), "body", X[:2], 1)
    for image, x, heatmap in zip(images.images["cams", 6], X, heatmaps, strict=False):
        picture = ((x - x.min()) / (x.max() - x.min())).movedim(0, -1).numpy()
        assert abs(xf.plot.overlay(picture, heatmap, alpha=0.4).astype(int) - image).max() <= 1


def test_what_cannot_be_logged_says_why(tmp_path):
    for logger, found in ((False, "none"), (CSVLogger(tmp_path), "CSVLogger")):
        with pytest.raises(ValueError, match=rf"loggers \({found}\) cannot log images; .*TensorBoardLogger"):
            fitted(logger, LogOverlays(X[:1]))
    with pytest.raises(ValueError, match=r"x has 4 channels and cannot be drawn; pass pictures="):
        LogOverlays(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"pictures has 1 entries for 2 images"):
        LogOverlays(X[:2], pictures=[np.zeros((8, 8, 3))])
    with pytest.raises(ValueError, match="every=0 is out of range"):
        LogOverlays(X[:2], every=0)
