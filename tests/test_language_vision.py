"""Networks of language and vision: sentences as targets, and tokens that lie where the image was changed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xcam_fn as xf

SENTENCES = torch.tensor([[48, 3, 4, 49], [48, 7, 5, 49], [48, 9, 1, 49]])
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
        "max_position_embeddings": 4, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 0}  # fmt: skip
VISION = TEXT | {"num_hidden_layers": 2, "image_size": 48, "patch_size": 8}
PLACES = [(0, 0), (1, 4), (5, 2), (3, 3)]  # of two patches side by side, among 6 × 6


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12))


def siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))


def open_clip() -> nn.Module:
    from open_clip import model

    vision = model.CLIPVisionCfg(layers=2, width=16, head_width=8, patch_size=8, image_size=48)
    text = model.CLIPTextCfg(context_length=4, vocab_size=50, width=16, heads=2, layers=1)
    return model.CLIP(12, vision, text)


def image_tower(net: Any, x: Tensor) -> Any:
    return net.encode_image(x) if hasattr(net, "encode_image") else net.get_image_features(x)


def sentences(net: Any) -> Tensor:
    with torch.no_grad():
        if hasattr(net, "encode_text"):
            return net.encode_text(SENTENCES)
        return net.get_text_features(SENTENCES).pooler_output


def logits(net: Any, x: Tensor) -> Tensor:
    """One for each sentence, as the networks themselves compute them."""
    if hasattr(net, "encode_text"):
        return net.get_logits(x, SENTENCES)[0]
    return net(input_ids=SENTENCES, pixel_values=x).logits_per_image


def seeded(build: Any) -> nn.Module:
    model, generator = build().eval(), torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim:
            scale = 0.7 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1
            p.data = torch.randn(p.shape, generator=generator) * scale
            p.data += p.ndim == 1 and not name.endswith("bias")
    return model


BUILDS = {
    "CLIP": (clip, "model.vision_model.encoder.layers.1.layer_norm1"),
    "SigLIP": (siglip, "model.vision_model.post_layernorm"),
    "open_clip": (open_clip, "model.visual.transformer.resblocks.1.ln_1"),
}


@pytest.mark.parametrize("name", BUILDS)
def test_several_sentences_are_several_maps_of_each_image(name):
    build, layer = BUILDS[name]
    net = seeded(build)
    tower, x, texts = xf.bind(net, image_tower), torch.randn(2, 3, 48, 48), sentences(net)
    assert xf.default_layer(tower, x) == layer
    several = xf.targets.similarity(texts[None])
    for method, options in ((xf.gradcam, {}), (xf.rise, {"num_masks": 6}), (xf.ablationcam, {})):
        found = method(tower, None, x, several, **options)
        assert found.shape == (2, 3, 48, 48)
        alone = [method(tower, None, x[:1], xf.targets.similarity(one), **options)[0] for one in texts]
        torch.testing.assert_close(found[0], torch.stack(alone), atol=1e-4, rtol=1e-4)
    as_classes = xf.gradcam(xf.bind(net, logits), None, x, [[0, 1, 2]] * 2)
    torch.testing.assert_close(xf.gradcam(tower, None, x, several), as_classes, atol=1e-4, rtol=1e-4)


def without_places(net: nn.Module, last: str) -> None:
    """Take away what tells an empty patch's token from zero, and what patches learn of each other up to the layer.

    A token is then zero at the layer unless its own patch shows something.
    """
    tower = net.visual if hasattr(net, "visual") else net.vision_model
    for name, p in tower.named_parameters():
        alone = name.endswith("out_proj.weight") and last not in name
        if name.endswith("bias") or "position" in name or alone:
            p.data.zero_()


def planted(name: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network, images that are empty but for one pattern, and the embeddings of one of them and of an empty one."""
    net = seeded(BUILDS[name][0])
    without_places(net, {"CLIP": "layers.1.", "SigLIP": "head.", "open_clip": "resblocks.1."}[name])
    tower, generator = xf.bind(net, image_tower), torch.Generator().manual_seed(1)
    pattern, x = torch.randn(3, 8, 16, generator=generator), torch.zeros(4, 3, 48, 48)
    for image, (row, column) in zip(x, PLACES, strict=True):
        image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 16] = pattern
    with torch.no_grad():
        embeddings = [xf.targets.outputs.embeddings(tower(images))[0] for images in (x[:1], 0 * x[:1])]
    return net, x, *embeddings


def share(maps: Tensor) -> Tensor:
    """How much of each map (4, n, h, w) lies where the pattern is, of those that are not zero everywhere."""
    patches = maps.unflatten(3, (6, -1)).unflatten(2, (6, -1)).sum((3, 5))
    there = [one[:, i, j : j + 2].sum(1) for one, (i, j) in zip(patches, PLACES, strict=True)]
    found = torch.stack(there) / patches.sum((2, 3))
    return found[found.isfinite()]


@pytest.mark.parametrize("method", [xf.gradcam, xf.hirescam])
@pytest.mark.parametrize("name", BUILDS)
def test_the_map_of_what_a_sentence_is_about_is_where_it_was_planted(name, method):
    net, x, shown, empty = planted(name)
    about = xf.targets.similarity(torch.stack([shown - empty, empty - shown, *sentences(net)])[None])
    found = method(xf.bind(net, image_tower), None, x, about, postprocess=None).relu()
    assert found.shape == (4, 5, 6, 6)
    assert found.flatten(2).any(2).any(1).all()  # a map without positive values says nothing
    assert share(found).min() >= 0.95


HIDING = {
    "scorecam": {}, "ablationcam": {}, "reciprocam": {"gaussian": False}, "occlusion": {"window": 8, "stride": 8},
    "rise": {"num_masks": 100, "grid": 6, "keep": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("method", HIDING)
@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_what_is_hidden_or_shown_tells_where_it_was_planted(name, method):
    net, x, shown, empty = planted(name)
    asked = xf.targets.similarity(
        shown
    )  # and of a network that has something to say of nothing: rather than that
    asked = asked - xf.targets.similarity(empty) if empty.any() else asked

    def raw(maps, _size):
        return maps

    found = xf.METHODS[method](xf.bind(net, image_tower), None, x, asked, postprocess=raw, **HIDING[method])
    least = share(found.relu()[:, None])
    assert len(least) >= 3
    if (
        method == "rise"
    ):  # 100 masks: as bright a place as 1.5 others, of 34, since their chance remains everywhere
        assert least.min() >= 1.5 * 2 / (34 + 1.5 * 2)
    else:
        assert least.min() >= 0.95


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_a_tower_of_text_has_no_places(name):
    net = seeded(BUILDS[name][0])
    x, asked = torch.randn(2, 3, 48, 48), xf.bind(net, logits)
    layer = "text_model.encoder.layers.0.layer_norm1"
    with pytest.raises(ValueError, match=rf"layer 'model\.{layer}' .*does not depend on the image"):
        xf.gradcam(asked, layer, x, 0)
    with pytest.raises(ValueError, match=r"is in Bound but its forward never runs it"):
        xf.gradcam(xf.bind(net, image_tower), layer, x, xf.targets.similarity(sentences(net)[0]))
    with pytest.raises(
        ValueError, match=r"fails on it: .*if the model takes other arguments, .*xcam_fn\.bind"
    ):
        xf.gradcam(net, None, x, 0)


@pytest.mark.parametrize("name", ["SigLIP", "open_clip"])
def test_tokens_that_all_answer_alike_are_not_placed(name):
    """Where what leaks through attention is made as large, by a norm, as what a patch itself shows."""
    (build, layer), generator = BUILDS[name], torch.Generator().manual_seed(12)
    net = seeded(build)
    without_places(net, "layers." if name == "SigLIP" else "resblocks.")
    for key, p in net.named_parameters():
        if p.ndim > 1 and p.any():
            p.data = torch.randn(p.shape, generator=generator) * 0.7 / p[0].numel() ** 0.5
            p.data *= 0.05 if key.endswith("out_proj.weight") else 1
        elif p.ndim > 1:
            torch.randn(p.shape, generator=generator)
    x = torch.zeros(1, 3, 48, 48)
    x[:, :, :8, :16] = torch.randn(3, 8, 16, generator=generator)
    with pytest.raises(ValueError, match="does not change its values most at that place"):
        xf.features(xf.bind(net, image_tower), layer, x)
