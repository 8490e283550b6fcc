"""Small random networks made of habits of real code: what people write in a forward, one class or function each.

A network is a stem, blocks that may lie in each other, and a head, all drawn by one seed. Blocks keep the number of
channels. `network(recipe)` builds the same network each time, so that a reference may hook and change one of its own.
"""

import collections
import contextlib
import dataclasses
import functools
import random
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import einops
import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

CLASSES = 4
Block = tuple[str, tuple[Any, ...]]


class Recipe(NamedTuple):
    """What a network is made of.

    Attributes:
        seed: of the weights and of what the parts draw.
        stem: a name in `STEMS`.
        blocks: names in `BLOCKS`, each with the blocks in it.
        head: a name in `HEADS`.
        output: a name in `OUTPUTS`.
    """

    seed: int
    stem: str
    blocks: tuple[Block, ...]
    head: str
    output: str

    def __str__(self) -> str:
        parts = [self.stem, *map(shown, self.blocks), self.head, self.output]
        return " > ".join(parts)

    @property
    def habits(self) -> set[str]:
        """The names of all habits in it."""
        found, pending = {self.stem, self.head, self.output}, list(self.blocks)
        while pending:
            name, inner = pending.pop()
            found.add(name)
            pending.extend(inner)
        return found


def shown(block: Block) -> str:
    name, inner = block
    return f"{name}({', '.join(map(shown, inner))})" if inner else name


class Maker:
    """Draws the settings of parts; `opened` and `plain` are as for `network`."""

    def __init__(self, seed: int, *, opened: bool, plain: bool) -> None:
        self.rng, self.opened, self.plain = random.Random(seed), opened, plain
        self.channels = self.rng.choice((4, 6, 8))
        self.shared = self.rng.choice((nn.ReLU(inplace=True), nn.ReLU(), nn.SiLU(inplace=True), nn.GELU()))
        self.outside: list[Any] = []  # what a forward writes to that is no part of the network
        self.low_precision = False

    def conv(
        self, into: int | None = None, out: int | None = None, size: int = 3, **options: Any
    ) -> nn.Conv2d:
        into, out = into or self.channels, out or self.channels
        options = {"padding": size // 2, "bias": self.rng.random() < 0.8} | options
        return lively(nn.Conv2d(into, out, size, **options))

    def act(self) -> nn.Module:
        kinds: list[Callable[[], nn.Module]] = [
            nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.ELU, nn.Softplus, nn.Mish, nn.Identity,
            lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(0.1, inplace=True),
            lambda: nn.Hardswish(inplace=True), lambda: nn.ReLU6(inplace=True), lambda: nn.SiLU(inplace=True),
            lambda: self.shared,
        ]  # fmt: skip
        return self.rng.choice(kinds)()

    def norm(self) -> nn.Module:
        channels = self.channels
        kinds: list[Callable[[], nn.Module]] = [
            lambda: nn.GroupNorm(2, channels), lambda: nn.InstanceNorm2d(channels, affine=True),
            lambda: nn.InstanceNorm2d(channels), lambda: seen(nn.BatchNorm2d(channels)),
            lambda: seen(nn.BatchNorm2d(channels)), lambda: nn.GroupNorm(1, channels),
            lambda: seen(nn.InstanceNorm2d(channels, track_running_stats=True)), nn.Identity,
        ]  # fmt: skip
        return self.rng.choice(kinds)()

    def unit(self) -> nn.Sequential:
        return nn.Sequential(self.conv(), self.norm(), self.act())


def lively(layer: Any) -> Any:
    """The layer with weights under which signals neither fade nor grow."""
    nn.init.kaiming_normal_(layer.weight, a=0.5)
    if layer.bias is not None:
        nn.init.normal_(layer.bias, std=0.3)
    return layer


def linear(into: int, out: int, **options: Any) -> nn.Linear:
    return lively(nn.Linear(into, out, **options))


def seen(norm: Any) -> Any:
    """The norm with running statistics as of training."""
    nn.init.normal_(norm.running_mean, std=0.3)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


Made = Callable[..., nn.Module]
BLOCKS: dict[str, Made] = {}
INNER: dict[str, int] = {}
STEMS: dict[str, Made] = {}
HEADS: dict[str, Made] = {}
OUTPUTS: dict[str, Made] = {}
WEIGHTS: dict[str, float] = {}


def habit(
    name: str, inner: int = 0, *, into: dict[str, Made] = BLOCKS, weight: float = 1.0
) -> Callable[[Any], Any]:
    """Enter a class that is made of a Maker and inner blocks, or a function that does the making."""

    def entered(made: Any) -> Any:
        into[name], INNER[name], WEIGHTS[name] = made, inner, weight
        return made

    return entered


# -- activations --------------------------------------------------------------------------------------------


@habit("in-place activation")
def in_place_activation(maker: Maker) -> nn.Module:
    return nn.Sequential(maker.conv(), nn.ReLU(inplace=True))


@habit("unit", weight=2)
def unit(maker: Maker) -> nn.Module:
    return maker.unit()


@habit("shared activation")
class SharedActivation(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.first, self.second, self.act = maker.conv(), maker.conv(), maker.shared

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))


@habit("in-place functional")
class InPlaceFunctional(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.kind = maker.conv(), maker.rng.randrange(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.kind == 0:
            F.relu(x, inplace=True)
        elif self.kind == 1:
            x.relu_()
        elif self.kind == 2:
            x *= 2
            x += 0.5
        elif self.kind == 3:
            x[:, 0] = 0
        else:
            x[x < 0] *= 0.2
        return x


@habit("in-place ignored")
class InPlaceIgnored(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.act = maker.conv(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.act(x)
        return x


# -- autograd functions -------------------------------------------------------------------------------------


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None


class Sign(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (ctx.saved_tensors[0].abs() < 2)


class EfficientSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grads[0] * (s * (1 + x * (1 - s)))


class Applied(nn.Module):
    """A function as an activation module."""

    is_activation = True

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@habit("gradient reversal")
def gradient_reversal(maker: Maker) -> nn.Module:
    return nn.Sequential(maker.conv(), Applied(lambda x: Reversal.apply(x, 0.5)), nn.ReLU())


@habit("straight-through")
def straight_through(maker: Maker) -> nn.Module:
    def rounded(x: Tensor) -> Tensor:
        return x + ((2 * x).round() / 2 - x).detach()

    return nn.Sequential(maker.conv(), Applied(maker.rng.choice((Sign.apply, rounded))), maker.conv(size=1))


@habit("memory-efficient swish")
def efficient_swish(maker: Maker) -> nn.Module:
    return nn.Sequential(maker.conv(), maker.norm(), Applied(EfficientSwish.apply))


# -- gates, loops, branches ---------------------------------------------------------------------------------


@habit("squeeze-excite")
class SqueezeExcite(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.linear = maker.conv(), maker.rng.random() < 0.5
        C = maker.channels
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Sigmoid()
        self.reduce = linear(C, 2) if self.linear else maker.conv(C, 2, 1)
        self.expand = linear(2, C) if self.linear else maker.conv(2, C, 1)
        self.act = maker.act()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, _, _ = x.size()
        y = self.pool(x)
        if self.linear:
            y = y.view(b, c)
        y = self.gate(self.expand(self.act(self.reduce(y))))
        return x * (y.view(b, c, 1, 1).expand_as(x) if self.linear else y)


@habit("module list")
class Listed(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.layers = nn.ModuleList([maker.conv() for _ in range(2)])
        self.acts = nn.ModuleDict({"0": maker.act(), "1": maker.act()})

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = self.acts[str(i)](layer(x))
        return x


@habit("tied loop")
class Tied(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.act, self.times = maker.conv(), maker.act(), maker.rng.choice((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.act(self.conv(x))
        return x


@habit("rare branch")
class RareBranch(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.other = maker.conv(), maker.conv()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise FloatingPointError("not finite")
        if float(x.detach().abs().max()) > 1e9:
            return self.other(x)
        if x.sum().item() != x.sum().item():
            x = torch.nan_to_num(x)
        return self.conv(x).relu()


@habit("branch for each image")
class ImageBranch(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.one, self.other = maker.conv(), maker.conv()

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x.split(1):
            block = self.one if row.mean() > x.new_tensor(0.3) else self.other
            rows += [block(row)]
        return torch.cat(rows).relu()


@habit("branch on the batch", weight=0.3)
class BatchBranch(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.one, self.other = maker.conv(), maker.conv()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x) if x.mean() > 0.3 else self.other(x))


@habit("where")
class Where(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.one, self.other = maker.conv(), maker.conv()

    def forward(self, x: Tensor) -> Tensor:
        is_bright = x.flatten(1).mean(1) > 0.2
        return torch.where(is_bright[:, None, None, None], self.one(x), self.other(x)).tanh()


# -- norms and weights --------------------------------------------------------------------------------------


@habit("norms")
def norms(maker: Maker) -> nn.Module:
    return nn.Sequential(maker.conv(), maker.norm(), maker.act(), maker.conv(), maker.norm(), maker.act())


@habit("batch norm without statistics", weight=0.3)
def norm_without_statistics(maker: Maker) -> nn.Module:
    return nn.Sequential(maker.conv(), nn.BatchNorm2d(maker.channels, track_running_stats=False), nn.ReLU())


@habit("functional norms")
class FunctionalNorms(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.kind = maker.conv(), maker.rng.randrange(4)
        self.norm = seen(nn.BatchNorm2d(maker.channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.kind == 0:
            return F.layer_norm(x, x.shape[1:]).relu()
        if self.kind == 1:
            return F.group_norm(x, 2).relu()
        if self.kind == 2:
            return F.normalize(x, dim=1)
        n = self.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, self.training).relu()


@habit("weight norm")
def weight_norm(maker: Maker) -> nn.Module:
    kind = maker.rng.randrange(3)
    with quiet():
        if kind == 0:
            conv = nn.utils.weight_norm(maker.conv())
        elif kind == 1:
            conv = parametrizations.weight_norm(maker.conv())
        else:
            conv = parametrizations.spectral_norm(maker.conv())
    return nn.Sequential(conv, nn.ReLU())


@habit("pruning")
def pruned(maker: Maker) -> nn.Module:
    conv = maker.conv()
    prune.l1_unstructured(conv, "weight", amount=0.3)
    return nn.Sequential(conv, maker.act())


@habit("channels last inside")
class ChannelsLast(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        C = maker.channels
        self.conv, self.norm = maker.conv(size=3, groups=C), nn.LayerNorm(C)
        self.up, self.act, self.down = linear(C, 2 * C), nn.GELU(), linear(2 * C, C)
        self.act.is_channels_last = True
        self.scale = nn.Parameter(torch.full((C,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1)
        y = self.scale * self.down(self.act(self.up(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


@habit("own parameters")
class OwnParameters(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        C, conv = maker.channels, maker.conv(bias=True)
        self.weight, self.bias = conv.weight, conv.bias
        self.scale = nn.ParameterDict({"a": nn.Parameter(torch.rand(C, 1, 1) + 0.5)})
        self.mixing = nn.ParameterList([nn.Parameter(torch.randn(C, C) / C**0.5)])
        self.register_buffer("shift", torch.randn(C, 1, 1) * 0.3)
        self.register_buffer("unsaved", torch.tensor(1.1), persistent=False)
        self.act = maker.act()

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, padding=1) * self.scale["a"] + self.shift
        return self.act(torch.einsum("bchw,dc->bdhw", x, self.mixing[0]) * self.get_buffer("unsaved"))


@habit("weights from the image")
class DynamicConv(nn.Module):
    """The batch is folded into the channels of one grouped convolution."""

    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.attend = maker.conv(), linear(maker.channels, 2)
        self.kernels = nn.Parameter(torch.randn(2, maker.channels, maker.channels, 3, 3) / 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        B, C, H, W = x.shape
        share = self.attend(x.mean((2, 3))).softmax(1)
        weight = (share @ self.kernels.flatten(1)).view(B * C, C, 3, 3)
        return F.conv2d(x.reshape(1, B * C, H, W), weight, padding=1, groups=B).view(B, C, H, W).relu()


# -- what a forward writes ----------------------------------------------------------------------------------


@habit("writes")
class Writes(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.act = maker.conv(), maker.act()
        self.register_buffer("calls", torch.zeros(1))
        self.count, self.last, self.log = 0, None, []
        self.recent: collections.deque[float] = collections.deque([0.0], maxlen=3)
        self.kept, self.names = {"a": torch.zeros(1)}, set()
        self.total = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.last = x
        self.log.append(x.shape)
        x = self.conv(x)
        self.kept["b"] = x
        self.kept["a"] += 1
        self.recent.append(float(x.detach().mean()))
        self.names.add(len(self.log))
        self.total += x.detach().sum()
        return self.act(self.kept["b"] + 0 * self.last)


@habit("writes outside")
class WritesOutside(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.state = maker.conv(), types.SimpleNamespace(count=0, maps=[])
        self.where = {"a": [0]}

    def forward(self, x: Tensor) -> Tensor:
        self.state.count += 1
        self.state.maps.append(x.detach())
        self.where["a"][0] = x
        return self.conv(self.where["a"][0]).relu()


@habit("cached by size")
class Cached(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.grids = maker.conv(maker.channels + 2), {}

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        if (H, W) not in self.grids:
            rows, columns = torch.linspace(-1, 1, H), torch.linspace(-1, 1, W)
            self.grids[H, W] = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        grid = self.grids[H, W].expand(B, -1, -1, -1)
        return self.conv(torch.cat([x, grid.to(x)], 1)).relu()


@habit("not to be copied")
class Locked(nn.Module):
    """A lock, a generator and a tensor computed from parameters: deepcopy refuses the module."""

    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.lock = maker.conv(), threading.Lock()
        self.generator = torch.Generator().manual_seed(1)
        self.sharp = self.conv.weight * 1.1
        self.numbers = (n for n in range(9))

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return F.conv2d(x, self.sharp, self.conv.bias, padding=1).relu() + self.conv(x)


@habit("gradient kept by a tensor hook")
class TensorHook(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.gradients = maker.conv(), None

    def keep(self, grad: Tensor) -> None:
        self.gradients = grad

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.requires_grad:
            x.register_hook(self.keep)
        return x.relu()


# -- hooks and forwards of the user's own -------------------------------------------------------------------

GLOBAL_MAPS: list[Tensor] = []
GLOBAL_COUNT = {"calls": 0}


def global_hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    GLOBAL_COUNT["calls"] += 1
    GLOBAL_MAPS.append(output.detach())
    return output * 1.5


@habit("hooks")
class Hooked(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.act, self.maps = maker.conv(), maker.act(), {}
        self.norm = maker.norm()
        outside: list[Tensor] = []
        maker.outside += [outside, GLOBAL_MAPS, GLOBAL_COUNT]
        kind = maker.rng.randrange(5)
        if kind == 0:
            self.norm.register_forward_hook(lambda module, args, output: outside.append(output.detach()))
        elif kind == 1:
            self.norm.register_forward_hook(self.keep)
        elif kind == 2:
            self.norm.register_forward_hook(global_hook)
        elif kind == 3:
            self.norm.register_forward_pre_hook(lambda module, args: (args[0] * 1.2,))
        else:
            self.norm.register_forward_hook(
                lambda module, args, kwargs, output: output + args[0].tanh(), with_kwargs=True
            )
            self.norm.register_full_backward_hook(lambda module, into, out: outside.append(out[0]))

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.maps[type(module).__name__] = output

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


@habit("hook of a layer")
class HookedLayer(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.act, self.gain = maker.conv(), nn.ReLU(), nn.Parameter(torch.tensor(1.3))
        self.conv.register_forward_hook(self.scaled)

    def scaled(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.gain - 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


@habit("own forward")
def own_forward(maker: Maker) -> nn.Module:
    block = maker.unit()
    kind = maker.rng.randrange(3)
    if kind == 0:
        old = block.forward
        block.forward = lambda x: old(x) * 1.1 + 0.1
    elif kind == 1:

        def forward(self: Any, x: Tensor) -> Tensor:
            return self[2](self[1](self[0](x))) + x

        block.forward = types.MethodType(forward, block)
    else:
        conv = block[0]
        conv.forward = functools.partial(type(conv).forward, conv)
        block[2].forward = torch.tanh
    return block


# -- regions ------------------------------------------------------------------------------------------------


class Region(nn.Module):
    """Another block in a context that switches recording off."""

    def __init__(self, maker: Maker, inner: nn.Module, context: Callable[[], Any]) -> None:
        super().__init__()
        self.inner, self.context = inner, contextlib.nullcontext if maker.opened else context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            return self.inner(x)


@habit("no_grad", inner=1, weight=0.4)
def region_no_grad(maker: Maker, inner: nn.Module) -> nn.Module:
    return Region(maker, inner, torch.no_grad)


@habit("inference_mode", inner=1, weight=0.3)
def region_inference(maker: Maker, inner: nn.Module) -> nn.Module:
    return Region(maker, inner, torch.inference_mode)


@habit("no_grad beside", inner=1, weight=0.6)
class RegionBeside(nn.Module):
    """A frozen branch beside one that learns."""

    def __init__(self, maker: Maker, inner: nn.Module) -> None:
        super().__init__()
        self.frozen, self.conv = Region(maker, inner, torch.no_grad), maker.conv(size=1)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.frozen(x)
        return frozen + F.adaptive_avg_pool2d(self.conv(x), tuple(frozen.shape[-2:]))


@habit("no_grad decorator", weight=0.4)
class Decorated(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.opened = maker.conv(), maker.opened

    @torch.no_grad()
    def statistics(self, x: Tensor) -> Tensor:
        return x.abs().amax((1, 2, 3), keepdim=True) + 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) / self.statistics(x)).relu()


@habit("detached", inner=1, weight=0.3)
class Detached(nn.Module):
    def __init__(self, maker: Maker, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.opened, self.kind = inner, maker.opened, maker.rng.randrange(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.opened:
            return x
        return x.detach() if self.kind else x.data


@habit("checkpoint", inner=1)
class Checkpointed(nn.Module):
    def __init__(self, maker: Maker, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.reentrant, self.plain = inner, maker.rng.random() < 0.5, maker.plain

    def forward(self, x: Tensor) -> Tensor:
        if self.plain or not torch.is_grad_enabled():
            return self.inner(x)
        with quiet():
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@habit("dropout that eval stops")
class Stopped(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.drop = maker.conv(), nn.Dropout2d(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.drop(self.conv(x)), 0.3, self.training).relu()


@habit("dropout that goes on", weight=0.3)
class GoesOn(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv = maker.conv()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.3).relu()


@habit("mixed precision", weight=0.6)
class MixedPrecision(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.act, self.is_cast = maker.conv(), nn.ReLU(), maker.rng.random() < 0.5
        if self.is_cast:
            self.conv.bfloat16()
        maker.low_precision = True

    def forward(self, x: Tensor) -> Tensor:
        if self.is_cast:
            return self.act(self.conv(x.bfloat16())).float()
        with torch.autocast("cpu", torch.bfloat16):
            return self.act(self.conv(x)).float()


# -- attention over positions -------------------------------------------------------------------------------


@habit("multi-head attention")
class Attention(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        C = maker.channels
        self.conv, self.norm = maker.conv(stride=2), nn.LayerNorm(C)
        self.attend = nn.MultiheadAttention(C, 2, batch_first=True)
        self.weights = maker.rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        B, C, H, W = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        y, _ = self.attend(tokens, tokens, tokens, need_weights=self.weights)
        return x + y.transpose(1, 2).reshape(B, C, H, W)


@habit("transformer layer")
class Transformer(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        C = maker.channels
        layer = nn.TransformerEncoderLayer(C, 2, 2 * C, batch_first=True, dropout=0.1)
        with quiet():
            self.layers = layer if maker.rng.random() < 0.5 else nn.TransformerEncoder(layer, 2)
        self.conv = maker.conv(stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        tokens = einops.rearrange(x, "b c h w -> b (h w) c")
        return einops.rearrange(self.layers(tokens), "b (h w) c -> b c h w", h=x.shape[2])


@habit("scaled dot product")
class DotProduct(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        C = maker.channels
        self.qkv, self.out = maker.conv(C, 3 * C, 1, stride=2), maker.conv(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        h, w = qkv.shape[-2:]
        q, k, v = einops.rearrange(qkv, "b (n t c) h w -> n b t (h w) c", n=3, t=2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(einops.rearrange(y, "b t (h w) c -> b (t c) h w", h=h, w=w))


# -- shapes -------------------------------------------------------------------------------------------------


@habit("einops layers")
def einops_layers(maker: Maker) -> nn.Module:
    C = maker.channels
    last = Rearrange("b c h w -> b h w c"), nn.LayerNorm(C), linear(C, C), Rearrange("b h w c -> b c h w")
    return nn.Sequential(maker.conv(), maker.act(), *last)


@habit("shuffled pixels")
class Shuffled(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        C = maker.channels
        self.conv, self.up, self.act = maker.conv(C, 4 * C), nn.PixelShuffle(2), maker.act()
        self.down = maker.conv(stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.conv(x))))


@habit("down")
def down(maker: Maker) -> nn.Module:
    kinds = nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1), maker.conv(stride=2), nn.AdaptiveMaxPool2d(7)
    return nn.Sequential(maker.conv(), maker.act(), maker.rng.choice(kinds))


@habit("gated halves")
class Gated(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv = maker.conv(maker.channels, 2 * maker.channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, dim=1)
        return value * torch.sigmoid(gate)


@habit("rows stacked")
class Stacked(nn.Module):
    """A loop over the batch whose results are written into a new tensor of the batch's size."""

    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv = maker.conv()

    def forward(self, x: Tensor) -> Tensor:
        result = x.new_zeros(x.size(0), *x.shape[1:])
        for i in range(x.size(0)):
            result[i] = self.conv(x[i].unsqueeze(0)).squeeze(0)
        return result.relu()


@habit("vmap")
class Mapped(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.plain = maker.conv(), maker.plain
        self.conv.is_mapped = True

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:  # what is mapped cannot be hooked
            return self.conv(x).tanh().contiguous()
        return torch.vmap(lambda row: self.conv(row[None])[0].tanh())(x).contiguous()


@habit("scripted")
def scripted(maker: Maker) -> nn.Module:
    part = nn.Sequential(maker.conv(), nn.ReLU()).eval()
    with quiet():
        if maker.rng.random() < 0.5:
            part = torch.jit.script(part)
        else:
            part = torch.jit.trace(part, torch.rand(1, maker.channels, 16, 16))
    return nn.Sequential(part, maker.conv(), maker.act())


# -- around other blocks ------------------------------------------------------------------------------------


@habit("residual", inner=1, weight=2)
class Residual(nn.Module):
    def __init__(self, maker: Maker, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.kind, self.act = inner, maker.rng.randrange(3), maker.act()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.clone() if self.kind == 1 else x)
        shortcut = x if y.shape == x.shape else F.adaptive_avg_pool2d(x, tuple(y.shape[-2:]))
        if self.kind == 2:
            y = y + 0
            y += shortcut
            return self.act(y)
        return self.act(shortcut + y)


@habit("concatenated", inner=1)
class Concatenated(nn.Module):
    def __init__(self, maker: Maker, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.mix = inner, maker.conv(2 * maker.channels, maker.channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        up = F.interpolate(y, size=tuple(x.shape[-2:]), mode="bilinear", align_corners=False)
        return self.mix(torch.cat([x, up], dim=1))


@habit("twice", inner=1, weight=0.7)
class Twice(nn.Module):
    def __init__(self, maker: Maker, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


@habit("two streams", inner=1, weight=0.5)
class TwoStreams(nn.Module):
    def __init__(self, maker: Maker, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.5 * self.inner(x.flip(-1))


@habit("in a row", inner=2)
class InARow(nn.Module):
    """Blocks that hand on a tuple with None in it, as keywords."""

    def __init__(self, maker: Maker, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def step(self, block: nn.Module, *, state: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        x, seen = state
        y = block(x)
        return y, [*(seen or []), y.shape]

    def forward(self, x: Tensor) -> Tensor:
        state: tuple[Tensor, Any] = (x, None)
        for block in (self.first, self.second):
            state = self.step(block, state=state)
        return state[0]


@habit("branches", inner=2)
class Branches(nn.Module):
    def __init__(self, maker: Maker, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList([first, second])
        self.share = nn.Parameter(torch.tensor([0.6, 0.4]))

    def forward(self, x: Tensor) -> Tensor:
        found = [F.adaptive_avg_pool2d(branch(x), 8) for branch in self.branches]
        return sum(s * f for s, f in zip(self.share.softmax(0), found, strict=True))


@habit("data parallel", inner=1, weight=0.3)
def parallel(maker: Maker, inner: nn.Module) -> nn.Module:
    with quiet():
        return nn.DataParallel(inner)


# -- stems --------------------------------------------------------------------------------------------------


class Stem(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.act = maker.conv(3, stride=maker.rng.choice((1, 2))), maker.act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.prepared(x)))

    def prepared(self, x: Tensor) -> Tensor:
        return x


habit("stem", into=STEMS, weight=4)(Stem)


@habit("stem of standardized x", into=STEMS)
class Standardized(Stem):
    def prepared(self, x: Tensor) -> Tensor:
        mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
        return (x - mean) / (std + 1e-3)


@habit("stem that normalizes", into=STEMS)
class Normalizing(Stem):
    def __init__(self, maker: Maker) -> None:
        super().__init__(maker)
        self.mean, self.std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), [0.5, 0.6, 0.7]
        self.one: Tensor
        self.register_buffer("one", torch.ones(()))

    def prepared(self, x: Tensor) -> Tensor:
        x = x.clone()
        x -= self.mean
        return x.div_(torch.tensor(self.std).view(1, 3, 1, 1)) * self.one


@habit("stem that writes to x", into=STEMS, weight=0.5)
class WritesToInput(Stem):
    def prepared(self, x: Tensor) -> Tensor:
        return x.mul_(2).sub_(0.3)


@habit("stem of the batch's statistics", into=STEMS, weight=0.2)
class OfTheBatch(Stem):
    def prepared(self, x: Tensor) -> Tensor:
        return x - x.mean((0, 2, 3), keepdim=True)


@habit("stem for one image", into=STEMS, weight=0.3)
class OneImage(Stem):
    def prepared(self, x: Tensor) -> Tensor:
        if x.shape[0] != 1:
            raise RuntimeError(f"expected one image, found {x.shape[0]}")
        return x.squeeze(0).unsqueeze(0)


@habit("stem of patches", into=STEMS, weight=0.5)
def patches(maker: Maker) -> nn.Module:
    return nn.Sequential(nn.PixelUnshuffle(2), maker.conv(12, size=1), maker.act())


# -- heads --------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Features (B, C, H, W), and the number of images that the network read early, to logits."""

    def __init__(self, maker: Maker, into: int | None = None) -> None:
        super().__init__()
        self.fc = linear(into or maker.channels, CLASSES)
        with torch.no_grad():
            self.fc.weight.mul_(2)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        return self.fc(x.mean((2, 3)))


habit("head of means", into=HEADS, weight=2)(Head)


@habit("head that pools and flattens", into=HEADS)
class Flattening(Head):
    def __init__(self, maker: Maker) -> None:
        super().__init__(maker, maker.channels * 6)
        self.pool, self.drop = nn.AdaptiveAvgPool2d((2, 3)), nn.Dropout(0.5)
        self.kind = maker.rng.randrange(5)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        x = self.pool(x)
        if self.kind == 0:
            x = x.view(x.size(0), -1)
        elif self.kind == 1:
            x = x.reshape(len(x), -1)
        elif self.kind == 2:
            x = x.view(batch, -1)
        elif self.kind == 3:
            x = torch.flatten(x, 1)
        else:
            x = x.contiguous().view(-1, 6 * x.size(1))
        return self.fc(self.drop(x))


@habit("recurrent head", into=HEADS)
class Recurrent(Head):
    def __init__(self, maker: Maker) -> None:
        super().__init__(maker, 6)
        self.rnn = maker.rng.choice((nn.LSTM, nn.GRU, nn.RNN))(maker.channels, 6, batch_first=True)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        steps, _ = self.rnn(x.mean(2).transpose(1, 2))
        return self.fc(steps[:, -1])


@habit("bidirectional head", into=HEADS, weight=0.5)
class Bidirectional(Head):
    def __init__(self, maker: Maker) -> None:
        super().__init__(maker, 6)
        self.rnn = nn.LSTM(maker.channels, 3, bidirectional=True, dropout=0.2, num_layers=2)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        start = (torch.zeros(4, batch, 3), torch.zeros(4, batch, 3))
        _, (hidden, _) = self.rnn(x.logsumexp(2).permute(2, 0, 1), start)
        return self.fc(hidden[-2:].transpose(0, 1).reshape(batch, -1))


@habit("convolutional head", into=HEADS)
class Convolutional(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.conv, self.pool = maker.conv(maker.channels, CLASSES, 1), nn.AdaptiveMaxPool2d(1)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        return self.pool(self.conv(x)).squeeze(-1).squeeze(-1)


@habit("head of prototypes", into=HEADS)
class Prototypes(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(CLASSES, maker.channels))

    def forward(self, x: Tensor, batch: int) -> Tensor:
        return -torch.cdist(x.flatten(2).mean(-1), self.prototypes)


@habit("head of attention", into=HEADS)
class AttentionHead(Head):
    def __init__(self, maker: Maker) -> None:
        super().__init__(maker)
        C = maker.channels
        self.query, self.attend = (
            nn.Parameter(torch.randn(1, 1, C)),
            nn.MultiheadAttention(C, 2, batch_first=True),
        )

    def forward(self, x: Tensor, batch: int) -> Tensor:
        # Indexed, for torch's batch norm takes a gradient of one image in the strides of tokens for another one.
        tokens = x[:, torch.arange(x.shape[1])].flatten(2).transpose(1, 2)
        y, _ = self.attend(self.query.expand(batch, -1, -1), tokens, tokens)
        return self.fc(y[:, 0] + tokens.mean(1))


@habit("head of several layers", into=HEADS)
class Deep(nn.Module):
    def __init__(self, maker: Maker) -> None:
        super().__init__()
        C = maker.channels
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(C, 8), nn.LayerNorm(8), nn.ReLU(inplace=True),
            nn.Dropout(0.2), linear(8, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor, batch: int) -> Tensor:
        return self.layers(x)


@habit("head of a detached mean", into=HEADS, weight=0.2)
class DetachedHead(Head):
    def __init__(self, maker: Maker) -> None:
        super().__init__(maker)
        self.opened = maker.opened

    def forward(self, x: Tensor, batch: int) -> Tensor:
        x = x.mean((2, 3))
        return self.fc(x if self.opened else x.detach())


# -- outputs ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    logits: Tensor
    maps: Any = None
    loss: Any = None
    note: str = "none"
    step: int = 3


class Named(NamedTuple):
    logits: Tensor
    other: Any


class Plain(nn.Module):
    """What the network returns of its logits and features. `read` finds the logits again."""

    is_read_by_the_library = True

    def __init__(self, maker: Maker) -> None:
        super().__init__()

    def forward(self, logits: Tensor, features: Tensor) -> Any:
        return logits


habit("logits", into=OUTPUTS, weight=4)(Plain)


@habit("a dict", into=OUTPUTS)
class Dict(Plain):
    def forward(self, logits: Tensor, features: Tensor) -> Any:
        return {"logits": logits, "aux": None, "best": logits.argmax(1), "count": 3, "name": "net"}


@habit("a dict with maps", into=OUTPUTS)
class DictWithMaps(Plain):
    def __init__(self, maker: Maker) -> None:
        super().__init__(maker)
        self.aux = maker.conv(maker.channels, 2)

    def forward(self, logits: Tensor, features: Tensor) -> Any:
        return collections.OrderedDict(out=logits, aux=self.aux(features), mask=features > 0)


@habit("a dataclass", into=OUTPUTS)
class Dataclass(Plain):
    def forward(self, logits: Tensor, features: Tensor) -> Any:
        return Output(logits, maps=[features, None])


@habit("a named tuple", into=OUTPUTS, weight=0.5)
class NamedOutput(Plain):
    def forward(self, logits: Tensor, features: Tensor) -> Any:
        return Named(logits, {"positions": features.flatten(2).argmax(-1)})


@habit("a tuple", into=OUTPUTS)
class Tuple(Plain):
    is_read_by_the_library = False

    def __init__(self, maker: Maker) -> None:
        super().__init__(maker)
        self.aux = nn.Sequential(maker.conv(), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, logits: Tensor, features: Tensor) -> Any:
        return logits, self.aux(features.clone()), None


def read(output: Any) -> Tensor:
    """The logits in a network's output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return output["logits"] if "logits" in output else output["out"]
    return output.logits if hasattr(output, "logits") else output[0]


# -- the network --------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head, self.output = stem, nn.ModuleList(blocks), head, output
        self.unused = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Any:
        batch = x.shape[0]
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.output(self.head(x, batch), x)


def drawn(names: dict[str, Made], rng: random.Random) -> str:
    return rng.choices(list(names), [WEIGHTS[name] for name in names])[0]


def draw_block(rng: random.Random, depth: int = 0) -> Block:
    name = drawn(BLOCKS, rng)
    while INNER[name] and depth > 1:
        name = drawn(BLOCKS, rng)
    return name, tuple(draw_block(rng, depth + 1) for _ in range(INNER[name]))


def recipe(seed: int) -> Recipe:
    """Draw what a network is made of."""
    rng = random.Random(seed)
    blocks = tuple(draw_block(rng) for _ in range(rng.choice((1, 1, 2, 2, 3))))
    return Recipe(seed, drawn(STEMS, rng), blocks, drawn(HEADS, rng), drawn(OUTPUTS, rng))


def network(recipe: Recipe, *, opened: bool = False, plain: bool = False) -> tuple[Network, Maker]:
    """Build a network in evaluation mode, always the same.

    Args:
        recipe: what it is made of.
        opened: leave out what stops gradients on purpose, as no_grad does.
        plain: leave out what changes no value and no gradient, but how they are found: checkpoints and vmap.
    """
    maker = Maker(recipe.seed, opened=opened, plain=plain)

    def made(block: Block) -> nn.Module:
        name, inner = block
        return BLOCKS[name](maker, *map(made, inner))

    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(recipe.seed)
        stem = STEMS[recipe.stem](maker)
        blocks = [made(block) for block in recipe.blocks]
        net = Network(stem, blocks, HEADS[recipe.head](maker), OUTPUTS[recipe.output](maker))
        return net.eval(), maker
