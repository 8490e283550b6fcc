"""The commands that list what there is: `methods` and `layers`."""

from __future__ import annotations

from xcam_fn.cli.text import table


def methods() -> None:
    """List the methods: name, title, paper, what it does, and what it needs of the network."""
    import xcam_fn as xf

    rows = [
        (name, m.title, m.paper, m.summary + (f" (needs {m.needs})" if m.needs else ""))
        for name, m in xf.METHODS.items()
    ]
    print(table([("name", "title", "paper", "what it does"), *rows]))


def layers(model: str, /, *, weights: str | None = None) -> None:
    """List the layers that a model runs, in order, with type and output shape; the default has a star.

    Args:
        model: lite0, a classification model of torchvision, or timm:NAME.
        weights: a checkpoint of your own for the model. The layers are the same without.
    """
    import torch

    import xcam_fn as xf
    from xcam_fn.models import describe

    loaded = xf.models.load(model, weights=weights or "random")
    x = torch.zeros(1, 3, loaded.preset.crop, loaded.preset.crop)
    shapes = xf.layers(loaded.model, x)
    default = describe.default_call(loaded.model, x, list(shapes))
    rows = [
        (
            f"{'*' if name == default else ' '} {name}",
            type(loaded.model.get_submodule(name.partition("#")[0])).__name__,
            " x ".join(map(str, shape[1:])),
        )
        for name, shape in shapes.items()
    ]
    print(table([("  layer", "type", "output"), *rows]))
