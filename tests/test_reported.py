"""Situations of public bug reports: a right map, or a refusal that says what to do."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import xcam_fn as xf
from xcam_fn.checks import LostGradientError, StructureError


def seeded(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def gradient_at(model: nn.Module, module: nn.Module, x: Tensor, cls: int) -> tuple[Tensor, Tensor]:
    """The layer's output and the gradient of a logit, by a hook."""
    seen = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    score = model(x)[:, cls].sum()
    handle.remove()
    return seen[0].detach(), torch.autograd.grad(score, seen[0])[0]


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor):
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


# -- no gradient, no number ---------------------------------------------------------------------------------


class Detached(Convolutional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Inference(Convolutional):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Root(Convolutional):
    """A root at zero, whose derivative is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.conv(x)).flatten(2)
        return self.fc((maps @ maps.mT).sqrt().mean(-1))


@pytest.mark.parametrize("kind", [Detached, Inference])
@pytest.mark.parametrize("method", ["gradcam", "integrated_gradients", "fullgrad", "legrad"])
def test_a_gradient_that_is_lost_is_said(kind, method):
    with pytest.raises((LostGradientError, StructureError)):
        xf.METHODS[method](seeded(kind), "conv", images(1, 3, 16, 16), 1)


def test_a_forward_without_recording_has_its_map():
    class NoGrad(Convolutional):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    x = images(1, 3, 16, 16)
    found, right = (xf.gradcam(seeded(kind), "conv", x, 1) for kind in (NoGrad, Convolutional))
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("method", ["gradcam", "layercam", "integrated_gradients"])
def test_numbers_that_are_not_finite_are_said(method):
    model = seeded(Root)
    with torch.no_grad():
        model.conv.weight[0], model.conv.bias[0] = 0, -1
    with pytest.raises(ValueError, match="NaN or infinite"):
        xf.METHODS[method](model, "conv", images(1, 3, 16, 16), 1)


def test_a_targets_own_mistake_is_the_targets():
    model, x = seeded(Convolutional), images(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"^cls: the target fails on the model's output: IndexError"):
        xf.gradcam(model, "conv", x, lambda y: y[:, 9])
    with pytest.raises(LostGradientError, match=r"the target \(cls\)"):
        xf.gradcam(model, "conv", x, lambda y: y[:, 0].detach())


class Unrecorded(Convolutional):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(super().forward(x).numpy())


def test_what_cannot_be_recorded_is_explained_at_a_named_layer():
    model, x = seeded(Unrecorded), images(2, 3, 16, 16)
    for method in (xf.gradcam, xf.eigencam):  # the default layer is found by a gradient
        with pytest.raises(
            LostGradientError, match=r"use a method without gradients: .* at a named layer, or rise"
        ):
            method(model, None, x, 1)
    for method in (xf.eigencam, xf.scorecam):
        torch.testing.assert_close(method(model, "conv", x, 1), method(seeded(Convolutional), "conv", x, 1))
    assert xf.rise(model, None, x, 1, num_masks=4).isfinite().all()


class Checkpointed(Convolutional):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_a_reentrant_checkpoint_is_named_where_it_loses_the_gradient():
    model, x = seeded(Checkpointed), images(2, 3, 16, 16)
    with pytest.raises(LostGradientError, match="a checkpoint with use_reentrant=True"):
        xf.gradcam(model, "conv", x, 1)
    model.reentrant = False
    torch.testing.assert_close(
        xf.gradcam(model, "conv", x, 1), xf.gradcam(seeded(Convolutional), "conv", x, 1)
    )


# -- randomness and batches ---------------------------------------------------------------------------------


def test_dropout_that_eval_does_not_stop():
    class Drops(Convolutional):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x))

    state = torch.get_rng_state()
    for method in ("gradcam", "scorecam", "ablationcam"):
        with pytest.raises(ValueError, match=r"its own forward \(Drops\) draws random numbers"):
            xf.METHODS[method](seeded(Drops), "conv", images(1, 3, 16, 16), 1)
    torch.manual_seed(0)  # as `seeded` did
    state = torch.get_rng_state()
    model = Drops().eval()
    drawn = torch.get_rng_state()
    with pytest.raises(ValueError, match="random"):
        xf.gradcam(model, "conv", images(1, 3, 16, 16), 1)
    assert torch.equal(drawn, torch.get_rng_state())
    torch.set_rng_state(state)


def test_batch_norm_without_statistics():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.Flatten(), nn.LazyLinear(5)
    )
    model(images(2, 3, 8, 8))
    with pytest.raises(ValueError, match="'1' \\(BatchNorm2d\\) has no running statistics"):
        xf.gradcam(model.eval(), "0", images(1, 3, 8, 8), 1)


class OneAtATime(Convolutional):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8 * 256, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).reshape(1, -1))


@pytest.mark.parametrize(
    "method", ["scorecam", "ablationcam", "reciprocam", "rise", "integrated_gradients", "iscam"]
)
def test_a_network_of_one_image_at_a_time(method):
    options = {"rise": {"num_masks": 8}, "iscam": {"num_samples": 2}}.get(method, {})
    x, method = images(1, 3, 16, 16), xf.METHODS[method].with_options(**options)
    found = method(seeded(OneAtATime), "conv", x, 1)
    torch.testing.assert_close(found, method(seeded(OneAtATime), "conv", x, 1, chunk_size=1))
    with pytest.raises(ValueError, match=r"fails on 2 images at once .* pass one image"):
        xf.gradcam(seeded(OneAtATime), "conv", images(2, 3, 16, 16), 1)


def test_an_answer_that_depends_on_the_batch():
    class Centered(Convolutional):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    with pytest.raises(ValueError, match="depends on the rest of the batch"):
        xf.scorecam(seeded(Centered), "conv", images(2, 3, 16, 16), 1)


# -- networks of other kinds --------------------------------------------------------------------------------


def test_a_body_in_another_precision():
    class Mixed(Convolutional):
        def __init__(self) -> None:
            super().__init__()
            self.conv = self.conv.bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv(x.bfloat16())).mean((2, 3)).float())

    x = images(1, 3, 16, 16)
    for method in ("gradcam", "scorecam", "ablationcam", "groupcam"):
        options = {"groupcam": {"num_groups": 4}}.get(method, {})
        found = xf.METHODS[method](seeded(Mixed), "conv", x, 1, **options)
        right = xf.METHODS[method](seeded(Convolutional), "conv", x, 1, **options)
        torch.testing.assert_close(found, right, atol=0.1, rtol=0)


def test_a_network_made_in_inference_mode():
    with torch.inference_mode():
        model = seeded(Convolutional)
    x = images(1, 3, 16, 16)
    for method in ("gradcam", "scorecam", "ablationcam"):
        right = xf.METHODS[method](seeded(Convolutional), "conv", x, 1)
        torch.testing.assert_close(xf.METHODS[method](model, "conv", x, 1), right)


@pytest.mark.filterwarnings("ignore:`torch.jit.(script|trace):FutureWarning")
@pytest.mark.parametrize(
    "script", [torch.jit.script, lambda part: torch.jit.trace(part, images(1, 8, 16, 16))]
)
def test_a_part_in_torchscript(script):
    stem, part, head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1).eval(), nn.Linear(8, 5)

    def made(part: nn.Module) -> nn.Module:
        return nn.Sequential(stem, part, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()

    x = images(1, 3, 16, 16)
    torch.testing.assert_close(xf.gradcam(made(script(part)), "0", x, 1), xf.gradcam(made(part), "0", x, 1))


def test_a_subclass_of_tensors():
    class Meta(Tensor):
        def new_empty(self, size, **options):  # pyright: ignore[reportIncompatibleMethodOverride]
            raise AssertionError("not of a plain tensor's kind")

    model, x = seeded(Convolutional), images(1, 3, 16, 16)
    for method in ("gradcam", "scorecam", "ablationcam"):
        found = xf.METHODS[method](model, "conv", x.as_subclass(Meta), 1)
        assert type(found) is Tensor
        torch.testing.assert_close(found, xf.METHODS[method](model, "conv", x, 1))


def test_the_fused_path_of_transformer_layers_is_stepped_around():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.pos = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.randn(1, 17, 32))
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patch(x).flatten(2).transpose(1, 2)
            tokens = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1) + self.pos
            return self.head(self.norm(self.encoder(tokens))[:, 0])

    model, x = seeded(Encoder), images(1, 3, 32, 32)
    assert xf.default_layer(model, x) == "encoder.layers.1.norm1"
    A, G = gradient_at(model, model.encoder.layers[1].norm1, x, 1)
    right = (G[:, 1:].mean(1, keepdim=True) * A[:, 1:]).sum(-1).reshape(1, 4, 4)
    torch.testing.assert_close(xf.gradcam(model, None, x, 1, postprocess=None), right, atol=1e-6, rtol=1e-4)


def test_frames_in_the_batch():
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv(x.flatten(0, 1))).mean((2, 3)).reshape(*x.shape[:2], -1).mean(1))

    model, x = xf.bind(seeded(Frames), lambda net, x: net(x.transpose(1, 2))), images(2, 3, 4, 8, 8)
    found = xf.gradcam(model, "conv", x, 1)
    given = xf.gradcam(model, "conv", x, 1, to_spatial=lambda t: t.unflatten(0, (-1, 4)).transpose(1, 2))
    torch.testing.assert_close(found, given, atol=0, rtol=0)
    assert found.shape == (2, 4, 8, 8)
    assert xf.rise(model, None, x, 1, num_masks=4).shape == (2, 4, 8, 8)


# -- the layer beside the score -----------------------------------------------------------------------------


class Tasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.fc, self.dec = (
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.Linear(16, 5),
            nn.ConvTranspose2d(16, 4, 2, 2),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = F.relu(self.enc(x))
        return {"logits": self.fc(maps.mean((2, 3))), "mask": self.dec(maps)}


def test_the_default_layer_has_a_gradient():
    model, x = seeded(Tasks), images(1, 3, 32, 32)
    assert xf.default_layer(model, x) == "enc"
    torch.testing.assert_close(xf.gradcam(model, None, x, 1), xf.gradcam(model, "enc", x, 1))

    def of_mask(output: dict[str, Tensor]) -> Tensor:
        return output["mask"][:, 1].mean((1, 2))

    torch.testing.assert_close(xf.gradcam(model, None, x, of_mask), xf.gradcam(model, "dec", x, of_mask))
    torch.testing.assert_close(
        xf.gradcam(model, None, x, 1), xf.gradcam(model, "enc", x, 1)
    )  # whatever was asked
    with pytest.raises(
        LostGradientError, match="layer 'dec' from the score: the score does not depend on it"
    ):
        xf.gradcam(model, "dec", x, 1)


def test_auxiliary_heads_are_passed_over():
    from torchvision.models.segmentation import fcn_resnet50

    model = seeded(lambda: fcn_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True))
    x, target = images(1, 3, 32, 32), xf.targets.segment(1, torch.ones(32, 32))
    assert xf.default_layer(model, x) == "classifier"
    assert xf.feature_and_grad(model, None, x, target).grads.any()


def test_of_two_streams_the_one_of_the_image():
    net, other = seeded(Convolutional), images(1, 3, 16, 16)
    model = xf.bind(net, lambda net, x: net(x) - net(other.expand_as(x)))
    x = images(2, 3, 16, 16).flip(0)
    A = xf.features(model, "conv", x)
    torch.testing.assert_close(A, net.conv(x).detach())
    torch.testing.assert_close(A, xf.features(model, "conv#1", x))


# -- tokens that are no grid --------------------------------------------------------------------------------


def test_tokens_of_a_text_have_no_place():
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config=common | {"image_size": 64, "patch_size": 16},
        text_config=common | {"vocab_size": 99, "max_position_embeddings": 77, "eos_token_id": 98},
    )
    net, words = seeded(lambda: transformers.CLIPModel(config)), torch.arange(2, 18)[None]
    words[0, -1] = 98
    model = xf.bind(net, lambda net, x: net(pixel_values=x, input_ids=words).logits_per_image)
    x = images(1, 3, 64, 64)
    assert xf.default_layer(model, x) == "model.vision_model.encoder.layers.1.layer_norm1"
    assert xf.features(model, None, x).shape == (1, 32, 4, 4)
    with pytest.raises(ValueError, match="does not depend on the image, as in a text encoder"):
        xf.gradcam(model, "text_model.encoder.layers.1.layer_norm1", x, 0)


def test_shuffled_patches_have_no_place_and_turned_ones_have():
    class Patches(nn.Module):
        def __init__(self, order) -> None:
            super().__init__()
            self.patch, self.norm, self.fc, self.order = (
                nn.Conv2d(3, 16, 4, 4),
                nn.LayerNorm(16),
                nn.Linear(16, 5),
                order,
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(self.order(self.patch(x))).mean(1))

    x, shuffled = images(1, 3, 24, 32), torch.randperm(48, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="does not change its values most"):
        xf.gradcam(seeded(lambda: Patches(lambda maps: maps.flatten(2).mT[:, shuffled])), "norm", x, 1)
    rows = xf.features(seeded(lambda: Patches(lambda maps: maps.flatten(2).mT)), "norm", x)
    columns = xf.features(seeded(lambda: Patches(lambda maps: maps.mT.flatten(2).mT)), "norm", x)
    assert rows.shape == (1, 16, 6, 8)
    torch.testing.assert_close(rows, columns)


# -- the user's own -----------------------------------------------------------------------------------------


def test_hooks_that_a_network_installs_stay_off_the_users_own():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8,
        num_labels=5, output_hidden_states=True,
    )  # fmt: skip
    model, x = seeded(lambda: transformers.ViTForImageClassification(config)), images(1, 3, 32, 32)
    right = copy.deepcopy(model)(x)
    xf.gradcam(model, None, x, 1)
    after = model(x)
    assert len(after.hidden_states) == len(right.hidden_states)
    assert torch.equal(after.logits, right.logits)


class Keeps:
    def save(self, module, args, output):
        self.output = output


def test_what_hooks_and_forwards_keep_is_the_users():
    class Counts(Convolutional):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.calls, self.lock = [], torch.zeros(()), threading.Lock()

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            self.calls += 1
            return super().forward(x)

    model, kept = seeded(Counts), Keeps()
    model.conv.register_forward_hook(kept.save)
    x = images(2, 3, 16, 16)
    model(x)
    before = kept.output
    for method in ("gradcam", "scorecam", "ablationcam", "smoothgradcam_pp"):
        xf.METHODS[method](model, "conv", x, 1)
    assert kept.output is before
    assert len(model.seen) == 1
    assert model.calls == 1


def test_a_forward_replaced_by_a_closure_is_explained():
    model, x = seeded(Convolutional), images(1, 3, 16, 16)
    right = xf.feature_and_grad(model, "conv", x, 1)
    conv, fc = model.conv, model.fc
    model.forward = lambda x: fc(F.relu(conv(x)).mean((2, 3)))
    found = xf.feature_and_grad(model, "conv", x, 1)
    torch.testing.assert_close(found.grads, right.grads)


def test_a_network_that_another_thread_changes():
    parts = [seeded(Convolutional).fc, nn.Linear(8, 5)]
    model, x = seeded(Convolutional), images(1, 3, 16, 16)
    right = []
    for part in parts:
        model.fc = part
        right.append(
            [xf.METHODS[name](model, "conv", x, 1, postprocess=None) for name in ("gradcam", "ablationcam")]
        )
    done = threading.Event()

    def swap() -> None:
        while not done.wait(1e-4):
            model.fc = parts[0] if model.fc is parts[1] else parts[1]

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(60):
            for i, name in enumerate(("gradcam", "ablationcam")):
                found = xf.METHODS[name](model, "conv", x, 1, postprocess=None)
                assert any(torch.allclose(found, one[i], atol=1e-6) for one in right)
    finally:
        done.set()
        thread.join()
