"""Shapley-CAM, LIFT-CAM, NormGrad, Integrated Grad-CAM, Finer-CAM, FullGrad, guided backpropagation, LeGrad and deep feature factorization."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import networks
import xcam_fn as xf
from test_zoo import CLASSES, difference, grad_cam
from xcam_fn.checks import StructureError
from xcam_fn.methods.call import Call
from xcam_fn.methods.full_gradient import full_gradient
from xcam_fn.testing import small_case, small_transformer

# -- Shapley-CAM ---------------------------------------------------------------------------------------------


def test_shapleycam_is_gradcam_where_the_head_is_linear():
    case = small_case()
    ours = xf.shapleycam(case.model, case.layer, case.x, postprocess=None)
    torch.testing.assert_close(ours, xf.gradcam(case.model, case.layer, case.x, postprocess=None))


def test_shapleycam_weighs_by_the_whole_hessian():
    """The Hessian itself, one image at a time, through a head with a product in it."""

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.fc = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.conv(x) ** 3).mean((2, 3)))

    model, x = networks.seeded(Squares()).double(), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    ours = xf.shapleycam(model, "conv", x, [[1, 2], [3, 4]], postprocess=None)
    for image, classes in enumerate([[1, 2], [3, 4]]):
        A = model.conv(x[image : image + 1]).detach()
        for place, cls in enumerate(classes):
            score = lambda a, c=cls: model.fc((a**3).mean((2, 3)))[0, c]  # noqa: E731
            G = torch.func.grad(score)(A)
            HA = torch.einsum("abcdefgh,efgh->abcd", torch.func.jacrev(torch.func.jacrev(score))(A), A)
            w = (G - HA / 2).mean((2, 3))
            torch.testing.assert_close(ours[image, place], torch.einsum("k,khw->hw", w[0], A[0]))


# -- LIFT-CAM, NormGrad and Integrated Grad-CAM ---------------------------------------------------------------


class Curved(nn.Module):
    """Activation functions of several kinds follow the convolution, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.head = nn.Sequential(
            nn.GELU(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2, inplace=True),
            nn.Flatten(), nn.Linear(4 * 4 * 6, 7), nn.Tanh(), nn.Linear(7, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


def seen_at(model: nn.Module, layer: str, x: Tensor, cls: int) -> tuple[Tensor, Tensor]:
    """The features of one image, (K, *spatial), and the gradient of its score, by a hook."""
    kept: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _, __, output: kept.append(output))
    score = model(x[None])[0, cls]
    hook.remove()
    (G,) = torch.autograd.grad(score, kept[0])
    return kept[0][0].detach(), G[0]


def small_images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_liftcam_on_pooling_and_one_linear_layer():
    case = small_case()
    ours = xf.liftcam(case.model, case.layer, case.x, case.classes, postprocess=None)
    for b, cls in enumerate(case.classes):
        A, G = seen_at(case.model, case.layer, case.x[b], cls)
        torch.testing.assert_close(ours[b], sum((G[k] * A[k]).sum() * A[k] for k in range(len(A))))


@pytest.mark.filterwarnings(
    "ignore:Setting forward, backward hooks", "ignore:Input Tensor 0 did not"
)  # Captum's
def test_liftcam_is_deeplift_of_the_head_by_hand_and_by_captum():
    """The multiplier is W of a linear layer, and Δout / Δin from zero features of an activation function."""
    from captum.attr import DeepLift

    head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 6 * 8, 7), nn.Softplus(), nn.Linear(7, 5), nn.Tanh())
    model, x = networks.seeded(nn.Sequential(nn.Conv2d(3, 6, 3), head)).double(), small_images()
    A = model[0](x).detach()
    zero = torch.zeros_like(A)
    expected = torch.zeros_like(A)
    for b, cls in enumerate((1, 3)):
        slopes = []
        for last in (2, 4):
            before, after = ([head[:n](a[b, None])[0] for a in (A, zero)] for n in (last, last + 1))
            slopes.append((after[0] - after[1]) / (before[0] - before[1]))
        row = slopes[1][cls] * head[3].weight[cls] * slopes[0]
        expected[b] = (row @ head[1].weight).reshape(A[b].shape).detach() * A[b]
    theirs = DeepLift(head).attribute(A, zero, target=torch.tensor([1, 3])).detach()
    torch.testing.assert_close(expected, theirs)
    ours = xf.liftcam(model, "0", x, [1, 3], postprocess=None)
    torch.testing.assert_close(ours, torch.einsum("bk,bkij->bij", expected.sum((2, 3)), A))


@pytest.mark.parametrize(
    ("build", "layer"),
    [(Curved, "conv"), (networks.Residual, "conv1"), (networks.Residual, "relu#2"), (networks.ReadsParameters, "conv")],
)  # fmt: skip
def test_multipliers_add_up_to_what_the_score_loses_without_the_features(build, layer):
    """Around a skip connection, behind one call of several, and where the forward reads parameters."""
    model, x = networks.seeded(build()).double(), small_images(2)
    call = Call(model, layer, x, [[1, 2], [3, 4]])
    with call.running():
        total = (call.multipliers() * call.features[:, None]).flatten(2).sum(2)
    name, _, number = layer.partition("#")
    calls: list[None] = []

    def blanked(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        calls.append(None)
        return torch.zeros_like(output) if len(calls) == int(number or 1) else output

    own = model(x)
    hook = model.get_submodule(name).register_forward_hook(blanked)
    lost = own - model(x)
    hook.remove()
    torch.testing.assert_close(total, lost.gather(1, torch.tensor([[1, 2], [3, 4]])).detach())


def test_liftcam_says_where_there_is_no_reference():
    model = networks.seeded(networks.DataDependent()).double()  # it leaves out a block where all is zero
    with pytest.raises(StructureError, match="runs other activation functions for features of zero"):
        xf.liftcam(model, "conv", small_images())


def test_normgrad_is_the_norm_of_the_outer_products():
    case = small_case()
    ours = xf.normgrad(case.model, case.layer, case.x, case.classes, postprocess=None)
    for b, cls in enumerate(case.classes):
        A, G = seen_at(case.model, case.layer, case.x[b], cls)
        for i in range(A.shape[1]):
            for j in range(A.shape[2]):
                outer = torch.outer(G[:, i, j], A[:, i, j])
                torch.testing.assert_close(ours[b, i, j], outer.square().sum().sqrt())


def integrated_loop(model: nn.Module, layer: str, x: Tensor, start: Tensor, cls: int, steps: int) -> Tensor:
    """The paper's sum, with the mean over the positions in place of its sum."""
    of_start, total = seen_at(model, layer, start, cls)[0], 0.0
    for t in range(1, steps + 1):
        A, G = seen_at(model, layer, start + t / steps * (x - start), cls)
        cam = sum(G[k].mean() * (A[k] - of_start[k]) for k in range(len(A)))
        total = total + cam.clamp(min=0) / steps
    return total


def test_integrated_gradcam_is_the_papers_loop():
    model, x = networks.seeded(Curved()).double(), small_images()
    for baseline in (0.0, 0.5):
        ours = xf.integrated_gradcam(model, "conv", x, [1, 3], steps=4, baseline=baseline, postprocess=None)
        start = torch.full_like(x[0], baseline)
        loop = [integrated_loop(model, "conv", x[b], start, cls, 4) for b, cls in enumerate((1, 3))]
        torch.testing.assert_close(ours, torch.stack(loop))
    predicted = xf.integrated_gradcam(model, None, x, steps=2, postprocess=None)
    chosen = xf.integrated_gradcam(model, None, x, model(x).argmax(1), steps=2, postprocess=None)
    torch.testing.assert_close(predicted, chosen)


def test_integrated_gradcam_on_pooling_and_one_linear_layer():
    """Features that are linear in x and a gradient that is the same on all of the path: the mean of t is left."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    model, x = networks.seeded(model).double(), small_images()
    cam = xf.gradcam(model, "0", x, 2, postprocess=None)
    of_zero = xf.gradcam(model, "0", torch.zeros_like(x), 2, postprocess=None)
    ours = xf.integrated_gradcam(model, "0", x, 2, steps=4, postprocess=None)
    torch.testing.assert_close(ours, (1 + 2 + 3 + 4) / 16 * (cam - of_zero).relu())


# -- the full gradient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 1, [0, 1, 2], [[0, 1], [2, 3], [4, 0]]])
def test_the_parts_of_the_full_gradient_add_up_to_the_score(classes):
    case = small_case(1)
    found = full_gradient(case.model, case.x, classes)
    target = xf.targets.logit(classes)(case.model(case.x)).reshape(3, -1)
    total = found.input.flatten(2).sum(2) + sum(part.flatten(2).sum(2) for part in found.biases)
    torch.testing.assert_close(total, target)


def test_fullgrad_scales_channels_or_layers():
    case = small_case(2)
    found = full_gradient(case.model, case.x, 1)
    parts = [part.abs() for part in (found.input, *found.biases) if part.ndim == 5]

    def scaled(part: Tensor, axes: tuple[int, ...]) -> Tensor:
        low, high = part.amin(axes, keepdim=True), part.amax(axes, keepdim=True)
        return torch.nan_to_num((part - low) / (high - low))

    for rescale, axes in (("channel", (3, 4)), ("layer", (2, 3, 4))):
        expected: Tensor = sum(
            F.interpolate(scaled(part, axes).flatten(0, 1), (20, 28), mode="bilinear").sum(1)
            for part in parts
        )
        ours = xf.fullgrad(case.model, None, case.x, 1, rescale=rescale, postprocess=None)
        torch.testing.assert_close(ours, expected)


def test_fullgrad_refuses_another_scale(unchecked):
    case = small_case()
    with pytest.raises(ValueError, match="rescale='pixel'; expected one of 'channel', 'layer'"):
        xf.fullgrad(case.model, None, case.x, rescale="pixel")


# -- guided backpropagation ----------------------------------------------------------------------------------


def test_guided_backprop_is_the_rule_layer_by_layer():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(8, 12, generator=generator), torch.randn(4, 8, generator=generator))
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8, bias=False), nn.ReLU6(), nn.Linear(8, 4, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(first * 3)
        model[3].weight.copy_(second)
    x = torch.randn(2, 3, 2, 2, generator=generator)
    ours = xf.guided_backprop(model.eval(), None, x, [1, 3], postprocess=None)
    hidden = x.flatten(1) @ (first * 3).T
    back = second[[1, 3]].clamp(min=0) * ((hidden > 0) & (hidden < 6))
    torch.testing.assert_close(ours, (back @ (first * 3)).reshape(2, 3, 2, 2).sum(1))


class Guided(nn.Module):
    """A ReLU that lets back what is positive where it was positive, as its own autograd function."""

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x > 0)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            (positive,) = ctx.saved_tensors
            return gradients[0].clamp(min=0) * positive

    def forward(self, x: Tensor) -> Any:
        return self.Rule.apply(x)


def test_guided_backprop_leaves_networks_and_calls_in_place_as_they_are():
    """One ReLU in place, called three times, against a twin in which the rule stands in the ReLU's place."""
    model, x = networks.seeded(networks.Residual()), torch.randn(2, 3, 8, 9)
    before = model(x)
    found = xf.guided_backprop(model, None, x, 1, postprocess=None)
    assert torch.equal(model(x), before)
    assert x.grad is None
    twin, leaf = networks.seeded(networks.Residual()), x.clone().requires_grad_()
    twin.relu = Guided()
    (expected,) = torch.autograd.grad(twin(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(found, expected.sum(1))
    (plain,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    assert not torch.allclose(found, plain.sum(1))


def test_methods_say_what_structure_they_lack():
    tokens = small_transformer()
    with pytest.raises(
        StructureError, match=r"guided_backprop .* _Transformer runs none; use integrated_gradients"
    ):
        xf.guided_backprop(tokens.model, None, tokens.x)
    case = small_case()
    with pytest.raises(StructureError, match=r"legrad .* Sequential has no block with it; use gradcam"):
        xf.legrad(case.model, None, case.x)
    found = xf.explain_all(case.model, case.layer, case.x[:1], num_masks=8, num_samples=1, steps=3, num_groups=4,
                           num_concepts=2)  # fmt: skip
    assert {"guided_backprop", "fullgrad"} <= set(found)
    assert "legrad" not in found


# -- LeGrad --------------------------------------------------------------------------------------------------


def test_legrad_is_the_gradient_to_the_attention():
    case = small_transformer(1)
    model: Any = case.model
    cls = 2
    tokens = torch.cat([model.class_token, model.patches(case.x[:1]).flatten(2).mT], 1) + model.position
    expected = torch.zeros(35, dtype=torch.float64)
    for block in model.blocks:
        attn = block.self_attn
        qkv = F.linear(block.norm1(tokens), attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.reshape(36, 3, 2, 4).permute(1, 2, 0, 3)
        attention = (q @ k.mT / 2).softmax(-1).detach().requires_grad_()
        attended = attn.out_proj((attention @ v).permute(1, 0, 2).reshape(1, 36, 8))
        after = tokens.detach() + attended
        after = after + block.linear2(F.gelu(block.linear1(block.norm2(after))))
        (gradient,) = torch.autograd.grad(model.fc(model.norm(after)[:, 0])[0, cls], attention)
        expected += gradient.relu().mean((0, 1))[1:] / 2
        tokens = block(tokens)
    ours = xf.legrad(model, None, case.x, cls, postprocess=None)
    torch.testing.assert_close(ours[0], expected.reshape(5, 7))
    last = xf.legrad(model, None, case.x, cls, num_blocks=1, postprocess=None)
    assert not torch.allclose(last, ours)


# -- concepts ------------------------------------------------------------------------------------------------


def test_concepts_add_up_to_the_features():
    case = small_case(3)
    A = xf.features(case.model, case.layer, case.x)
    found = xf.concepts(case.model, case.layer, case.x, num_concepts=8, tol=1e-9)
    again = found.offset[:, None, None] + torch.einsum("mk,bmhw->bkhw", found.vectors, found.maps)
    assert found.vectors.min() >= 0
    assert found.maps.min() >= 0
    assert (again - A).norm() <= 1e-2 * A.norm()
    with pytest.raises(ValueError, match=r"num_concepts=9: features of shape \(3, 8, 9, 13\) have at most 8"):
        xf.concepts(case.model, case.layer, case.x, num_concepts=9)


def test_the_factorization_weighs_concepts_by_what_they_score():
    """On pooling and a linear layer a concept adds its vector times how much of it there is."""
    case = small_case(4)
    ours = xf.deep_feature_factorization(case.model, case.layer, case.x, 2, num_concepts=3, postprocess=None)
    for image in range(3):
        found = xf.concepts(case.model, case.layer, case.x[image : image + 1], num_concepts=3)
        gains = (found.vectors @ case.model.fc.weight[2].detach()) * found.maps[0].mean((1, 2))
        torch.testing.assert_close(ours[image], torch.einsum("m,mhw->hw", gains, found.maps[0]))


def test_concepts_are_drawn(photographs, lite0):
    found = xf.concepts(lite0, None, photographs, num_concepts=4)
    picture = np.full((224, 224, 3), 0.5)
    figure = xf.plot.concepts(picture, list(found.maps[0]), caption="four concepts")
    assert [axis.get_title() for axis in figure.axes[:6]] == [
        "photograph", "all concepts", "concept 1", "concept 2", "concept 3", "concept 4",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"maps\['concept 1'\] has negative or non-finite values"):
        xf.plot.concepts(picture, [-found.maps[0, 0]])
    with pytest.raises(ValueError, match="maps is empty"):
        xf.plot.concepts(picture, [])


# -- other libraries -----------------------------------------------------------------------------------------


def test_pytorch_grad_cam_shapley_agrees(lite0, photographs):
    import pytorch_grad_cam

    for layer in ("_blocks.10", "_blocks.15"):
        theirs = grad_cam(pytorch_grad_cam.ShapleyCAM, lite0, layer, photographs)
        ours = xf.shapleycam(lite0, layer, photographs, CLASSES, postprocess=None)
        assert difference(ours, theirs) <= 1e-4


def test_pytorch_grad_cam_fullgrad_agrees(lite0, photographs):
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    x = photographs[:, :, ::2, ::2].contiguous()
    with pytorch_grad_cam.FullGrad(lite0, []) as cam:
        theirs = torch.from_numpy(cam(x, [ClassifierOutputTarget(c) for c in CLASSES]))
    method = xf.find_method("fullgrad", variant="pytorch-grad-cam")
    ours = method(lite0, None, x, CLASSES, postprocess=None)
    assert difference(ours, theirs) <= 1e-4


def test_pytorch_grad_cam_guided_backprop_agrees(photographs):
    import pytorch_grad_cam
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.resnet18(weights=None).eval()
    ours = xf.guided_backprop(model, None, photographs, CLASSES, postprocess=None)
    peer = pytorch_grad_cam.GuidedBackpropReLUModel(model, "cpu")
    theirs = [peer(photographs[i : i + 1].clone(), c).sum(2) for i, c in enumerate(CLASSES)]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - torch.from_numpy(other)).abs().max() <= 1e-4 * np.abs(other).max()


def test_finercam_agrees_with_both(lite0, photographs):
    import pytorch_grad_cam
    import torchcam.methods

    predicted = lite0(photographs).argmax(1)
    with pytorch_grad_cam.FinerCAM(lite0, [lite0.get_submodule("_blocks.15")]) as cam:
        theirs = torch.from_numpy(cam(photographs))
    ours = xf.find_method("finercam", variant="pytorch-grad-cam")
    assert difference(ours(lite0, "_blocks.15", photographs, predicted, postprocess=None), theirs) <= 1e-4
    with torchcam.methods.FinerCAM(lite0, "_blocks.15") as cam:
        scores = lite0(photographs)
        (theirs,) = cam(predicted.tolist(), scores, normalized=False)
    assert difference(xf.finercam(lite0, "_blocks.15", photographs, postprocess=None), theirs) <= 1e-4
    with pytest.raises(TypeError, match="cls must be None, an int or ints, as finercam contrasts classes"):
        xf.finercam(lite0, "_blocks.15", photographs, lambda y: y[:, 0])


@pytest.mark.filterwarnings("ignore:Maximum number of iterations")  # sklearn's own, in theirs
def test_pytorch_grad_cam_factorizes_alike(lite0, photographs):
    from pytorch_grad_cam.feature_factorization.deep_feature_factorization import dff

    A = xf.features(lite0, "_blocks.15", photographs).double()
    _, theirs = dff(A.numpy().copy(), n_components=5)
    options = dict(xf.VARIANTS["pytorch-grad-cam"]["deep_feature_factorization"])
    ours = xf.concepts(lite0.double(), "_blocks.15", photographs.double(), num_concepts=5, **options).maps
    lite0.float()
    for image in range(2):
        assert difference(ours[image], torch.from_numpy(theirs[image])) <= 1e-4


def test_torchcam_legrad_agrees_with_the_networks_own_head():
    """By itself it averages the tokens before the norm, where this network reads its class token."""
    import torchcam.methods
    import torchvision

    model = networks.seeded(torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=7))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blocks = list(model.encoder.layers)
    head = lambda tokens: model.heads(model.encoder.ln(tokens)[:, 0])  # noqa: E731
    with torchcam.methods.LeGrad(model, blocks, score_projection=head) as extractor:
        (theirs,) = extractor([1, 2], model(x), normalized=False)
    ours = xf.legrad(model, None, x, [1, 2], postprocess=None)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    with torchcam.methods.LeGrad(model, blocks) as extractor:
        (theirs,) = extractor([1, 2], model(x), normalized=False)
    assert difference(ours, theirs) > 1e-2
