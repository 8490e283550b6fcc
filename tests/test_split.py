"""The model as functions: both ways of cutting agree, and neither touches the model."""

import copy
import gc
import weakref
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import networks
import xcam_fn as xf
from xcam_fn.network.halves import traced_model
from xcam_fn.testing import state

TRACEABLE = {
    "stem": networks.Residual,
    "conv1": networks.Residual,
    "relu#1": networks.Residual,
    "relu#2": networks.Residual,
    "relu": networks.Residual,
    "conv": networks.ReadsParameters,
    "features": networks.InPlaceFunction,
    "features.0": networks.InPlaceFunction,
    "inner": networks.ReturnsTuple,
    "inner.conv": networks.ReturnsTuple,
}
UNTRACEABLE = {
    "conv": networks.DataDependent,
    "block": networks.DataDependent,
    "block.0": networks.DataDependent,
}


def images(batch: int = 3, size: tuple[int, int] = (12, 16)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(5))


def without_trace():
    """The out-of-place way, also for a model that can be traced."""
    return mock.patch("xcam_fn.network.trace.trace", lambda model: None)


def hooked(model: nn.Module, layer: nn.Module, x: Tensor, call: int = -1) -> tuple[Tensor, Tensor]:
    """Features and gradient of the predicted class, the way that hooks get them, on a copy of the model."""
    names = {id(module): name for name, module in model.named_modules()}
    twin = copy.deepcopy(model)
    kept = []

    def keep(module: nn.Module, args: object, output: object) -> object:
        first = output[0] if isinstance(output, tuple) else output
        assert isinstance(first, Tensor)
        kept.append(first.clone())
        out = kept[-1].clone()  # what follows in place must not change what was kept
        return (out, *output[1:]) if isinstance(output, tuple) else out

    twin.get_submodule(names[id(layer)]).register_forward_hook(keep)
    y = twin(x.clone())
    score = y.gather(1, y.argmax(1, keepdim=True)).sum()
    (grad,) = torch.autograd.grad(score, kept[call])
    return kept[call].detach(), grad


@pytest.mark.parametrize(("layer", "network"), [*TRACEABLE.items(), *UNTRACEABLE.items()])
def test_features_and_gradient_are_what_autograd_gives(layer, network):
    model, x = networks.seeded(network()), images()
    name, _, call = layer.partition("#")
    expected = hooked(model, model.get_submodule(name), x, int(call) - 1 if call else -1)
    found = xf.feature_and_grad(model, layer, x)
    torch.testing.assert_close(found.features, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.grads, expected[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.output, model(x).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("layer", "network"), TRACEABLE.items())
def test_both_ways_of_cutting_agree(layer, network):
    x = images()
    traced = xf.feature_and_grad(networks.seeded(network()), layer, x)
    with without_trace():
        replaced = xf.feature_and_grad(networks.seeded(network()), layer, x)
    for a, b in zip(traced[:2], replaced[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("network", dict.fromkeys(TRACEABLE.values()))
def test_these_networks_are_traced(network):
    assert traced_model(networks.seeded(network()), images()) is not None


@pytest.mark.parametrize("network", [networks.DataDependent, networks.Isinstance])
def test_a_trace_that_is_not_the_model_is_not_used(network):
    assert traced_model(networks.seeded(network()), images()) is None


@pytest.mark.parametrize(("layer", "network"), [*TRACEABLE.items(), *UNTRACEABLE.items()])
def test_head_after_trunk_is_the_model(layer, network):
    model, x = networks.seeded(network()), images()
    trunk, head = xf.split(model, layer, x)
    with torch.no_grad():
        features, residual = trunk(x)
        torch.testing.assert_close(head(features, residual), model(x))
        torch.testing.assert_close(head(features, residual), model(x))  # once more: nothing was written to


def test_the_head_does_not_run_the_trunk():
    model, x = networks.seeded(networks.Residual()), images()
    trunk, head = xf.split(model, "conv2", x)
    features, residual = trunk(x)
    runs = []
    handle = model.stem.register_forward_hook(lambda *_: runs.append("stem"))
    head(features, residual)
    handle.remove()
    assert runs == []


def test_the_head_of_another_batch_does_not_see_the_old_batch_size():
    model, x = networks.seeded(networks.ReadsParameters()), images(1)
    trunk, head = xf.split(model, "conv", x)
    features, residual = trunk(x)
    assert residual == ()
    torch.testing.assert_close(head(features.repeat(4, 1, 1, 1), residual), model(x).repeat(4, 1))


def test_an_output_changed_in_place_is_captured_as_the_layer_returned_it():
    model, x = networks.seeded(networks.InPlaceFunction()), images()
    found = xf.features(model, "features", x)
    assert found.min() < 0
    torch.testing.assert_close(found, model.features(x).detach())


def test_an_in_place_module_whose_result_is_ignored_still_has_a_gradient():
    model, x = networks.seeded(networks.InPlaceIgnored()), images()
    found = xf.feature_and_grad(model, "relu", x, 2)
    assert found.features.min() >= 0
    expected = model.fc.weight[2].detach().reshape(1, -1, 1, 1) / found.features[0, 0].numel()
    torch.testing.assert_close(found.grads, expected.expand_as(found.grads))


def test_a_parameter_assigned_later_is_seen():
    model, x = networks.seeded(networks.ReadsParameters()), images()
    before = xf.features(model, "conv", x)
    xf.gradcam(model, "conv", x)
    model.scale = nn.Parameter(model.scale.detach() * -3)
    model.conv.weight.data.mul_(2)
    assert not torch.equal(before, xf.features(model, "conv", x))
    torch.testing.assert_close(xf.feature_and_grad(model, "conv", x).output, model(x).detach())


def test_a_structure_that_has_changed_is_noticed():
    model, x = networks.seeded(networks.Residual()), images()
    xf.gradcam(model, "conv2", x)
    model.relu = nn.Tanh()
    torch.testing.assert_close(xf.feature_and_grad(model, "conv2", x).output, model(x).detach())
    model = networks.seeded(networks.Wrapped("logits"))
    xf.gradcam(model, "body.conv2", x)
    model.kind = "out"
    assert set(xf.feature_and_grad(model, "body.conv2", x).output) == {"out", "aux"}


def test_a_hook_of_the_users_own_runs_on_state_of_its_own():
    model, x = networks.seeded(networks.Residual()), images()
    xf.gradcam(model, "conv2", x)
    seen = []
    model.conv1.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    found = xf.feature_and_grad(model, "conv2", x)
    assert seen == []
    torch.testing.assert_close(found.output, model(x).detach())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        nn.DataParallel,
        lambda m: nn.DataParallel(torch.compile(m)),
    ],
    ids=["compile", "DataParallel", "both"],
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_wrappers_are_seen_through(wrap, prefix):
    model, x = networks.seeded(networks.Residual()), images()
    expected = xf.gradcam(model, "conv2", x)
    torch.testing.assert_close(xf.gradcam(wrap(model), prefix + "conv2", x), expected)
    torch.testing.assert_close(xf.gradcam(wrap(model), model.conv2, x), expected)


@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel_is_seen_through(tmp_path):
    dist = torch.distributed
    model, x = networks.seeded(networks.Residual()), images()
    dist.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for layer in ("conv2", "module.conv2", model.conv2):
            assert torch.equal(xf.gradcam(wrapped, layer, x), xf.gradcam(model, "conv2", x))
    finally:
        dist.destroy_process_group()


def test_a_model_compiled_in_place_or_in_part_is_cut_all_the_same():
    x = images()
    expected = xf.gradcam(networks.seeded(networks.Wrapped("logits")), "body.conv2", x)
    whole = networks.seeded(networks.Wrapped("logits"))
    whole.compile(backend="eager")
    torch.testing.assert_close(xf.gradcam(whole, "body.conv2", x), expected)
    part = networks.seeded(networks.Wrapped("logits"))
    part.body = torch.compile(part.body, backend="eager")
    torch.testing.assert_close(xf.gradcam(part, "body.conv2", x), expected)


@pytest.mark.parametrize("kind", ["logits", "out", "object"])
def test_outputs_that_rules_cover(kind):
    x = images()
    expected = xf.gradcam(networks.seeded(networks.Residual()), "conv2", x)
    torch.testing.assert_close(xf.gradcam(networks.seeded(networks.Wrapped(kind)), "body.conv2", x), expected)


def test_any_output_through_a_target():
    x = images()
    expected = xf.gradcam(networks.seeded(networks.Residual()), "conv2", x, 3)
    model = networks.seeded(networks.Wrapped("tuple"))
    torch.testing.assert_close(xf.gradcam(model, "body.conv2", x, lambda y: y[0][:, 3]), expected)


@pytest.mark.parametrize("kind", ["traced", "replaced"])
def test_a_forward_that_writes_to_its_model_writes_to_a_copy(kind):
    model, x = networks.seeded(networks.WritesBuffer()), images()
    before = state(model)
    if kind == "replaced":
        with without_trace():
            xf.gradcam(model, "conv", x)
    else:
        xf.gradcam(model, "conv", x)
    xf.integrated_gradients(model, None, x, steps=2)
    assert state(model) == before
    assert model.last is None


def test_a_layer_may_be_a_module_or_an_alias():
    model, x = networks.seeded(networks.Residual()), images()
    model.alias = model.conv2
    expected = xf.gradcam(model, "conv2", x)
    torch.testing.assert_close(xf.gradcam(model, model.conv2, x), expected)
    torch.testing.assert_close(xf.gradcam(model, "alias", x), expected)


def test_layers_lists_every_call():
    listed = xf.layers(networks.seeded(networks.Residual()), images())
    assert list(listed) == ["stem", "relu#1", "conv1", "bn", "relu#2", "conv2", "relu#3"]
    assert listed["conv2"] == (1, 6, 12, 16)


class Region(nn.Module):
    """The layer in a region that switches recording, as frozen backbones are run."""

    def __init__(self, region) -> None:
        super().__init__()
        self.region = region
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        with self.region():
            x = self.a(x).relu()
        return self.fc(self.b(x).relu().mean((2, 3)))


@pytest.mark.parametrize("region", [torch.no_grad, torch.enable_grad, lambda: torch.set_grad_enabled(False)])
def test_a_layer_in_a_region_that_switches_recording_has_its_gradient(region):
    model = networks.seeded(Region(region))
    expected = xf.feature_and_grad(networks.seeded(Region(nullcontext)), "a", images(), 1).grads
    found = xf.feature_and_grad(model, "a", images(), 1)
    torch.testing.assert_close(found.grads, expected)
    assert expected.abs().max() > 0
    assert torch.is_grad_enabled()


class Reroutes(nn.Module):
    """Another module each time that it runs."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 6, 3) for _ in range(3))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        Reroutes.runs += 1
        return self.fc(self.convs[Reroutes.runs % 3](x).mean((2, 3)))


def test_a_default_layer_that_changes_from_forward_to_forward_is_refused():
    with pytest.raises(
        ValueError, match="runs different modules in each forward pass of the same images; name a layer"
    ):
        xf.gradcam(networks.seeded(Reroutes()), None, images())


def test_what_is_remembered_goes_with_the_model():
    model = networks.seeded(networks.Residual())
    xf.gradcam(model, "conv2", images())
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("network", [networks.Residual, networks.DataDependent, networks.WritesBuffer])
def test_nothing_is_left_behind(network):
    model, x = networks.seeded(network()), images()
    model.fc.weight.requires_grad_(False)
    model.fc.bias.grad = torch.ones(5)
    before = state(model)
    for call in (
        lambda: xf.gradcam(model, None, x),
        lambda: xf.gradcam(model, None, x, [[0, 1]] * 3),
        lambda: xf.layercam(model, None, x.clone().requires_grad_()),
        lambda: xf.gradcam(model, None, x, create_graph=True),
        lambda: xf.features(model, None, x),
        lambda: xf.layers(model, x),
    ):
        call()
        assert state(model) == before
    for call in (
        lambda: xf.gradcam(model, None, x, 77),
        lambda: xf.gradcam(model, "nothing", x),
        lambda: xf.gradcam(model, None, x, lambda y: y),
        lambda: xf.gradcam(model, None, x, lambda y: 1 / 0),
        lambda: xf.gradcam(model, None, x.repeat(1, 2, 1, 1)),
    ):
        with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
            call()
        assert state(model) == before
