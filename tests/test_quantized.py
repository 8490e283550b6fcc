"""Quantized and exported networks, and those of other runtimes: what works equals slow loops, what cannot says so."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as ao
from torch.ao.quantization import quantize_fx

import networks
import xcam_fn as xf
from xcam_fn.checks import LostGradientError, StructureError
from xcam_fn.maps import resized_minmax
from xcam_fn.methods.together import explained_where_possible, named_methods

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(torch.ao.quantization|quantize_per_tensor|torch.qu?int).*"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
]
GRADIENT = ["gradcam", "input_x_gradient", "guided_backprop", "shapleycam", "opticam"]
FREE = ["eigencam", "scorecam", "ablationcam", "reciprocam", "rise", "occlusion"]


class Plain(nn.Module):
    """Two convolutions and a linear layer; with stubs, where torch's eager mode begins and ends to quantize."""

    def __init__(self, *, stubs: bool = False) -> None:
        super().__init__()
        self.quant, self.dequant = (
            (ao.QuantStub(), ao.DeQuantStub()) if stubs else (nn.Identity(), nn.Identity())
        )
        self.conv1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(8, 12, 3, padding=1, stride=2), nn.ReLU()
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(self.quant(x)))
        x = self.relu2(self.conv2(x))
        return self.dequant(self.fc(x.mean((2, 3))))


class Skipping(nn.Module):
    """A float path around a linear layer of the tokens, which alone is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.mlp, self.fc = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.relu(self.conv(x)).flatten(2).mT
        return self.fc((tokens + self.mlp(tokens)).mean(1))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def static(engine: str = "eager") -> nn.Module:
    """Weights and activations in whole numbers, calibrated on a few images."""
    model = networks.seeded(Plain(stubs=engine == "eager"))
    if engine == "eager":
        model.qconfig = ao.get_default_qconfig("x86")
        model = ao.prepare(ao.fuse_modules(model, [["conv1", "relu1"], ["conv2", "relu2"]]))
        model(images(8))
        return ao.convert(model)
    model = quantize_fx.prepare_fx(model, ao.get_default_qconfig_mapping("x86"), (images(),))
    model(images(8))
    return quantize_fx.convert_fx(model)


def dynamic() -> nn.Module:
    return ao.quantize_dynamic(networks.seeded(Plain()), {nn.Linear}, dtype=torch.qint8)


BUILDS = {
    "eager": (static, "conv2"),
    "fx": (functools.partial(static, "fx"), "conv2"),
    "dynamic": (dynamic, "relu2"),
}


@pytest.fixture(scope="module", params=BUILDS)
def quantized(request) -> tuple[nn.Module, str]:
    build, layer = BUILDS[request.param]
    return build(), layer


def hooked(model: nn.Module, layer: str, x: Tensor, change=lambda A: A) -> tuple[Tensor, Tensor]:
    """The layer's output in floats and the model's, the former changed on its way and rounded as the layer does."""
    seen = []

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        seen.append(output.dequantize() if output.is_quantized else output)
        new = change(seen[0])
        if not output.is_quantized:
            return new
        return torch.quantize_per_tensor(new, output.q_scale(), output.q_zero_point(), output.dtype)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model(x), seen[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("build", [static, dynamic])
def test_the_state_of_packed_weights_is_seen(build):
    model = build()
    before = xf.testing.state(model)
    xf.scorecam(model, None, images(1))
    assert xf.testing.state(model) == before
    weight, bias = model.fc.weight(), model.fc.bias()
    other = torch.quantize_per_tensor(-weight.dequantize(), 0.01, 0, torch.qint8)
    for changed in ((weight, bias + 1), (other, bias)):
        model.fc.set_weight_bias(*changed)
        assert xf.testing.state(model)["tensors"] != before["tensors"]
    model.fc.set_weight_bias(weight, bias)
    assert xf.testing.state(model) == before


def test_features_are_the_numbers_that_the_whole_ones_stand_for(quantized):
    model, layer = quantized
    x = images()
    A = xf.features(model, layer, x)
    torch.testing.assert_close(A, hooked(model, layer, x)[1])
    assert A.dtype == torch.float32
    assert xf.layers(model, x)[layer] == (1, 12, 8, 8)
    assert xf.default_layer(model, x) in (layer, "relu2")


@torch.no_grad()
def test_ablation_and_masks_equal_slow_loops(quantized):
    model, layer = quantized
    x = images(1)
    y, A = hooked(model, layer, x)
    zero = model(torch.zeros_like(x)).softmax(1)[0, 2]
    ablated, masked = torch.zeros(2, 8, 8)
    for k in range(12):
        kept = (torch.arange(12) != k).float()[:, None, None]
        ablated += (
            (y[0, 2] - hooked(model, layer, x, lambda A, kept=kept: A * kept)[0][0, 2]) / y[0, 2] * A[0, k]
        )
        shown = x * resized_minmax(A[0, k], x.shape[2:])
        masked += (model(shown).softmax(1)[0, 2] - zero) * A[0, k]
    for method, expected in ((xf.ablationcam, ablated), (xf.scorecam, masked)):
        found = method(model, layer, x, 2, postprocess=None)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        chunked = method(model, layer, x, 2, postprocess=None, chunk_size=3)[0]
        torch.testing.assert_close(chunked, found, atol=1e-5, rtol=1e-4)


def test_methods_without_gradients_explain_it_and_the_others_say_that_they_cannot(quantized):
    model, _ = quantized
    before = model(images()), [*model.modules()]
    chosen = named_methods([*FREE, *GRADIENT], num_masks=8, window=8)
    found, lacking = explained_where_possible(model, None, images(1), 1, chosen)
    assert list(found) == FREE
    assert all(heatmap.isfinite().all() for heatmap in found.values())
    assert list(lacking) == GRADIENT
    for error in lacking.values():
        assert "integers of quantization); " in str(error)
        assert "without gradients: eigencam or scorecam at a named layer, or rise" in str(error)
    assert torch.equal(model(images()), before[0])
    assert [*model.modules()] == before[1]


def test_whole_numbers_that_stand_for_nothing_have_no_map():
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.long()

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Counting(), nn.Flatten()).eval()
    with pytest.raises(
        StructureError, match=r"layer '1' returns torch\.int64 values, not floating-point numbers"
    ):
        xf.eigencam(model, "1", images(), lambda y: y[:, 0].float())


@pytest.mark.parametrize("method", [xf.gradcam, xf.input_x_gradient, xf.liftcam])
def test_a_gradient_of_the_paths_around_what_is_quantized_is_none(method):
    model = networks.seeded(Skipping())
    x, rounded = images(1), ao.quantize_dynamic(model, {"mlp"}, dtype=torch.qint8)
    assert method(model, "relu", x, 1).max() == 1
    with pytest.raises(LostGradientError):
        method(rounded, "relu", x, 1)


class Rounded(Tensor):
    """A weight of a kind of its own, by which linear layers compute in whole numbers."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            x, weight, bias = args
            return ((x * 16).char() @ (weight * 16).char().mT).float() / 256 + bias


def test_a_weight_that_rounds_what_it_is_multiplied_by_ends_the_gradient():
    model = networks.seeded(Skipping())
    model.mlp.weight = nn.Parameter(model.mlp.weight.detach().as_subclass(Rounded), requires_grad=False)
    assert torch.autograd.grad(model(images().requires_grad_()).sum(), model.mlp.bias)[0].any()
    with pytest.raises(LostGradientError):
        xf.gradcam(model, "relu", images(), 1)
    assert xf.eigencam(model, "relu", images(), 1).max() == 1


def test_a_graph_of_torch_export_has_layers_once_it_is_unflattened():
    model, x = networks.seeded(Plain()), images()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with pytest.raises(
        ValueError, match=r"runs functions and no modules, .*torch\.export\.unflatten\(program\)"
    ):
        xf.gradcam(program.module(), None, x, 1)
    unflattened = torch.export.unflatten(program).eval()
    for method in (xf.gradcam, xf.ablationcam, xf.rise):
        options = {"num_masks": 8} if method is xf.rise else {}
        expected = method(model, "relu2", x, 1, **options)
        torch.testing.assert_close(
            method(unflattened, "relu2", x, 1, **options), expected, atol=1e-4, rtol=1e-4
        )
        if method is xf.rise:
            torch.testing.assert_close(method(program.module(), None, x, 1, **options), expected)


# -- other runtimes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory) -> tuple[nn.Module, str]:
    """A network, and the same written by hand to a file that returns logits and features."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = networks.seeded(networks.Linearized())
    model.conv, relu = nn.Sequential(model.conv, nn.ReLU()), "features"
    weights = [model.conv[0].weight, model.conv[0].bias, model.fc.weight, model.fc.bias]
    names = ["w", "b", "v", "c"]
    held = [numpy_helper.from_array(t.detach().numpy(), n) for n, t in zip(names, weights, strict=True)]
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"]),
        helper.make_node("Relu", ["a"], [relu]),
        helper.make_node("GlobalAveragePool", [relu], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "v", "c"], ["logits"], transB=1),
    ]
    value = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    ends = [value("logits", shape=["n", 5]), value(relu, shape=["n", 7, 14, 14])]
    graph = helper.make_graph(nodes, "net", [value("x", shape=["n", 3, 16, 16])], ends, held)
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return model, str(path)


def onnxruntime_of(path: str):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda x: session.run(["logits", "features"], {"x": x.numpy()})


def openvino_of(path: str):
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(x: Tensor) -> list[np.ndarray]:
        found = compiled(x.numpy())
        return [found["logits"], found["features"]]

    return run


@pytest.mark.parametrize("load", [onnxruntime_of, openvino_of])
def test_a_network_of_another_runtime_is_scored_and_its_features_masked(onnx_file, load):
    model, path = onnx_file
    run, x = load(path), images()

    def scorer(x: Tensor) -> Tensor:
        return torch.from_numpy(run(x)[0])

    def ask(features: nn.Module, x: Tensor) -> Tensor:
        logits, A = map(torch.from_numpy, run(x))
        features(A)
        return logits

    net = xf.bind(nn.Identity().eval(), ask)
    close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-3)
    heatmap = xf.rise(None, None, x, 1, num_masks=16, scorer=scorer)
    close(heatmap, xf.rise(model, None, x, 1, num_masks=16))
    for metric in (xf.insertion, xf.deletion):
        close(
            metric(None, x, heatmap, 1, scorer=scorer, steps=8).scores,
            metric(model, x, heatmap, 1, steps=8).scores,
        )
    for method in (xf.scorecam, xf.eigencam):
        close(method(net, "model", x, 1), method(model, "conv", x, 1))
    with pytest.raises(StructureError, match=r"layer 'model': the model's output does not depend on"):
        xf.ablationcam(net, "model", x, 1)
    with pytest.raises(StructureError, match=r"no gradient reaches layer 'model' from the score"):
        xf.gradcam(net, "model", x, 1)
    advice = r"the model fails while autograd records it .*eigencam or scorecam at a named layer, or rise"
    with pytest.raises(StructureError, match=advice):
        xf.input_x_gradient(net, None, x, 1)


def test_a_module_around_another_runtime_is_not_handed_what_would_crash_it(onnx_file):
    model, path = onnx_file

    class Session(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run, self.features = onnxruntime_of(path), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            logits, A = map(torch.from_numpy, self.run(x))
            self.features(A)
            return logits

    x = images()
    found = xf.scorecam(Session().eval(), "features", x, 1)
    torch.testing.assert_close(found, xf.scorecam(model, "conv", x, 1), atol=1e-4, rtol=1e-3)


def test_what_is_no_module_goes_into_scorer(unchecked):
    with pytest.raises(TypeError, match="for another runtime, pass model=None and scorer="):
        xf.scorecam(copy.copy, None, images())


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "xml"])
def test_an_exported_network_is_no_checkpoint(suffix, tmp_path):
    path = tmp_path / f"net.{suffix}"
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"is an exported network; in Python, use rise\(\.\.\., scorer="):
        xf.models.load("lite0", weights=path)
