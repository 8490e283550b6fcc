"""Compiled scoring against eager scoring; run by test_perturbation.py, prints what it has compared."""

import torch

import networks
import xcam_fn as xf


def main() -> None:
    model = networks.seeded(networks.Residual())
    x = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    before = xf.testing.state(model)
    for name, options in {"scorecam": {}, "rise": {"num_masks": 10}}.items():
        method = xf.METHODS[name]
        fast = method(model, "relu", x, compile=True, chunk_size=4, **options)
        torch.testing.assert_close(
            fast, method(model, "relu", x, chunk_size=4, **options), rtol=1e-4, atol=1e-4
        )
        assert xf.testing.state(model) == before
        print(name)
    torch._dynamo.reset()
    compilations = torch._dynamo.utils.counters["stats"]
    compilations.clear()
    model = networks.seeded(networks.Residual(), 1)
    for masks in (8, 9, 10, 11):  # what is left over for the last forward is 0, 1, 2 and 3 images
        xf.rise(model, None, x[:1], 1, compile=True, chunk_size=4, num_masks=masks)
    assert compilations["unique_graphs"] == 1, dict(compilations)
    print("once")


if __name__ == "__main__":
    main()
