"""One model, many threads: every map is its serial twin, and an unrelated forward never notices."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

import networks
import xcam_fn as xf


def resnet() -> nn.Module:
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torchvision.models.resnet18(weights=None).eval()


def test_threads_on_one_model_from_a_cold_start():
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    layers = ["layer4", "layer3", "layer2.0", "layer4.1.conv1", "layer1.0.relu#1", None]
    names = ["gradcam", "layercam", "hirescam", "xgradcam", "gradcam_pp"]
    calls = [(names[i % 5], layers[i % 6], [i, 999 - i]) for i in range(60)]

    def explain(model: nn.Module, call: tuple[str, str | None, list[int]]) -> Tensor:
        name, layer, cls = call
        return xf.METHODS[name](model, layer, x, cls)

    twin, shared = resnet(), resnet()  # of the shared one nothing is traced or remembered
    expected = [explain(twin, call) for call in calls]
    plain = twin(x)
    stop, wrong, runs = threading.Event(), [], []

    def run_plainly() -> None:
        while not stop.is_set():
            try:
                y = shared(x)
                if not torch.equal(y, plain):
                    wrong.append("another output")
            except Exception as error:
                wrong.append(repr(error))
            runs.append(1)

    ninth = threading.Thread(target=run_plainly)
    ninth.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda call: explain(shared, call), calls))
    finally:
        stop.set()
        ninth.join()
    assert wrong == []
    assert len(runs) > 3
    different = [call for call, a, b in zip(calls, found, expected, strict=True) if not torch.equal(a, b)]
    assert different == []


def test_hundreds_of_calls_later_the_process_is_not_larger():
    model, x = networks.seeded(networks.Residual()), torch.randn(2, 3, 12, 16)

    def call(i: int) -> None:
        xf.METHODS[["gradcam", "layercam"][i % 2]](model, ["conv2", "relu#1", None][i % 3], x, i % 5)

    def resident() -> int:
        gc.collect()
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    for i in range(100):
        call(i)
    objects, before = len(gc.get_objects()), resident()
    for i in range(300):
        call(i)
    assert resident() - before < 4 * 2**20
    assert len(gc.get_objects()) - objects < 200


def test_models_that_come_and_go_leave_nothing():
    x = torch.randn(1, 3, 12, 16)
    xf.gradcam(networks.seeded(networks.Residual()), None, x)
    before = modules_alive()
    for seed in range(20):
        xf.gradcam(networks.seeded(networks.Residual(), seed), None, x)
    assert modules_alive() == before


def modules_alive() -> int:
    gc.collect()
    return sum(issubclass(type(o), nn.Module) for o in gc.get_objects())
