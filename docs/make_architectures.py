"""The table of docs/architectures.md: every method run on many architectures with random weights.

python docs/make_architectures.py                 # what docs/architectures.csv has no row for, then the page
python docs/make_architectures.py --only levit    # those whose name contains a word, again
python docs/make_architectures.py --page          # the page alone

It runs on one core, in about half an hour, and downloads nothing. A row is written as soon as it is known, so
that it goes on where it was stopped. The rows of ultralytics need that package, which is in no extra.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import importlib
import math
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import xcam_fn as xf
from xcam_fn.checks import NoDefaultLayerError, StructureError
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import heatmaps_of
from xcam_fn.network.places import UnplacedError
from xcam_fn.targets import Target, detection, logits
from xcam_fn.targets.detections import read as detected

DATA = Path(__file__).with_name("architectures.csv")
PAGE = Path(__file__).with_name("architectures.md")
OPTIONS: dict[str, Any] = {
    "num_samples": 1, "num_masks": 8, "steps": 4, "num_groups": 8, "num_concepts": 2, "max_iter": 20,
    "channels": 16, "scales": (1.0, 1.5),
}  # fmt: skip
METHODS = (*xf.METHODS, "smooth(gradcam)", "eigen_smooth(gradcam)")
ABOUT = ("library", "name", "parameters", "input", "layer", "features", "runs", "batch", "seed")
NUM_CLASSES = 10
NUM_SEEDS = 8
ENOUGH_SECONDS = 12


class Architecture(NamedTuple):
    """A network to be built, and the size and channels of the images, volumes or clips that it is shown.

    Detectors have the number of layers that a detection is read through, side by side.
    """

    library: str
    name: str
    size: tuple[int, ...]
    build: Callable[[], nn.Module]
    channels: int = 3
    levels: int = 0


# -- the architectures ---------------------------------------------------------------------------------------


def torchvision_net(name: str, size: tuple[int, int] = (64, 96), **options: Any) -> Architecture:
    """A network of torchvision by its name."""
    import torchvision

    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return Architecture(
        "torchvision",
        name,
        size,
        lambda: torchvision.models.get_model(name, weights=None, num_classes=NUM_CLASSES, **options),
    )


def torchvision_small(name: str, size: tuple[int, ...], kind: str, **options: Any) -> Architecture:
    """A narrow network of one of torchvision's classes."""
    import torchvision

    home = torchvision.models if len(size) == 2 else torchvision.models.video.swin_transformer
    return Architecture(
        "torchvision", name, size, lambda: getattr(home, kind)(num_classes=NUM_CLASSES, **options)
    )


def timm_net(name: str, size: tuple[int, int] = (64, 96), **options: Any) -> Architecture:
    """A network of timm by its name, with options that make it narrow, shallow or of another input size."""
    import timm

    return Architecture(
        "timm",
        name,
        size,
        lambda: timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, **options),
    )


def hf_net(kind: str, size: tuple[int, int] = (64, 96), model: str = "", **options: Any) -> Architecture:
    """An image classifier of transformers from a small configuration."""
    import transformers

    name = model or f"{kind}ForImageClassification"

    def build() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(num_labels=NUM_CLASSES, **options)
        return getattr(transformers, name)(config)

    return Architecture("transformers", name, size, build)


def hf_video(kind: str, **options: Any) -> Architecture:
    """A classifier of clips of transformers, which takes their frames first."""
    import transformers

    name = f"{kind}ForVideoClassification"

    def build() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(num_labels=NUM_CLASSES, **options)
        net = getattr(transformers, name)(config).eval()
        return xf.bind(net, lambda net, x: net(x.transpose(1, 2)))

    return Architecture("transformers", name, (8, 32, 32), build)


def monai_net(kind: str, **options: Any) -> Architecture:
    """A classifier of volumes of MONAI."""
    import monai.networks.nets

    build = functools.partial(getattr(monai.networks.nets, kind), spatial_dims=3, **options)
    return Architecture("monai", f"{kind}, 3-D", (16, 24, 32), build, channels=1)


def torchvision_detector(name: str, size: tuple[int, int] = (64, 96), **options: Any) -> Architecture:
    """A detector of torchvision by its name, whose head keeps few detections, whatever their score."""
    import torchvision

    build = getattr(torchvision.models.detection, name)
    if not name.startswith("ssd"):
        options |= {"min_size": min(size), "max_size": max(size)}
    given = {"weights": None, "weights_backbone": None, "num_classes": NUM_CLASSES, **options}
    return Architecture("torchvision", name, size, functools.partial(build, **given), levels=1)


def hf_detector(kind: str, size: tuple[int, int], **options: Any) -> Architecture:
    """A detector of transformers from a small configuration."""
    import transformers

    name = f"{kind}ForObjectDetection"

    def build() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(num_labels=NUM_CLASSES, **options)
        return getattr(transformers, name)(config)

    return Architecture("transformers", name, size, build, levels=3 if kind == "RTDetr" else 1)


def hf_backbone(kind: str, stages: int) -> Any:
    """The configuration of a narrow ResNet that returns its last stages."""
    import transformers

    named = [f"stage{4 - i}" for i in reversed(range(stages))]
    return getattr(transformers, f"{kind}Config")(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic", out_features=named
    )


def ultralytics_detector(name: str) -> Architecture:
    """A detector of ultralytics, whose head returns a score for each class at each position."""

    def build() -> nn.Module:
        # No extra brings ultralytics, so that a type checker would not find a plain import.
        tasks = importlib.import_module("ultralytics.nn.tasks")
        return tasks.DetectionModel(f"{name}.yaml", nc=NUM_CLASSES, verbose=False)

    return Architecture("ultralytics", name, (128, 192), build, levels=1)


def detectors() -> list[Architecture]:
    """The rows of the table that return boxes."""
    regions = {"box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 60, "box_detections_per_img": 40}
    dense = {"score_thresh": 0.0, "topk_candidates": 60, "detections_per_img": 40}
    own = {"use_pretrained_backbone": False, "backbone": None, "d_model": 32, "decoder_layers": 2}
    for side in ("encoder", "decoder"):
        own |= {f"{side}_ffn_dim": 64, f"{side}_attention_heads": 2}
    return [
        torchvision_detector("fasterrcnn_resnet50_fpn", **regions),
        torchvision_detector("fasterrcnn_mobilenet_v3_large_320_fpn", (128, 192), **regions),
        torchvision_detector("retinanet_resnet50_fpn", **dense),
        torchvision_detector("fcos_resnet50_fpn", **dense),
        torchvision_detector("ssdlite320_mobilenet_v3_large", **dense),
        hf_detector(
            "Detr",
            (128, 192),
            backbone_config=hf_backbone("ResNet", 1),
            use_timm_backbone=False,
            encoder_layers=2,
            num_queries=10,
            **own,
        ),
        hf_detector(
            "RTDetr",
            (128, 192),
            backbone_config=hf_backbone("RTDetrResNet", 3),
            encoder_hidden_dim=32,
            encoder_in_channels=[16, 24, 32],
            decoder_in_channels=[32] * 3,
            num_queries=12,
            **own,
        ),
        hf_detector(
            "Yolos",
            (64, 96),
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=96,
            image_size=[64, 96],
            patch_size=16,
            num_detection_tokens=10,
        ),
        ultralytics_detector("yolov8n"),
        ultralytics_detector("yolo11n"),
    ]


def architectures() -> list[Architecture]:
    """All rows of the table."""
    encoder = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    vit = {**encoder, "image_size": (64, 96), "patch_size": 16}
    clips = {**encoder, "image_size": 32, "patch_size": 8, "num_frames": 8}
    return [
        torchvision_net("alexnet", (96, 128)),
        torchvision_net("vgg11", (32, 64)),
        torchvision_net("vgg16_bn", (32, 64)),
        torchvision_net("resnet18"),
        torchvision_net("resnet50", (32, 64)),
        torchvision_net("densenet121", (48, 64)),
        torchvision_net("googlenet", (64, 96)),
        torchvision_net("inception_v3", (96, 128)),
        torchvision_net("squeezenet1_1", (64, 96)),
        torchvision_net("shufflenet_v2_x0_5"),
        torchvision_net("mnasnet0_5"),
        torchvision_net("mobilenet_v2"),
        torchvision_net("mobilenet_v3_small"),
        torchvision_net("regnet_x_400mf"),
        torchvision_net("regnet_y_400mf"),
        torchvision_net("efficientnet_b0", (48, 64)),
        torchvision_net("efficientnet_v2_s", (48, 64)),
        torchvision_small(
            "convnext_tiny",
            (64, 96),
            "ConvNeXt",
            block_setting=convnext_blocks((24, 48, 96, 192)),
        ),
        torchvision_small(
            "vit_b_16",
            (64, 64),
            "VisionTransformer",
            image_size=64,
            patch_size=16,
            num_layers=4,
            num_heads=3,
            hidden_dim=96,
            mlp_dim=192,
        ),
        torchvision_small("swin_t", (64, 96), "SwinTransformer", **SWIN, window_size=[4, 4]),
        torchvision_small(
            "swin_v2_t", (64, 96), "SwinTransformer", **SWIN, window_size=[4, 4], **swin_v2_blocks()
        ),
        torchvision_small(
            "maxvit_t",
            (64, 64),
            "MaxVit",
            input_size=(64, 64),
            stem_channels=16,
            partition_size=2,
            block_channels=[16, 32, 64, 96],
            block_layers=[1, 1, 2, 1],
            head_dim=16,
            stochastic_depth_prob=0.0,
        ),
        timm_net("resnet10t"),
        timm_net("seresnet18", (48, 64)),
        timm_net("dla34", (64, 64)),
        timm_net("regnety_002"),
        timm_net("nf_regnet_b0", (48, 64)),
        timm_net("mobilenetv4_conv_small"),
        timm_net("mobilenetv4_hybrid_medium"),
        timm_net("tf_efficientnet_lite0", (48, 64)),
        timm_net("ghostnet_050"),
        timm_net("repvgg_a0", (48, 64)),
        timm_net("hrnet_w18_small", (32, 64)),
        timm_net("convnext_atto"),
        timm_net("convnextv2_atto"),
        timm_net("inception_next_atto"),
        timm_net("edgenext_xx_small"),
        timm_net("mambaout_femto", dims=(24, 48, 96, 144)),
        timm_net("vit_tiny_patch16_224", img_size=(64, 96), depth=4, embed_dim=96),
        timm_net(
            "vit_base_patch14_reg4_dinov2", (56, 84), img_size=(56, 84), depth=3, embed_dim=96, num_heads=3
        ),
        timm_net("vit_betwixt_patch16_reg4_gap_256", img_size=(64, 96), depth=3, embed_dim=80, num_heads=4),
        timm_net("deit_tiny_patch16_224", img_size=(64, 96), depth=4, embed_dim=96),
        timm_net("deit_tiny_distilled_patch16_224", img_size=(64, 96), depth=4, embed_dim=96),
        timm_net("beit_base_patch16_224", img_size=(64, 96), depth=3, embed_dim=96, num_heads=3),
        timm_net("eva02_tiny_patch14_224", (56, 84), img_size=(56, 84), depth=4, embed_dim=96),
        timm_net("cait_xxs24_224", img_size=(64, 96), depth=3, embed_dim=96, num_heads=3),
        timm_net("xcit_nano_12_p16_224", img_size=(64, 96), depth=3, embed_dim=64),
        timm_net(
            "swin_tiny_patch4_window7_224",
            img_size=(64, 96),
            window_size=4,
            embed_dim=24,
            depths=(1, 1, 2, 2),
            num_heads=(1, 2, 2, 4),
        ),
        timm_net(
            "swinv2_tiny_window8_256",
            img_size=(64, 96),
            window_size=4,
            embed_dim=24,
            depths=(1, 1, 2, 2),
            num_heads=(1, 2, 2, 4),
        ),
        timm_net(
            "coatnet_0_rw_224",
            img_size=(64, 96),
            embed_dim=(24, 32, 64, 96),
            depths=(1, 1, 2, 2),
            stem_width=16,
        ),
        timm_net(
            "maxvit_pico_rw_256",
            img_size=(64, 96),
            embed_dim=(32, 32, 64, 96),
            depths=(1, 1, 2, 1),
            stem_width=16,
        ),
        timm_net("levit_128s", (224, 224), depth=(1, 1, 2), embed_dim=(32, 64, 96), num_heads=(2, 2, 3)),
        timm_net("mobilevit_xxs"),
        timm_net("mobilevitv2_050"),
        timm_net("pvt_v2_b0"),
        timm_net("mixer_s32_224", (64, 64), img_size=64),
        timm_net("resmlp_12_224", (64, 64), img_size=64),
        timm_net("gmlp_ti16_224", (64, 64), img_size=64),
        timm_net("efficientformer_l1", (224, 224), depths=(1, 1, 1, 2), embed_dims=(16, 24, 48, 64)),
        timm_net("poolformer_s12", (48, 64)),
        timm_net("nextvit_small", (48, 64)),
        timm_net("fastvit_t8", (48, 64)),
        timm_net("efficientvit_b0"),
        timm_net("crossvit_9_240", (240, 240)),
        timm_net("pit_ti_distilled_224", (128, 128), img_size=128),
        timm_net("tnt_s_patch16_224", img_size=(64, 96), depth=3, embed_dim=96),
        timm_net("twins_svt_small", img_size=(64, 96), embed_dims=(16, 32, 64, 96), depths=(1, 1, 2, 2)),
        timm_net("visformer_tiny", img_size=(64, 96)),
        timm_net("volo_d1_224", (64, 64), img_size=64),
        timm_net(
            "convit_tiny", (64, 64), img_size=64, depth=4, local_up_to_layer=2, embed_dim=16, num_heads=3
        ),
        timm_net("davit_tiny", embed_dims=(24, 48, 64, 96), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 3)),
        timm_net("hiera_tiny_224", (64, 96), img_size=(64, 96), stages=(1, 1, 1, 2), embed_dim=16),
        timm_net(
            "tiny_vit_5m_224",
            (224, 224),
            embed_dims=(16, 32, 48, 64),
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 3, 4),
        ),
        hf_net("ViT", **vit),
        hf_net("DeiT", **vit),
        hf_net("DeiT", model="DeiTForImageClassificationWithTeacher", **vit),
        hf_net("ViTMSN", **vit),
        hf_net("Dinov2", (56, 56), **{**vit, "image_size": (56, 56), "patch_size": 14, "mlp_ratio": 2}),
        hf_net(
            "Dinov2WithRegisters",
            (56, 56),
            **{**vit, "image_size": (56, 56), "patch_size": 14, "mlp_ratio": 2},
        ),
        hf_net("Beit", **vit, use_relative_position_bias=True),
        hf_net("Data2VecVision", **vit, use_relative_position_bias=True),
        hf_net("IJepa", **vit),
        hf_net(
            "Swin",
            (128, 128),
            image_size=128,
            embed_dim=24,
            depths=[1, 1, 2, 2],
            num_heads=[1, 2, 2, 4],
            window_size=2,
        ),
        hf_net(
            "Swinv2",
            (128, 192),
            image_size=(128, 192),
            embed_dim=24,
            depths=[1, 1, 2, 2],
            num_heads=[1, 2, 2, 4],
            window_size=4,
        ),
        hf_net("ConvNext", hidden_sizes=[24, 32, 64, 96], depths=[1, 1, 2, 1]),
        hf_net("ConvNextV2", hidden_sizes=[24, 32, 64, 96], depths=[1, 1, 2, 1]),
        hf_net(
            "ResNet",
            embedding_size=16,
            hidden_sizes=[32, 48, 64, 128],
            depths=[1, 1, 2, 2],
            layer_type="basic",
        ),
        hf_net(
            "RegNet", embedding_size=16, hidden_sizes=[32, 48, 64, 128], depths=[1, 1, 2, 1], groups_width=16
        ),
        hf_net(
            "MobileViT",
            hidden_sizes=[32, 48, 64],
            neck_hidden_sizes=[16, 32, 64, 96, 128, 160, 192],
            num_attention_heads=2,
            expand_ratio=2.0,
        ),
        hf_net("PvtV2", hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 1, 2], num_attention_heads=[1, 2, 2, 4]),
        hf_net(
            "Pvt",
            (128, 128),
            image_size=128,
            hidden_sizes=[16, 32, 64, 96],
            depths=[1, 1, 1, 2],
            num_attention_heads=[1, 2, 2, 4],
        ),
        hf_net(
            "Levit",
            (224, 224),
            hidden_sizes=[32, 64, 96],
            num_attention_heads=[2, 2, 3],
            depths=[1, 1, 2],
            key_dim=[16, 16, 16],
        ),
        hf_net("PoolFormer", hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 2, 1]),
        hf_net(
            "Segformer", hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 1, 2], num_attention_heads=[1, 2, 2, 4]
        ),
        hf_net(
            "Siglip",
            (64, 64),
            vision_config={**encoder, "image_size": 64, "patch_size": 16},
            text_config=encoder,
        ),
        hf_net("Cvt", embed_dim=[16, 48, 96], num_heads=[1, 2, 4], depth=[1, 2, 3]),
        hf_net("FocalNet", image_size=(64, 96), embed_dim=16, depths=[1, 1, 2, 1]),
        hf_net("Hiera", image_size=[64, 96], embed_dim=16, depths=[1, 1, 1, 2], num_heads=[1, 2, 4, 8]),
        hf_net("EfficientNet", (96, 128), width_coefficient=0.5, hidden_dim=640),
        hf_net("SwiftFormer", (64, 96), embed_dims=[16, 32, 64, 96], depths=[1, 1, 2, 2]),
        torchvision_small("swin3d_t", (8, 64, 96), "SwinTransformer3d", **SWIN_3D),
        hf_video("VideoMAE", **clips),
        hf_video("Vivit", tubelet_size=[2, 8, 8], **{**clips, "patch_size": None}),
        hf_video("Timesformer", **clips),
        monai_net(
            "DenseNet",
            in_channels=1,
            out_channels=NUM_CLASSES,
            init_features=8,
            growth_rate=8,
            block_config=(1, 2, 2),
        ),
        monai_net(
            "ResNet",
            block="basic",
            layers=[1, 1, 1, 1],
            block_inplanes=[8, 16, 24, 32],
            n_input_channels=1,
            num_classes=NUM_CLASSES,
            conv1_t_stride=2,
        ),
        *detectors(),
    ]


SWIN: dict[str, Any] = {
    "patch_size": [4, 4], "embed_dim": 24, "depths": [1, 1, 2, 2], "num_heads": [1, 2, 2, 4],
}  # fmt: skip


SWIN_3D: dict[str, Any] = {**SWIN, "patch_size": [2, 4, 4], "window_size": [2, 4, 4]}


def convnext_blocks(widths: tuple[int, ...]) -> list[Any]:
    """The stages of torchvision's ConvNeXt, of these widths."""
    from torchvision.models.convnext import CNBlockConfig

    return [CNBlockConfig(width, after, 2) for width, after in zip(widths, (*widths[1:], None), strict=True)]


def swin_v2_blocks() -> dict[str, Any]:
    """What makes a Swin Transformer of torchvision one of version 2."""
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    return {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}


# -- weights -------------------------------------------------------------------------------------------------


def drawn(model: nn.Module, x: Tensor, seed: int, is_detector: bool) -> nn.Module:
    """The network with random weights under which every layer has a say, in evaluation mode.

    As they are made many networks would explain nothing: heads, the last norms of blocks and layer scales
    start at or near zero. Batch norm's statistics are those of a few random images, and the head is scaled so
    that no class is certain.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if not parameter.requires_grad:  # a constant, as the bins of a YOLO's sides
            continue
        if name.endswith("bias"):
            parameter.data = noise * 0.1
        elif parameter.ndim < 2:  # of norms and layer scales
            parameter.data = 1 + noise * 0.2
        elif len(parameter) == 1:  # tokens and positions
            parameter.data = noise * 0.5
        else:
            parameter.data = noise * math.sqrt(2 / parameter[0].numel())
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None  # a plain mean
        norm.reset_running_stats()
    images = torch.randn(6, *x.shape[1:], generator=generator)
    with torch.no_grad():
        model(images)
        if is_detector:
            return scale_heads(model.eval(), images)
        scale = 1.5 / logits(model.eval()(images)).std()
        for module in model.modules():
            is_head = isinstance(module, nn.Linear) and module.out_features == NUM_CLASSES
            if is_head or (isinstance(module, nn.Conv2d) and module.out_channels == NUM_CLASSES):
                for parameter in module.parameters():
                    parameter.mul_(scale)
    return model


# The last layers of detectors' heads, and the standard deviation that what they return gets.
HEADS = {
    r"cls_(score|logits)|bbox_(pred|reg|ctrness)": 1.0,  # torchvision
    r"(classification|regression)_head\.module_list\.\d+\.1": 1.0,
    r"class_labels_classifier(\.layers\.2)?|class_embed\.\d+|enc_score_head": 1.0,  # transformers
    r"(bbox_predictor|enc_bbox_head|bbox_embed\.\d+)\.layers\.2": 1.0,
    r"cv3\.\d+\.2": 1.0,  # ultralytics
    r"cv2\.\d+\.2": 4.0,  # of bins, whose mean is a side
}


def scale_heads(model: nn.Module, images: Tensor) -> nn.Module:
    """The detector, no class of which is certain, with boxes of many sizes."""
    returned: dict[str, list[Tensor]] = {}
    wanted = {
        name: std
        for name, _ in model.named_modules()
        for pattern, std in HEADS.items()
        if re.search(rf"\b({pattern})$", name)
    }

    def keep(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        returned.setdefault(name, []).append(output.flatten())

    heads = [(name, model.get_submodule(name)) for name in wanted]
    handles = [head.register_forward_hook(functools.partial(keep, name)) for name, head in heads]
    model(images)
    for handle in handles:
        handle.remove()
    for name, outputs in returned.items():
        for parameter in model.get_submodule(name).parameters():
            parameter.mul_(wanted[name] / torch.cat(outputs).std())
    return model


class Detections(NamedTuple):
    """A detection of each image, to be explained: boxes (B, 4), and labels (B,)."""

    boxes: Tensor
    labels: Tensor

    def target(self, size: Sequence[int], which: slice = slice(None)) -> Target:
        """What is asked of some of the images, of this height and width."""
        return detection(self.boxes[which], self.labels[which], size=size, min_iou=0.0)


def surest(model: nn.Module, x: Tensor) -> Detections | None:
    """The surest detection of each image, of those within it that are 8 pixels to half of it wide and high.

    None where these weights detect no such thing.
    """
    chosen, end = [], x.new_tensor([x.shape[3], x.shape[2]])
    with torch.no_grad():
        found = detected(model(x), None, x.shape[2:])
    for one in found:
        scores, labels = one.scores.max(1) if one.labels is None else (one.scores, one.labels)
        low, high = one.boxes.split(2, dim=1)
        fits = ((low >= 0) & (high <= end) & (high - low >= 8) & (high - low <= end / 2)).all(1)
        if not (scores * fits > 0.05).any():
            return None
        best = (scores * fits).argmax()
        chosen.append((one.boxes[best], labels[best]))
    return Detections(*map(torch.stack, zip(*chosen, strict=True)))


# -- one row -------------------------------------------------------------------------------------------------


def examined(architecture: Architecture) -> dict[str, str]:
    """The architecture's row, with the first of a few seeds whose weights make no map zero.

    Random weights may speak against the class at all of a layer's few positions; where every seed has such a
    map, the row with the fewest is taken.
    """
    start, rows = time.perf_counter(), []
    for seed in range(NUM_SEEDS):
        try:
            row = examined_once(architecture, seed)
        except (NoDefaultLayerError, UnplacedError):
            row = None  # a detection that these weights read through no maps
        if row is None:
            continue
        rows.append(row)
        if not zeros(row) or time.perf_counter() - start > ENOUGH_SECONDS:
            break
    return min(rows, key=zeros)


def zeros(row: dict[str, str]) -> int:
    """How many methods give a map that is zero everywhere."""
    return sum(row[name] == "zero" for name in METHODS)


def examined_once(architecture: Architecture, seed: int) -> dict[str, str] | None:
    """What is known of an architecture, and what each method does on it; None where it detects nothing so."""
    torch.manual_seed(0)
    x = torch.randn(2, architecture.channels, *architecture.size, generator=torch.Generator().manual_seed(1))
    model = drawn(architecture.build(), x, seed, architecture.levels > 0)
    asked = surest(model, x) if architecture.levels > 0 else None
    cls = asked and asked.target(x.shape[2:], slice(1))
    levels = Call(model, None, x[:1], cls).levels or []
    if len(levels) != architecture.levels:
        return None
    layer = levels[-1] if levels else xf.default_layer(model, x[:1])
    call = Call(model, layer if len(levels) > 1 else None, x[:1], cls)
    cells = {name: cell(name, call) for name in METHODS}
    return {
        "library": architecture.library,
        "name": architecture.name,
        "parameters": str(sum(p.numel() for p in model.parameters())),
        "input": "x".join(map(str, architecture.size)),
        "layer": layer,
        "features": "x".join(map(str, call.features.shape[1:])),
        "runs": "halves" if call.halves.is_traced else "whole",
        "batch": f"{batch_difference(model, x, layer, asked):.0e}",
        "seed": str(seed),
        **cells,
    }


# Of errors that are not the network's structure, those that the page gives a reason for.
REFUSALS = ("finercam contrasts classes", "double backwards on roi_align not supported")


def cell(name: str, call: Call) -> str:
    """What a method does: "ok", "zero", "lacks: …" with what it asks for, or what went wrong."""
    method = xf.find_method(name, **OPTIONS)
    try:
        found = heatmaps_of(method, call)
    except Exception as error:  # the table says what goes wrong
        lacks = isinstance(error, StructureError) or any(words in str(error) for words in REFUSALS)
        return f"lacks: {error}" if lacks else f"error: {type(error).__name__}: {error}"
    if found.shape != (1, *call.x.shape[2:]):
        return f"error: shape {tuple(found.shape)}"
    if not torch.isfinite(found).all() or found.min() < 0 or found.max() > 1:
        return "error: values that are not finite or outside [0, 1]"
    return "ok" if found.any() else "zero"


def batch_difference(model: nn.Module, x: Tensor, layer: str, asked: Detections | None) -> float:
    """By how much Grad-CAM of two images differs from that of each alone, in float64.

    In float32 deep networks with random weights themselves return another output for another batch.
    """
    model = copy.deepcopy(model).double()

    def maps(which: slice) -> Tensor:
        return xf.gradcam(model, layer, x[which].double(), asked and asked.target(x.shape[2:], which))

    return (maps(slice(2)) - torch.cat([maps(slice(1)), maps(slice(1, 2))])).abs().max().item()


# -- the data ------------------------------------------------------------------------------------------------


def read(path: Path = DATA) -> dict[tuple[str, str], dict[str, str]]:
    """The rows by library and name."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["library"], row["name"]): row for row in csv.DictReader(file)}


def write(rows: Iterable[dict[str, str]], path: Path = DATA) -> None:
    """Write all rows, whole or not at all."""
    beside = path.with_suffix(".new")
    with beside.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*ABOUT, *METHODS], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    beside.replace(path)


def update(only: str | None) -> None:
    """Run what has no row yet, or what is named, and write each row as soon as it is known."""
    rows = read()
    wanted = architectures()
    for architecture in wanted:
        key = (architecture.library, architecture.name)
        if (key in rows) if only is None else (only not in architecture.name):
            continue
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows[key] = examined(architecture)
        counts = Counter(rows[key][name].partition(":")[0] for name in METHODS)
        print(*key, dict(counts), f"{time.perf_counter() - start:.0f} s", flush=True)
        order = [(each.library, each.name) for each in wanted]
        write(rows[each] for each in order if each in rows)


# -- the page ------------------------------------------------------------------------------------------------

_NO_RELU = "the network runs no ReLU (nor ReLU6), whose backward pass is what the method changes"
_NO_ATTENTION = (
    "the network has no block with a single attention over all patches: it is convolutional, mixes tokens in "
    "another way, attends within windows, to pooled keys or across channels, or twice in a block"
)
# Why a method has no map on some networks: what it needs and they lack, and where random weights leave none.
REASONS = {
    "cam": "the layer is not followed by just global average pooling and a linear layer, so the layer's "
    "channels have no weights for the class",
    "guided_backprop": _NO_RELU,
    "guided_gradcam": _NO_RELU,
    **dict.fromkeys(("legrad", "attention_rollout", "chefer", "agcam"), _NO_ATTENTION),
    "cameras": "the network has a fixed input size, its token positions are not found at another size, or "
    "the target is a box, which lies elsewhere in a scaled image",
    "smooth(gradcam)": "it mirrors the image, in which a box lies elsewhere; `flips=False` leaves that out",
    "refinecam": "no layer before the default one has a higher resolution",
    "finercam": "it compares a class with others, and a detection has no others",
    "sidu": "it compares the probabilities of all classes of an image, and a detector has them for each box",
    "liftcam": "with the layer at zero the network runs other activation functions (of other regions), so "
    "there are no differences from a reference",
    "shapleycam": "the operation that crops regions (`roi_align`) has no second derivative",
}
ZERO = (
    "with these weights the map has no positive value, as its definition says if nothing supports the class "
    "(weights are the draw with the fewest such maps, out of up to eight, or fewer if one takes long)"
)
UNPLACED = (
    "with these weights, and so few tokens, changing a patch of the image does not change its token the "
    "most, so the method raises an error"
)


def page(rows: Iterable[dict[str, str]]) -> str:
    """The page, in Markdown."""
    rows = list(rows)
    total = Counter(row[name].partition(":")[0] for row in rows for name in METHODS)
    libraries = ("torch", "torchvision", "timm", "transformers", "monai", "ultralytics")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries if find_spec(name))
    batch = max(float(row["batch"]) for row in rows)
    whole = sum(row["runs"] == "whole" for row in rows)
    lines = [
        "# Architectures",
        "",
        f"Every method, and `smooth` and `eigen_smooth` of Grad-CAM, run on {len(rows)} architectures: "
        f"{len(rows) * len(METHODS)} runs, of which {total['ok']} give a map, {total['lacks']} report that "
        f"the network lacks the method's structure, and {total['zero']} give a map of zeros. The default "
        "layer and the token positions are found automatically.",
        "",
        f"Made by `python docs/make_architectures.py` with {versions}. Nothing is downloaded: weights are "
        "random, drawn so that no head, norm or layer scale is zero. The input is one small image, not "
        "square if the architecture allows it; narrow or shallow variants replace slow networks (see their "
        "number of parameters). A map counts if it is finite, in [0, 1], of the image's size and not zero "
        "everywhere. [All cells](architectures.csv), with the messages, are in a CSV file.",
        "",
        "- **Layer** is `default_layer`, **features** its output as channels × height × width.",
        f"- **Runs** says how the network is split: into two *halves*, or, if its forward cannot be traced "
        f"({whole} of {len(rows)}), run *whole* with the layer's output replaced. Maps are the same; "
        "Ablation-CAM and Recipro-CAM then run the whole network for each channel or position.",
        f"- Grad-CAM of two images at once equals that of each alone to {batch:.0e} or better.",
        "- The last rows, from fasterrcnn_resnet50_fpn on, are detectors. One detection is explained, with "
        "`cls=targets.detection(box, label, min_iou=0)`: the most confident of those that lie in the image "
        "and are between 8 pixels and half the image wide and high. There is no minimum overlap (0.5 by "
        "default), since boxes of random weights move when the image changes. Heads drop no detection for "
        "its score, and are scaled so that no class is certain. The layer is the one that the detection is "
        "computed from; RT-DETR uses three levels, of which the deepest is named.",
        f"- **Maps** is the number of methods, out of {len(METHODS)}, that give a map; **No map** names the "
        "others, with the reason's number.",
        "",
        "Reasons:",  # a list right after a list would lose its numbers
        "",
        *(f"{number}. `{name}`: {reason}." for number, (name, reason) in enumerate(REASONS.items(), start=1)),
        f"{len(REASONS) + 1}. {ZERO}.",
        f"{len(REASONS) + 2}. {UNPLACED}.",
        "",
        "| Library | Architecture | Parameters | Image | Layer | Features | Runs | Maps | No map |",
        "| --- | --- | ---: | --- | --- | --- | --- | ---: | --- |",
        *(row_of_page(row) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def row_of_page(row: dict[str, str]) -> str:
    """One row of the page's table."""
    without = [reference(name, row) for name in METHODS if row[name] != "ok"]
    name = re.sub("For(ImageClassification|VideoClassification|ObjectDetection)$", "", row["name"])
    cells = (
        row["library"], name, f"{int(row['parameters']):,}",
        row["input"].replace("x", " × "), f"`{row['layer']}`", row["features"].replace("x", " × "),
        row["runs"], str(len(METHODS) - len(without)), ", ".join(without),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def reference(name: str, row: dict[str, str]) -> str:
    """A method that has no map, and the number of the reason.

    Raises:
        ValueError: there is no reason.
    """
    kind = row[name].partition(":")[0]
    if kind == "zero":
        return f"{name} ({len(REASONS) + 1})"
    if row[name].startswith("error: UnplacedError") or "has no spatial maps" in row[name]:
        return f"{name} ({len(REASONS) + 2})"
    if kind == "lacks" and name in REASONS:
        return f"{name} ({list(REASONS).index(name) + 1})"
    raise ValueError(f"{name} on {row['name']}: no reason is known for {row[name]!r}")


def main() -> None:
    """Run what is asked for, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="architectures whose name contains NAME, again")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.page:
        update(arguments.only)
    PAGE.write_text(page(read().values()), encoding="utf-8")


if __name__ == "__main__":
    main()
