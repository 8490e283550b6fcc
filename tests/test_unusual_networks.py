"""Networks that are seldom explained: what they compute is compared with plain hooks, loops and single images."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import networks
import xcam_fn as xf

# -- batch norms between maps and tokens -----------------------------------------------------------------------


class NormedTokens(nn.Module):
    """Maps are normalized and read as tokens behind a class token, or made of such tokens and normalized."""

    def __init__(self, norm: nn.Module, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), norm, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        A = self.conv(x)
        if self.kind == "from tokens":
            A = torch.cat([A.flatten(2).mT, A.new_zeros(len(A), 5, 8)], 1)[:, :-5].mT.unflatten(
                2, A.shape[2:]
            )
        A = self.norm(A).contiguous()
        if self.kind == "to tokens":
            return (
                self.head(torch.cat([A.new_ones(len(A), 1, 8), A.flatten(2).mT], 1)).relu().square().mean(1)
            )
        return self.head(A.relu().square().mean((2, 3)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True)])
@pytest.mark.parametrize("kind", ["to tokens", "from tokens"])
def test_a_batch_norm_beside_tokens_has_the_gradient_of_one_image_too(norm, kind):
    """torch itself returns another gradient for one image than for two of the same on a CPU."""
    model, x = networks.seeded(NormedTokens(norm, kind)).double(), torch.rand(1, 3, 8, 12).double()
    run = lambda x: xf.hirescam(model, "conv", x, 1, postprocess=None)  # noqa: E731
    expected = run(x.expand(2, -1, -1, -1).contiguous())[:1]
    torch.testing.assert_close(run(x), expected)
    value, _ = torch.func.vjp(run, x)
    torch.testing.assert_close(value, expected)
    leaf = x.clone().requires_grad_()
    (second,) = torch.autograd.grad(run(torch.cat([leaf, leaf])).sum() / 2, leaf)
    found: Any = run(leaf)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), leaf)[0], second, rtol=1e-3, atol=1e-5)
