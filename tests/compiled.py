"""Compiled pipelines against eager ones; run by test_transforms.py, prints what it has compared."""

import functools

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torchvision.models import VisionTransformer

import networks
import xcam_fn as xf

# They run the whole model, changed on its way, in private copies that dynamo does not see through.
WHOLE = (*networks.OF_ATTENTION, "fullgrad", "guided_backprop", "guided_gradcam", "liftcam")


def compiled(f, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=backend)


def agree(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def main() -> None:
    model = networks.seeded(networks.Residual())
    x = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    for name, method in xf.METHODS.items():
        if method.family == "gradient" and name not in WHOLE:
            explain = functools.partial(method, **networks.QUICK.get(name, {}))
            backend = "aot_eager" if name in ("gradcam", "shapleycam") else "eager"
            fast = compiled(lambda x, explain=explain: explain(model, "conv2", x, [1, 2, 3]), backend)
            agree(fast(x), explain(model, "conv2", x, [1, 2, 3]))
            agree(fast(-x), explain(model, "conv2", -x, [1, 2, 3]))
            print(name)
    cold = networks.seeded(networks.ReadsParameters())
    fast = compiled(lambda model, x: xf.gradcam(model, None, x))
    agree(fast(cold, x), xf.gradcam(cold, None, x))
    with torch.no_grad():
        cold.head.mul_(-1)
        cold.scale.mul_(2)
    agree(fast(cold, x), xf.gradcam(cold, None, x))
    print("defaults")
    vit = VisionTransformer(12, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=5)
    vit, square = networks.seeded(vit), x[..., :12]
    fast = compiled(lambda x: xf.gradcam(vit, None, x, 1))
    agree(fast(square), xf.gradcam(vit, None, square, 1))
    print("tokens")
    fast = compiled(lambda x: xf.gradcam(model, "conv2", x), "inductor")
    agree(fast(x), xf.gradcam(model, "conv2", x))
    print("inductor")
    counter = CompileCounter()
    torch._dynamo.reset()
    fast = torch.compile(lambda x: xf.gradcam(model, "conv2", x), fullgraph=True, backend=counter)
    for number in range(20):
        agree(fast(x + number / 10), xf.gradcam(model, "conv2", x + number / 10))
    assert counter.frame_count == 1, counter.frame_count
    for batch in (5, 2, 7, 4):
        agree(fast(x[:1].expand(batch, -1, -1, -1)), xf.gradcam(model, "conv2", x[:1]).expand(batch, -1, -1))
    assert counter.frame_count <= 2, counter.frame_count
    print("recompilation")
    broken = networks.seeded(networks.DataDependent())
    try:
        compiled(lambda x: xf.gradcam(broken, "conv", x))(x)
    except Exception as error:
        if "cannot be traced, so the call cannot be compiled" in str(error):
            print("untraceable")


if __name__ == "__main__":
    main()
