"""The private copy that scores: the same values as the network, whatever was made part of what."""

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import networks
import xcam_fn as xf
from xcam_fn.network.halves import traced_model as traced
from xcam_fn.scoring.folding import inference_copy

pads = st.tuples(*[st.integers(0, 3)] * 4)


class Padded(nn.Module):
    """A convolution whose input is padded by something else, then normalized, then activated."""

    def __init__(self, pad, *, own, stride, groups, dilation, function, activation):
        super().__init__()
        self.pad = None if function else nn.ZeroPad2d(pad)
        self.sides = pad
        self.conv = nn.Conv2d(6, 6, 3, stride, own, dilation, groups, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(x, self.sides) if self.pad is None else self.pad(x)
        return self.activation(self.norm(self.conv(y))).mean((2, 3))


def same(model: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    """The copy, after it was seen to compute the same and to leave the model and its input as they were."""
    networks.seeded(model)
    model.double().eval()
    before, image = {k: v.clone() for k, v in model.state_dict().items()}, x.clone()
    with torch.no_grad():
        trace = traced(model, x)
        assert trace is not None
        twin = inference_copy(model, trace.graph)
        torch.testing.assert_close(twin(x), model(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, image)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    return twin


def count(twin: torch.fx.GraphModule, wanted) -> int:
    return sum(
        node.target is wanted
        or (node.op == "call_module" and type(twin.get_submodule(str(node.target))) is wanted)
        for node in twin.graph.nodes
    )


@settings(deadline=None, max_examples=60)
@given(
    pads, st.integers(0, 2), st.integers(1, 3), st.sampled_from([1, 2, 6]), st.integers(1, 2), st.booleans(),
    st.sampled_from([nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.3), nn.ELU(0.5), nn.Hardtanh(-2, 1)]),
)  # fmt: skip
def test_padding_norm_and_activation_become_part_of_the_convolution(
    pad, own, stride, groups, dilation, function, activation
):
    model = Padded(
        pad,
        own=own,
        stride=stride,
        groups=groups,
        dilation=dilation,
        function=function,
        activation=activation,
    )
    x = torch.randn(2, 6, 11, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(pad)))
    twin = same(model, x)
    is_even = pad[0] == pad[1] and pad[2] == pad[3]
    if not function and (is_even or (groups > 1 and dilation == 1)):
        assert count(twin, nn.ZeroPad2d) == 0
    assert count(twin, nn.BatchNorm2d) == 0
    assert all(module.inplace for module in twin.modules() if type(module) is type(activation))
    assert not activation.inplace


class Shared(nn.Module):
    """What may not be changed in place or folded: values that something else reads too."""

    def __init__(self):
        super().__init__()
        self.pad, self.conv, self.other = nn.ZeroPad2d(1), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.norm, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        padded = self.pad(x)
        first = self.conv(padded)
        second = self.relu(first) - first  # the convolution's output is read twice
        third = self.norm(self.other(F.pad(x, (1, 1, 1, 1)))) + self.norm(first)  # one norm, two convolutions
        view = self.conv(padded).flatten(1)
        return torch.cat(
            [(second + third).mean((2, 3)), self.relu(view).mean(1, keepdim=True), F.relu(x).mean((2, 3))], 1
        )


def test_what_others_read_stays():
    twin = same(Shared(), torch.randn(2, 3, 8, 9, dtype=torch.float64))
    assert count(twin, nn.ZeroPad2d) == 1


class OtherPads(nn.Module):
    def __init__(self, pad):
        super().__init__()
        self.pad, self.conv = pad, nn.Conv2d(3, 4, 3, padding="same" if isinstance(pad, nn.ZeroPad2d) else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x))


@pytest.mark.parametrize(
    "pad",
    [nn.ConstantPad2d(1, 0.5), nn.ReflectionPad2d(1), nn.ZeroPad2d((-1, 2, 0, 0)), nn.ZeroPad2d(1)],
    ids=["constant", "reflected", "cropped", "beside-same"],
)
def test_padding_that_is_not_only_zeros_stays(pad):
    twin = same(OtherPads(pad), torch.randn(1, 3, 8, 9, dtype=torch.float64))
    assert count(twin, type(pad)) == 1


def test_a_convolution_that_runs_twice_keeps_one_kernel():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return operator.add(self.norm(self.conv(x)), self.norm(self.conv(x * 2)))

    twin = same(Twice(), torch.randn(1, 3, 5, 5, dtype=torch.float64))
    assert sum(buffer.ndim == 4 for buffer in twin.buffers()) == 1


@pytest.mark.parametrize("name", ["lite0", "vgg11", "resnet18", "convnext_tiny"])
def test_in_bfloat16_the_last_linear_layer_stays_exact(name):
    loaded = xf.models.load(name, weights=None if name == "lite0" else "random")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    made = inference_copy(loaded.model, traced(loaded.model, x).graph, torch.bfloat16)
    kept = [p for p in (*made.parameters(), *made.buffers()) if p.dtype == torch.float32]
    assert len(kept) == 2  # weight and bias of one layer
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    found = made(x.bfloat16())
    assert found.dtype == torch.float32
    assert torch.corrcoef(torch.stack([found[0], loaded.model(x)[0]]))[0, 1] > 0.999


def test_without_a_linear_layer_at_the_end_nothing_is_kept_exact():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.Flatten()
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    made = inference_copy(model, traced(model, x).graph, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in made.buffers())
    assert made(x.bfloat16()).dtype == torch.bfloat16


class Flattened(nn.Module):
    """A network that flattens by `view`, with a parameter of four axes that is no kernel."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 4 * 6, 5)
        self.filter = nn.Parameter(torch.ones(4, 4, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(F.relu(self.conv(x))) * torch.view_as_complex(self.filter)
        return self.linear(torch.fft.irfft2(y, s=(4, 6)).view(x.size(0), -1))


def test_channels_last_images_go_through_a_view():
    model = Flattened()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    twin = same(model, x)
    with torch.no_grad():
        torch.testing.assert_close(twin(x.to(memory_format=torch.channels_last)), model(x))


def test_what_is_not_folded_is_shared():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    twin = same(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    assert any(p is model[0].weight for p in twin.parameters())
    assert not any(p is model[2].weight for p in twin.parameters())
    assert not model[1].inplace


class Branching(nn.Module):
    """Two heads whose parameters have one name once dots are underscores."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"b_c": nn.Linear(3, 2)})
        self.a_b = nn.ModuleDict({"c": nn.Linear(3, 2)})

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3))
        return self.a["b_c"](y) - self.a_b["c"](y)


def test_names_that_differ_by_a_dot_are_told_apart():
    same(Branching(), torch.randn(1, 3, 4, 4, dtype=torch.float64))


def test_a_network_of_linear_layers_is_scored_in_bfloat16():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
    x = torch.randn(2, 3, 4, 4)
    made = inference_copy(model, traced(model, x).graph, torch.bfloat16)
    torch.testing.assert_close(made(x), model(x))
