"""TorchCAM's public names: `from xcam_fn.compat.torchcam.methods import LayerCAM`.

An extractor remembers its arguments, registers no hook, and each call is a pure call of our functions.
TorchCAM hooks the network and sees the forward that was run before an extractor is called; here it is told of
it, in one of two ways:

    extractor(cls, scores, input_tensor=x)           # the images themselves
    model = xcam_fn.compat.torchcam.remember(model)  # or a model that remembers its last input and output
    extractor = LayerCAM(model)

What runs TorchCAM's own tests on this package tells of it in a third way, which leaves the tests as they are:
it replaces `xcam_fn.compat.torchcam.methods.core.last_call` by a function from a model to the last (input,
output) of its forward, or None. The output is needed where scores are made of it, such as its softmax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["explain", "methods", "metrics", "utils"],
    submod_attrs={"methods.core": ["remember"]},
)
