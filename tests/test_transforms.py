"""Calls compose with torch.func, autograd, torch.compile and make_fx, and agree with plain calls."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import networks
import xcam_fn as xf

GRADIENT = [n for n, m in xf.METHODS.items() if m.family == "gradient" and n not in networks.OF_ATTENTION]
NETWORKS = {"conv": networks.ReadsParameters, "conv2": networks.Residual, "block": networks.DataDependent}


class Explained(nn.Module):
    """A model and the raw map of one class in one module, for `functional_call` around our call."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return xf.gradcam(self.model, self.layer, x, 1, postprocess=None)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def explained(layer: str) -> Explained:
    return Explained(networks.seeded(NETWORKS[layer]()).double(), layer)


def finite_difference(
    f: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, step: float = 1e-6
) -> Tensor:
    return (f(at + step * direction) - f(at - step * direction)) / (2 * step)


@pytest.mark.parametrize("layer", NETWORKS)
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_gradient_with_respect_to_x(layer, cold):
    wrapped, x = explained(layer), images()
    weight = torch.randn_like(wrapped(x))
    if not cold:
        wrapped(x)

    def f(x: Tensor) -> Tensor:
        return (wrapped(x) * weight).sum()

    if layer == "block":  # vmap and grad cannot look at values, so this network's forward cannot run there
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(f(leaf), leaf)
    else:
        found = grad(f)(x)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(f(leaf), leaf)[0], found)
    direction = torch.randn_like(x)
    expected = finite_difference(f, x, direction)
    torch.testing.assert_close((found * direction).sum(), expected, rtol=1e-5, atol=1e-8)
    assert found.abs().max() > 0


@pytest.mark.parametrize("layer", ["conv", "conv2"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_gradient_with_respect_to_the_parameters(layer, cold):
    wrapped, x = explained(layer), images()
    parameters = {name: p.detach() for name, p in wrapped.named_parameters()}
    weight = torch.randn_like(wrapped(x))
    if not cold:
        wrapped(x)

    def f(parameters: dict[str, Tensor]) -> Tensor:
        return (functional_call(wrapped, parameters, (x,)) * weight).sum()

    found = grad(f)(parameters)
    for name, value in parameters.items():
        direction = torch.randn_like(value)
        expected = finite_difference(lambda v, n=name: f(parameters | {n: v}), value, direction)
        torch.testing.assert_close((found[name] * direction).sum(), expected, rtol=1e-5, atol=1e-7)
    if layer == "conv":  # parameters that the forward itself reads
        assert found["model.scale"].abs().max() > 0
        assert found["model.head"].abs().max() > 0


def test_create_graph_reaches_the_parameters():
    wrapped, x = explained("conv2"), images()
    parameters = {name: p.detach() for name, p in wrapped.named_parameters()}
    expected = grad(lambda p: functional_call(wrapped, p, (x,)).square().sum())(parameters)
    loss = xf.gradcam(wrapped.model, "conv2", x, 1, postprocess=None, create_graph=True).square().sum()
    names = [name for name, value in expected.items() if value.abs().max() > 0]
    found = torch.autograd.grad(loss, [dict(wrapped.named_parameters())[name] for name in names])
    for name, value in zip(names, found, strict=True):
        torch.testing.assert_close(value, expected[name])
    assert len(names) > 4


def test_without_a_reason_no_graph_is_recorded():
    wrapped, x = explained("conv2"), images()
    assert all(p.requires_grad for p in wrapped.parameters())
    assert not xf.gradcam(wrapped.model, "conv2", x).requires_grad
    found = xf.feature_and_grad(wrapped.model, "conv2", x)
    assert not any(t.requires_grad for t in found)
    found[0].numpy()
    with torch.no_grad():
        assert not xf.gradcam(wrapped.model, "conv2", x.clone().requires_grad_()).requires_grad
    assert xf.gradcam(wrapped.model, "conv2", x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("layer", ["conv", "conv2"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_grad_of_vmap_is_not_silently_zero(layer, cold):
    wrapped, x = explained(layer), images()
    weight = torch.randn_like(wrapped(x))
    if not cold:
        wrapped(x)

    def f(x: Tensor) -> Tensor:
        return (vmap(lambda image: wrapped(image[None])[0])(x) * weight).sum()

    found, direction = grad(f)(x), torch.randn_like(x)
    assert found.abs().max() > 0
    torch.testing.assert_close(
        (found * direction).sum(), finite_difference(f, x, direction), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("name", GRADIENT)
def test_vmap_over_x_is_the_batch(name):
    model, x = networks.seeded(networks.Residual()).double(), images(3)
    method = xf.METHODS[name].with_options(**networks.QUICK.get(name, {}))
    for layer in ("conv2", None):
        expected = method(model, layer, x, 1)
        found = vmap(lambda image, layer=layer: method(model, layer, image[None], 1)[0])(x)
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:FutureWarning")  # torch.func.jvp's own
def test_jvp_is_the_directional_derivative():
    wrapped, x = explained("conv2"), images()
    direction = torch.randn_like(x)
    _, tangent = jvp(wrapped, (x,), (direction,))
    torch.testing.assert_close(tangent, finite_difference(wrapped, x, direction), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_an_ensemble_is_mapped_over(cold):
    models = [networks.seeded(networks.Residual(), seed).double() for seed in range(3)]
    base, x = networks.seeded(networks.Residual(), 9).double(), images()
    if not cold:
        xf.gradcam(base, "conv2", x)
    parameters, buffers = stack_module_state(models)
    wrapped = Explained(base, "conv2")

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        values = {f"model.{name}": value for name, value in (parameters | buffers).items()}
        return functional_call(wrapped, values, (x,))

    expected = torch.stack([xf.gradcam(model, "conv2", x, 1, postprocess=None) for model in models])
    torch.testing.assert_close(vmap(one)(parameters, buffers), expected)
    torch.testing.assert_close(xf.gradcam(base, "conv2", x, 1, postprocess=None), wrapped(x))


def test_a_compiled_pipeline_is_the_eager_one():
    """In a process of its own: dynamo cannot see through the run-time check of signatures."""
    script = Path(__file__).with_name("compiled.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [
        name for name in GRADIENT if name not in ("fullgrad", "guided_backprop", "guided_gradcam", "liftcam")
    ]
    assert done.stdout.split() == [
        *names, "defaults", "tokens", "inductor", "recompilation", "untraceable",
    ]  # fmt: skip


def test_make_fx_sees_straight_through(unchecked):
    wrapped, x = explained("conv2"), images()
    traced = make_fx(wrapped)(x)
    torch.testing.assert_close(traced(x + 1), wrapped(x + 1))


def test_inference_mode():
    model, x = networks.seeded(networks.Residual()), images().float()
    expected = xf.gradcam(model, "conv2", x)
    with torch.inference_mode():
        torch.testing.assert_close(xf.gradcam(model, "conv2", x), expected)
        inside = x * 1
    torch.testing.assert_close(xf.gradcam(model, "conv2", inside), expected)
    torch.testing.assert_close(
        xf.integrated_gradients(model, None, inside, 1), xf.integrated_gradients(model, None, x, 1)
    )


def test_autocast():
    model, x = networks.seeded(networks.Residual()), images().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = xf.gradcam(model, "conv2", x, 1)
    torch.testing.assert_close(found.float(), xf.gradcam(model, "conv2", x, 1), rtol=0, atol=0.1)
