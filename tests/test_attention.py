"""Rollout, Chefer's relevance and AG-CAM: the papers' loops on the attention that the libraries compute."""

import copy
import functools
import itertools

import pytest
import torch
from einops import rearrange
from torch import nn

import xcam_fn as xf
from test_tokens import CASES, SIZE, images, seeded
from xcam_fn.checks import StructureError
from xcam_fn.targets import logits
from xcam_fn.testing import small_case, small_transformer

METHODS = ("attention_rollout", "chefer", "agcam")
SIGNED = {f"{name}, signed": xf.METHODS[name].with_options(signed=True) for name in METHODS[1:]}


class Weighing(nn.Module):
    """Torch's own attention, asked for its weights, so that it computes them outside of the fused kernel."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, q, k, v, need_weights):
        return self.attention(q, k, v, need_weights=True, average_attn_weights=False)


def unfused(model: nn.Module) -> nn.Module:
    """A copy in which attention is a softmax that can be seen."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "self_attention"):
            module.self_attention = Weighing(module.self_attention)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model


def attended(model: nn.Module, x, cls: int, monkeypatch):
    """For each block what its softmax was given and made, (heads, T, T), and the logit's gradient to it."""
    seen, softmax = [], torch.Tensor.softmax  # which F.softmax calls as well

    def spied(values, *args, **kwargs):
        seen.append((values, softmax(values, *args, **kwargs)))
        return seen[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", spied)
        score = logits(unfused(model)(x))[0, cls]
    grads = torch.autograd.grad(score, [A for _, A in seen])
    of_heads = lambda values: values.detach().reshape(-1, *values.shape[-2:])  # noqa: E731
    return [tuple(map(of_heads, (*of_block, G))) for of_block, G in zip(seen, grads, strict=True)]


def by_hand(name: str, blocks, readers: list[int]):
    """The value of each token, as the papers write it, with matrices in full."""
    tokens = blocks[0][1].shape[-1]
    name, _, signed = name.partition(", ")
    least = -torch.inf if signed else 0.0
    R = total = torch.eye(tokens, dtype=blocks[0][1].dtype)
    guided = torch.zeros_like(R)
    for before, A, G in blocks:
        rows = A.mean(0) + torch.eye(tokens, dtype=A.dtype)
        R = rows / rows.sum(-1, keepdim=True) @ R
        total = total + (G * A).clamp(min=least).mean(0) @ total
        guided = guided + (G.clamp(min=least) / (1 + torch.exp(-before))).sum(0)
    found = {"attention_rollout": R, "chefer": total - torch.eye(tokens), "agcam": guided}[name]
    return found[readers].mean(0)


# For each form of transformer the tokens that its score reads, and where its patches begin.
FORMS = {
    "torchvision ViT": ([0], 1),
    "timm ViT": ([0], 1),
    "timm DeiT, two tokens": ([0, 1], 2),
    "timm registers": (range(4, 28), 4),
    "timm no class token": (range(24), 0),
    "transformers ViT": ([0], 1),
    "transformers DINOv2, registers": ([0, *range(5, 21)], 5),  # its head reads the mean of the patches too
}


@pytest.mark.parametrize("form", FORMS)
def test_maps_are_the_papers_loops(form, monkeypatch):
    build, size, _, (_, h, w) = CASES[form]
    model, x = seeded(build()).double(), images(size).double()
    readers, start = FORMS[form]
    classes = [[1, 3], [4, 0]]
    methods = {name: xf.METHODS[name] for name in METHODS} | SIGNED
    found = xf.explain_all(model, None, x, classes, methods, postprocess=None)
    for image, place in itertools.product(range(2), range(2)):
        blocks = attended(model, x[image : image + 1], classes[image][place], monkeypatch)
        assert len(blocks) == 2
        for name in methods:
            expected = by_hand(name, blocks, list(readers))[start : start + h * w].reshape(h, w)
            ours = found[name][image, place]  # transformers' softmax is of float32
            torch.testing.assert_close(ours, expected.to(ours), rtol=1e-4, atol=1e-6)


def test_transformers_says_the_same_attention(monkeypatch):
    model, x = seeded(CASES["transformers ViT"][0]()), images(SIZE, batch=1)
    model.set_attn_implementation("eager")
    theirs = model(x, output_attentions=True).attentions
    row = torch.eye(25)[:1]
    for A in reversed(theirs):
        row = row @ (A[0].mean(0) + torch.eye(25)) / 2
    ours = xf.attention_rollout(model, None, x, 1, postprocess=None)
    torch.testing.assert_close(ours, row[:, 1:].reshape(1, 4, 6))


def test_attention_to_all_alike_rolls_out_evenly():
    """Half of what passes through a block is shared out among its 36 tokens, the other half stays."""
    case = small_transformer()
    with torch.no_grad():
        for block in case.model.get_submodule("blocks").children():
            block.self_attn.in_proj_weight[:8] = block.self_attn.in_proj_bias[:8] = 0
    ours = xf.attention_rollout(case.model, None, case.x, postprocess=None)
    torch.testing.assert_close(ours, torch.full((3, 5, 7), (1 - 0.5**2) / 36, dtype=torch.float64))


def test_rollout_does_not_look_at_the_class_and_the_others_do():
    case = small_transformer()
    for name in METHODS:
        one, other = (xf.METHODS[name](case.model, None, case.x, cls) for cls in (0, 1))
        assert torch.equal(one, other) == (name == "attention_rollout")


@pytest.mark.parametrize("name", METHODS)
def test_networks_without_attention_over_all_patches_are_refused(name):
    case = small_case()
    windows = CASES["transformers Swin"]
    for model, x in ((case.model, case.x), (seeded(windows[0]()), images(windows[1]))):
        with pytest.raises(StructureError, match=rf"{name} needs attention over all patches .* use gradcam"):
            xf.METHODS[name](model, None, x, 1)


# -- a trained transformer ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2():
    return xf.models.load("dinov2-focus")


def eighth(net: nn.Module, x, *, reads_class: bool):
    """What the eighth of its twelve blocks knows of an image: those behind it were trained to find the salient."""
    options = {"norm": True, "stop_early": True, "intermediates_only": True, "output_fmt": "NLC"}
    ((patches, prefix),) = net.forward_intermediates(x, indices=[7], return_prefix_tokens=True, **options)
    return prefix[:, 0] if reads_class else patches.mean(1)


@pytest.mark.parametrize("reads_class", [True, False], ids=["class token", "mean of patches"])
def test_what_a_photograph_is_like_is_found_among_four(reads_class, dinov2, shared):
    """Two of four photographs are looked for, by what tells each from the others; the chance is 0.25."""
    names = ("n02123045_tabby", "n02391049_zebra", "n04285008_sports_car", "n07734744_mushroom")
    photographs = [xf.images.prepare(shared / "images" / f"{name}.jpg", dinov2.preset)[0] for name in names]
    tower = xf.bind(dinov2.model, functools.partial(eighth, reads_class=reads_class))
    with torch.no_grad():
        embeddings = tower(torch.cat(photographs))
    small = [nn.functional.interpolate(one, (112, 112), mode="area") for one in photographs]
    x = torch.cat([torch.cat(small[:2], 3), torch.cat(small[2:], 3)], 2).expand(2, -1, -1, -1)
    likeness = xf.targets.similarity(embeddings[:2]) - 0.25 * sum(map(xf.targets.similarity, embeddings))
    method, layer = (SIGNED["chefer, signed"], None) if reads_class else (xf.hirescam, "norm")
    found = method(tower, layer, x, likeness, postprocess=None).relu()
    cells = rearrange(found, "b (row h) (column w) -> b (row column) (h w)", row=2, column=2).sum(-1)
    assert (cells.diagonal() / cells.sum(1)).mean() > 0.6
