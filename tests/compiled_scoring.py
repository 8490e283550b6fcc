"""Compiled scoring against eager scoring; run by test_perturbation.py, prints what it has compared."""

import torch

import networks
import xcam_fn as xf


def main() -> None:
    model = networks.seeded(networks.Residual())
    x = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    before = xf.testing.state(model)
    compilations = torch._dynamo.utils.counters["stats"]
    for masks in (8, 9, 10, 11):  # what is left over for the last forward is 0, 1, 2 and 3 images
        fast = xf.rise(model, None, x[:1], 1, compile=True, chunk_size=4, num_masks=masks)
        eager = xf.rise(model, None, x[:1], 1, chunk_size=4, num_masks=masks)
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-4)
        assert xf.testing.state(model) == before
    assert compilations["unique_graphs"] == 1, dict(compilations)
    print("rise")
    print("once")
    fast = xf.scorecam(model, "relu", x, compile=True, chunk_size=4)
    torch.testing.assert_close(fast, xf.scorecam(model, "relu", x, chunk_size=4), rtol=1e-4, atol=1e-4)
    assert xf.testing.state(model) == before
    print("scorecam")


if __name__ == "__main__":
    main()
