"""The battery that every method passes, for the methods in `METHODS` and for your own."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.arguments import Count, checked
from xcam_fn.checks import StructureError
from xcam_fn.methods.method import Method

Run = Callable[..., Tensor]


def state(model: nn.Module) -> dict[str, Any]:
    """Every parameter, buffer, gradient, flag and hook of the model, and the global random state, to the bit.

    Args:
        model: the network, before and after a call; the two values are compared with `==`.
    """
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    return {
        "tensors": {name: _bytes(value) for name, value in model.state_dict(keep_vars=True).items()},
        "gradients": {name: _bytes(p.grad) for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {name: sum(len(vars(module)[kind]) for kind in _HOOKS) for name, module in modules.items()},
        "modules": {name: id(module) for name, module in modules.items()},
        "random": _bytes(torch.random.get_rng_state()),
    }


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _bytes(value: Any) -> Any:
    """A tensor's values to the bit, also of those within a tuple; what else a state dict holds as it is."""
    if isinstance(value, (tuple, list)):
        return [*map(_bytes, value)]
    if not isinstance(value, Tensor):
        return value
    value = value.dequantize() if value.is_quantized else value
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


class Case(NamedTuple):
    """A small network in float64 and a batch for it."""

    model: nn.Module
    x: Tensor
    classes: list[int]
    layer: str


@checked
def small_case(seed: int = 0, batch: Count = 3, size: tuple[Count, Count] = (20, 28)) -> Case:
    """A convolutional network with batch norm, pooling and one linear layer, and non-square images for it.

    Args:
        seed: of the weights and images.
        batch: images, ≥ 1.
        size: of the images, pixels.
    """
    with torch.device("meta"):  # where what modules are initialized with is not drawn
        features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        )  # fmt: skip
        head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(8, 5)}
        model = nn.Sequential(OrderedDict(features=features, **head))
    return _case(model, "features.4", seed, batch, size)


@checked
def small_transformer(seed: int = 0, batch: Count = 3, size: tuple[Count, Count] = (20, 28)) -> Case:
    """A transformer of two blocks with a class token, and images for it, their size in multiples of 4 pixels.

    It takes the arguments of `small_case`.
    """
    with torch.device("meta"):
        model = _Transformer(size[0] // 4 * (size[1] // 4))
    return _case(model, "blocks.1.norm1", seed + 11, batch, size)  # its patches speak for the class


def _case(model: nn.Module, layer: str, seed: int, batch: int, size: tuple[int, int]) -> Case:
    checks.check_amount("size", size, batch, *size)
    generator = torch.Generator().manual_seed(seed % 2**63)
    model.double().to_empty(device="cpu").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    x = torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)
    return Case(model, x, [(i * 2 + 1) % 5 for i in range(batch)], layer)


Make = Callable[..., Case]


class _Transformer(nn.Module):
    """Patches and a class token through two blocks; the class token is classified."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.zeros(1, patches + 1, 8))
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(
            nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        ))  # fmt: skip
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.patches(x), "b k h w -> b (h w) k")
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.position
        return self.fc(self.norm(self.blocks(self.dropout(tokens)))[:, 0])


def check_method(method: Method | Callable[..., Tensor], **options: Any) -> None:
    """Check everything that a method must guarantee. Run it on your own method before you trust its maps.

    On a small network in float64 (convolutional, or a transformer if the method raises
    `checks.StructureError`): heatmaps have the input's size, lie in [0, 1], and are finite and detached; the
    same call gives the same map; a batch equals its images one by one; a class can be an int, a list, a
    tensor or a target; n classes at once equal one at a time; the order of channels does not matter; the map
    is zero if the score depends on nothing; any chunk size gives the same map, and so does the same seed;
    float32 and bfloat16 work; several threads can share a model; x, the model, its hooks and the global
    random state are unchanged, even after an error.

    Args:
        method: a method of `METHODS`, or your own: `(model, layer, x, cls, **options) -> (B, h, w)`.
        **options: passed with every call, such as `num_masks=50` to keep it quick.

    Raises:
        AssertionError: says which guarantee is violated and by how much.
    """
    case, make = small_case(), small_case
    try:
        method(case.model, case.layer, case.x, **options)
    except StructureError:
        make = small_transformer
    check_on(make, method, **options)


def check_on(make: Make, method: Method | Callable[..., Tensor], **options: Any) -> None:
    """Check the same, and raise the same, on the network that `make(seed=...)` builds.

    Args:
        make: `small_case` or `small_transformer`.
        method: as for `check_method`.
        **options: as for `check_method`.
    """

    def run(case: Case, cls: Any = None, **more: Any) -> Tensor:
        return method(case.model, case.layer, case.x, cls, **(options | more))

    for check in _checks(method):
        check(run, make)


def _checks(method: Callable[..., Tensor]) -> Iterator[Callable[[Run, Make], None]]:
    yield from (_gives_heatmaps, _repeats, _takes_batches_and_classes, _takes_other_dtypes)
    yield from (_runs_in_threads, _leaves_no_trace, _refuses_bad_calls)
    family, parameters = getattr(method, "family", None), inspect.signature(method).parameters
    if family != "baseline":  # weights drawn for channels by their number
        yield _ignores_channel_order
    # Random masks do not add up to a constant, whatever they score, and features do not look at the score.
    if "num_masks" not in parameters and family not in ("activation", "baseline"):
        yield _is_zero_without_evidence
    if "chunk_size" in parameters:
        yield _ignores_chunk_size
    if "seed" in parameters:
        yield functools.partial(_repeats, seed=1)


def _expect(holds: bool | Tensor, promise: str) -> None:
    if not holds:
        raise AssertionError(promise)


def _expect_close(actual: Tensor, expected: Tensor, promise: str) -> None:
    shape, wanted = tuple(actual.shape), tuple(expected.shape)
    _expect(shape == wanted, f"{promise}: shape {shape}, not {wanted}")
    difference = (actual - expected).abs().max().item()
    _expect(difference <= 1e-6, f"{promise}: they differ by {difference:.3g}, more than 1e-06")


def _gives_heatmaps(run: Run, make: Make) -> None:
    case = make()
    maps = run(case)
    expected = (len(case.x), *case.x.shape[2:])
    _expect(maps.shape == expected, f"heatmaps have x's batch and size: {expected}, not {tuple(maps.shape)}")
    _expect(torch.isfinite(maps).all(), "heatmaps are finite")
    _expect(maps.min() >= 0 and maps.max() <= 1, "heatmaps are in [0, 1]")
    _expect(maps.amax() > 0, "a network with evidence for its class has a heatmap that is not zero")
    _expect(not maps.requires_grad, "heatmaps are detached unless x requires grad")
    raw = run(case, postprocess=None)
    _expect(raw.ndim == 3 and len(raw) == 3, f"a raw map is (B, H, W), not {tuple(raw.shape)}")
    _expect(torch.isfinite(raw).all(), "raw maps are finite")


def _repeats(run: Run, make: Make, **options: Any) -> None:
    case = make()
    first, second = run(case, **options), run(case, **options)
    _expect(torch.equal(first, second), "the same call gives the same map, to the bit")


def _takes_batches_and_classes(run: Run, make: Make) -> None:
    case = make(seed=1)
    alone = [run(case._replace(x=case.x[i : i + 1]), case.classes[i]) for i in range(3)]
    _expect_close(run(case, case.classes), torch.cat(alone), "a batch equals its images one by one")
    predicted, expected = case.model(case.x).argmax(1), run(case)
    _expect_close(run(case, predicted), expected, "cls=None is the predicted class")
    _expect_close(run(case, predicted.tolist()), expected, "cls may be a list of ints")
    _expect_close(run(case, [2, 2, 2]), run(case, 2), "cls may be one int for the batch")
    many = run(case, [[0, 1], [2, 3], [4, 0]])
    alone = [run(case, [0, 2, 4]), run(case, [1, 3, 0])]
    _expect_close(many, torch.stack(alone, 1), "(B, n) classes at once equal one at a time")


# The parameters of the two small networks that have the channels of their layer as an axis, and which.
_CHANNEL_AXES = {
    r"^features\.3\.": 0, r"^patches\.": 0, r"^class_token|^position": 2, r"norm": 0, r"in_proj_weight": 1,
    r"out_proj\.": 0, r"linear1\.weight": 1, r"linear2\.": 0, r"^fc\.weight": 1,
}  # fmt: skip


def _ignores_channel_order(run: Run, make: Make) -> None:
    order = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    case, shuffled = make(seed=4), make(seed=4)
    with torch.no_grad():
        for name, tensor in shuffled.model.named_parameters():
            for ending, axis in _CHANNEL_AXES.items():
                if re.search(ending, name):
                    tensor.copy_(tensor.index_select(axis, order))
    _expect_close(run(shuffled, 1), run(case, 1), "the order of channels changes nothing")


def _is_zero_without_evidence(run: Run, make: Make) -> None:
    case = make(seed=5)
    with torch.no_grad():
        case.model.get_parameter("fc.weight").zero_()
    promise = "where the score depends on nothing the heatmap is zero, not NaN or noise"
    _expect((run(case, 1) == 0).all(), promise)


def _takes_other_dtypes(run: Run, make: Make) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = make(seed=6)
        maps = run(case._replace(model=case.model.to(dtype), x=case.x.to(dtype)))
        _expect(maps.dtype == dtype, f"{dtype} in, {dtype} out, not {maps.dtype}")
        _expect(((maps >= 0) & (maps <= 1)).all(), f"heatmaps in {dtype} are in [0, 1]")


def _runs_in_threads(run: Run, make: Make) -> None:
    case = make(seed=7)
    expected = [run(case, cls) for cls in range(5)]
    fresh = make(seed=7)  # nothing is remembered of it yet
    with ThreadPoolExecutor(4) as pool:
        maps = list(pool.map(lambda i: run(fresh, i % 5), range(10)))
    same = all(torch.equal(one, expected[i % 5]) for i, one in enumerate(maps))
    _expect(same, "threads share a model and its maps stay right")


def _leaves_no_trace(run: Run, make: Make) -> None:
    case = make(seed=8)
    before, image = state(case.model), case.x.clone()
    run(case)
    _expect(state(case.model) == before, "the model and the global random state are as they were, to the bit")
    _expect(torch.equal(case.x, image), "x is as it was")
    with contextlib.suppress(ValueError):
        run(case, 99)
    _expect(state(case.model) == before, "the model is as it was after an error, to the bit")


def _refuses_bad_calls(run: Run, make: Make) -> None:
    case, broken = make(), make()
    broken.x[1, 0, 3, 3] = torch.nan
    refused: dict[str, tuple[Case, Any]] = {
        "a model in training mode": (case._replace(model=make().model.train()), None),
        "NaN in x": (broken, None),
        "an empty batch": (case._replace(x=case.x[:0]), None),
        "a wrong number of classes": (case, [1, 2]),
        "a class out of range": (case, 99),
    }
    for what, (bad, cls) in refused.items():
        try:
            run(bad, cls)
        except ValueError:
            continue
        raise AssertionError(f"{what} raises ValueError")


def _ignores_chunk_size(run: Run, make: Make) -> None:
    case = make(seed=9)
    expected = run(case)
    for length in (1, 5, 1000):
        _expect_close(run(case, chunk_size=length), expected, f"chunk_size={length} gives the same map")
