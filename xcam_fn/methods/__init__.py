"""The methods: formulas over a `Call`, a file for each family, and the catalog that names them.

Code that methods share is in `call`, `method`, `catalog` and `together`; nothing here opens files or draws.
"""

from xcam_fn.methods import (
    ablation,
    activation,
    attention,
    factorization,
    full_gradient,
    fusion,
    gradient,
    input_gradient,
    optimized,
    perturbation,
    together,
    wrappers,
)
from xcam_fn.methods.ablation import *  # noqa: F403
from xcam_fn.methods.activation import *  # noqa: F403
from xcam_fn.methods.attention import *  # noqa: F403
from xcam_fn.methods.catalog import METHODS, find_method, freeze
from xcam_fn.methods.factorization import *  # noqa: F403
from xcam_fn.methods.full_gradient import *  # noqa: F403
from xcam_fn.methods.fusion import *  # noqa: F403
from xcam_fn.methods.gradient import *  # noqa: F403
from xcam_fn.methods.input_gradient import *  # noqa: F403
from xcam_fn.methods.method import Method
from xcam_fn.methods.optimized import *  # noqa: F403
from xcam_fn.methods.perturbation import *  # noqa: F403
from xcam_fn.methods.together import *  # noqa: F403
from xcam_fn.methods.wrappers import *  # noqa: F403

VARIANTS = freeze(
    gradient, attention, input_gradient, full_gradient, activation, perturbation, ablation,
    factorization, optimized, fusion, wrappers,
)  # fmt: skip
"""For each library the methods that it has, and the keywords with which ours computes its map."""

__all__ = ["METHODS", "VARIANTS", "Method", "find_method"]
__all__ += gradient.__all__
__all__ += attention.__all__
__all__ += input_gradient.__all__
__all__ += full_gradient.__all__
__all__ += activation.__all__
__all__ += perturbation.__all__
__all__ += ablation.__all__
__all__ += factorization.__all__
__all__ += optimized.__all__
__all__ += fusion.__all__
__all__ += wrappers.__all__
__all__ += together.__all__
