"""The battery that every method passes, for the methods in `METHODS` and for your own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from xcam_fn.checks import StructureError
from xcam_fn.methods.method import Method

Run = Callable[..., Tensor]


class State(NamedTuple):
    """What a call must leave as it was; equal states compare equal."""

    tensors: dict[str, bytes]
    grads: dict[str, bytes | None]
    requires_grad: dict[str, bool]
    training: dict[str, bool]
    hooks: dict[str, int]
    modules: dict[str, int]
    rng: bytes


def state(model: nn.Module) -> State:
    """Every parameter, buffer, gradient, flag and hook of the model, and the global random state, to the bit.

    Args:
        model: the network.

    Returns:
        A value to compare with `==` before and after a call.
    """
    parameters = dict(model.named_parameters())
    return State(
        tensors={name: _bytes(value) for name, value in model.state_dict(keep_vars=True).items()},
        grads={n: None if p.grad is None else _bytes(p.grad) for n, p in parameters.items()},
        requires_grad={n: p.requires_grad for n, p in parameters.items()},
        training={name: module.training for name, module in model.named_modules()},
        hooks={name: _hook_count(module) for name, module in model.named_modules()},
        modules={name: id(module) for name, module in model.named_modules()},
        rng=_bytes(torch.random.get_rng_state()),
    )


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _hook_count(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(module.__dict__[kind]) for kind in kinds)


class Case(NamedTuple):
    """A small network in float64 and a batch for it."""

    model: nn.Module
    x: Tensor
    classes: list[int]
    layer: str


def small_case(seed: int = 0, batch: int = 3, size: tuple[int, int] = (20, 28)) -> Case:
    """A convolutional network with batch norm, pooling and one linear layer, and non-square images for it.

    Args:
        seed: of the weights and images.
        batch: images, ≥ 1.
        size: of the images, pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    features = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
    )  # fmt: skip
    model = nn.Sequential()
    model.add_module("features", features)
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(8, 5))
    return _case(model, "features.4", generator, batch, size)


def small_transformer(seed: int = 0, batch: int = 3, size: tuple[int, int] = (20, 28)) -> Case:
    """A transformer of two blocks with a class token, and non-square images of 5 × 7 patches for it.

    Args:
        seed: of the weights and images.
        batch: images, ≥ 1.
        size: of the images, pixels, multiples of 4.
    """
    generator = torch.Generator().manual_seed(seed + 11)  # weights with which its patches speak for the class
    return _case(_Transformer(size[0] // 4 * (size[1] // 4)), "blocks.1.norm1", generator, batch, size)


def _case(
    model: nn.Module, layer: str, generator: torch.Generator, batch: int, size: tuple[int, int]
) -> Case:
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    x = torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)
    return Case(model, x, [(i * 2 + 1) % 5 for i in range(batch)], layer)


Make = Callable[..., Case]


class _Attention(nn.Module):
    """Self-attention of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (n h d) -> n b h t d", n=3, h=2).unbind()
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(attended, "b h t d -> b t (h d)"))


class _Block(nn.Module):
    """Attention and a small network, each after a norm and beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn = _Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Transformer(nn.Module):
    """Patches and a class token through two blocks; the class token is classified."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.zeros(1, patches + 1, 8))
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.Sequential(_Block(), _Block())
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.patches(x), "b k h w -> b (h w) k")
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.position
        return self.fc(self.norm(self.blocks(self.dropout(tokens)))[:, 0])


def check_method(method: Method | Callable[..., Tensor], **options: Any) -> None:
    """Check all that every method promises: run it on your own method before you trust its maps.

    On a small network in float64 (a convolutional one; a transformer for a method that asks for one by a
    `checks.StructureError`): heatmaps of the input's size in [0, 1], finite and detached; the same again
    for the same call; a batch equal to its images one by one; a class given as an int, a list, a tensor or a
    target; n classes at once equal to one at a time; no dependence on the order of channels; zeros where the
    score depends on nothing; any chunk size and the same seed giving the same map; float32 and bfloat16;
    several threads on one model; x, the model, its hooks and the global random state as they were, also after
    an error.

    Args:
        method: a method of `METHODS`, or your own: `(model, layer, x, cls, **options) -> (B, h, w)`.
        **options: passed with every call, such as `num_masks=50` to keep it quick.

    Raises:
        AssertionError: says which promise does not hold and by how much.
    """
    make = small_case
    try:
        case = make()
        method(case.model, case.layer, case.x, **options)
    except StructureError:
        make = small_transformer
    check_on(make, method, **options)


def check_on(make: Make, method: Method | Callable[..., Tensor], **options: Any) -> None:
    """Check the same on the network that `make(seed=...)` builds, `small_case` or `small_transformer`.

    Args:
        make: the network, its layer and a batch for it.
        method: as for `check_method`.
        **options: as for `check_method`.

    Raises:
        AssertionError: says which promise does not hold and by how much.
    """

    def run(*args: Any, **more: Any) -> Tensor:
        return method(*args, **(options | more))

    for check in _checks(method):
        check(run, make)


def _checks(method: Callable[..., Tensor]) -> Iterator[Callable[[Run, Make], None]]:
    family = getattr(method, "family", None)
    yield from (
        _gives_heatmaps,
        _repeats,
        _treats_images_alone,
        _takes_any_form_of_class,
        _takes_many_classes,
        _takes_other_dtypes,
        _runs_in_threads,
        _leaves_no_trace,
        _refuses_bad_calls,
    )
    parameters = inspect.signature(method).parameters
    if family != "baseline":  # weights drawn for channels by their number
        yield _ignores_channel_order
    # Random masks do not add up to a constant, whatever they score, and features do not look at the score.
    if "num_masks" not in parameters and family not in ("activation", "baseline"):
        yield _is_zero_without_evidence
    if "chunk_size" in parameters:
        yield _ignores_chunk_size
    if "seed" in parameters:
        yield _follows_seed


def _expect(holds: bool, promise: str) -> None:
    if not holds:
        raise AssertionError(promise)


def _expect_close(actual: Tensor, expected: Tensor, promise: str, tolerance: float = 1e-6) -> None:
    _expect(
        actual.shape == expected.shape, f"{promise}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    difference = (actual - expected).abs().max().item()
    _expect(difference <= tolerance, f"{promise}: they differ by {difference:.3g}, more than {tolerance:.0e}")


def _gives_heatmaps(run: Run, make: Make) -> None:
    case = make()
    maps = run(case.model, case.layer, case.x)
    _expect(
        maps.shape == (3, 20, 28), f"heatmaps have x's batch and size: (3, 20, 28), not {tuple(maps.shape)}"
    )
    _expect(bool(torch.isfinite(maps).all()), "heatmaps are finite")
    _expect(maps.min().item() >= 0 and maps.max().item() <= 1, "heatmaps are in [0, 1]")
    _expect(maps.amax().item() > 0, "a network with evidence for its class has a heatmap that is not zero")
    _expect(not maps.requires_grad, "heatmaps are detached unless x requires grad")
    raw = run(case.model, case.layer, case.x, postprocess=None)
    _expect(raw.ndim == 3 and len(raw) == 3, f"a raw map is (B, H, W), not {tuple(raw.shape)}")
    _expect(bool(torch.isfinite(raw).all()), "raw maps are finite")


def _repeats(run: Run, make: Make) -> None:
    case = make()
    first, second = run(case.model, case.layer, case.x), run(case.model, case.layer, case.x)
    _expect(torch.equal(first, second), "the same call gives the same map, to the bit")


def _treats_images_alone(run: Run, make: Make) -> None:
    case = make(seed=1)
    together = run(case.model, case.layer, case.x, case.classes)
    alone = [run(case.model, case.layer, case.x[i : i + 1], case.classes[i]) for i in range(3)]
    _expect_close(together, torch.cat(alone), "a batch equals its images one by one")


def _takes_any_form_of_class(run: Run, make: Make) -> None:
    case = make(seed=2)
    predicted = case.model(case.x).argmax(1)
    expected = run(case.model, case.layer, case.x)
    _expect_close(run(case.model, case.layer, case.x, predicted), expected, "cls=None is the predicted class")
    _expect_close(
        run(case.model, case.layer, case.x, predicted.tolist()), expected, "cls may be a list of ints"
    )
    constant = run(case.model, case.layer, case.x, 2)
    _expect_close(
        run(case.model, case.layer, case.x, [2, 2, 2]), constant, "cls may be one int for the batch"
    )


def _takes_many_classes(run: Run, make: Make) -> None:
    case = make(seed=3)
    classes = [[0, 1], [2, 3], [4, 0]]
    together = run(case.model, case.layer, case.x, classes)
    alone = [run(case.model, case.layer, case.x, [row[j] for row in classes]) for j in range(2)]
    _expect_close(together, torch.stack(alone, 1), "(B, n) classes at once equal one at a time")


# The parameters of the two small networks that have the channels of their layer as an axis, and which.
_CHANNEL_AXES = {
    r"^features\.3\.": 0, r"^patches\.": 0, r"^class_token|^position": 2, r"norm": 0, r"qkv\.weight": 1,
    r"proj\.": 0, r"mlp\.0\.weight": 1, r"mlp\.2\.": 0, r"^fc\.weight": 1,
}  # fmt: skip


def _ignores_channel_order(run: Run, make: Make) -> None:
    case = make(seed=4)
    expected = run(case.model, case.layer, case.x, 1)
    order = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    shuffled = make(seed=4)
    with torch.no_grad():
        for name, tensor in shuffled.model.named_parameters():
            for ending, axis in _CHANNEL_AXES.items():
                if re.search(ending, name):
                    tensor.copy_(tensor.index_select(axis, order))
    _expect_close(
        run(shuffled.model, shuffled.layer, case.x, 1), expected, "the order of channels changes nothing"
    )


def _is_zero_without_evidence(run: Run, make: Make) -> None:
    case = make(seed=5)
    with torch.no_grad():
        weight = case.model.get_submodule("fc").weight
        assert isinstance(weight, Tensor)
        weight.zero_()
    maps = run(case.model, case.layer, case.x, 1)
    _expect(
        bool((maps == 0).all()), "where the score depends on nothing the heatmap is zero, not NaN or noise"
    )


def _takes_other_dtypes(run: Run, make: Make) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = make(seed=6)
        maps = run(case.model.to(dtype), case.layer, case.x.to(dtype))
        _expect(maps.dtype == dtype, f"{dtype} in, {dtype} out, not {maps.dtype}")
        _expect(bool(((maps >= 0) & (maps <= 1)).all()), f"heatmaps in {dtype} are in [0, 1]")


def _runs_in_threads(run: Run, make: Make) -> None:
    case = make(seed=7)
    expected = [run(case.model, case.layer, case.x, c) for c in range(5)]
    fresh = make(seed=7).model  # nothing is remembered of it yet
    with ThreadPoolExecutor(4) as pool:
        maps = list(pool.map(lambda c: run(fresh, case.layer, case.x, c % 5), range(10)))
    _expect(
        all(torch.equal(m, expected[c % 5]) for c, m in enumerate(maps)),
        "threads share a model and its maps stay right",
    )


def _leaves_no_trace(run: Run, make: Make) -> None:
    case = make(seed=8)
    before, image = state(case.model), case.x.clone()
    run(case.model, case.layer, case.x)
    _expect(state(case.model) == before, "the model and the global random state are as they were, to the bit")
    _expect(torch.equal(case.x, image), "x is as it was")
    try:
        run(case.model, case.layer, case.x, 99)
    except ValueError:
        pass
    else:
        _expect(False, "a class out of range raises ValueError")
    _expect(state(case.model) == before, "the model is as it was after an error, to the bit")


def _refuses_bad_calls(run: Run, make: Make) -> None:
    case = make()
    broken = case.x.clone()
    broken[1, 0, 3, 3] = torch.nan
    for what, model, x, cls in (
        ("a model in training mode", make().model.train(), case.x, None),
        ("NaN in x", case.model, broken, None),
        ("an empty batch", case.model, case.x[:0], None),
        ("a wrong number of classes", case.model, case.x, [1, 2]),
    ):
        try:
            run(model, case.layer, x, cls)
        except ValueError:
            continue
        _expect(False, f"{what} raises ValueError")


def _ignores_chunk_size(run: Run, make: Make) -> None:
    case = make(seed=9)
    expected = run(case.model, case.layer, case.x)
    for chunk_size in (1, 5, 1000):
        maps = run(case.model, case.layer, case.x, chunk_size=chunk_size)
        _expect_close(maps, expected, f"chunk_size={chunk_size} gives the same map")


def _follows_seed(run: Run, make: Make) -> None:
    case = make(seed=10)
    first = run(case.model, case.layer, case.x, seed=1)
    _expect(
        torch.equal(run(case.model, case.layer, case.x, seed=1), first), "the same seed gives the same map"
    )
