"""Prints the peak memory of this process, in MiB, after few and after many perturbations."""

import resource

import torch

import networks
import xcam_fn as xf


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    torch.set_num_threads(1)
    model, x = networks.seeded(networks.Linearized()), torch.randn(1, 3, 96, 96)
    xf.rise(model, None, x, num_masks=100)
    few = peak()
    xf.rise(model, None, x, num_masks=6000)
    print(few, peak())


if __name__ == "__main__":
    main()
