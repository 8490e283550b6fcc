"""Other libraries' numbers: XplainCAM's own maps, through the keywords that `VARIANTS` holds."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize, to_tensor

import networks
import xcam_fn as xf
from xcam_fn.methods.catalog import own_name

PHOTOGRAPHS = ("n02099601_golden_retriever", "n02123045_tabby", "n02391049_zebra", "n04285008_sports_car")
CLASSES = (
    "GradCAM", "GradCAMpp", "XGradCAM", "LayerCAM", "GroupCAM", "ScoreCAM", "AblationCAM", "ISCAM", "UnionCAM", "FusionCAM",
)  # fmt: skip
KEYS = {own_name(name): name for name in CLASSES}
MASKING = ("scorecam", "iscam", "unioncam", "fusioncam")  # of thousands of forwards: on one photograph
# Where a method divides by what nearly cancels, the rounding of the features (which differs from one processor
# to the next) moves the map by more than 1e-4: by how much is measured, not guessed.
CANCELING = ("gradcam_pp", "xgradcam")
# Fusion-CAM drops a tenth of the pixels. One at the edge is dropped or kept as its value is rounded, and the whole
# map is scaled by what is left: the reference may stand on either side of that edge.
ROUNDING = 1e-6


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_xplaincams_maps(lite0, shared, name):
    folder = shared / "reference"
    cls = json.loads((folder / "public.json").read_text())[f"{name}.JPEG"]["class"]
    picture = Image.open(folder / f"{name}_224.png")
    x = normalize(to_tensor(picture), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]
    keys = {m: key for m, key in KEYS.items() if name == PHOTOGRAPHS[0] or m not in MASKING}
    options = {"num_samples": 2} if "iscam" in keys else {}
    ours = xf.explain_all(
        lite0, "_blocks.15", x, None, list(keys), variant="xplaincam", chunk_size=16, **options
    )
    with np.load(folder / "public.npz") as reference:
        theirs = {method: torch.from_numpy(reference[f"{name}.JPEG/{key}"]) for method, key in keys.items()}
    found = xf.feature_and_grad(lite0, "_blocks.15", x, cls)
    far = {}
    for method, expected in theirs.items():
        bound = max(1e-4, 2 * rounding_moves(found, method)) if method in CANCELING else 1e-4
        maps = [ours[method]]
        if method == "fusioncam":
            edge = torch.quantile(ours["gradcam"], 0.1)
            is_at_edge = (ours["gradcam"] - edge).abs() < ROUNDING
            for other in (edge, edge + ROUNDING):
                moved = torch.where(is_at_edge, other, ours["gradcam"])
                maps.append(xf.fusioncam(lite0, None, x, cls, gradient=moved, region=ours["scorecam"]))
        difference = min((m[0] - expected).abs().max().item() for m in maps)
        if not difference <= bound:
            far[method] = (difference, bound)
    assert not far


def rounding_moves(found: xf.FeatureAndGrad, method: str) -> float:
    """How far the heatmap moves, at most, when the features move by a few units of float32's last place."""
    options = xf.VARIANTS["xplaincam"][method]

    def heatmap(A: Tensor) -> Tensor:
        weights = getattr(xf.weights, method)(A, found.grads, **options)
        return xf.heatmap(xf.weights.weighted_sum(A, weights), (224, 224))

    expected, largest = heatmap(found.features), found.features.abs().max()
    noise = [torch.randn(found.features.shape, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    return max((heatmap(found.features + n * largest * 2**-22) - expected).abs().max().item() for n in noise)


@pytest.mark.filterwarnings("ignore:Maximum number of iterations")  # of a factorization, as many as elsewhere
def test_a_variant_is_keywords_of_ours():
    model = networks.seeded(networks.Residual())
    x = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    for library, methods in xf.VARIANTS.items():
        for name, options in methods.items():
            if name in networks.OF_ATTENTION:
                continue  # they need a transformer
            few = {"rise": {"num_masks": 8}, "groupcam": {"num_groups": 2}}.get(name, {})
            few |= {"num_samples": 2} if name in ("sscam", "iscam", "smoothgradcam_pp") else {}
            few |= {"layers": ["conv1", "relu#3"]} if name == "refinecam" else {}
            found = xf.find_method(name, variant=library)(model, "relu", x, 1, **few)
            assert torch.equal(found, xf.METHODS[name](model, "relu", x, 1, **(dict(options) | few)))
            assert found.shape == (2, 12, 16)
    with pytest.raises(TypeError):
        xf.VARIANTS["torchcam"]["gradcam"]["eps"] = 1


def test_options_that_are_given_win_over_the_variant_s():
    found = xf.find_method("rise", variant="xplaincam", num_masks=8)
    assert found.options == {"num_masks": 8, "keep": 0.1, "score": "logit"}


def test_variants_can_be_sent_to_other_processes():
    code = """
import pickle, xcam_fn as xf
for library, methods in xf.VARIANTS.items():
    for name in methods:
        method = xf.find_method(name, variant=library)
        again = pickle.loads(pickle.dumps(method))
        assert (again.name, again.title, again.keywords.keys()) == (name, method.title, method.keywords.keys())
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # as users import it, without the tests' hook


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gradcm", None), r"method 'gradcm' is not known; did you mean 'gradcam'"),
        (("gradcam+sscm", None), r"method 'sscm' is not known; did you mean 'sscam'"),
        (("gradcam", "captum"), r"variant 'captum' is not known; expected one of xplaincam, torchcam"),
        (("rise", "torchcam"), r"variant 'torchcam' has no method 'rise'; it has gradcam, "),
    ],
)
def test_the_error_says_what_there_is(arguments, words):
    with pytest.raises(ValueError, match=words):
        xf.find_method(arguments[0], variant=arguments[1])


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("Grad-CAM++", "gradcam_pp"),
        ("gradcam++", "gradcam_pp"),
        ("GradCAMpp", "gradcam_pp"),
        ("GradCAMPlusPlus", "gradcam_pp"),
        ("Smooth Grad-CAM++", "smoothgradcam_pp"),
        ("XGradCAM", "xgradcam"),
        ("integrated-gradients", "integrated_gradients"),
        ("Grad-CAM+SS-CAM", "gradcam+sscam"),
        ("GradCAM+++ScoreCAM", "gradcam_pp+scorecam"),
        ("Smooth(Layer-CAM)", "smooth(layercam)"),
        ("eigen-smooth(smooth(Score CAM))", "eigen_smooth(smooth(scorecam))"),
    ],
)
def test_methods_go_by_familiar_names(name, own):
    assert own_name(name) == own_name(own) == own
    if own in xf.METHODS:
        assert xf.find_method(name) is xf.METHODS[own]


def test_titles_are_names():
    assert [own_name(method.title) for method in xf.METHODS.values()] == list(xf.METHODS)
    for strange in ("gradcam+", "(gradcam", "gradcam!", "+"):
        assert own_name(strange) == strange


def test_a_near_miss_of_a_familiar_name_suggests():
    for wrong, near in (("Grad-CM", "gradcam"), ("ScorCAM", "scorecam"), ("smooth(LayrCAM)", "layercam")):
        with pytest.raises(ValueError, match=f"is not known; did you mean .*'{near}'"):
            xf.find_method(wrong)
