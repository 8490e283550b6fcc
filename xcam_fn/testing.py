"""The battery that every method passes, for the methods in `METHODS` and for your own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xcam_fn.methods.method import Method

LAYER = "features.4"


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

    model: nn.Sequential
    x: Tensor
    classes: list[int]


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
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    x = torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)
    return Case(model, x, [(i * 2 + 1) % 5 for i in range(batch)])


def check_method(method: Method | Callable[..., Tensor], **options: Any) -> None:
    """Check all that every method promises: run it on your own method before you trust its maps.

    On a small network in float64: heatmaps of the input's size in [0, 1], finite and detached; the same again
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

    def run(*args: Any, **more: Any) -> Tensor:
        return method(*args, **(options | more))

    for check in _checks(method):
        check(run)


def _checks(method: Callable[..., Tensor]) -> Iterator[Callable[[Callable[..., Tensor]], None]]:
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


def _gives_heatmaps(run: Callable[..., Tensor]) -> None:
    case = small_case()
    maps = run(case.model, LAYER, case.x)
    _expect(
        maps.shape == (3, 20, 28), f"heatmaps have x's batch and size: (3, 20, 28), not {tuple(maps.shape)}"
    )
    _expect(bool(torch.isfinite(maps).all()), "heatmaps are finite")
    _expect(maps.min().item() >= 0 and maps.max().item() <= 1, "heatmaps are in [0, 1]")
    _expect(maps.amax().item() > 0, "a network with evidence for its class has a heatmap that is not zero")
    _expect(not maps.requires_grad, "heatmaps are detached unless x requires grad")
    raw = run(case.model, LAYER, case.x, postprocess=None)
    _expect(raw.ndim == 3 and len(raw) == 3, f"a raw map is (B, H, W), not {tuple(raw.shape)}")
    _expect(bool(torch.isfinite(raw).all()), "raw maps are finite")


def _repeats(run: Callable[..., Tensor]) -> None:
    case = small_case()
    first, second = run(case.model, LAYER, case.x), run(case.model, LAYER, case.x)
    _expect(torch.equal(first, second), "the same call gives the same map, to the bit")


def _treats_images_alone(run: Callable[..., Tensor]) -> None:
    case = small_case(seed=1)
    together = run(case.model, LAYER, case.x, case.classes)
    alone = [run(case.model, LAYER, case.x[i : i + 1], case.classes[i]) for i in range(3)]
    _expect_close(together, torch.cat(alone), "a batch equals its images one by one")


def _takes_any_form_of_class(run: Callable[..., Tensor]) -> None:
    case = small_case(seed=2)
    predicted = case.model(case.x).argmax(1)
    expected = run(case.model, LAYER, case.x)
    _expect_close(run(case.model, LAYER, case.x, predicted), expected, "cls=None is the predicted class")
    _expect_close(run(case.model, LAYER, case.x, predicted.tolist()), expected, "cls may be a list of ints")
    constant = run(case.model, LAYER, case.x, 2)
    _expect_close(run(case.model, LAYER, case.x, [2, 2, 2]), constant, "cls may be one int for the batch")


def _takes_many_classes(run: Callable[..., Tensor]) -> None:
    case = small_case(seed=3)
    classes = [[0, 1], [2, 3], [4, 0]]
    together = run(case.model, LAYER, case.x, classes)
    alone = [run(case.model, LAYER, case.x, [row[j] for row in classes]) for j in range(2)]
    _expect_close(together, torch.stack(alone, 1), "(B, n) classes at once equal one at a time")


def _ignores_channel_order(run: Callable[..., Tensor]) -> None:
    case = small_case(seed=4)
    expected = run(case.model, LAYER, case.x, 1)
    order = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    shuffled = small_case(seed=4).model
    with torch.no_grad():
        convolution, linear = shuffled.get_submodule("features.3"), shuffled.get_submodule("fc")
        for tensor, axis in ((convolution.weight, 0), (convolution.bias, 0), (linear.weight, 1)):
            assert isinstance(tensor, Tensor)
            tensor.copy_(tensor.index_select(axis, order))
    _expect_close(run(shuffled, LAYER, case.x, 1), expected, "the order of channels changes nothing")


def _is_zero_without_evidence(run: Callable[..., Tensor]) -> None:
    case = small_case(seed=5)
    with torch.no_grad():
        weight = case.model.get_submodule("fc").weight
        assert isinstance(weight, Tensor)
        weight.zero_()
    maps = run(case.model, LAYER, case.x, 1)
    _expect(
        bool((maps == 0).all()), "where the score depends on nothing the heatmap is zero, not NaN or noise"
    )


def _takes_other_dtypes(run: Callable[..., Tensor]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = small_case(seed=6)
        maps = run(case.model.to(dtype), LAYER, case.x.to(dtype))
        _expect(maps.dtype == dtype, f"{dtype} in, {dtype} out, not {maps.dtype}")
        _expect(bool(((maps >= 0) & (maps <= 1)).all()), f"heatmaps in {dtype} are in [0, 1]")


def _runs_in_threads(run: Callable[..., Tensor]) -> None:
    case = small_case(seed=7)
    expected = [run(case.model, LAYER, case.x, c) for c in range(5)]
    fresh = small_case(seed=7).model  # nothing is remembered of it yet
    with ThreadPoolExecutor(4) as pool:
        maps = list(pool.map(lambda c: run(fresh, LAYER, case.x, c % 5), range(10)))
    _expect(
        all(torch.equal(m, expected[c % 5]) for c, m in enumerate(maps)),
        "threads share a model and its maps stay right",
    )


def _leaves_no_trace(run: Callable[..., Tensor]) -> None:
    case = small_case(seed=8)
    before, image = state(case.model), case.x.clone()
    run(case.model, LAYER, case.x)
    _expect(state(case.model) == before, "the model and the global random state are as they were, to the bit")
    _expect(torch.equal(case.x, image), "x is as it was")
    try:
        run(case.model, LAYER, case.x, 99)
    except ValueError:
        pass
    else:
        _expect(False, "a class out of range raises ValueError")
    _expect(state(case.model) == before, "the model is as it was after an error, to the bit")


def _refuses_bad_calls(run: Callable[..., Tensor]) -> None:
    case = small_case()
    broken = case.x.clone()
    broken[1, 0, 3, 3] = torch.nan
    for what, model, x, cls in (
        ("a model in training mode", small_case().model.train(), case.x, None),
        ("NaN in x", case.model, broken, None),
        ("an empty batch", case.model, case.x[:0], None),
        ("a wrong number of classes", case.model, case.x, [1, 2]),
    ):
        try:
            run(model, LAYER, x, cls)
        except ValueError:
            continue
        _expect(False, f"{what} raises ValueError")


def _ignores_chunk_size(run: Callable[..., Tensor]) -> None:
    case = small_case(seed=9)
    expected = run(case.model, LAYER, case.x)
    for chunk_size in (1, 5, 1000):
        maps = run(case.model, LAYER, case.x, chunk_size=chunk_size)
        _expect_close(maps, expected, f"chunk_size={chunk_size} gives the same map")


def _follows_seed(run: Callable[..., Tensor]) -> None:
    case = small_case(seed=10)
    first = run(case.model, LAYER, case.x, seed=1)
    _expect(torch.equal(run(case.model, LAYER, case.x, seed=1), first), "the same seed gives the same map")
