"""The gradient family: closed forms, properties, the paper's loops, other libraries and the original's own maps."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import networks
import xcam_fn as xf

GRADIENT = [n for n, m in xf.METHODS.items() if m.family == "gradient" and n not in networks.OF_ATTENTION]
CAMS = [name for name in GRADIENT if hasattr(xf.weights, name) and name != "smoothgradcam_pp"]
seeds = st.integers(0, 2**31 - 1)


def maps(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def quick(name: str) -> xf.Method:
    return xf.METHODS[name].with_options(**networks.QUICK.get(name, {}))


def linearized(seed: int, batch: int = 2) -> tuple[networks.Linearized, Tensor]:
    model = networks.seeded(networks.Linearized(), seed).double()
    assert isinstance(model, networks.Linearized)
    return model, maps(batch, 3, 9, 7, seed=seed)


# -- the weighting functions, position by position as the papers write them ---------------------------------


def loop_weights(name: str, A: Tensor, G: Tensor) -> Tensor:
    B, K, H, W = A.shape
    per_position = torch.zeros_like(A)
    for b in range(B):
        for k in range(K):
            a, g = A[b, k], G[b, k]
            match name:
                case "gradcam":
                    per_position[b, k] = sum(g[i, j] for i in range(H) for j in range(W)) / (H * W)
                case "xgradcam":
                    total = a.sum()
                    per_position[b, k] = (g * a).sum() / total if total != 0 else 0.0
                case "layercam":
                    per_position[b, k] = g.clamp(min=0)
                case "hirescam":
                    per_position[b, k] = g
                case "liftcam":
                    per_position[b, k] = sum(g[i, j] * a[i, j] for i in range(H) for j in range(W))
                case "gradcam_elementwise":
                    per_position[b, k] = (g * a).clamp(min=0) / a
                case "gradcam_pp":
                    third = (a * g**3).sum()
                    weight = 0.0
                    for i in range(H):
                        for j in range(W):
                            denominator = 2 * g[i, j] ** 2 + third
                            alpha = g[i, j] ** 2 / denominator if denominator != 0 else 0.0
                            weight += alpha * max(g[i, j].item(), 0.0)
                    per_position[b, k] = weight
    return per_position


@pytest.mark.parametrize("name", CAMS)
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_weights_are_the_papers_loops(name, seed):
    A, G = maps(2, 3, 4, 5, seed=seed), maps(2, 3, 4, 5, seed=seed + 1, scale=0.1)
    weights = getattr(xf.weights, name)(A, G)
    expected = (loop_weights(name, A, G) * A).sum(1)
    torch.testing.assert_close(xf.weights.weighted_sum(A, weights), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CAMS)
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_the_order_of_channels_changes_nothing(name, seed):
    A, G = maps(2, 6, 4, 5, seed=seed), maps(2, 6, 4, 5, seed=seed + 1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    weight = getattr(xf.weights, name)
    expected = xf.weights.weighted_sum(A, weight(A, G))
    shuffled = xf.weights.weighted_sum(A[:, order], weight(A[:, order], G[:, order]))
    torch.testing.assert_close(shuffled, expected)


@pytest.mark.parametrize("name", ["gradcam", "xgradcam", "layercam", "hirescam"])
@given(seed=seeds, exponent=st.integers(-30, 30))
@settings(max_examples=10, deadline=None)
def test_the_scale_of_the_gradient_changes_nothing(name, seed, exponent):
    A, G = maps(2, 6, 4, 5, seed=seed), maps(2, 6, 4, 5, seed=seed + 1)
    weight = getattr(xf.weights, name)

    def heatmap(G: Tensor) -> Tensor:
        return xf.heatmap(xf.weights.weighted_sum(A, weight(A, G)), (8, 9))

    torch.testing.assert_close(heatmap(G * 2.0**exponent), heatmap(G))


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_gradcam_pp_survives_gradients_whose_square_underflows(seed):
    A = maps(1, 4, 3, 3, seed=seed).float().abs()
    G = maps(1, 4, 3, 3, seed=seed + 1).float()
    tiny = xf.weights.gradcam_pp(A, G * 2.0**-80) * 2.0**80
    without_third = (G.relu() / 2).sum((2, 3))  # what the weights tend to as the gradient becomes small
    torch.testing.assert_close(tiny, without_third, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CAMS)
def test_zero_gradients_and_zero_features_give_zeros(name):
    weight = getattr(xf.weights, name)
    for A, G in (
        (maps(1, 3, 4, 4, seed=0), torch.zeros(1, 3, 4, 4, dtype=torch.float64)),
        (torch.zeros(1, 3, 4, 4, dtype=torch.float64), maps(1, 3, 4, 4, seed=0)),
    ):
        raw = xf.weights.weighted_sum(A, weight(A, G))
        assert (raw == 0).all()
        assert (xf.heatmap(raw, (8, 8)) == 0).all()


# -- whole methods -----------------------------------------------------------------------------------------


@given(seed=seeds, cls=st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_closed_forms_on_pooling_and_one_linear_layer(seed, cls):
    model, x = linearized(seed)
    A = model.conv(x).relu().detach()
    w = model.fc.weight[cls].detach()
    positions = A[0, 0].numel()
    # The layer is the convolution, before ReLU.
    G = (w / positions).reshape(1, -1, 1, 1).expand_as(A) * (A > 0)
    raw = model.conv(x).detach()
    found = xf.feature_and_grad(model, "conv", x, cls)
    torch.testing.assert_close(found.features, raw)
    torch.testing.assert_close(found.grads, G)
    torch.testing.assert_close(xf.hirescam(model, "conv", x, cls, postprocess=None), (G * A).sum(1))
    torch.testing.assert_close(
        xf.gradcam(model, "conv", x, cls, postprocess=None), (G.mean((2, 3), keepdim=True) * raw).sum(1)
    )


@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_on_pooling_and_one_linear_layer_gradcam_and_hirescam_are_the_original_cam(seed):
    model, x = linearized(seed)
    model = nn.Sequential(model.conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc).eval()
    A, w = model[:2](x).detach(), model[4].weight[3].detach()
    expected = torch.einsum("k,bkhw->bhw", w, A) / A[0, 0].numel()
    for method in (xf.gradcam, xf.hirescam):
        torch.testing.assert_close(method(model, "1", x, 3, postprocess=None), expected)


@pytest.mark.parametrize("name", GRADIENT)
@given(seed=seeds, shift=st.floats(-100, 100))
@settings(max_examples=5, deadline=None)
def test_a_shift_of_all_logits_changes_nothing(name, seed, shift):
    model, x = linearized(seed)
    expected = quick(name)(model, "conv", x, 2)
    with torch.no_grad():
        model.fc.bias.add_(shift)
    torch.testing.assert_close(quick(name)(model, "conv", x, 2), expected)


@pytest.mark.parametrize("name", GRADIENT)
@given(seed=seeds, batch=st.integers(1, 5), data=st.data())
@settings(max_examples=5, deadline=None)
def test_a_batch_is_its_images(name, seed, batch, data):
    model, x = linearized(seed, batch)
    classes = data.draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    together = quick(name)(model, "conv", x, classes)
    assert together.min() >= 0
    assert together.max() <= 1
    for i, cls in enumerate(classes):
        alone = quick(name)(model, "conv", x[i : i + 1], cls)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=1e-8)


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_integrated_gradients_are_complete(seed):
    model = networks.seeded(networks.Residual(), seed).double()
    x = maps(2, 3, 8, 10, seed=seed)
    baseline = maps(3, 1, 1, seed=seed + 1)
    raw = xf.integrated_gradients(model, None, x, [1, 4], steps=50, baseline=baseline, postprocess=None)
    with torch.no_grad():
        difference = (model(x) - model(baseline.expand_as(x)))[[0, 1], [1, 4]]
        scale = model(x).abs().max()
    assert (raw.sum((1, 2)) - difference).abs().max() <= 1e-3 * scale


def test_integrated_gradients_by_the_right_ends():
    model, x = networks.seeded(networks.Residual()), torch.randn(1, 3, 9, 9)
    total = torch.zeros_like(x)
    for share in torch.linspace(0, 1, 6)[1:]:
        point = (share * x).requires_grad_()
        total += torch.autograd.grad(model(point)[0, 2], point)[0]
    for chunk_size in (1, 3, 16):
        found = xf.integrated_gradients(
            model, None, x, 2, steps=5, rule="right", chunk_size=chunk_size, postprocess=None
        )
        torch.testing.assert_close(found, (x * total / 5).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_integrated_gradients_do_not_depend_on_the_chunk(chunk_size):
    model, x = linearized(0)
    expected = xf.integrated_gradients(model, None, x, postprocess=None)
    torch.testing.assert_close(
        xf.integrated_gradients(model, None, x, chunk_size=chunk_size, postprocess=None), expected
    )


def test_many_classes_cost_one_forward_of_the_trunk():
    model, x = networks.seeded(networks.Residual()), torch.randn(2, 3, 12, 16)
    classes = [[0, 1, 2, 3], [4, 3, 2, 1]]
    xf.gradcam(model, "conv2", x)
    forwards = []

    class Counted(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            forwards.append(len(input))
            return super().forward(input)

    Counted.__module__ = "torch.nn.counted"
    model.stem.__class__ = Counted
    xf.gradcam(model, "conv2", x)  # the structure has changed: it is looked at again
    forwards.clear()
    together = xf.gradcam(model, "conv2", x, classes)
    assert forwards == [2]
    assert together.shape == (2, 4, 12, 16)
    for j in range(4):
        alone = xf.gradcam(model, "conv2", x, [row[j] for row in classes])
        torch.testing.assert_close(together[:, j], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(xf.gradcam(model, "conv2", x, torch.tensor(classes)), together)


@pytest.mark.parametrize(
    ("network", "shape"),
    [(networks.OneDimensional, (2, 2, 31)), (networks.ThreeDimensional, (2, 1, 9, 10, 11))],
)
@pytest.mark.parametrize("name", GRADIENT)
def test_signals_and_volumes(name, network, shape):
    model, x = networks.seeded(network()), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert xf.default_layer(model, x) == "3"
    found = quick(name)(model, None, x, [0, 3])
    assert found.shape == (shape[0], *shape[2:])
    assert 0 <= found.min() < found.max() <= 1
    assert quick(name)(model, None, x, [[0, 3]] * 2).shape == (shape[0], 2, *shape[2:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_agree_with_float32(dtype):
    model, x = networks.seeded(networks.Residual()), torch.randn(2, 3, 12, 16)
    expected = xf.gradcam(model, "conv2", x, 1)
    found = xf.gradcam(networks.seeded(networks.Residual()).to(dtype), "conv2", x.to(dtype), 1)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5 if dtype == torch.float64 else 0.1)


def test_a_method_made_in_code_without_a_module_belongs_to_main():
    bare = inspect.unwrap(xf.from_gradients)  # without the run-time check, which would be the caller
    names = {"from_gradients": bare}
    exec("absolute = from_gradients(lambda A, G: G.abs(), name='absolute')", names)
    assert names["absolute"].__module__ == "__main__"


def test_a_method_of_ones_own_gets_everything():
    absolute = xf.from_gradients(lambda A, G, power=1.0: (G.abs() ** power).mean((2, 3)), name="absolute")
    model, x = networks.seeded(networks.Residual()), torch.randn(2, 3, 12, 16)
    assert not torch.equal(absolute(model, "conv2", x), absolute(model, "conv2", x, power=3.0))
    with pytest.raises(TypeError, match=r"absolute\(\) has no option 'powr'; its options are .*power"):
        absolute(model, "conv2", x, powr=2.0)


# -- other libraries ---------------------------------------------------------------------------------------


def normalized(raw: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    return xf.heatmap(raw.detach(), size or tuple(raw.shape[-2:]))


def random_network(name: str) -> nn.Module:
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torchvision.models.get_model(name, weights=None).eval()


CASES = [
    ("lite0", "_blocks.15"),
    ("lite0", "_conv_head"),
    ("resnet18", "layer4"),
    ("resnet18", "layer3"),
    ("vgg11", "features.19"),
]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def case(request, lite0, photographs) -> tuple[nn.Module, str, Tensor]:
    name, layer = request.param
    if name == "lite0":
        return lite0, layer, photographs
    return random_network(name), layer, photographs[:, :, ::2, ::2].contiguous()


@pytest.mark.parametrize(
    ("name", "peer"),
    [("gradcam", "GradCAM"), ("gradcam_pp", "GradCAMpp"), ("xgradcam", "XGradCAM"), ("layercam", "LayerCAM")],
)
def test_torchcam_agrees(case, name, peer):
    """Its GradCAMpp's `alpha[idx][mask].div_(…)` divides a copy (a mask makes one), so that α stays G²."""
    import torchcam.methods

    model, layer, x = case
    classes = [281, 650]
    with getattr(torchcam.methods, peer)(model, layer) as extractor:
        (theirs,) = extractor(classes, model(x), normalized=False)
    ours = xf.METHODS[name](model, layer, x, classes, postprocess=None, **xf.VARIANTS["torchcam"][name])
    assert (normalized(ours) - normalized(theirs)).abs().max() <= 1e-4
    assert normalized(ours).amax() == 1


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("gradcam", "GradCAM"),
        ("gradcam_pp", "GradCAMPlusPlus"),
        ("xgradcam", "XGradCAM"),
        ("layercam", "LayerCAM"),
        ("hirescam", "HiResCAM"),
    ],
)
def test_pytorch_grad_cam_agrees(case, name, peer):
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, layer, x = case
    classes = [281, 650]
    ours = xf.METHODS[name](model, layer, x, classes, **xf.VARIANTS["pytorch-grad-cam"][name])
    with getattr(pytorch_grad_cam, peer)(model, [model.get_submodule(layer)]) as cam:
        theirs = cam(x, [ClassifierOutputTarget(c) for c in classes])
    difference = (ours - normalized(torch.from_numpy(theirs))).abs().max()
    # It adds 1e-7 to each map's maximum before it resizes, which shows where that maximum is small.
    assert difference <= 1e-4


def test_captum_agrees(case):
    from captum.attr import LayerGradCam

    model, layer, x = case
    theirs = LayerGradCam(model, model.get_submodule(layer)).attribute(x, torch.tensor([281, 650]))
    ours = xf.gradcam(model, layer, x, [281, 650], postprocess=None)
    assert (normalized(ours) - normalized(theirs[:, 0])).abs().max() <= 1e-4


def test_captum_agrees_on_integrated_gradients(photographs):
    from captum.attr import IntegratedGradients

    model, x = random_network("resnet18"), photographs[:, :, ::4, ::4].contiguous()
    theirs = IntegratedGradients(model).attribute(x, target=torch.tensor([281, 650]), n_steps=200).sum(1)
    ours = xf.integrated_gradients(model, None, x, [281, 650], steps=60, postprocess=None)
    for one, other in zip(ours, theirs, strict=True):  # two rules for the same integral
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten().float()]))[0, 1] > 0.999


# -- half precision ------------------------------------------------------------------------------------------


def wide() -> tuple[nn.Module, Tensor]:
    """A network whose features add up to more than float16 holds, 65504."""
    model = networks.seeded(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
        )
    )
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 8
    assert model[:2](x).sum((2, 3)).max() > 65504
    return model, x


@pytest.mark.parametrize(
    "name",
    ["gradcam", "gradcam_pp", "xgradcam", "layercam", "eigengradcam", "smoothgradcam_pp", "eigencam"],
)
def test_half_precision_gives_the_map_of_float32(name):
    model, x = wide()
    expected = xf.METHODS[name](model, "1", x, 1)
    found = xf.METHODS[name](model.half(), "1", x.half(), 1)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


def test_weights_of_half_precision_neither_overflow_nor_underflow():
    A, G = torch.full((1, 2, 300, 300), 50.0).half(), torch.full((1, 2, 300, 300), 1e-4).half()
    for name in CAMS:
        weighting = getattr(xf.weights, name)
        found, expected = weighting(A, G), weighting(A.float(), G.float())
        torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=0, msg=name)
        torch.testing.assert_close(
            xf.weights.weighted_sum(A, found), xf.weights.weighted_sum(A.float(), expected), rtol=1e-3, atol=0
        )


def test_cameras_is_the_papers_loop():
    model, x = networks.seeded(networks.Residual(), 1).double(), maps(1, 3, 9, 12, seed=2)
    at_own_size: dict[str, list[Tensor]] = {"A": [], "G": []}
    for size in ((9, 12), (14, 18)):
        scaled = F.interpolate(x, size=size, mode="bilinear")
        kept: list[Tensor] = []
        with model.conv1.register_forward_hook(lambda *args, kept=kept: kept.append(args[2])):
            score = model(scaled)[0, 2]
        for name, value in (("A", kept[0]), ("G", torch.autograd.grad(score, kept[0])[0])):
            at_own_size[name].append(F.interpolate(value.detach(), size=(9, 12), mode="bilinear"))
    expected = sum(at_own_size["A"]) / 2 * (sum(at_own_size["G"]) / 2)
    found = xf.cameras(model, "conv1", x, 2, scales=(1.0, 1.5), postprocess=None)
    torch.testing.assert_close(found, expected.sum(1))
    alone = xf.cameras(model, "conv1", x, 2, scales=[1.0], postprocess=None)
    torch.testing.assert_close(alone, xf.hirescam(model, "conv1", x, 2, postprocess=None))


def test_the_layer_and_the_class_of_cameras_are_those_of_the_input_itself():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    model, x = networks.seeded(model).double(), maps(4, 3, 8, 8, seed=0)
    layer, larger = xf.default_layer(model, x), F.interpolate(x, scale_factor=3.0, mode="bilinear")
    assert layer != xf.default_layer(model, larger)
    cls = model(x).argmax(1)
    assert (cls != model(larger).argmax(1)).any()
    found = xf.cameras(model, None, x, scales=[1.0, 3.0], postprocess=None)
    torch.testing.assert_close(found, xf.cameras(model, layer, x, cls, scales=[1.0, 3.0], postprocess=None))


# -- odd values ----------------------------------------------------------------------------------------------

FEATURES = torch.rand(2, 3, 4, 5)
ODD_CALLS = {
    "nan": (lambda: xf.weights.xgradcam(FEATURES, FEATURES, eps=float("nan")), ValueError, r"eps=nan is out of range; expected a number ≥ 0"),
    "eps of a method": (lambda: xf.gradcam_pp(*linearized(0)[:1], None, linearized(0)[1], eps=float("nan")), ValueError, "eps=nan is out of range"),
    "percentile": (lambda: xf.weights.unioncam(FEATURES, FEATURES, theta=101), ValueError, "theta=101 is out of range"),
    "complex": (lambda: xf.heatmap(FEATURES * 1j, (8, 8)), TypeError, r"cam is a tensor of torch.complex64; expected a dense tensor of real numbers"),
    "array": (lambda: xf.heatmap(FEATURES.numpy(), (8, 8)), TypeError, r"cam must be a floating-point tensor"),
    "size": (lambda: xf.heatmap(FEATURES, 8), TypeError, r"size must be a list"),
    "size of words": (lambda: xf.heatmap(FEATURES, ("8", "8")), TypeError, r"size must be an integer"),
    "a flag": (lambda: xf.heatmap(FEATURES, (8, 8), resize_first=1), TypeError, r"resize_first must be True or False"),
    "shapes that differ": (lambda: xf.weights.layercam(FEATURES, FEATURES[:1]), TypeError, r"G must be a floating-point tensor \(B K \*spatial\), got shape \(1, 3, 4, 5\)"),
    "no features": (lambda: xf.projections.principal_component(FEATURES[0, 0]), TypeError, r"A must be a floating-point tensor \(B K L.*, got shape \(4, 5\) and torch.float32"),
    "kernel": (lambda: xf.projections.kernel_component(FEATURES, gamma=float("inf")), ValueError, "gamma=inf is out of range"),
    "create_graph": (lambda: xf.gradcam(linearized(0)[0], None, linearized(0)[1], create_graph=FEATURES), TypeError, r"create_graph must be True or False, got shape \(2, 3, 4, 5\)"),
    "postprocess": (lambda: xf.gradcam(linearized(0)[0], None, linearized(0)[1], postprocess=3), TypeError, r"postprocess must be a callable or None"),
    "weighting": (lambda: xf.from_gradients(3), TypeError, r"weighting must be a callable"),
    "baseline": (lambda: xf.integrated_gradients(linearized(0)[0], None, linearized(0)[1], baseline=None), TypeError, r"baseline must be a tensor or a number"),
    "a target for finercam": (lambda: xf.finercam(linearized(0)[0], None, linearized(0)[1], xf.targets.similarity(torch.rand(384))), TypeError, r"^cls must be None, .* as finercam contrasts classes, got \w+, a target"),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", ODD_CALLS)
def test_odd_values_are_refused_by_their_names(case):
    call, kind, words = ODD_CALLS[case]
    with pytest.raises(kind, match=words) as raised:
        call()
    assert len(str(raised.value)) < 200


ODD = st.one_of(
    st.sampled_from([float("nan"), float("inf"), -1.5, "sideways", None, (), {}, True, object()]),
    st.just(torch.full((2, 3), torch.nan)),
)
OF_NUMBERS = {"num_samples", "std", "seed", "eps", "num_masks", "grid", "keep", "num_groups", "steps", "theta", "k",
              "num_concepts", "tol", "max_iter", "score", "noise", "cluster", "rescale", "last", "gaussian", "threshold"}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_method_refuses_an_odd_number_before_it_runs(data):
    options = [
        (m, name)
        for m in xf.METHODS.values()
        for name in inspect.signature(m).parameters
        if name in OF_NUMBERS
    ]
    method, name = data.draw(st.sampled_from(options))
    value = data.draw(ODD)
    if isinstance(value, bool) and isinstance(inspect.signature(method).parameters[name].default, bool):
        return
    with pytest.raises((ValueError, TypeError), match=name):
        method(None, None, None, **{name: value})
