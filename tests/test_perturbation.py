"""The perturbation family: the papers' loops, the engine's promises, and other libraries."""

import functools
import math
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

import bad_calls
import networks
import xcam_fn as xf
from xcam_fn.maps import resized_minmax
from xcam_fn.perturb import (
    blurred,
    distinct_maps,
    grid_mask,
    normal,
    perturbation_scores,
    uniform,
)

QUICK = {
    "scorecam": {},
    "sscam": {"num_samples": 2},
    "iscam": {"num_samples": 2},
    "ablationcam": {},
    "groupcam": {"num_groups": 3},
    "rise": {"num_masks": 20},
    "gscorecam": {"channels": 3},
    "occlusion": {"window": (5, 6), "stride": 4},
    "sidu": {},
}
seeds = st.integers(0, 2**31 - 1)


def images(batch: int = 2, size: tuple[int, int] = (12, 16), seed: int = 5) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 0) -> nn.Module:
    return networks.seeded(networks.Residual(), seed).double()


def stretched(values: Tensor) -> Tensor:
    """n(·), the obvious way."""
    return (
        torch.zeros_like(values)
        if values.max() == values.min()
        else (values - values.min()) / (values.max() - values.min())
    )


def upsampled(values: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def probability(model: nn.Module, image: Tensor, cls: int) -> Tensor:
    return model(image[None])[0].softmax(0)[cls]


# -- the papers, one channel and one image at a time --------------------------------------------------------


def loop_scorecam(model, A, image, cls, ways):
    cam = torch.zeros_like(A[0])
    for a in A:
        scores = [probability(model, way(a), cls) for way in ways]
        cam += (sum(scores) / len(scores) - probability(model, image * 0, cls)) * a
    return cam


def loop_gscorecam(model, layer, A, image, cls):
    grads = xf.feature_and_grad(model, layer, image[None], cls).grads[0]
    best = sorted(range(len(A)), key=lambda k: grads[k].mean().item())[-3:]
    size = tuple(image.shape[1:])
    return loop_scorecam(model, A[best], image, cls, [lambda a: image * stretched(upsampled(a, size))])


def loop_sidu(model, layer, A, image, cls):
    shown = [(stretched(a) > 0.5).double() for a in A]
    P = [model((image * upsampled(B, tuple(image.shape[1:])))[None])[0].softmax(0) for B in shown]
    own = model(image[None])[0].softmax(0)
    cam = torch.zeros_like(A[0])  # at the layer's size: the sum of resized masks is their sum resized
    for B, p in zip(shown, P, strict=True):
        similarity = torch.exp(-((own - p) ** 2).sum() / (2 * 0.25**2))
        cam += similarity * sum((p - other).norm() for other in P) * B
    return cam


def loop_occlusion(model, layer, A, image, cls, window=(5, 6), stride=4):
    """Each pixel by the windows that hold it, which begin at multiples of the stride."""
    begins = [[0] for _ in window]
    for along, length, size in zip(begins, window, image.shape[1:], strict=True):
        while along[-1] + length < size:
            along.append(along[-1] + stride)
    total, count = torch.zeros_like(image[0]), torch.zeros_like(image[0])
    for top in begins[0]:
        for left in begins[1]:
            rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
            hidden = image.clone()
            hidden[:, rows, columns] = 0
            total[rows, columns] += probability(model, image, cls) - probability(model, hidden, cls)
            count[rows, columns] += 1
    return total / count


def loop_rise(model, layer, A, image, cls):
    cam = torch.zeros_like(image[0])
    for n in range(20):
        M = grid_mask(0, torch.tensor(n), image.shape[1:], grid=7, keep=0.5, like=image)
        cam += probability(model, image * M, cls) * M
    return cam / (20 * 0.5)


LOOPS = {"rise": loop_rise, "gscorecam": loop_gscorecam, "sidu": loop_sidu, "occlusion": loop_occlusion}


def loop(name: str, model: nn.Module, layer: str, image: Tensor, cls: int) -> Tensor:
    size = tuple(image.shape[1:])
    A = xf.features(model, layer, image[None])[0]
    match name:
        case "scorecam":
            return loop_scorecam(model, A, image, cls, [lambda a: image * stretched(upsampled(a, size))])
        case "iscam":
            ways = [lambda a, t=t: image * t * stretched(upsampled(a, size)) for t in (0.5, 1.0)]
            return loop_scorecam(model, A, image, cls, ways)
        case "sscam":
            noise = [normal(0, j, size, like=image) * 2.0 for j in range(2)]
            ways = [lambda a, d=d: image * stretched(upsampled(a, size) + d) for d in noise]
            return loop_scorecam(model, A, image, cls, ways)
        case "ablationcam":
            head = xf.split(model, layer, image[None])
            features, residual = head.trunk(image[None])
            s = head.head(features, residual)[0, cls]
            cam = torch.zeros_like(A[0])
            for k in range(len(A)):
                ablated = features.clone()
                ablated[:, k] = 0
                cam += (s - head.head(ablated, residual)[0, cls]) / s * A[k]
            return cam
        case "groupcam":
            found = xf.feature_and_grad(model, layer, image[None], cls)
            weighted = found.features[0] * found.grads[0].mean((1, 2))[:, None, None]
            cam = torch.zeros_like(A[0])
            smooth = blurred(image[None])[0]
            for group in weighted.tensor_split(3):
                a = group.sum(0).relu()
                M = stretched(upsampled(a, size))
                w = probability(model, image * M + smooth * (1 - M), cls) - probability(model, smooth, cls)
                cam += w.relu() * a
            return cam
        case _:
            return LOOPS[name](model, layer, A, image, cls)


@pytest.mark.parametrize("layer", ["relu", "conv2", "relu#1"])
@pytest.mark.parametrize("name", QUICK)
def test_methods_are_the_papers_loops(name, layer):
    model, x = network(), images()
    found = xf.METHODS[name](model, layer, x, [1, 3], postprocess=None, **QUICK[name])
    with torch.no_grad():
        expected = torch.stack([loop(name, model, layer, x[0], 1), loop(name, model, layer, x[1], 3)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("kind", [networks.DataDependent, networks.ReadsParameters, networks.InPlaceFunction])
def test_any_network_and_layer(name, kind):
    model = networks.seeded(kind()).double()
    layer = {"DataDependent": "block", "ReadsParameters": "conv", "InPlaceFunction": "features"}[
        kind.__name__
    ]
    x = images()
    together = xf.METHODS[name](model, layer, x, [1, 2], **QUICK[name])
    alone = [xf.METHODS[name](model, layer, x[i : i + 1], i + 1, **QUICK[name]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-8)
    assert together.max() == 1


@given(seed=seeds, cls=st.integers(0, 4))
@settings(max_examples=10, deadline=None)
def test_ablationcam_has_a_closed_form_on_pooling_and_one_linear_layer(seed, cls):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    )
    model, x = networks.seeded(model, seed).double(), images(seed=seed)
    A = model[:2](x).detach()
    s = model(x).detach()[:, cls]
    w = model[4].weight[cls].detach() * A.mean((2, 3)) / s[:, None]
    expected = torch.einsum("bk,bkhw->bhw", w, A)
    torch.testing.assert_close(
        xf.ablationcam(model, "1", x, cls, postprocess=None), expected, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("name", QUICK)
@given(seed=seeds, data=st.data())
@settings(max_examples=4, deadline=None)
def test_neither_chunks_nor_neighbors_change_a_map(name, seed, data):
    model, x = network(seed), images(3, seed=seed)
    options = QUICK[name] | ({"seed": seed} if name in ("sscam", "rise") else {})
    expected = xf.METHODS[name](model, "relu", x, [1, 2, 3], postprocess=None, **options)
    chunk_size = data.draw(st.integers(1, 70))
    chunked = xf.METHODS[name](
        model, "relu", x, [1, 2, 3], postprocess=None, chunk_size=chunk_size, **options
    )
    torch.testing.assert_close(chunked, expected, rtol=1e-6, atol=1e-9)
    cut = data.draw(st.integers(1, 2))
    parts = [
        xf.METHODS[name](model, "relu", part, cls, postprocess=None, **options)
        for part, cls in ((x[:cut], [1, 2, 3][:cut]), (x[cut:], [1, 2, 3][cut:]))
    ]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["sscam", "rise"])
def test_another_seed_gives_another_map(name):
    model, x = network(), images()
    first, second = (xf.METHODS[name](model, "relu", x, seed=seed, **QUICK[name]) for seed in (1, 2))
    assert not torch.equal(first, second)


# -- channels that are scored ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 0.3])
@pytest.mark.parametrize("name", ["scorecam", "sscam", "iscam", "ablationcam"])
def test_a_budget_leaves_the_channels_that_matter_most(name, channels):
    model, x = network(), images(1)
    A = xf.features(model, "relu", x)
    ranks = [A[0].std((1, 2))] * 5
    if name == "ablationcam":
        grads = [xf.feature_and_grad(model, "relu", x, cls).grads for cls in range(5)]
        ranks = [(A * G).abs().sum((0, 2, 3)) for G in grads]
        assert len({tuple(sorted(rank.argsort()[-2:].tolist())) for rank in ranks}) > 1
    kept = [rank.argsort()[-2:] for rank in ranks]
    method = functools.partial(xf.METHODS[name], model, "relu", x, postprocess=None, **QUICK[name])
    expected = [method(cls, projection=lambda W, k=k: W[:, k].sum(1)) for cls, k in enumerate(kept)]
    torch.testing.assert_close(method([[0, 1, 2, 3, 4]], channels=channels), torch.stack(expected, 1))


def test_what_is_left_out_takes_no_part_in_the_softmax_and_costs_nothing():
    model, x = network(), images(1)
    forwards = []

    def counted(x: Tensor) -> Tensor:
        forwards.append(len(x))
        return model(x).detach()

    A = xf.features(model, "relu", x)[0]
    kept = A.std((1, 2)).argsort()[-2:]
    with torch.no_grad():
        w = torch.stack([probability(model, x[0] * stretched(upsampled(A[k], (12, 16))), 3) for k in kept])
    expected = torch.einsum("k,kij->ij", w.softmax(0), A[kept])
    options = {"channels": 2, "softmax": True, "postprocess": None, "scorer": counted, "chunk_size": 1}
    torch.testing.assert_close(xf.scorecam(model, "relu", x, 3, **options)[0], expected)
    assert sum(forwards) == 2 + 2  # and the image and the baseline themselves


# -- the engine ---------------------------------------------------------------------------------------------


def test_scores_come_back_in_order():
    x = images(3)
    which, amount = torch.tensor([2, 0, 0, 1, 2]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=x.dtype)
    seen = []

    def score(batch: Tensor, of: Tensor) -> Tensor:
        seen.append((len(batch), of.tolist()))
        return batch.flatten(1).sum(1, keepdim=True)

    found = perturbation_scores(score, x, lambda image, a: image * a, which, (amount,), chunk_size=2)
    torch.testing.assert_close(found[:, 0], x.flatten(1).sum(1)[which] * amount)
    assert seen == [(2, [2, 0]), (2, [0, 1]), (1, [2])]


def test_what_need_not_be_computed_is_not():
    """Maps that are constant or equal to others are not scored: to the bit the same."""
    forwards = []
    conv = nn.Conv2d(3, 24, 3)
    model = networks.seeded(
        nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))
    )
    with torch.no_grad():
        assert conv.bias is not None
        conv.bias[::4] = -100.0
        for value in (conv.weight, conv.bias):
            value[5] = value[1]

    def counted(x: Tensor) -> Tensor:
        forwards.append(len(x))
        with torch.no_grad():
            return model(x)

    x = images(1).float()
    A = xf.features(model, "1", x)
    constant = int((A.flatten(2).amax(-1) == A.flatten(2).amin(-1)).sum())
    assert constant == 6
    found = xf.scorecam(model, "1", x, 2, scorer=counted, chunk_size=1, postprocess=None)
    needed = len(distinct_maps(A).maps)
    assert needed == A.shape[1] - constant - 1
    assert sum(forwards) == needed + 2  # and the image and the baseline themselves
    with torch.no_grad():
        p0 = model(torch.zeros_like(x)).softmax(1)[0, 2]
        masked = [x * resized_minmax(a[None], x.shape[2:]) for a in A[0]]
        w = torch.stack([model(one).softmax(1)[0, 2] for one in masked]) - p0
    assert torch.equal(found, torch.einsum("bkn,bk...->bn...", w[None, :, None], A)[:, 0])


def test_equal_maps_are_scored_once():
    A = torch.randn(2, 6, 3, 4)
    A[:, 3] = A[:, 1]
    A[:, 4] = 2.5
    A[1, 0] = A[0, 0]  # of another image: it is not the same perturbation
    found = distinct_maps(A)
    assert len(found.maps) == 8
    assert found.constant.reshape(2, 6)[:, 4].all()
    for i, place in enumerate(found.places):
        if not found.constant[i]:
            assert torch.equal(found.maps[place], A.flatten(0, 1)[i])
            assert found.which[place] == i // 6


def test_constant_and_zero_maps_give_zeros_never_nan():
    model, x = network(), images()
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.conv2.bias.fill_(2.0)
    for name, options in QUICK.items():
        found = xf.METHODS[name](model, "conv2", x, 1, **options)
        assert torch.isfinite(found).all()
        if name in ("scorecam", "iscam", "groupcam"):
            assert (found == 0).all()


def test_randomness_is_a_function_of_seed_and_index():
    like = torch.zeros((), dtype=torch.float64)
    alone = torch.stack([uniform(3, i, (5, 7), like=like) for i in range(4)])
    mapped = torch.vmap(lambda i: uniform(3, i, (5, 7), like=like))(torch.arange(4))
    assert torch.equal(alone, mapped)
    many = uniform(7, 0, (200_000,), like=like)
    assert 0 <= many.min() < many.max() < 1
    assert abs(many.mean() - 0.5) < 3e-3
    assert abs(many.std() - 12**-0.5) < 3e-3
    assert abs(torch.corrcoef(torch.stack([many[:-1], many[1:]]))[0, 1]) < 0.01
    assert abs(torch.corrcoef(torch.stack([many, uniform(8, 0, (200_000,), like=like)]))[0, 1]) < 0.01
    noise = normal(7, 0, (200_000,), like=like)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert torch.isfinite(noise).all()


def test_neither_is_the_global_generator_read_nor_advanced():
    model, x = network(), images()
    before = torch.random.get_rng_state()
    first = [xf.METHODS[n](model, "relu", x, **QUICK[n]) for n in ("sscam", "rise", "groupcam")]
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        second = [xf.METHODS[n](model, "relu", x, **QUICK[n]) for n in ("sscam", "rise", "groupcam")]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_masks_of_rise_are_grids_upsampled_and_shifted():
    size, grid, like = (21, 30), 7, torch.zeros((), dtype=torch.float64)
    cells = [math.ceil(length / grid) for length in size]
    for n in range(5):
        draws = uniform(4, n, ((grid + 1) ** 2 + 2,), like=like)
        cell_values = (draws[:-2] < 0.5).double().reshape(1, 1, grid + 1, grid + 1)
        whole = F.interpolate(
            cell_values, size=[(grid + 1) * c for c in cells], mode="bilinear", align_corners=False
        )
        top, left = (int(d * c) for d, c in zip(draws[-2:], cells, strict=True))
        expected = whole[0, 0, top : top + size[0], left : left + size[1]]
        found = grid_mask(4, torch.tensor(n), size, grid=grid, keep=0.5, like=like)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_blur_is_torchvisions():
    x = images(2, (60, 71))
    torch.testing.assert_close(blurred(x), gaussian_blur(x, 51, 50.0))
    assert blurred(images(1, (5, 9))).shape == (1, 3, 5, 9)


def test_grouping_by_likeness_and_any_number_of_channels():
    model, x = network(), images()
    maps = {
        cluster: xf.groupcam(model, "relu", x, [1, 3], num_groups=2, cluster=cluster, postprocess=None)
        for cluster in ("chunks", "kmeans", "agglomerative")
    }
    for found in maps.values():
        assert torch.isfinite(found).all()
    assert not torch.equal(maps["chunks"], maps["kmeans"])
    one_each = xf.groupcam(model, "relu", x, 3, num_groups=6, cluster="chunks")
    torch.testing.assert_close(
        xf.groupcam(model, "relu", x, 3, num_groups=6, cluster="agglomerative"), one_each
    )


# -- how the model is run -----------------------------------------------------------------------------------


def test_a_prepared_model_scores_like_the_model_and_follows_its_parameters(photographs):
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.resnet18(weights=None).eval()
    x = photographs[:, :, ::4, ::4].contiguous()
    for _ in range(2):
        prepared = xf.rise(model, None, x, 1, num_masks=8, postprocess=None)
        plain = xf.rise(model, None, x, 1, num_masks=8, postprocess=None, scorer=lambda x: model(x).detach())
        torch.testing.assert_close(prepared, plain, rtol=1e-4, atol=1e-7)
        with torch.no_grad():
            model.layer3[0].bn1.weight.mul_(1.5)
            model.fc.weight.mul_(2)


@pytest.mark.parametrize("kind", [networks.Residual, networks.DataDependent, networks.ReadsParameters])
def test_the_model_is_prepared_out_of_place(kind):
    model, x = networks.seeded(kind()), images().float()
    before = xf.testing.state(model)
    for options in ({}, {"precision": "bfloat16"}):
        found = xf.scorecam(model, None, x, 1, **options)
        assert xf.testing.state(model) == before
        assert found.dtype == torch.float32


def test_bfloat16_agrees_with_float32(lite0, photographs):
    x = photographs[:1, :, ::2, ::2].contiguous()
    exact, fast = (
        xf.groupcam(lite0, "_blocks.15", x, num_groups=16, precision=precision, postprocess=None)
        for precision in ("float32", "bfloat16")
    )
    assert torch.corrcoef(torch.stack([exact.flatten(), fast.flatten()]))[0, 1] > 0.99
    assert not torch.equal(exact, fast)


def test_compiling_agrees_with_eager():
    script = Path(__file__).with_name("compiled_scoring.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["rise", "once", "scorecam"]


def test_a_scorer_stands_in_for_the_model():
    model, x = network(), images()

    def scorer(x: Tensor) -> Tensor:
        return torch.from_numpy(model(x).detach().numpy())  # as from another runtime

    assert torch.equal(
        xf.rise(None, None, x, num_masks=9, scorer=scorer),
        xf.rise(model, None, x, num_masks=9, scorer=scorer),
    )
    torch.testing.assert_close(xf.scorecam(model, "relu", x, scorer=scorer), xf.scorecam(model, "relu", x))


def test_targets_of_all_kinds():
    model, x = network(), images()

    def raw(cls: object, **options: str) -> Tensor:
        return xf.scorecam(model, "relu", x, cls, postprocess=None, **options)

    expected = raw(2, score="logit")
    for cls in (xf.targets.logit(2), xf.targets.logit([2, 2]), lambda y: y[:, 2]):
        torch.testing.assert_close(raw(cls), expected)
    assert not torch.equal(raw(2), expected)


def test_maps_can_be_differentiated():
    model, x = network(), images(1).requires_grad_()
    weight = torch.randn(1, 12, 16, dtype=torch.float64)
    for name in ("scorecam", "ablationcam", "iscam", "groupcam"):

        def f(x: Tensor, name: str = name) -> Tensor:
            return (xf.METHODS[name](model, "conv2", x, 1, postprocess=None, **QUICK[name]) * weight).sum()

        (found,) = torch.autograd.grad(f(x), x)
        direction = torch.randn_like(x)
        with torch.no_grad():
            expected = (f(x + 1e-6 * direction) - f(x - 1e-6 * direction)) / 2e-6
        torch.testing.assert_close((found * direction).sum(), expected, rtol=1e-3, atol=1e-6)


def test_memory_does_not_grow_with_the_number_of_maps():
    script = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    grown = {name: float(mebibytes) for name, mebibytes in map(str.split, done.stdout.splitlines())}
    # Held at once: 110 MiB of masked images, 240 of ablated features, and 44 of baselines beside 21 of maps.
    assert len(grown) == 3
    assert grown["rise"] < 48
    assert grown["ablationcam"] < 96
    assert grown["scorecam"] < 48


# -- other libraries ----------------------------------------------------------------------------------------


def torchcam_weights(peer: object, model: nn.Module, layer: str, x: Tensor, classes: list[int]) -> Tensor:
    with peer(model, layer, batch_size=8) as extractor:
        with torch.no_grad():
            model(x)
        (found,) = extractor(classes, normalized=False)
        return found


@pytest.mark.parametrize(("name", "peer"), [("scorecam", "ScoreCAM"), ("iscam", "ISCAM")])
def test_torchcam_agrees(name, peer):
    import torchcam.methods

    model, x = networks.seeded(networks.Residual()), images().float()
    few = {"num_samples": 3} if name == "iscam" else {}
    theirs = torchcam_weights(
        functools.partial(getattr(torchcam.methods, peer), **few), model, "conv1", x, [1, 3]
    )
    method = xf.find_method(name, variant="torchcam")
    ours = method(model, "conv1", x, [1, 3], postprocess=None, **few)
    # It adds up its normalized maps' originals with the weights, after ReLU.
    torch.testing.assert_close(ours.relu(), theirs, rtol=0, atol=1e-4)


def test_torchcam_sscam_agrees_when_given_our_noise(monkeypatch):
    import torchcam.methods

    model, x = networks.seeded(networks.Residual()), images().float()
    draws = iter(range(10))

    def sample(self, shape: torch.Size) -> Tensor:
        return (normal(0, next(draws), (12, 16), like=x) * self.scale).expand(shape)

    monkeypatch.setattr(torch.distributions.normal.Normal, "sample", sample)
    peer = functools.partial(torchcam.methods.SSCAM, num_samples=2, std=0.5)
    theirs = torchcam_weights(peer, model, "conv1", x, [1, 3])
    ours = xf.find_method("sscam", variant="torchcam")(
        model, "conv1", x, [1, 3], num_samples=2, std=0.5, postprocess=None
    )
    torch.testing.assert_close(ours.relu(), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "window", "stride"),
    [
        (networks.Residual(), (4, 4), (3, 3)),
        (networks.Residual(), (12, 5), (12, 2)),
        (networks.OneDimensional(), (7,), (4,)),
        (networks.ThreeDimensional(), (4, 3, 5), (3, 2, 2)),
    ],
)
def test_captums_occlusion_agrees(model, window, stride):
    from captum.attr import Occlusion

    model = networks.seeded(model).double()
    size = {1: (30,), 2: (12, 16), 3: (8, 7, 9)}[len(window)]
    channels = next(model.parameters()).shape[1]
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options: dict[str, object] = {"window": window, "stride": stride, "baseline": 0.3, "score": "logit"}
    ours = xf.occlusion(model, None, x, [1, 3], postprocess=None, **options)
    theirs = Occlusion(model).attribute(
        x, (channels, *window), (channels, *stride), baselines=0.3, target=torch.tensor([1, 3])
    )
    torch.testing.assert_close(ours, theirs[:, 0].double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["scorecam", "ablationcam"])
def test_pytorch_grad_cam_agrees(name, capfd):
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = networks.seeded(networks.Residual()), images().float()
    peer = {"scorecam": pytorch_grad_cam.ScoreCAM, "ablationcam": pytorch_grad_cam.AblationCAM}[name]

    layer = "relu#3"  # its maps are not negative, and heatmap's ReLU changes nothing in the mask
    ours = xf.find_method(name, variant="pytorch-grad-cam")(model, layer, x, [1, 3])
    twin = networks.seeded(networks.Unshared())
    with peer(twin, [twin.last]) as cam:
        theirs = cam(x, [ClassifierOutputTarget(1), ClassifierOutputTarget(3)])
    capfd.readouterr()
    assert (ours - xf.heatmap(torch.from_numpy(theirs), (12, 16))).abs().max() <= 1e-4


def test_scales_add_up_as_elsewhere():
    model, x = network(), images()
    expected = xf.iscam(model, "relu", x, 1, scales=list(accumulate((0.25, 0.5, 0.75, 1.0))))
    torch.testing.assert_close(xf.iscam(model, "relu", x, 1, num_samples=4, scales="cumulative"), expected)


# -- bad input ----------------------------------------------------------------------------------------------

ONE = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))


def call(name: str, **options):
    return lambda: xf.METHODS[name](networks.seeded(networks.Residual()), "relu", ONE, 1, **options)


BAD = {
    "chunk": (
        call("scorecam", chunk_size=0),
        ValueError,
        r"chunk_size=0 is out of range; expected an integer ≥ 1",
    ),
    "chunk kind": (call("rise", chunk_size="4"), TypeError, r"chunk_size must be .*, got '4'"),
    "samples": (call("sscam", num_samples=0), ValueError, r"num_samples=0 is out of range"),
    "std": (call("sscam", std=-1.0), ValueError, r"std=-1.0 is out of range; expected a number ≥ 0"),
    "std nan": (call("sscam", std=math.nan), ValueError, r"std=nan is out of range"),
    "scales": (
        call("iscam", scales=[]),
        ValueError,
        r"scales is empty; expected at least one entry",
    ),
    "scales word": (
        call("iscam", scales="odd"),
        ValueError,
        r"scales='odd'; expected one of 'even', 'cumulative'",
    ),
    "groups": (call("groupcam", num_groups=7), ValueError, r"num_groups=7, but the layer has 6 channels"),
    "no groups": (call("groupcam", num_groups=0), ValueError, r"num_groups=0 is out of range"),
    "cluster": (
        call("groupcam", cluster="dbscan"),
        ValueError,
        r"cluster='dbscan'; expected one of 'chunks'",
    ),
    "keep": (call("rise", keep=1.5), ValueError, r"keep=1.5 is out of range; expected a number > 0 and ≤ 1"),
    "masks": (call("rise", num_masks=0), ValueError, r"num_masks=0 is out of range"),
    "seed": (call("rise", seed=0.5), TypeError, r"seed must be an integer"),
    "score": (
        call("scorecam", score="odds"),
        ValueError,
        r"score='odds'; expected one of 'probability', 'logit'",
    ),
    "summed": (
        call("scorecam", summed="all"),
        ValueError,
        r"summed='all'; expected one of 'features', 'masks'",
    ),
    "no channels": (call("scorecam", channels=0), ValueError, r"channels=0 is out of range"),
    "share of channels": (
        call("ablationcam", channels=1.5),
        ValueError,
        r"channels=1.5 is out of range; expected a number > 0 and ≤ 1",
    ),
    "window": (
        call("occlusion", window=13),
        ValueError,
        r"window=13; expected an int or 2 ints, at most the image's size \(12, 16\)",
    ),
    "stride": (
        call("occlusion", window=4, stride=(2, 5)),
        ValueError,
        r"stride=\(2, 5\); .* at most the window's size \(4, 4\)",
    ),
    "axes": (call("occlusion", window=[4]), ValueError, r"window=\[4\]; expected an int or 2"),
    "no classes": (
        lambda: xf.sidu(
            xf.bind(networks.seeded(networks.Residual()), lambda net, x: net(x)[:, 0]), "relu", ONE
        ),
        xf.checks.StructureError,
        r"sidu compares all classes, .* a tensor of shape \(1,\)",
    ),
    "precision": (
        call("scorecam", precision="float8"),
        ValueError,
        r"precision='float8'; expected one of 'float32'",
    ),
    "scorer": (
        call("scorecam", scorer=3),
        TypeError,
        r"scorer must be a callable or None",
    ),
    "baseline": (call("scorecam", baseline=torch.zeros(5)), ValueError, r"baseline has shape \(5,\)"),
    "nothing to score": (
        lambda: xf.rise(None, None, ONE),
        ValueError,
        r"model=None; expected a model, or scorer=",
    ),
    "shape of a target": (
        lambda: xf.scorecam(networks.seeded(networks.Residual()), "relu", ONE, lambda y: y),
        ValueError,
        r"cls: the target returned shape \(1, 5\); expected \(1,\)",
    ),
    "NaN of a target": (
        lambda: xf.scorecam(
            networks.seeded(networks.Residual()),
            "relu",
            ONE,
            lambda y: y[:, 0] / (y[:, 0] != y[:, 0]),
            chunk_size=2,
        ),
        ValueError,
        r"the score of perturbation 0 \(image 0\) is \[-?inf\]",
    ),
}


test_the_error_says_what_is_wrong = bad_calls.refused(BAD)


def test_out_of_memory_says_which_chunk_size_to_try():
    def scorer(x: Tensor) -> Tensor:
        if len(x) > 2:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
            )
        return torch.zeros(len(x), 5)

    with pytest.raises(MemoryError, match=r"chunk_size=8: .* try chunk_size=2"):
        xf.rise(None, None, ONE, 1, scorer=scorer, chunk_size=8)


@pytest.mark.usefixtures("unchecked")
def test_compiling_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"compile=True needs a C\+\+ compiler"):
        call("scorecam", compile=True)()


def test_an_interrupt_leaves_nothing_behind():
    model, x = networks.seeded(networks.Residual()), images().float()
    before = xf.testing.state(model)

    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        xf.scorecam(model, "relu", x, scorer=interrupted)
    assert xf.testing.state(model) == before


# -- scores whose zero is arbitrary ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reciprocam", "rise"])
@given(seed=seeds, shift=st.sampled_from([-1000.0, -30.0, 30.0]))
@settings(max_examples=4, deadline=None)
def test_a_heatmap_of_scores_does_not_depend_on_where_their_zero_is(name, seed, shift):
    model, x, options = network(seed), images(seed=seed), QUICK.get(name, {})
    method = xf.METHODS[name]
    expected = method(model, "relu", x, 1, score="logit", **options)
    raw = method(model, "relu", x, 1, score="logit", postprocess=None, **options)
    torch.testing.assert_close(expected, resized_minmax(raw, (12, 16)))
    assert expected.amax() == 1
    if name == "reciprocam":  # RISE's map is a sum over masks, which are not alike everywhere
        with torch.no_grad():
            model.fc.bias += shift
        moved = method(model, "relu", x, 1, score="logit", **options)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
        assert ((shift > 0) | (method(model, "relu", x, 1, score="logit", postprocess=None) < 0)).all()


@pytest.mark.parametrize("name", ["reciprocam", "rise"])
def test_a_heatmap_of_probabilities_is_what_it_was(name):
    model, x, options = network(), images(), QUICK.get(name, {})
    raw = xf.METHODS[name](model, "relu", x, 1, postprocess=None, **options)
    assert raw.min() >= 0
    torch.testing.assert_close(xf.METHODS[name](model, "relu", x, 1, **options), xf.heatmap(raw, (12, 16)))
