"""Traces a model's forward as a graph, without patching anything, and cuts the graph in two at a layer."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase

from xcam_fn.network.bound import Bound
from xcam_fn.network.calls import outputs_agree
from xcam_fn.network.copies import has_hooks, is_leaf, private_copy, unwrap
from xcam_fn.torch_state import pytree


class Trace(NamedTuple):
    """The graph of a forward, and the node that holds the output of each call of each module.

    `writes` maps a node that writes to one of its inputs in place to that input; `audited` fills it in.
    """

    graph: fx.Graph
    calls: dict[str, list[fx.Node | None]]
    writes: dict[fx.Node, fx.Node]


class Cut(NamedTuple):
    """The two halves of a trace as plain functions of the live model."""

    trunk: Callable[..., tuple[Tensor, tuple[Any, ...]]]
    head: Callable[..., Any]
    residual_is_empty: bool


class _TensorProxy(fx.Proxy):
    """A proxy of a parameter or buffer: operations on it are traced, its shape and dtype are plain values."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, value: Tensor) -> None:
        super().__init__(node, tracer)
        self.__dict__.update(
            shape=value.shape, ndim=value.ndim, dtype=value.dtype, device=value.device, size=value.size,
            dim=value.dim, numel=value.numel, nelement=value.nelement,
            is_floating_point=value.is_floating_point, requires_grad=value.requires_grad,
        )  # fmt: skip


class _TensorDict(dict[str, Any]):
    """A module's parameters (or buffers) that hands out proxies where forward reads one by name."""

    def __init__(self, tensors: Any, tracer: _Tracer) -> None:
        super().__init__(tensors)
        self.tracer = tracer

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value if value is None else self.tracer.tensor_proxy(value)


class _Tracer(fx.Tracer):
    """Records a forward run on a private copy of the module tree.

    `Tracer.trace` is never called: it would patch `nn.Module.__call__` for the whole process while it runs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.root = nn.Module()
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        self.tensor_names = {id(tensor): name for name, tensor in named}
        self.calls: dict[str, list[Any]] = {}
        self.constants = 0

    def tensor_proxy(self, value: Tensor) -> fx.Proxy:
        return _TensorProxy(self.tensor_node(value), self, value)

    def tensor_node(self, value: Tensor) -> fx.Node:
        name = self.tensor_names.get(id(value))
        if name is not None:
            return self.create_node("get_attr", name, (), {})
        self.constants += 1
        return self.create_node("call_function", _constant(value, self.constants), (), {})

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        if target == "numpy":  # other runtimes crash on a proxy
            raise _NotTraceableError("values that leave torch")
        return super().create_proxy(kind, target, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.tensor_node(a)
        if isinstance(a, nn.Module):
            raise TypeError("a module passed as a value cannot be traced")
        return TracerBase.create_arg(self, a)

    def intercept(self, name: str, module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        leaf = is_leaf(module)

        def recording(forward: Callable[..., Any]) -> Callable[..., Any]:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                if leaf:
                    output = self.create_proxy("call_module", name, args, kwargs)
                else:
                    output = forward(*args, **kwargs)
                self.calls.setdefault(name, []).append(output)
                return output

            return recorded

        return recording


def _constant(value: Tensor, number: int) -> Callable[[], Tensor]:
    """Make a named function that returns a tensor created in the forward (code cannot hold a tensor)."""

    def constant() -> Tensor:
        return value

    constant.__name__ = constant.__qualname__ = f"constant_{number}"
    constant.__module__ = "traced"
    return constant


def trace(model: nn.Module) -> Trace | None:
    """The graph of the model's forward on one tensor, or `None` if it cannot be traced.

    Args:
        model: the network, in the mode in which it is explained; it is only read.
    """
    root = unwrap(model)
    if any(has_hooks(module) for module in root.modules()):
        return None  # a hook may do anything: it must run at every call
    if any(isinstance(module, Bound) for module in root.modules()):
        return None  # other inputs that fn reads may differ at the next call
    tracer = _Tracer(root)
    try:
        copy = private_copy(root, tracer.intercept, clone_buffers=False)
        for module in list(copy.modules()):
            module.__dict__["_parameters"] = _TensorDict(module._parameters, tracer)
            module.__dict__["_buffers"] = _TensorDict(module._buffers, tracer)
        output = copy(tracer.create_proxy("placeholder", "x", (), {}))
        tracer.create_node("output", "output", (tracer.create_arg(output),), {})
    except Exception:  # foreign code may raise anything when it gets a proxy
        return None
    calls = {name: [_output_node(value) for value in values] for name, values in tracer.calls.items()}
    return Trace(tracer.graph, calls, {})


def _output_node(value: Any) -> fx.Node | None:
    """The node of a call's output; None if there are several, which only a real run can distinguish."""
    proxies = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Proxy)]
    return proxies[0].node if len(proxies) == 1 else None


class _Audit(fx.Interpreter):
    """Runs a graph once on real values and notes which nodes write to their inputs in place."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        super().__init__(model, graph=trace.graph)
        self.extra_traceback = False
        self.writes: dict[fx.Node, fx.Node] = {}
        self.returns_structure: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        before = {k: v._version for k, v in self.env.items() if isinstance(v, Tensor)}
        result = super().run_node(n)
        if n.op == "call_module" and not isinstance(result, Tensor):
            self.returns_structure.add(n)
        written = [k for k, version in before.items() if self.env[k]._version != version]
        if written:
            self.note_write(n, written, result)
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().get_attr(target, args, kwargs).clone()  # the model's own must not be written to

    def note_write(self, n: fx.Node, written: list[fx.Node], result: Any) -> None:
        (value, *others) = written
        same = isinstance(result, Tensor) and _same_memory(result, self.env[value])
        if others or value not in n.all_input_nodes or not same:
            raise _NotTraceableError("a write through a view")
        self.writes[n] = value


class _NotTraceableError(Exception):
    pass


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def audited(trace: Trace, model: nn.Module, x: Tensor, expected: Any) -> Trace | None:
    """Make the trace safe to cut; return `None` if it computes something else than the model.

    Things that tracing misses (an `isinstance(x, Tensor)`, an autocast region, a random number) change the
    output. In-place writes are found by version counters and rewritten, so no value is read after it was
    written to under another name.

    Args:
        trace: from `trace(model)`; its graph is modified.
        model: the traced network, unwrapped; it is only read.
        x: (B, C, *size), an input to try.
        expected: the model's own output for x.
    """
    audit = _Audit(trace, model)
    try:
        agree = outputs_agree(audit.run(x.clone()), expected)
    except Exception:  # the model did not fail, so this is not its graph
        return None
    if not agree:
        return None
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    for writer, value in audit.writes.items():
        value.replace_all_uses_with(writer, delete_user_cb=lambda user, w=writer: order[user] > order[w])
    for writer, value in audit.writes.items():
        if len(value.users) > 1 or not value.all_input_nodes:
            _clone_input(trace.graph, writer, value)
    calls = {
        name: [None if node in audit.returns_structure else node for node in nodes]
        for name, nodes in trace.calls.items()
    }
    return Trace(trace.graph, calls, audit.writes)


def run(trace: Trace, model: nn.Module, x: Tensor) -> Any:
    """The trace's output for x with the model's parameters."""
    return _compiled(trace.graph)(model, x.clone())


def _clone_input(graph: fx.Graph, user: fx.Node, value: fx.Node) -> None:
    with graph.inserting_before(user):
        clone = graph.call_method("clone", (value,))
    user.replace_input_with(value, clone)


def cut(trace: Trace, layer: fx.Node) -> Cut:
    """Cut the trace into two functions: up to the layer's output, and from there to the model's output.

    Args:
        trace: an audited trace.
        layer: the node that holds the layer's output.
    """
    nodes = list(trace.graph.nodes)
    output = nodes[-1]
    after = {layer}
    for node in nodes:
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
    needed = _ancestors([output])
    in_head = [n for n in nodes if n is output or (n in after and n in needed and n is not layer)]
    crossing = dict.fromkeys(
        source
        for node in in_head
        for source in node.all_input_nodes
        if source not in after and (source.all_input_nodes or source.op == "placeholder")
    )
    residual = [node for node in crossing if not _is_batch_size(node)]
    in_trunk = _ancestors([layer, *residual])
    trunk = _trunk_graph([n for n in nodes if n in in_trunk], layer, residual)
    head = _head_graph(trace, in_head, layer, residual, list(crossing))
    return Cut(_compiled(trunk), _compiled(head), not residual)


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return seen


def _is_batch_size(node: fx.Node) -> bool:
    """True for `x.size(0)` and `x.shape[0]` of the model's input."""

    def is_input(value: Any) -> bool:
        return isinstance(value, fx.Node) and value.op == "placeholder"

    if node.target == "size":
        return is_input(node.args[0]) and node.args[1:] == (0,)
    if getattr(node.target, "__name__", "") != "getitem" or node.args[1] != 0:
        return False
    shape = node.args[0]
    if not isinstance(shape, fx.Node) or not is_input(shape.args[0] if shape.args else None):
        return False
    return (shape.target == "size" and len(shape.args) == 1) or shape.args[1:] == ("shape",)


def _trunk_graph(nodes: list[fx.Node], layer: fx.Node, residual: list[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    if not any(node.op == "placeholder" for node in nodes):
        graph.placeholder("x")
    for node in nodes:
        new[node] = graph.node_copy(node, lambda n: new[n])
    graph.output((new[layer], tuple(new[node] for node in residual)))
    return graph


def _head_graph(
    trace: Trace, nodes: list[fx.Node], layer: fx.Node, residual: list[fx.Node], crossing: list[fx.Node]
) -> fx.Graph:
    graph = fx.Graph()
    features = graph.placeholder("features")
    new = {layer: features}
    for i, node in enumerate(residual):
        new[node] = graph.placeholder(f"residual_{i}")
    for node in crossing:
        if node not in new:  # the batch size: the head may run on another batch than the trunk
            new[node] = graph.call_method("size", (features, 0))
    boundary = {layer, *residual}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in new:  # a parameter or a constant: read again, where it is used
                new[source] = graph.node_copy(source, lambda n: new[n])
        copy = graph.node_copy(node, lambda n: new[n])
        written = trace.writes.get(node)
        if written in boundary and new[written] in copy.all_input_nodes:
            _clone_input(graph, copy, new[written])
        new[node] = copy
    return graph


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function `(model, *placeholders)` that reads the model's parameters at each call."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<xcam_fn: traced model>", "exec"), namespace)
    forward = namespace["forward"]
    assert isinstance(forward, types.FunctionType)
    return forward
