"""Networks that are seldom explained: what they compute is compared with plain hooks, loops and single images."""

import functools
import gc
import itertools
import weakref
from typing import Any, ClassVar

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn

import networks
import xcam_fn as xf
from xcam_fn import checks
from xcam_fn.methods.call import Call
from xcam_fn.network.copies import tree
from xcam_fn.network.turns import may_turn

# -- batch norms between maps and tokens -----------------------------------------------------------------------


class NormedTokens(nn.Module):
    """Maps are normalized and read as tokens behind a class token, or made of such tokens and normalized."""

    def __init__(self, norm: nn.Module, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), norm, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        A = self.conv(x)
        if self.kind == "from tokens":
            A = torch.cat([A.flatten(2).mT, A.new_zeros(len(A), 5, 8)], 1)[:, :-5].mT.unflatten(
                2, A.shape[2:]
            )
        A = self.norm(A).contiguous()
        if self.kind == "to tokens":
            return (
                self.head(torch.cat([A.new_ones(len(A), 1, 8), A.flatten(2).mT], 1)).relu().square().mean(1)
            )
        return self.head(A.relu().square().mean((2, 3)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True)])
@pytest.mark.parametrize("kind", ["to tokens", "from tokens"])
def test_a_batch_norm_beside_tokens_has_the_gradient_of_one_image_too(norm, kind):
    """torch itself returns another gradient for one image than for two of the same on a CPU."""
    model, x = networks.seeded(NormedTokens(norm, kind)).double(), torch.rand(1, 3, 8, 12).double()
    run = lambda x: xf.hirescam(model, "conv", x, 1, postprocess=None)  # noqa: E731
    expected = run(x.expand(2, -1, -1, -1).contiguous())[:1]
    torch.testing.assert_close(run(x), expected)
    value, _ = torch.func.vjp(run, x)
    torch.testing.assert_close(value, expected)
    leaf = x.clone().requires_grad_()
    (second,) = torch.autograd.grad(run(torch.cat([leaf, leaf])).sum() / 2, leaf)
    found: Any = run(leaf)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), leaf)[0], second, rtol=1e-3, atol=1e-5)


class Kept:
    """Lives as long as the graph that holds it."""


class Marked(torch.autograd.Function):
    generate_vmap_rule = True
    alive: ClassVar[list[Any]] = []

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.kept = Kept()
        Marked.alive.append(weakref.ref(ctx.kept))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return grad_outputs[0]


class MarkedConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return Marked.apply(super().forward(input))


def test_no_graph_of_a_batch_norm_outlives_its_call():
    head = [nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    model, x = nn.Sequential(MarkedConv(3, 4, 3), *head).eval(), torch.rand(1, 3, 8, 8)
    run = lambda x: xf.gradcam(model, "0", x, 1)  # noqa: E731
    for call in (
        lambda: run(x.clone().requires_grad_()).sum().backward(),
        lambda: xf.gradcam(model, "0", x, 1, create_graph=True),
        lambda: torch.func.grad(lambda x: run(x).sum())(x),
        lambda: torch.func.vmap(lambda x: run(x[None])[0])(x),
    ):
        Marked.alive.clear()
        call()
        gc.collect()
        assert Marked.alive
        assert not any(one() for one in Marked.alive)


# -- several levels --------------------------------------------------------------------------------------------


def test_layers_keep_their_names_in_a_network_that_is_bound_twice():
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    net, x = networks.seeded(networks.Residual()), torch.rand(2, 3, 24, 32)
    layer = xf.default_layer(net, x)
    expected = xf.gradcam(net, layer, x, 1)
    once = xf.bind(net, lambda net, x: net(x))
    outer = Outer(once).eval()
    for model, name in [
        (xf.bind(once, lambda net, x: net(x)), layer),
        (outer, f"inner.{layer}"),
        (xf.bind(outer, lambda net, x: net(x)), f"inner.{layer}"),
    ]:
        assert torch.equal(xf.gradcam(model, name, x, 1), expected)


class Pyramid(nn.Module):
    """A detector whose scores are read from two levels, the finer computed of the coarser where it is `fed`."""

    def __init__(self, *, fed: bool) -> None:
        super().__init__()
        self.fed = fed
        self.stem, self.fine = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1)
        self.coarse, self.score = nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        A = self.stem(x).relu()
        coarse = self.coarse(A).relu()
        up = nn.functional.interpolate(coarse, scale_factor=2.0)
        fine = self.fine(A + up if self.fed else A).relu()
        score = self.score(fine).mean((2, 3)) + self.score(coarse).mean((2, 3))
        boxes = torch.stack([0.5 + score[:, 0] / 99, *[score.new_full(score[:, 0].shape, 0.5)] * 3], 1)
        return {"logits": score[:, None], "pred_boxes": boxes[:, None]}


@pytest.mark.parametrize(("fed", "levels"), [(False, ["fine", "coarse"]), (True, ["stem"])])
def test_levels_of_which_one_is_computed_of_the_other_are_not_added_up(fed, levels):
    model, x = networks.seeded(Pyramid(fed=fed)), torch.rand(2, 3, 48, 64)
    target = xf.targets.detection(
        [16.0, 12.0, 48.0, 36.0], format="rtdetr", size=(48, 64), min_score=0.0, min_iou=0.1
    )
    assert sorted(Call(model, None, x, target).levels or ()) == sorted(levels)


def test_tokens_of_several_levels_are_no_map_of_one():
    """Deformable DETR's encoder returns the tokens of all levels in one row."""
    torch.manual_seed(0)
    stages: Any = {
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1] * 4,
        "layer_type": "basic",
    }
    backbone = transformers.ResNetConfig(**stages, out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        d_model=32, encoder_layers=2, decoder_layers=2, num_queries=10, num_feature_levels=3, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    model, x = transformers.DeformableDetrForObjectDetection(config).eval(), torch.rand(1, 3, 128, 192)
    with pytest.raises(
        ValueError, match=r"'model.encoder' returns tokens of shape \(1, 504, 32\).*one of them"
    ):
        xf.hirescam(model, "model.encoder", x, lambda output: output.logits.amax((1, 2)))
    assert "model.encoder" not in xf.layers(model, x)
    x1, y1, w, h = model(x).pred_boxes[0, 0].tolist()
    box = [(x1 - w / 2) * 192, (y1 - h / 2) * 128, (x1 + w / 2) * 192, (y1 + h / 2) * 128]
    target = xf.targets.detection(box, size=(128, 192), min_score=0.0)
    names = [f"model.input_proj.{level}" for level in range(3)]
    assert Call(model, None, x, target).levels == names
    one = xf.hirescam(
        model, "model.encoder", x, target, to_spatial=lambda t: t[:, 384:480].mT.unflatten(2, (8, 12))
    )
    assert one.any()
    few = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    target = xf.targets.detection([x * 0.5 for x in box], size=(64, 96), min_score=0.0, min_iou=0.0)
    # 2 × 3 places are too few to be measured, but a convolution made them
    assert Call(model, None, few, target).levels == names
    assert xf.multi_layer("hirescam")(model, None, few, target).any()
    bound = xf.bind(model, lambda model, x: model(x))  # which may do anything to the image
    with pytest.raises(ValueError, match=r"the values of .*input_proj.2, .*to_spatial=lambda maps: maps"):
        xf.multi_layer("hirescam")(bound, None, few, target)


def test_a_map_without_channels_is_no_row_of_tokens():
    """A depth map (B, H, W) has the shape of H tokens with W channels, and its rows answer in order."""

    config = transformers.GLPNConfig(
        depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    torch.manual_seed(0)
    model, x = transformers.GLPNForDepthEstimation(config).eval(), torch.rand(1, 3, 64, 96)
    assert model(x).predicted_depth.shape == (1, 64, 96)
    score = lambda output: output.predicted_depth.mean((1, 2))  # noqa: E731
    assert "head" not in xf.layers(model, x)
    with pytest.raises(ValueError, match="'head' returns"):
        xf.gradcam(model, "head", x, score)
    assert xf.default_layer(model, x) != "head"


# -- axes exchanged --------------------------------------------------------------------------------------------


class Convolved(nn.Module):
    """Two convolutions and the maximum over all places."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        kind: Any = (nn.Conv2d, nn.Conv3d)[axes - 2]
        self.maps = nn.Sequential(kind(3, 8, 3, 2, 1), nn.ReLU(), kind(8, 8, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x).flatten(2).amax(2))


@pytest.mark.parametrize("size", [(40, 64), (48, 48), (8, 32, 48), (16, 16, 16)])
def test_exchanged_axes_are_exchanged_back_or_refused(size):
    """The axes that a network exchanges have a slope on the image too, and a fit to it only one order."""
    axes = range(len(size))
    net, x = networks.seeded(Convolved(len(size))), torch.rand(1, 3, *size)
    for order in itertools.permutations(axes):
        turned = (0, 1, *(axis + 2 for axis in order))
        model = xf.bind(net, lambda net, x, turned=turned: net(x.permute(turned)))
        try:
            found = xf.features(model, "maps", x)
        except ValueError:
            assert len(size) == 3
            assert order != (0, 1, 2)
            continue
        back = (0, 1, *(order.index(axis) + 2 for axis in axes))
        torch.testing.assert_close(found, net.maps(x.permute(turned)).permute(back).detach())


ARRANGED: dict[str, Any] = {
    "turned": (lambda x: x.transpose(2, 3), lambda maps: maps.mT),
    "matrices turned": (lambda x: x.mT, lambda maps: maps.mT),
    "channels and columns exchanged, and turned": (lambda x: x.permute(0, 1, 3, 2), lambda maps: maps.mT),
    "colors and axes exchanged": (lambda x: x.flip(1), lambda maps: maps),
    "mirrored": (lambda x: x.flip(-1), None),
    "mirrored by name": (lambda x: torch.flip(x, dims=[3]), None),
    "rolled": (lambda x: x.roll(30, 3), None),
}


@pytest.mark.parametrize("kind", ARRANGED)
def test_what_a_forward_does_to_the_image_first_is_undone_or_refused(kind):
    arrange, undo = ARRANGED[kind]

    class Arranging(Convolved):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(arrange(x))

    model, x = networks.seeded(Arranging(2)), torch.rand(2, 3, 40, 64)
    if undo is not None:
        torch.testing.assert_close(xf.features(model, None, x), undo(model.maps(arrange(x))).detach())
        return
    with pytest.raises(ValueError, match=r"layer=None.*mirrors, turns or warps the image: pass to_spatial"):
        xf.gradcam(model, None, x, 1)
    with pytest.raises(ValueError, match=r"changing a patch .* most at that place.*pass to_spatial"):
        xf.gradcam(model, "maps", x, 1)
    mirrored = xf.gradcam(model, "maps", x, 1, to_spatial=lambda maps: maps.flip(-1))
    assert mirrored.shape == (2, 40, 64)


def mirror(x: Tensor) -> Tensor:
    return x.flip(-1)


HELD: dict[str, Any] = {
    "a function": mirror,
    "a lambda": lambda x: mirror(x) + 0,
    "a partial": functools.partial(torch.flip, dims=[-1]),
    "an object": type("Mirror", (), {"__call__": lambda self, x: x.flip(-1)})(),
}


@pytest.mark.parametrize("held", HELD)
def test_code_that_a_network_holds_is_known_to_turn(held):
    class Holding(Convolved):
        def __init__(self) -> None:
            super().__init__(2)
            self.first = HELD[held]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.first(x))

    model = networks.seeded(Holding())
    assert may_turn(tree(model))
    with pytest.raises(ValueError, match="mirrors, turns or warps the image"):
        xf.gradcam(model, None, torch.rand(1, 3, 40, 64), 1)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vgg11", "mobilenet_v3_small"])
def test_usual_networks_are_not_looked_at_in_each_function_call(name):
    assert not may_turn(tree(torchvision.models.get_model(name, weights=None)))


# -- inputs whose content is elsewhere -------------------------------------------------------------------------


class Pixelwise(nn.Module):
    """A segmentation network that looks at single pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.classes = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU()), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.maps(x))


def test_a_place_of_the_image_is_no_target_of_inputs_that_have_it_elsewhere():
    model, x = networks.seeded(Pixelwise()), torch.rand(2, 3, 24, 32)
    mask = torch.zeros(24, 32)
    mask[:12, :16] = 1
    segment = xf.targets.segment(1, mask)
    box = xf.targets.detection([0, 0, 16, 12])
    assert box.is_placed
    assert not xf.targets.logit(1).is_placed
    summed = segment - 0.5 * segment
    for target in (segment, summed, xf.targets.segment(1)):
        for method in (xf.smooth("hirescam"), xf.sess("hirescam", num_scales=1), xf.cameras):
            with pytest.raises(checks.StructureError, match="the target reads given places of the image"):
                method(model, "maps", x, target)
    heat = xf.smooth("hirescam", flips=False)(model, "maps", x, segment)
    assert (heat * mask).sum() == heat.sum()
    assert xf.cameras(model, "maps", x, segment, scales=[1.0]).shape == heat.shape
