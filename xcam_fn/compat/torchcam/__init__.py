"""TorchCAM's public names: `from xcam_fn.compat.torchcam.methods import LayerCAM`.

An extractor remembers its arguments and registers no hooks; each call runs a pure function of `xcam_fn`.
TorchCAM's hooks record the forward that runs before an extractor is called. Without hooks, there are two ways
to give an extractor that forward:

    extractor(cls, scores, input_tensor=x)           # pass the images
    model = xcam_fn.compat.torchcam.remember(model)  # or use a model that remembers its last input and output
    extractor = LayerCAM(model)

The runner of TorchCAM's own tests uses a third way, which leaves the tests unchanged: it replaces
`xcam_fn.compat.torchcam.methods.core.last_call` with a function from a model to the (input, output) of its
last forward, or None. The output is needed if the scores are computed from it, such as its softmax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["explain", "methods", "metrics", "utils"],
    submod_attrs={"methods.core": ["remember"]},
)
