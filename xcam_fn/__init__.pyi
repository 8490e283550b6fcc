"""The public names of `xcam_fn`; `__init__.py` imports one when it is first used."""

from . import evaluate as evaluate
from . import export as export
from . import metrics as metrics
from . import models as models
from . import perturb as perturb
from . import plot as plot
from . import projections as projections
from . import targets as targets
from . import testing as testing
from . import weights as weights
from .evaluate import dataset as dataset
from .evaluate import latency as latency
from .evaluate import report as report
from .maps import heatmap as heatmap
from .methods import *  # noqa: F403
from .metrics import Curve as Curve
from .metrics import adcc as adcc
from .metrics import average_drop as average_drop
from .metrics import average_gain as average_gain
from .metrics import average_sensitivity as average_sensitivity
from .metrics import coherency as coherency
from .metrics import complexity as complexity
from .metrics import deletion as deletion
from .metrics import efficient_mprt as efficient_mprt
from .metrics import energy_pointing_game as energy_pointing_game
from .metrics import entropy as entropy
from .metrics import faithfulness_correlation as faithfulness_correlation
from .metrics import increase_in_confidence as increase_in_confidence
from .metrics import infidelity as infidelity
from .metrics import insertion as insertion
from .metrics import irof as irof
from .metrics import local_lipschitz as local_lipschitz
from .metrics import max_sensitivity as max_sensitivity
from .metrics import parameter_randomization as parameter_randomization
from .metrics import pointing_game as pointing_game
from .metrics import random_logit as random_logit
from .metrics import road as road
from .metrics import sensitivity_n as sensitivity_n
from .metrics import sparseness as sparseness
from .metrics import symmetric_relevance_gain as symmetric_relevance_gain
from .models import images as images
from .network.bound import bind as bind
from .network.split import FeatureAndGrad as FeatureAndGrad
from .network.split import Split as Split
from .network.split import default_layer as default_layer
from .network.split import feature_and_grad as feature_and_grad
from .network.split import features as features
from .network.split import layers as layers
from .network.split import split as split
from .perturb import perturbation_scores as perturbation_scores

__version__: str
