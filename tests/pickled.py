"""Public objects pickled and used in other processes; run by test_functions.py."""

import multiprocessing
import pickle
import types
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

import networks
import xcam_fn as xf


def explained(method, model, x):
    return method(model, "conv2", x, 1).numpy()


def main() -> None:
    things = [getattr(xf, name) for name in xf.__all__]
    things = [thing for thing in things if not isinstance(thing, types.ModuleType)]
    things += [
        xf.find_method(name, variant=library) for library in xf.VARIANTS for name in xf.VARIANTS[library]
    ]
    things += [xf.find_method("gradcam+sscam", num_samples=2), xf.targets.probability(3)]
    things += [xf.models.load("lite0"), xf.Curve(torch.ones(2), torch.ones(1, 2), torch.ones(1))]
    for thing in things:
        assert type(pickle.loads(pickle.dumps(thing))) is type(thing), thing
    assert pickle.loads(pickle.dumps(xf.METHODS))["gradcam"] is xf.gradcam
    print("pickled")

    model = networks.seeded(networks.Residual())
    x = torch.randn(4, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = pool.map(explained, [xf.gradcam] * 2, [model] * 2, [x[:2], x[2:]])
        found = np.concatenate(list(parts))
    np.testing.assert_allclose(found, xf.gradcam(model, "conv2", x, 1), atol=1e-6)
    print("mapped")


if __name__ == "__main__":
    main()
