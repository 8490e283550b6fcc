"""Does with each extra what it is for, where nothing but the wheel and that extra is installed.

`python extras.py NAME` in an empty folder.
"""

import pathlib
import signal
import subprocess
import sys

import numpy as np
import torch
from PIL import Image
from torch import nn

import xcam_fn as xf

XCAM = pathlib.Path(sys.executable).with_name("xcam")
NETWORKS = """
from torch import nn

def network(convolution, pool, channels):
    return nn.Sequential(convolution(channels, 4, 3), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(4, 3))

def signal():
    return network(nn.Conv1d, nn.AdaptiveAvgPool1d, 1)

def clip():
    return network(nn.Conv3d, nn.AdaptiveAvgPool3d, 3)

def volume():
    return network(nn.Conv3d, nn.AdaptiveAvgPool3d, 1)
"""


def classifier() -> nn.Module:
    """A network of photographs, as small as one can be."""
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(*layers).eval()


def explained(file: str, network: str) -> None:
    """Explain a file by the command."""
    pathlib.Path("networks.py").write_text(NETWORKS)
    subprocess.run([XCAM, "explain", file, "--model", f"networks.py:{network}"], check=True)
    assert list(pathlib.Path("xcam_output").glob("*.png"))


def app() -> None:
    command = [XCAM, "app", "--model", "resnet18", "--weights", "random", "--no-browser", "--port", "7861"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert any("xcam app is at http://127.0.0.1:7861" in line for line in server.stdout)
        server.send_signal(signal.SIGINT)
    assert server.returncode == 0


def audio() -> None:
    import soundfile

    soundfile.write("tone.wav", np.sin(np.arange(4000) / 5), 8000)
    explained("tone.wav", "signal")


def cluster() -> None:
    heatmap = xf.groupcam(classifier(), "0", torch.rand(1, 3, 16, 16), 1, num_groups=2, cluster="kmeans")
    assert heatmap.isfinite().all()


def demo() -> None:
    subprocess.run([XCAM, "explain", "--example"], check=True)


def dinov2() -> None:
    network = xf.models.load("dinov2-focus").model
    heatmap = xf.gradcam(network, None, torch.rand(1, 3, 224, 224), xf.targets.similarity(torch.ones(384)))
    assert heatmap.isfinite().all()


def export() -> None:
    xf.export.onnx(classifier(), "0", torch.rand(2, 3, 16, 16), "gradcam.onnx")


def lightning() -> None:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import CSVLogger

    from xcam_fn.callbacks import LogOverlays

    class Trained(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = classifier()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

        def training_step(self, x: torch.Tensor) -> torch.Tensor:
            return self(x).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    class Logger(CSVLogger):
        pictures = 0

        def log_image(self, key: str, images: list[np.ndarray], step: int) -> None:
            self.pictures += len(images)

    images, logger = torch.rand(4, 3, 16, 16), Logger(".")
    callback = LogOverlays(images[:1], "body.0", 1, every=2)
    trainer = Trainer(max_epochs=1, logger=logger, callbacks=[callback], enable_checkpointing=False)
    trainer.fit(Trained(), torch.utils.data.DataLoader(images))
    assert logger.pictures == 2


def medical() -> None:
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 9, 10), np.float32), np.eye(4)), "scan.nii.gz")
    explained("scan.nii.gz", "volume")


def evaluated(*options: str) -> None:
    """Evaluate a photograph and write the report."""
    pathlib.Path("photographs").mkdir()
    Image.effect_noise((64, 64), 50).convert("RGB").save("photographs/noise.png")
    model = ["--model", "resnet18", "--weights", "random", "--methods", "gradcam"]
    subprocess.run([XCAM, "evaluate", "photographs", *model, "--output", "run", *options], check=True)


def parquet() -> None:
    evaluated()
    subprocess.run([XCAM, "report", "run", "--format", "parquet"], check=True)
    assert list(pathlib.Path("run").glob("*.parquet"))


def ray() -> None:
    evaluated("--ray")


def torchmetrics() -> None:
    metric = xf.metrics.torchmetric("insertion", steps=4)
    x = torch.rand(2, 3, 16, 16)
    metric.update(classifier(), x, xf.gradcam(classifier(), "0", x, 1), 1)
    assert metric.compute().isfinite()


def video() -> None:
    import av

    with av.open("clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for level in range(6):
            picture = np.full((32, 32, 3), 40 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    explained("clip.mp4", "clip")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print(f"extra {sys.argv[1]}: ok")
