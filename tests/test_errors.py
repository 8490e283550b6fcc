"""Wrong arguments: the error names the argument, what it was, what was expected and the remedy."""

import numpy as np
import pytest
import torch
from torch import nn

import networks
import xcam_fn as xf

pytestmark = pytest.mark.usefixtures("unchecked")

x = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))


def residual() -> nn.Module:
    return networks.seeded(networks.Residual())


class Unused(networks.Residual):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Conv2d(3, 3, 3)


BAD_CALLS = {
    "unknown layer": (
        lambda: xf.gradcam(residual(), "conv22", x),
        ValueError,
        r"layer 'conv22' is not in Residual; did you mean 'conv2'.*",
    ),
    "nothing near": (
        lambda: xf.gradcam(residual(), "zzz", x),
        ValueError,
        r"its top modules are 'stem', 'conv1'",
    ),
    "layer never reached": (
        lambda: xf.gradcam(networks.seeded(Unused()), "spare", x),
        ValueError,
        r"layer 'spare' is in Unused but its forward never runs it",
    ),
    "call out of range": (
        lambda: xf.gradcam(residual(), "relu#4", x),
        ValueError,
        r"layer 'relu#4': 'relu' runs 3 time\(s\) in a forward pass; expected one of relu#1, relu#2, relu#3",
    ),
    "call not a number": (
        lambda: xf.gradcam(residual(), "relu#b", x),
        ValueError,
        r"expected a number after '#'",
    ),
    "layer of another model": (
        lambda: xf.gradcam(residual(), nn.Conv2d(3, 3, 1), x),
        ValueError,
        r"layer=Conv2d\(...\) is not a module of this Residual",
    ),
    "layer of another kind": (
        lambda: xf.gradcam(residual(), 3, x),
        TypeError,
        r"layer must be a name",
    ),
    "layer without maps": (
        lambda: xf.gradcam(residual(), "fc", x),
        ValueError,
        r"layer 'fc' returns shape \(2, 5\); expected spatial maps \(2, K, H, W\)",
    ),
    "class out of range": (
        lambda: xf.gradcam(residual(), None, x, 5),
        ValueError,
        r"cls=5 is out of range: the model has 5 classes, 0 to 4",
    ),
    "negative class": (lambda: xf.gradcam(residual(), None, x, -1), ValueError, r"cls=-1 is out of range"),
    "class in a tensor": (
        lambda: xf.gradcam(residual(), None, x, torch.tensor([1, 9])),
        ValueError,
        r"cls=9 is out of range",
    ),
    "classes for another batch": (
        lambda: xf.gradcam(residual(), None, x, [1, 2, 3]),
        ValueError,
        r"cls=\[1, 2, 3\] holds 3 classes for a batch of 2",
    ),
    "ragged classes": (
        lambda: xf.gradcam(residual(), None, x, [[1, 2], [3]]),
        ValueError,
        r"expected the same number of classes, at least one, for each image",
    ),
    "class by name": (
        lambda: xf.gradcam(residual(), None, x, "cat"),
        TypeError,
        r"cls must be None, an int",
    ),
    "class a float": (lambda: xf.gradcam(residual(), None, x, 1.5), TypeError, r"cls must be .*, got 1.5"),
    "float classes": (
        lambda: xf.gradcam(residual(), None, x, torch.ones(2)),
        TypeError,
        r"cls has dtype torch.float32; expected integers",
    ),
    "target of a wrong shape": (
        lambda: xf.gradcam(residual(), None, x, lambda y: y),
        ValueError,
        r"cls: the target returned shape \(2, 5\); expected \(2,\)",
    ),
    "target of a wrong kind": (
        lambda: xf.gradcam(residual(), None, x, lambda y: 3),
        TypeError,
        r"cls: the target returned an int",
    ),
    "x an array": (
        lambda: xf.gradcam(residual(), None, x.numpy()),
        TypeError,
        r"x must be a torch.Tensor",
    ),
    "x of integers": (
        lambda: xf.gradcam(residual(), None, (x * 9).to(torch.uint8)),
        TypeError,
        r"x has dtype torch.uint8; expected a dense floating-point tensor",
    ),
    "x without a batch": (
        lambda: xf.gradcam(residual(), None, x[0]),
        ValueError,
        r"x has shape \(3, 12, 16\); the model expects a batch of images \(B, C, H, W\); pass x.unsqueeze\(0\)",
    ),
    "x of no rank": (
        lambda: xf.gradcam(residual(), None, x[0, 0]),
        ValueError,
        r"x has shape \(12, 16\); expected a batch of signals \(B, C, L\), or images",
    ),
    "NaN": (
        lambda: xf.gradcam(residual(), None, x / 0 * 0),
        ValueError,
        r"x holds NaN; expected finite values",
    ),
    "infinity": (lambda: xf.gradcam(residual(), None, x / 0), ValueError, r"x holds infinite values"),
    "empty batch": (
        lambda: xf.gradcam(residual(), None, x[:0]),
        ValueError,
        r"x has shape \(0, 3, 12, 16\): an empty batch",
    ),
    "another dtype": (
        lambda: xf.gradcam(residual(), None, x.double()),
        TypeError,
        r"x has dtype torch.float64, but the model has torch.float32; pass x.to\(torch.float32\)",
    ),
    "another device": (
        lambda: xf.gradcam(residual().to("meta"), None, x),
        ValueError,
        r"x is on cpu, but the model is on meta",
    ),
    "channels": (
        lambda: xf.gradcam(residual(), None, x[:, :1]),
        ValueError,
        r"x has shape \(\d, 1, 12, 16\); the model expects 3 channels",
    ),
    "training mode": (
        lambda: xf.gradcam(residual().train(), None, x),
        ValueError,
        r"model is in training mode, where BatchNorm2d .*; call model.eval\(\) first",
    ),
    "dropout in training mode": (
        lambda: xf.gradcam(
            nn.Sequential(nn.Conv2d(3, 5, 3), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), None, x
        ),
        ValueError,
        r"where Dropout makes",
    ),
    "model a function": (
        lambda: xf.gradcam(lambda x: x, None, x),
        TypeError,
        r"model must be a torch.nn.Module",
    ),
    "output that no rule covers": (
        lambda: xf.gradcam(networks.seeded(networks.Wrapped("tuple")), None, x),
        ValueError,
        r"the model's output is a tuple of 2: a tensor of shape \(2, 5\), .*Pass cls=a callable",
    ),
    "no convolution": (
        lambda: xf.gradcam(nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 16, 5)).eval(), None, x),
        ValueError,
        r"layer=None: Sequential runs no convolution",
    ),
    "lazy parameters": (
        lambda: xf.gradcam(nn.Sequential(nn.LazyConv2d(3, 3), nn.Flatten()).eval(), "0", x),
        ValueError,
        r"'0' \(LazyConv2d\) is not initialized; run model\(x\)",
    ),
    "unknown option": (
        lambda: xf.gradcam(residual(), None, x, step=3),
        TypeError,
        r"gradcam\(\) has no option 'step'; its options are create_graph, postprocess",
    ),
    "no steps": (
        lambda: xf.integrated_gradients(residual(), None, x, steps=0),
        ValueError,
        r"steps=0 is out of range; expected an integer ≥ 2",
    ),
    "chunk size": (
        lambda: xf.integrated_gradients(residual(), None, x, chunk_size=2.5),
        TypeError,
        r"chunk_size must be an integer ≥ 1, got 2.5",
    ),
    "baseline": (
        lambda: xf.integrated_gradients(residual(), None, x, baseline=torch.zeros(7)),
        ValueError,
        r"baseline has shape \(7,\); expected a number, a callable of x, or a shape that broadcasts",
    ),
    "weights of a wrong shape": (
        lambda: xf.from_gradients(lambda A, G: G.mean(1), name="wrong")(residual(), None, x),
        ValueError,
        r"weights have shape \(2, 12, 16\) for features of shape",
    ),
    "size": (
        lambda: xf.heatmap(torch.zeros(2, 4, 4), (0, 4)),
        ValueError,
        r"size=\(0, 4\); expected 1 to 3 lengths",
    ),
    "map without a batch": (
        lambda: xf.heatmap(torch.zeros(4, 4), (8, 8)),
        ValueError,
        r"cam has shape \(4, 4\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_the_error_says_what_is_wrong(case):
    call, kind, words = BAD_CALLS[case]
    with pytest.raises(kind, match=words):
        call()


def test_numpy_classes_are_fine():
    expected = xf.gradcam(residual(), None, x, [1, 2])
    assert torch.equal(xf.gradcam(residual(), None, x, np.array([1, 2])), expected)
    assert torch.equal(xf.gradcam(residual(), None, x, (np.int64(1), 2)), expected)


def test_a_network_without_randomness_may_be_in_training_mode():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    )
    assert model.training
    assert torch.equal(xf.gradcam(model, "1", x), xf.gradcam(model.eval(), "1", x))


def test_heatmaps_of_constant_maps_are_zero():
    for value in (0.0, 3.0, -2.0, 1e-38, 1e38):
        assert (xf.heatmap(torch.full((2, 4, 4), value), (9, 7)) == 0).all()


def test_heatmap_order_of_steps():
    cam = torch.tensor([[[-4.0, 1.0], [2.0, -1.0]]])
    first, last = xf.heatmap(cam, (6, 6)), xf.heatmap(cam, (6, 6), resize_first=True)
    resize = nn.functional.interpolate
    relu_first = resize(cam.relu()[None], size=(6, 6), mode="bilinear")[0]
    relu_last = resize(cam[None], size=(6, 6), mode="bilinear")[0].relu()
    torch.testing.assert_close(first, relu_first / relu_first.max())
    torch.testing.assert_close(last, relu_last / relu_last.max())
    assert not torch.allclose(first, last)
