"""Photographs of any kind come in as the RGB that a person sees, or are refused in words."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from xcam_fn.models import images

PRESET = images.Preset(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
RAMP = np.arange(0, 252, 4, dtype=np.uint8).reshape(7, 9)


def pixels(image) -> np.ndarray:
    loaded = images.load(image)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA"])
def test_a_gray_ramp_stays_what_it_is_in_every_mode(mode, tmp_path):
    path = saved(Image.fromarray(RAMP).convert(mode), tmp_path / "ramp.png")
    np.testing.assert_array_equal(pixels(path), gray(RAMP))
    np.testing.assert_array_equal(pixels(str(path)), gray(RAMP))


def test_black_and_white_is_0_and_255(tmp_path):
    path = saved(Image.fromarray(RAMP > 100), tmp_path / "bits.png")
    np.testing.assert_array_equal(pixels(path), gray((RAMP > 100) * np.uint8(255)))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_cut_off(suffix, tmp_path):
    path = saved(Image.fromarray(RAMP.astype(np.uint16) * 257), tmp_path / f"deep.{suffix}")
    np.testing.assert_array_equal(pixels(path), gray(RAMP))


def test_integers_of_mode_i_are_taken_for_sixteen_bits(tmp_path):
    deep = Image.fromarray(RAMP.astype(np.int32) * 257)
    assert deep.mode == "I"
    np.testing.assert_array_equal(pixels(deep), gray(RAMP))
    np.testing.assert_array_equal(pixels(saved(deep, tmp_path / "deep.tif")), gray(RAMP))
    for factor in (70_000, -1, 1):  # up to 255 they may be of 8 bits or of 16
        integers = saved(Image.fromarray(RAMP.astype(np.int32) * factor), tmp_path / "int.tif")
        with pytest.raises(ValueError, match=r"int\.tif' has dtype int32 of unknown range"):
            images.load(integers)
    np.testing.assert_array_equal(pixels(Image.new("I", (9, 7))), np.zeros((7, 9, 3)))


def test_a_tiff_of_floats_is_read_or_its_range_is_named(tmp_path):
    path = saved(Image.fromarray((RAMP / 255).astype(np.float32)), tmp_path / "unit.tif")
    np.testing.assert_array_equal(pixels(path), gray(RAMP))
    path = saved(Image.fromarray(RAMP.astype(np.float32)), tmp_path / "large.tif")
    with pytest.raises(ValueError, match=r"large\.tif' has values from 0 to 248; expected \[0, 1\]"):
        images.load(path)


def test_only_named_formats_are_opened(tmp_path):
    path = saved(Image.fromarray(gray(RAMP)), tmp_path / "drawing.eps")  # Ghostscript would run it
    path = path.rename(tmp_path / "drawing.png")
    with pytest.raises(
        ValueError, match="is not an image file of a supported format; expected JPEG, PNG, WEBP, TIFF"
    ):
        images.load(path)
    assert "EPS" not in images.FORMATS


def test_cmyk_comes_out_in_its_colors(tmp_path):
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    path = saved(red.convert("CMYK"), tmp_path / "print.jpg", quality=95)
    assert np.abs(pixels(path).astype(int) - (200, 30, 30)).max() <= 6


def test_transparent_parts_are_white(tmp_path):
    clear = np.zeros((2, 3, 4), np.uint8)
    clear[0, :, 3], clear[1, 0] = 0, (255, 0, 0, 255)
    clear[1, 1], clear[1, 2] = (0, 0, 0, 128), (0, 0, 255, 255)
    found = pixels(saved(Image.fromarray(clear), tmp_path / "clear.png"))
    np.testing.assert_array_equal(found[0], np.full((3, 3), 255))
    np.testing.assert_array_equal(found[1], [(255, 0, 0), (127, 127, 127), (0, 0, 255)])


def test_a_transparent_palette_entry_is_white(tmp_path):
    indexed = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    path = saved(indexed, tmp_path / "palette.png", transparency=0)
    np.testing.assert_array_equal(pixels(path), [[(255, 255, 255), (40, 50, 60)]])


def test_the_picture_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right side
    path = saved(Image.fromarray(gray(RAMP)), tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(pixels(path), gray(np.rot90(RAMP, -1)))


@pytest.mark.parametrize(
    "values",
    [
        RAMP,
        RAMP[..., None],
        gray(RAMP),
        RAMP.astype(np.uint16) * 257,
        RAMP / 255,
        (RAMP / 255).astype(np.float32)[..., None],
    ],
)
def test_arrays_of_every_kind(values):
    np.testing.assert_array_equal(pixels(values), gray(RAMP))


def test_the_argument_is_left_as_it_is_and_the_result_is_ours():
    original = Image.fromarray(gray(RAMP))
    loaded = images.load(original)
    loaded.putpixel((0, 0), (9, 9, 9))
    assert original.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("size", [(300, 260), (260, 611), (40, 50)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_prepare_does_what_torchvision_s_own_preset_does(size, interpolation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    theirs = ImageClassification(
        crop_size=224, resize_size=256, interpolation=InterpolationMode(interpolation)
    )(image)
    x, picture = images.prepare(image, PRESET._replace(interpolation=interpolation))
    assert torch.equal(x[0], theirs)
    again = (x[0] * torch.tensor(PRESET.std)[:, None, None] + torch.tensor(PRESET.mean)[:, None, None]) * 255
    np.testing.assert_array_equal(again.round().byte().permute(1, 2, 0), picture)


def test_prepare_may_squash_to_a_fixed_size():
    image = Image.fromarray(np.tile(RAMP, (4, 20)))
    x, picture = images.prepare(image, PRESET._replace(resize=(224, 224)))
    assert x.shape == (1, 3, 224, 224)
    np.testing.assert_array_equal(picture, images.load(image).resize((224, 224), Image.Resampling.BILINEAR))


def test_a_long_strip_takes_no_more_memory_than_a_photograph():
    # resized as it is, the shorter side to 256, this would be 256 x 12,800,000 pixels
    strip = np.zeros((2, 100_000), np.uint8)
    strip[:, 49_990:50_010] = 255
    x, picture = images.prepare(strip, PRESET)
    assert x.shape == (1, 3, 224, 224)
    assert (picture == 255).all()


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"image 'no/such\.jpg': no such file"):
        images.load("no/such.jpg")


def damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind}.jpg"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    if kind == "text":
        path.write_text("not an image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        whole = saved(noise, path).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", "not an image"),
        ("empty", "not an image"),
        ("folder", "is a folder"),
        ("pipe", "is a pipe, socket or device; expected an image file"),
        ("cut", "damaged or truncated.*truncated"),
    ],
)
def test_what_is_not_an_image_is_named_with_the_reason(kind, reason, tmp_path):
    path = damaged(tmp_path, kind)
    with pytest.raises(ValueError, match=reason) as caught:
        images.load(path)
    assert str(path) in str(caught.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = saved(Image.new("L", (100, 100)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png' is too large.*10000 pixels"):
        images.load(path)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros((3, 20, 30), np.uint8), "channels last"),
        (np.zeros((2, 20, 30, 3), np.uint8), "channels last"),
        (np.zeros((0, 5), np.uint8), "at least one pixel"),
        (np.zeros((4, 5), np.int64), r"int64.*astype"),
        (np.full((4, 5), 17.0), r"from 17 to 17; expected \[0, 1\]"),
        (np.full((4, 5), np.nan), "NaN"),
    ],
)
def test_arrays_out_of_range_are_refused(values, reason):
    with pytest.raises(ValueError, match=reason):
        images.load(values)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_image_at_all_is_refused():
    with pytest.raises(TypeError, match="image must be a path"):
        images.load([1, 2])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"crop": 300}, r"crop=300 with resize=256"),
        ({"crop": 0}, r"crop=0"),
        ({"resize": (300, 200)}, r"crop=224 with resize=\(300, 200\)"),
        ({"interpolation": "cubic"}, r"interpolation='cubic'; expected one of .*'bicubic'"),
    ],
)
def test_a_preset_that_contradicts_itself_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        images.prepare(RAMP, PRESET._replace(**change))
