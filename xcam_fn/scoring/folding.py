"""A private copy of a traced network that computes the same in fewer passes over memory."""

from __future__ import annotations

import copy
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

_CONVOLUTIONS: dict[Any, Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
# Activations that can overwrite their input, with the settings that the function takes.
_ACTIVATIONS: dict[Any, tuple[Any, tuple[str, ...]]] = {
    nn.ReLU: (F.relu, ()),
    nn.ReLU6: (F.relu6, ()),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.Hardswish: (F.hardswish, ()),
    nn.SiLU: (F.silu, ()),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.ELU: (F.elu, ("alpha",)),
}
_OVERWRITING = {torch.relu: F.relu} | {function: function for function, _ in _ACTIVATIONS.values()}
_FRESH = (*_CONVOLUTIONS.values(), F.linear, operator.add, torch.add)
_FEW_CHANNELS = 4
_POOLS = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Flatten, nn.Dropout, nn.Identity,
)  # fmt: skip
_POOLING = (
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.avg_pool2d, F.dropout, torch.flatten, torch.mean, torch.squeeze,
)  # fmt: skip


class _Convolution(NamedTuple):
    """A convolution of the network: what it is, or would be with what surrounds it made part of it."""

    source: fx.Node
    weight: Tensor
    bias: Tensor | None
    settings: dict[str, Any]  # stride, padding, dilation, groups
    function: Any


def inference_copy(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A copy with batch norm and zero padding made part of convolutions, and activations in place.

    Args:
        root: the network; it is read only.
        graph: its trace.
    """
    own = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    holder = nn.Module()
    convolutions = {node: found for node in graph.nodes if (found := _convolution(root, node)) is not None}
    norms = {
        source: node for node in graph.nodes if (source := _normed(root, node, convolutions)) is not None
    }
    for node, norm in norms.items():
        convolutions[node] = _with_norm(convolutions[node], _attribute(root, str(norm.target)))
    padded = {found.source for found in convolutions.values()}
    convolutions = {node: _with_padding(root, found) for node, found in convolutions.items()}
    padded -= {found.source for found in convolutions.values()}  # what convolutions do by themselves now
    folded = set(norms.values())
    for node in graph.nodes:
        if node in padded:
            continue
        if node in folded:
            new[node] = new[node.args[0]]
        elif node in convolutions:
            parts = [node, norms[node]] if node in norms else [node]
            name = ".".join(str(part.target) if part.op == "call_module" else part.name for part in parts)
            new[node] = _convolved(own, holder, convolutions[node], name, new)
        elif (activation := _activation(root, node)) is not None and _is_fresh(root, node.args[0]):
            function, settings = activation
            new[node] = own.call_function(function, (new[node.args[0]],), settings | {"inplace": True})
        else:
            new[node] = own.node_copy(node, lambda n: new[n])
            if node.op in ("call_module", "get_attr"):
                new[node].target = _keep(holder, _attribute(root, str(node.target)), str(node.target))
    own.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _writes(node))
    return fx.GraphModule(holder, own)


def _writes(node: fx.Node) -> bool:
    """True for a node that may write in place: it stays, read or not."""
    if node.op == "call_module":
        return True
    name = str(getattr(node.target, "__name__", node.target))
    return (
        bool(node.kwargs.get("inplace"))
        or name.startswith("i")
        or (name.endswith("_") and not name.endswith("__"))
    )


def _keep(holder: nn.Module, value: Any, name: str) -> str:
    """Put a copy of a module or tensor of the model into the holder, once, and say under which name."""
    own = name.replace(".", "_")
    if not hasattr(holder, own):
        if isinstance(value, nn.Module):
            holder.add_module(own, copy.deepcopy(value))
        else:
            holder.register_buffer(own, value.detach().clone())
    return own


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def with_exact_head(network: fx.GraphModule, dtype: torch.dtype) -> set[str]:
    """Make the last linear layer, and the pooling before it, compute in a precision of their own.

    In bfloat16 a logit of 10 is rounded to steps of 1/16, which is more than most perturbations change it.

    Args:
        network: what `inference_copy` made; it is changed.
        dtype: the precision of what follows the last convolution's pooling.

    Returns:
        The names of the parameters and buffers that are to have that precision; none where the network does
        not end in a linear layer after its convolutions.
    """
    nodes = list(network.graph.nodes)
    linear = next((node for node in reversed(nodes) if _is_linear(network, node)), None)
    if linear is None or not linear.args:
        return set()
    position = nodes.index(linear)
    own = [node for node in nodes[position:] if node.op in ("get_attr", "call_module")]
    own += [node for node in linear.all_input_nodes if node.op == "get_attr"]
    targets = {node.target for node in own}
    elsewhere = {node.target for node in nodes[:position] if node not in own}
    if targets & elsewhere or any(_is_convolution(network, node) for node in nodes[position:]):
        return set()
    start = linear
    while isinstance(start.args[0], fx.Node) and _only_pools(network, start.args[0]):
        start = start.args[0]
    source = start.args[0]
    if not isinstance(source, fx.Node):
        return set()
    with network.graph.inserting_before(start):
        start.replace_input_with(source, network.graph.call_method("to", (source, dtype)))
    network.recompile()
    tensors = [name for name, _ in (*network.named_parameters(), *network.named_buffers())]
    return {name for name in tensors if any(name == t or name.startswith(f"{t}.") for t in targets)}


def _is_linear(network: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(_attribute(network, str(node.target))) is nn.Linear
    return node.op == "call_function" and node.target is F.linear


def _is_convolution(network: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(_attribute(network, str(node.target)), nn.modules.conv._ConvNd)
    return node.op == "call_function" and node.target in _CONVOLUTIONS.values()


def _only_pools(network: nn.Module, node: fx.Node) -> bool:
    """True for a node of one input that averages or reshapes, and is read by one other."""
    if len(node.users) != 1 or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return isinstance(_attribute(network, str(node.target)), _POOLS)
    if node.op == "call_method":
        return node.target in ("mean", "flatten", "view", "reshape", "squeeze")
    return node.op == "call_function" and node.target in _POOLING


# -- convolutions -------------------------------------------------------------------------------------------


def _normed(root: nn.Module, node: fx.Node, convolutions: dict[fx.Node, _Convolution]) -> fx.Node | None:
    """The convolution that a node of batch norm follows, alone, or None where it is another node."""
    if node.op != "call_module" or not node.args or node.args[0] not in convolutions:
        return None
    norm, source = _attribute(root, str(node.target)), node.args[0]
    assert isinstance(source, fx.Node)
    if type(norm) not in _NORMS or norm.running_mean is None or len(source.users) != 1:
        return None
    return source


def _convolution(root: nn.Module, node: fx.Node) -> _Convolution | None:
    """The convolution that a node is, or None where it is none that can be taken apart."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node):
        return None
    if node.op == "call_module":
        module = _attribute(root, str(node.target))
        if type(module) not in _CONVOLUTIONS or module.padding_mode != "zeros":
            return None
        names = ("stride", "padding", "dilation", "groups")
        settings = {name: getattr(module, name) for name in names}
        return _Convolution(source, module.weight, module.bias, settings, _CONVOLUTIONS[type(module)])
    if node.op != "call_function" or node.target not in _CONVOLUTIONS.values():
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weight, bias = (_read(root, given.get(name)) for name in ("weight", "bias"))
    settings = {name: value for name, value in given.items() if name not in ("input", "weight", "bias")}
    is_constant = not any(isinstance(value, fx.Node) for value in settings.values())
    if weight is None or (bias is None and given.get("bias") is not None) or not is_constant:
        return None
    return _Convolution(source, weight, bias, settings, node.target)


def _read(root: nn.Module, value: Any) -> Any:
    """The tensor of the model that a node stands for, or None where it stands for none."""
    is_own = isinstance(value, fx.Node) and value.op == "get_attr"
    return _attribute(root, str(value.target)) if is_own else None


def _with_norm(convolution: _Convolution, norm: Any) -> _Convolution:
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
        norm.bias
    )  # fmt: skip
    return convolution._replace(weight=weight, bias=bias)


def _with_padding(root: nn.Module, convolution: _Convolution) -> _Convolution:
    """The convolution that pads for itself, where its input is padded with zeros for it alone.

    A side that is padded less than its opposite gets as much as that one and the kernel zeros there, which is
    worth it where channels are convolved alone or are few.
    """
    weight = convolution.weight
    axes = weight.ndim - 2
    pads = _zero_padding(root, convolution.source, axes)
    if pads is None or isinstance(convolution.settings.get("padding", 0), str):
        return convolution
    own, dilation = (
        _for_each(convolution.settings.get(name, default), axes)
        for name, default in (("padding", 0), ("dilation", 1))
    )
    total = [(left + o, right + o) for (left, right), o in zip(pads, own, strict=True)]
    if any(left != right for left, right in total):
        is_small = weight.shape[1] <= _FEW_CHANNELS
        if not is_small or any(d != 1 for d in dilation):
            return convolution
        missing = [(max(right - left, 0), max(left - right, 0)) for left, right in total]
        weight = F.pad(weight.detach(), [n for pair in reversed(missing) for n in pair])
    settings = convolution.settings | {"padding": tuple(max(pair) for pair in total)}
    return convolution._replace(source=convolution.source.args[0], weight=weight, settings=settings)


def _zero_padding(root: nn.Module, node: fx.Node, axes: int) -> list[tuple[int, int]] | None:
    """The zeros that a node puts before and after each of so many last axes, or None where it does more."""
    if len(node.users) != 1 or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module" and type(module := _attribute(root, str(node.target))) in _PADS:
        pads, mode, value = module.padding, "constant", module.value
    elif node.op == "call_function" and node.target is F.pad:
        given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
        pads, mode, value = given.get("pad"), given.get("mode", "constant"), given.get("value")
    else:
        return None
    if not isinstance(pads, (tuple, list)) or not all(type(n) is int and n >= 0 for n in pads):
        return None
    if mode != "constant" or value not in (None, 0) or len(pads) > 2 * axes:
        return None
    sides: Any = pads
    pairs = list(zip(sides[::2], sides[1::2], strict=True))[::-1]
    return [(0, 0)] * (axes - len(pairs)) + pairs


def _for_each(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes


def _convolved(
    graph: fx.Graph, holder: nn.Module, convolution: _Convolution, name: str, new: dict[fx.Node, fx.Node]
) -> fx.Node:
    size = "x".join(map(str, convolution.weight.shape))  # the kernel of another call may be padded otherwise
    parts = {f"weight_{size}": convolution.weight, "bias": convolution.bias}
    values = [
        None if value is None else graph.get_attr(_keep(holder, value, f"{name}.{part}"))
        for part, value in parts.items()
    ]
    return graph.call_function(convolution.function, (new[convolution.source], *values), convolution.settings)


# -- activations --------------------------------------------------------------------------------------------


def _activation(root: nn.Module, node: fx.Node) -> tuple[Any, dict[str, Any]] | None:
    """The function and settings of a node that is an activation and nothing more."""
    if node.op == "call_module":
        module = _attribute(root, str(node.target))
        if type(module) not in _ACTIVATIONS or len(node.args) != 1 or node.kwargs:
            return None
        function, names = _ACTIVATIONS[type(module)]
        return function, {name: getattr(module, name) for name in names}
    if node.op == "call_function" and node.target in _OVERWRITING and len(node.args) == 1:
        return _OVERWRITING[node.target], dict(node.kwargs)
    return None


def _is_fresh(root: nn.Module, node: Any) -> bool:
    """True where a node's value is a new tensor that nothing but one other node reads."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if node.op == "call_module":
        module = _attribute(root, str(node.target))
        return type(module) in (*_CONVOLUTIONS, *_NORMS, nn.Linear)
    return node.op == "call_function" and node.target in _FRESH
