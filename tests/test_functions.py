"""Explanations are functions: differentiated, mapped over models, sent to other processes."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.metrics import sensitivity_max
from torch import Tensor
from torch.func import functional_call, jacrev, stack_module_state, vmap

import networks
import xcam_fn as xf
from xcam_fn.testing import small_transformer

# Each method and what it needs to be quick and smooth here. The map of RISE and of the others that weigh masks is a
# function of the scores, which are differentiated; the masks that are made of features are differentiated too.
OPTIONS = {
    "sscam": {"num_samples": 2},
    "iscam": {"num_samples": 2},
    "rise": {"num_masks": 8},
    "drise": {"num_masks": 8},
    "groupcam": {"num_groups": 2},
    "integrated_gradients": {"steps": 5},
    "expected_gradients": {"num_samples": 3},
    "integrated_gradcam": {"steps": 3},
    "smoothgradcam_pp": {"num_samples": 2},
    "opticam": {"steps": 2},
    "curvecam": {"steps": 2},
    "refinecam": {"layers": ["0", "2"], "each": None},
}
# Those two choose between maps; concepts cannot be differentiated; guided backprop is a rule for ReLUs, corners all.
NOT_SMOOTH = ("unioncam", "fusioncam", "deep_feature_factorization", "guided_backprop", "guided_gradcam")
METHODS = [name for name in xf.METHODS if name not in NOT_SMOOTH]


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def smooth() -> torch.nn.Module:
    """A network without corners, so that a finite difference is a derivative."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(6, 6, 3, padding=1),
        torch.nn.Softplus(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 5),
    )  # fmt: skip
    return networks.seeded(model).double()


def network_of(name: str) -> torch.nn.Module:
    return small_transformer().model if name in networks.OF_ATTENTION else smooth()


def images_of(name: str) -> Tensor:
    return small_transformer(batch=2).x if name in networks.OF_ATTENTION else images()


def raw_map(name: str, model: torch.nn.Module, x: Tensor, **options) -> Tensor:
    options = OPTIONS.get(name, {}) | options
    # CAM is of the features that are pooled, methods of attention of all blocks.
    layer = {"cam": "3", **dict.fromkeys(networks.OF_ATTENTION)}.get(name, "2")
    return xf.METHODS[name](model, layer, x, 1, postprocess=None, **options)


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_to_x_is_that_of_finite_differences(name):
    model, x = network_of(name), images_of(name)
    weight = torch.randn_like(raw_map(name, model, x))
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((raw_map(name, model, leaf) * weight).sum(), leaf)
    direction, step = torch.randn_like(x), 1e-6
    ends = [(raw_map(name, model, x + sign * step * direction) * weight).sum() for sign in (1, -1)]
    torch.testing.assert_close(
        (found * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-7
    )
    assert found.abs().max() > 0


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_to_the_parameters_is_that_of_finite_differences(name):
    model, x = network_of(name), images_of(name)
    weight = torch.randn_like(raw_map(name, model, x))
    parameters = dict(model.named_parameters())
    loss = (raw_map(name, model, x, create_graph=True) * weight).sum()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        if gradient is None:
            continue
        value = parameters[parameter].detach()
        direction, step = torch.randn_like(value), 1e-6
        ends = []
        for sign in (1, -1):
            moved = network_of(name)
            with torch.no_grad():
                moved.get_parameter(parameter).add_(sign * step * direction)
            ends.append((raw_map(name, moved, x) * weight).sum())
        torch.testing.assert_close(
            (gradient * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-7
        )
    assert sum(gradient is not None and gradient.abs().max() > 0 for gradient in found) >= 3


def test_a_factorization_says_that_it_cannot_be_differentiated():
    model, x = smooth(), images().requires_grad_()
    with pytest.raises(ValueError, match="cannot be differentiated"):
        xf.deep_feature_factorization(model, "2", x)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        xf.deep_feature_factorization(model, "2", images(), create_graph=True)


def test_five_networks_at_once():
    models = [networks.seeded(networks.Residual(), seed).double() for seed in range(5)]
    base, x = networks.seeded(networks.Residual(), 9).double(), images(3)

    class Explained(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = base

        def forward(self, x):
            return xf.gradcam(self.model, "conv2", x, [1, 2, 3])

    wrapped = Explained()

    def one(parameters, buffers):
        values = {f"model.{name}": value for name, value in (parameters | buffers).items()}
        return functional_call(wrapped, values, (x,))

    found = vmap(one)(*stack_module_state(models))
    expected = torch.stack([xf.gradcam(model, "conv2", x, [1, 2, 3]) for model in models])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.mean(0), expected.mean(0))
    assert found.std(0).max() > 0.1


def test_a_jacobian_of_the_map():
    model, x = smooth(), images(1)
    jacobian = jacrev(lambda x: xf.gradcam(model, "2", x, 1, postprocess=None))(x)
    assert jacobian.shape == (1, 8, 9, 1, 3, 8, 9)
    direction, step = torch.randn_like(x), 1e-6
    ends = [raw_map("gradcam", model, x + sign * step * direction) for sign in (1, -1)]
    along = (jacobian * direction).flatten(3).sum(3)
    torch.testing.assert_close(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-8)


# -- sensitivity --------------------------------------------------------------------------------------------


def test_sensitivity_is_that_of_the_definition_and_of_captum():
    model, x = networks.seeded(networks.Residual()), images(3).float()
    found = xf.max_sensitivity("gradcam", model, "conv2", x, 1, radius=0.1, num_samples=6, seed=4)
    from xcam_fn.perturb import uniform

    changes = [0.1 * (2 * uniform(4, i, (3, 8, 9), like=x) - 1) for i in range(6)]
    first = xf.gradcam(model, "conv2", x, 1)
    by_hand = torch.stack(
        [
            torch.stack([(xf.gradcam(model, "conv2", (x[i] + c)[None], 1)[0] - first[i]).norm() for c in changes])
            .max() / first[i].norm()
            for i in range(3)
        ]
    )  # fmt: skip
    torch.testing.assert_close(found, by_hand)
    given = iter(changes)
    captum = sensitivity_max(
        lambda x: (xf.gradcam(model, "conv2", x if isinstance(x, Tensor) else x[0], 1),),
        (x,),
        perturb_func=lambda x: ((x if isinstance(x, Tensor) else x[0]) + next(given),),
        n_perturb_samples=6,
        max_examples_per_batch=3,
    )
    torch.testing.assert_close(found, captum)


def test_sensitivity_of_a_map_that_never_moves_is_zero():
    def constant(model, layer, x, cls=None):
        return torch.ones(len(x), *x.shape[2:])

    def empty(model, layer, x, cls=None):
        return torch.zeros(len(x), *x.shape[2:])

    model, x = networks.seeded(networks.Residual()), images().float()
    assert xf.max_sensitivity(constant, model, None, x).tolist() == [0, 0]
    assert xf.max_sensitivity(empty, model, None, x).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"), [({"radius": 0.0}, "radius=0.0"), ({"num_samples": 0}, "num_samples=0")]
)
def test_bad_options_of_sensitivity(options, message):
    with pytest.raises(ValueError, match=message):
        xf.max_sensitivity("gradcam", networks.seeded(networks.Residual()), None, images().float(), **options)


# -- other processes and threads ----------------------------------------------------------------------------


def test_everything_public_goes_to_other_processes():
    """In a process of its own: what the run-time check of signatures wraps cannot be pickled."""
    script = Path(__file__).with_name("pickled.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["pickled", "mapped"]


def test_the_registry_is_read_only():
    registry: Any = xf.METHODS
    with pytest.raises(TypeError, match="item assignment"):
        registry["mine"] = xf.gradcam


def test_a_pool_of_threads_over_one_model():
    model, x = networks.seeded(networks.Residual()), images(16).float()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: xf.layercam(model, "conv2", image[None], 1), x))
    torch.testing.assert_close(torch.cat(found), xf.layercam(model, "conv2", x, 1))
