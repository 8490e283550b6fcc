"""Prints by how much many perturbations raise the peak memory of this process, in MiB, a method a line."""

import resource

import torch

import networks
import xcam_fn as xf


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    torch.set_num_threads(1)
    model, x = networks.seeded(networks.Linearized()), torch.randn(2, 3, 96, 96)
    few, many, most = (networks.seeded(networks.Linearized(channels)) for channels in (200, 400, 800))
    xf.rise(model, None, x, num_masks=100)
    xf.ablationcam(few, None, x[..., :16, :16], chunk_size=8)
    xf.scorecam(few, None, x)
    for name, run in {
        "rise": lambda: xf.rise(model, None, x, num_masks=500),
        "ablationcam": lambda: xf.ablationcam(many, None, x[..., :16, :16], chunk_size=8),
        "scorecam": lambda: xf.scorecam(most, None, x[..., :48, :48], chunk_size=8),
    }.items():
        before = peak()
        run()
        print(name, peak() - before)


if __name__ == "__main__":
    main()
