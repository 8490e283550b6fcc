"""Tokens and channels last: where they lie on the image, and that every method works on them as on maps."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import networks
import xcam_fn as xf
from xcam_fn.checks import StructureError
from xcam_fn.network.modes import StepByStep
from xcam_fn.testing import state

SIZE = (32, 48)  # 4 × 6 patches of 8 pixels


def images(size=SIZE, batch: int = 2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


def seeded(model: nn.Module) -> nn.Module:
    """Weights under which attention and every norm have a say, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.7 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1
        parameter.data = noise * (0.3 if len(parameter) == 1 else scale)
        if parameter.ndim == 1 and not name.endswith("bias"):
            parameter.data += 1
    return model.eval()


# -- networks of the three libraries -------------------------------------------------------------------------


def torchvision_vit(size: int = 32):
    from torchvision.models import VisionTransformer

    return VisionTransformer(size, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5)


def torchvision_swin(version: int = 1):
    from torchvision.models import SwinTransformer
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    return SwinTransformer([4, 4], 8, [2, 2], [1, 2], [2, 2], num_classes=5, **parts)


def timm_vit(name: str = "vit_tiny_patch16_224", **options):
    import timm

    options = {"img_size": SIZE, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2} | options
    return timm.create_model(name, pretrained=False, num_classes=5, **options)


def timm_swin(name: str):
    import timm

    return timm.create_model(
        name, pretrained=False, num_classes=5, img_size=SIZE, window_size=2, embed_dim=8, depths=(1, 2),
        num_heads=(1, 2),
    )  # fmt: skip


def timm_levit():
    import timm

    return timm.create_model(
        "levit_128s", pretrained=False, num_classes=5, img_size=64, embed_dim=(16, 24), depth=(1, 2),
        num_heads=(2, 2), key_dim=8,
    )  # fmt: skip


def hf(kind: str, **options):
    import transformers

    common = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "image_size": SIZE, "patch_size": 8,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(num_labels=5, **common | options)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def hf_swin(kind: str):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        num_labels=5, image_size=32, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=2
    )
    return getattr(transformers, f"{kind}ForImageClassification")(config)


# The network, its images, the default layer, and what that returns for one image as (K, H, W).
CASES = {
    "torchvision ViT": (torchvision_vit, (32, 32), "encoder.layers.encoder_layer_1.ln_1", (16, 4, 4)),
    "torchvision Swin": (torchvision_swin, SIZE, "features.3.1.norm1", (16, 4, 6)),
    # Swin of version 2 has its norms after the attention, which reads what the block before returned.
    "torchvision Swin v2": (lambda: torchvision_swin(2), SIZE, "features.3.0", (16, 4, 6)),
    "timm ViT": (timm_vit, SIZE, "blocks.1.norm1", (16, 4, 6)),
    "timm DeiT, two tokens": (
        lambda: timm_vit("deit_tiny_distilled_patch16_224"), SIZE, "blocks.1.norm1", (16, 4, 6),
    ),
    "timm registers": (
        lambda: timm_vit("vit_betwixt_patch16_reg4_gap_256"), SIZE, "blocks.1.norm1", (16, 4, 6),
    ),
    "timm no class token": (
        lambda: timm_vit(class_token=False, global_pool="avg"), SIZE, "blocks.1.norm1", (16, 4, 6),
    ),
    "timm Swin": (lambda: timm_swin("swin_tiny_patch4_window7_224"), SIZE, "layers.1.blocks.1.norm1", (16, 4, 6)),
    "timm Swin v2": (lambda: timm_swin("swinv2_tiny_window8_256"), SIZE, "layers.1.blocks.0", (16, 4, 6)),
    # The four tokens of its last stage answer alike to every patch, as no shortcut leads to them.
    "timm LeViT": (timm_levit, (64, 64), "stages.0", (16, 4, 4)),
    "transformers ViT": (lambda: hf("ViT"), SIZE, "vit.layers.1.layernorm_before", (16, 4, 6)),
    "transformers DINOv2, registers": (
        lambda: hf("Dinov2WithRegisters", image_size=32), (32, 32),
        "dinov2_with_registers.encoder.layer.1.norm1", (16, 4, 4),
    ),
    "transformers Swin": (
        lambda: hf_swin("Swin"), (32, 32), "swin.encoder.layers.1.blocks.1.layernorm_before", (16, 4, 4),
    ),
    "transformers Swin v2": (
        lambda: hf_swin("Swinv2"), (32, 32), "swinv2.encoder.layers.1.blocks.0", (16, 4, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_default_layer_and_its_place(name):
    build, size, layer, shape = CASES[name]
    model, x = seeded(build()), images(size)
    assert xf.default_layer(model, x) == layer
    assert xf.layers(model, x)[layer] == (1, *shape)
    A, G, output = xf.feature_and_grad(model, None, x, [1, 2])
    assert A.shape == G.shape == (2, *shape)
    assert G.abs().amax((1, 2, 3)).min() > 0
    expected = model(x)
    torch.testing.assert_close(_logits(output), _logits(expected))
    together = xf.gradcam(model, None, x, [1, 2])
    alone = [xf.gradcam(model, None, image[None], cls) for image, cls in zip(x, (1, 2), strict=True)]
    assert together.shape == (2, *size)
    assert (together - torch.cat(alone)).abs().max() <= 1e-5


def _logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize(
    "name",
    [
        "torchvision Swin",
        "timm ViT",
        "timm DeiT, two tokens",
        "timm registers",
        "timm Swin",
        "transformers ViT",
    ],
)
def test_a_token_is_placed_where_its_patch_is(name):
    """Of all patches of the image, its own moves a position of the features most."""
    build, size, layer, (_, h, w) = CASES[name]
    model = seeded(build())
    x = images(size, batch=1).requires_grad_()
    A = xf.features(model, layer, x)
    for i, j in ((0, 0), (1, w - 1), (h - 1, 2)):
        (gradient,) = torch.autograd.grad(A[0, :, i, j].square().sum(), x, retain_graph=True)
        moved = F.adaptive_avg_pool2d(gradient.square().sum(1), (h, w))[0]
        assert divmod(int(moved.argmax()), w) == (i, j)


def test_blocks_with_channels_last_inside_are_placed():
    """ConvNeXt turns its axes for the norm and the linear layers of each block."""
    from torchvision.models import ConvNeXt
    from torchvision.models.convnext import CNBlockConfig

    model = seeded(ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5))
    found = xf.layers(model, images())
    inside = {name: shape for name, shape in found.items() if name.startswith("features.3.0.block")}
    assert len(inside) > 5
    assert {shape[2:] for shape in inside.values()} == {(4, 6)}
    x = images()
    by_linear = xf.features(model, "features.3.0.block.5", x)
    assert torch.equal(by_linear, xf.features(model, "features.3.0.block.6", x))  # the same, channels first


HOLDERS = {
    "Sequential": nn.Sequential,
    "ModuleList": lambda *parts: nn.ModuleList(parts),
    "ModuleDict": lambda *parts: nn.ModuleDict(dict(zip("ab", parts, strict=True))),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_an_activation_is_placed_by_what_ran_before_it(holder):
    """Its axes are of one length, so that only a norm tells them, in a part that may not run as a whole."""

    class ToLast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    class Stepwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 8, 4, stride=4), HOLDERS[holder](ToLast(), nn.LayerNorm(8))
            self.act, self.head = nn.GELU(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for part in self.body.children():
                x = part(x)
            return self.head(self.act(x).mean((1, 2)))

    model, x = seeded(Stepwise()), images((32, 32))
    _, norm = model.body.children()
    expected = F.gelu(norm(model.stem(x).movedim(1, -1))).movedim(-1, 1)
    for _ in range(2):  # the second call starts from what the first one found
        torch.testing.assert_close(xf.features(model, "act", x), expected)


def test_heads_of_an_attention_are_not_listed():
    """(1, heads, tokens, channels) has as many axes as maps have."""
    model, x = timm_vit(qk_norm=True).eval(), images()
    assert not any("q_norm" in name or "attn_drop" in name for name in xf.layers(model, x))
    assert {shape[2:] for shape in xf.layers(model, x).values()} == {(4, 6)}
    with pytest.raises(StructureError, match="higher resolution"):
        xf.refinecam(model, None, x)


def test_patches_that_are_returned_beside_the_class_tokens_that_are_read():
    """PiT returns maps and class tokens; the maps of its last stage are not read."""
    import timm

    model = seeded(timm.create_model("pit_ti_distilled_224", pretrained=False, img_size=64, num_classes=5))
    x = images((64, 64), batch=1)
    assert xf.default_layer(model, x) == "transformers.2.blocks.3.norm1"
    assert xf.feature_and_grad(model, None, x).grads.abs().max() > 0


def test_pool_former_is_no_pooling():
    import transformers

    config = transformers.PoolFormerConfig(
        num_labels=5, depths=[1, 1], hidden_sizes=[8, 16], num_encoder_blocks=2, patch_sizes=[7, 3],
        strides=[4, 2], padding=[2, 1],
    )  # fmt: skip
    model = seeded(transformers.PoolFormerForImageClassification(config))
    assert xf.default_layer(model, images()) == "norm"


class TwoBranches(nn.Module):
    """Patches of two sizes with a class token for each, as in CrossViT."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.ModuleList([nn.Conv2d(3, 8, size, stride=size) for size in (8, 16)])
        self.cls_token_0 = nn.Parameter(torch.zeros(1, 1, 8))
        self.cls_token_1 = nn.Parameter(torch.zeros(1, 1, 8))
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        total = 0
        for patches, token, norm in zip(
            self.patches, (self.cls_token_0, self.cls_token_1), self.norms, strict=True
        ):
            tokens = rearrange(patches(x), "b k h w -> b (h w) k")
            total = total + norm(torch.cat([token.expand(len(x), -1, -1), tokens], 1)).mean(1)
        return self.fc(total)


def test_two_branches_have_a_class_token_each():
    found = xf.layers(networks.seeded(TwoBranches()), images())
    assert found["norms.0"] == (1, 8, 4, 6)
    assert found["norms.1"] == (1, 8, 2, 3)


class PooledBeside(nn.Module):
    """Its body returns maps, and the same pooled, which alone are read (as networks of transformers do)."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU())

        def forward(self, x):
            maps = self.encoder(x)
            return {"last_hidden_state": maps, "pooler_output": maps.mean((2, 3))}

    def __init__(self) -> None:
        super().__init__()
        self.body = self.Body()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.body(x)["pooler_output"])


def test_maps_beside_which_they_are_pooled_are_not_the_default():
    model, x = networks.seeded(PooledBeside()), images()
    assert xf.default_layer(model, x) == "body.encoder"
    assert xf.feature_and_grad(model, None, x).grads.abs().max() > 0


# -- a user's own to_spatial ---------------------------------------------------------------------------------


def place(tokens):
    return rearrange(tokens[:, 1:], "b (h w) d -> b d h w", h=4)


@pytest.mark.parametrize("method", [xf.gradcam, xf.ablationcam, xf.eigencam, xf.legrad])
def test_own_to_spatial_equals_the_found_one(method):
    model, x = seeded(torchvision_vit()), images((32, 32))
    expected = method(model, None, x, 1, postprocess=None)
    assert torch.equal(method(model, None, x, 1, to_spatial=place, postprocess=None), expected)


@pytest.mark.parametrize(
    ("to_spatial", "error", "message"),
    [
        (lambda t: rearrange(t[:, 1:], "b (h w) d -> b d h w", h=5), ValueError, r"to_spatial fails .*\(2, 17, 16\)"),
        (lambda t: t[:, 1:], ValueError, r"to_spatial returns shape \(2, 16, 16\).*with 4 axes"),
        ("b (h w) d", TypeError, "to_spatial must be a function"),
    ],
)  # fmt: skip
def test_bad_to_spatial(to_spatial, error, message, unchecked):
    with pytest.raises(error, match=message):
        xf.gradcam(seeded(torchvision_vit()), None, images((32, 32)), to_spatial=to_spatial)


class Shortened(nn.Module):
    """Throws away three of the patches, so that those left make no grid."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.norm(rearrange(self.patches(x), "b k h w -> b (h w) k")[:, 3:])
        return self.fc(tokens.mean(1))


def test_tokens_that_make_no_grid():
    model = networks.seeded(Shortened())
    with pytest.raises(ValueError, match=r"'norm' returns tokens of shape \(1, 21, 8\).*pass to_spatial="):
        xf.gradcam(model, "norm", images())
    row = xf.gradcam(model, "norm", images(), 1, to_spatial=lambda t: rearrange(t, "b t k -> b k t 1"))
    assert row.shape == (2, *SIZE)


def test_patches_after_the_last_attention_have_no_say():
    model, x = seeded(torchvision_vit()), images((32, 32))
    message = r"only its class token affects.*before the last attention \(layer=None"
    for layer in ("encoder.ln", "encoder.layers.encoder_layer_1"):
        for method in (xf.gradcam, xf.liftcam):
            with pytest.raises(ValueError, match=message):
                method(model, layer, x)


# -- the two halves, and gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["torchvision ViT", "torchvision Swin", "timm ViT", "timm LeViT", "transformers ViT"]
)
def test_split_on_tokens(name):
    build, size, layer, shape = CASES[name]
    model, x = seeded(build()), images(size)
    trunk, head = xf.split(model, layer, x)
    A, residual = trunk(x)
    assert A.shape == (2, *shape)
    assert torch.equal(_logits(head(A, residual)), _logits(model(x)))
    assert not torch.equal(_logits(head(A * 0.5, residual)), _logits(model(x)))


def with_patches_changed(model, layer, x, change):
    """The model's output, the patch tokens of the layer changed by a hook."""

    def hook(module, args, output):
        return torch.cat([output[:, :1], change(output[:, 1:])], 1)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        return _logits(model(x))
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["torchvision ViT", "timm ViT", "transformers ViT"])
def test_ablation_equals_a_slow_loop(name):
    build, size, layer, (channels, _, _) = CASES[name]
    model, x = seeded(build()), images(size, batch=1)
    with torch.no_grad():
        score = _logits(model(x))[0, 2]
        shares = []
        for k in range(channels):
            kept = (torch.arange(channels) != k).float()
            ablated = with_patches_changed(model, layer, x, lambda tokens, kept=kept: tokens * kept)
            shares.append((score - ablated[0, 2]) / score)
        A = xf.features(model, layer, x)
        expected = torch.einsum("k,bkhw->bhw", torch.stack(shares), A)
    found = xf.ablationcam(model, layer, x, 2, postprocess=None)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["torchvision ViT", "timm ViT", "transformers ViT"])
def test_gradients_equal_autograd(name):
    build, size, layer, (_, h, _) = CASES[name]
    model, x = seeded(build()), images(size)
    zero = torch.zeros(2, math.prod(CASES[name][3][1:]), 16, requires_grad=True)
    scores = with_patches_changed(model, layer, x, lambda tokens: tokens + zero)[:, 3]
    (expected,) = torch.autograd.grad(scores.sum(), zero)
    _, G, _ = xf.feature_and_grad(model, layer, x, 3)
    torch.testing.assert_close(G, rearrange(expected, "b (h w) k -> b k h w", h=h), rtol=1e-4, atol=1e-6)


# -- attention in plain operations ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "boolean", "additive", "causal", "grouped"])
def test_step_by_step_equals_the_fused_attention(kind):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, generator=generator) for _ in range(3))
    options = {
        "none": {"scale": 0.3},
        "boolean": {"attn_mask": torch.rand(2, 1, 6, 6, generator=generator) > 0.3},
        "additive": {"attn_mask": torch.randn(6, 6, generator=generator)},
        "causal": {"is_causal": True},
        "grouped": {"enable_gqa": True},
    }[kind]
    if kind == "grouped":
        k, v = k[:, :2], v[:, :2]
    if kind == "boolean":
        options["attn_mask"][..., 0] = True  # every query has a key
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    with StepByStep():
        found = F.scaled_dot_product_attention(q, k, v, **options)
    assert (found - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("masks", ["none", "additive", "each head", "padding", "both"])
def test_step_by_step_equals_multi_head_attention(masks):
    generator = torch.Generator().manual_seed(1)
    attention = networks.seeded(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(3, 5, 8, generator=generator)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    options = {
        "none": {},
        "additive": {"attn_mask": torch.randn(5, 5, generator=generator)},
        "each head": {"attn_mask": torch.randn(6, 5, 5, generator=generator)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "key_padding_mask": padding},
    }[masks]
    x.requires_grad_()  # without a gradient torch would take another path
    expected, weights = attention(x, x, x, **options)
    with StepByStep():
        found, own = attention(x, x, x, **options)
    assert (found - expected).abs().max() <= 1e-6
    assert (own - weights).abs().max() <= 1e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("build", [torchvision_vit, lambda: timm_vit(img_size=32)])
def test_transforms_go_through_attention(build):
    model, x = seeded(build()).double(), images((32, 32), batch=1).double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def cam(x):
        return xf.gradcam(model, None, x, 1, postprocess=None)

    step = 1e-6
    expected = (cam(x + step * direction) - cam(x - step * direction)) / (2 * step)
    _, along = torch.func.jvp(cam, (x,), (direction,))
    torch.testing.assert_close(along, expected, rtol=1e-4, atol=1e-8)
    gradient = torch.func.grad(lambda x: cam(x).square().sum())(x)
    torch.testing.assert_close(
        (gradient * direction).sum(), (2 * cam(x) * expected).sum(), rtol=1e-4, atol=1e-8
    )


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop.*batching rule:UserWarning"
)  # torch.vmap's own
@pytest.mark.parametrize("name", ["torchvision Swin", "transformers ViT"])
def test_threads_share_a_model_and_nothing_is_left(name):
    build, size, _, _ = CASES[name]
    model, x = seeded(build()), images(size)
    before = state(model)
    methods = [xf.gradcam, xf.shapleycam, xf.ablationcam, xf.fullgrad]
    expected = [method(model, None, x, 1) for method in methods]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: methods[i % 4](model, None, x, 1), range(8)))
    assert all(torch.equal(cam, expected[i % 4]) for i, cam in enumerate(found))
    assert state(model) == before


# -- peers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchvision ViT", "timm Swin"])
def test_pytorch_grad_cam_agrees(name):
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    build, size, layer, _ = CASES[name]
    model, x = seeded(build()), images(size)

    def reshape(output):
        return output.movedim(-1, 1) if output.ndim == 4 else place(output)

    peer = pytorch_grad_cam.GradCAM(model, [model.get_submodule(layer)], reshape_transform=reshape)
    theirs = torch.from_numpy(peer(x, [ClassifierOutputTarget(1), ClassifierOutputTarget(2)]))
    ours = xf.gradcam(model, layer, x, [1, 2])
    assert theirs.amax() > 0.99
    assert (ours - theirs).abs().max() <= 1e-4


def test_torchcam_legrad_agrees():
    import torchcam.methods

    vit, x = seeded(torchvision_vit()), images((32, 32))
    layers = list(vit.encoder.layers)
    with torchcam.methods.LeGrad(
        vit, layers, score_projection=lambda t: vit.heads(vit.encoder.ln(t)[:, 0])
    ) as extractor:
        scores = vit(x)
        theirs = extractor([1, 2], scores, normalized=False)
    ours = xf.legrad(vit, None, x, [1, 2], postprocess=None)
    torch.testing.assert_close(ours, theirs[0].reshape(ours.shape), rtol=0, atol=1e-5)


def test_torchcam_legrad_of_chosen_blocks_agrees():
    """Over a block that is not the last, and with a head that the network does not have."""
    import torchcam.methods

    vit, x = seeded(torchvision_vit()), images((32, 32))
    first, last = vit.encoder.layers[0], vit.encoder.layers[-1]
    chosen = {"first": [first], "both, by name": ["encoder.layers.encoder_layer_0", last]}
    for blocks in chosen.values():
        with torchcam.methods.LeGrad(vit, blocks) as extractor:
            theirs = extractor([1, 2], vit(x), normalized=False)
        head = lambda tokens: vit.heads(vit.encoder.ln(tokens.mean(1)))  # noqa: E731
        ours = xf.legrad(vit, None, x, [1, 2], blocks=blocks, head=head, postprocess=None)
        torch.testing.assert_close(ours, theirs[0].reshape(ours.shape), rtol=0, atol=1e-5)
    last_of_all = xf.legrad(vit, None, x, 1, num_blocks=1)
    torch.testing.assert_close(xf.legrad(vit, None, x, 1, blocks=[last]), last_of_all)


def test_legrad_says_which_blocks_there_are():
    vit, x = seeded(torchvision_vit()), images((32, 32))
    with pytest.raises(
        ValueError, match=r"'encoder.ln', .* not a block with attention; expected .*encoder_layer_0, "
    ):
        xf.legrad(vit, None, x, 1, blocks=["encoder.ln"])
    with pytest.raises(ValueError, match=r"num_blocks=1 and blocks=\['encoder.layers.*pass only one of them"):
        xf.legrad(vit, None, x, 1, blocks=["encoder.layers.encoder_layer_0"], num_blocks=1)
