"""What `xcam explain` reads beside photographs, values as they are: arrays, volumes, signals and clips."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import xcam_fn as xf
from xcam_fn.cli.text import saved
from xcam_fn.names import check_file, needed

_ARRAY, _VOLUME = (".npy",), (".nii", ".nii.gz")
_SIGNAL, _CLIP = (".wav", ".flac", ".ogg"), (".mp4", ".mov", ".avi", ".mkv", ".webm")
_FRAMES = 512  # of a clip, which is held in memory as a whole


@dataclass(frozen=True)
class Given:
    """One input of a network, and how its heatmaps are drawn and kept.

    Attributes:
        x: (1, C, *size), its values as they are in the file.
        draw: a heatmap (*size), a caption and keywords of `plot.overlay` to a figure.
        suffix: of files of maps.
        save: writes a map (*size) to a path.
    """

    x: Tensor
    draw: Callable[..., Any]
    suffix: str = ".npy"
    save: Callable[[Path, np.ndarray], None] = np.save

    def figures(self, maps: Mapping[xf.Method, Any], caption: str, style: dict[str, Any]) -> dict[str, Any]:
        """The figures by what follows the input's name in theirs: one for each method."""
        return {
            f"_{method.name}": self.draw(one, caption=f"{method.title}: {caption}", **style)
            for method, one in maps.items()
        }

    def write(
        self,
        stem: Path,
        maps: Mapping[xf.Method, Any],
        caption: str,
        style: dict[str, Any],
        inputs: Collection[Path] | None,
    ) -> list[str]:
        """Write the figures and, where the inputs are named, the maps, over none of them; say where."""
        figures = self.figures(maps, caption, style)
        lines = [saved(figure, stem.with_name(f"{stem.name}{more}.png")) for more, figure in figures.items()]
        if inputs is None:
            return lines
        for method, one in maps.items():
            path = stem.with_name(f"{stem.name}_{method.name}{self.suffix}")
            if path.resolve() in {each.resolve() for each in inputs}:
                raise ValueError(
                    f"--output {str(path.parent)!r}: a map would overwrite {path}; choose another folder"
                )
            self.save(path, one.float().cpu().numpy())
            lines.append(f"  wrote {path}")
        return lines


class Photograph(Given):
    """A photograph as its network takes it, and as a picture, drawn under all heatmaps in one figure."""

    def figures(self, maps: Mapping[xf.Method, Any], caption: str, style: dict[str, Any]) -> dict[str, Any]:
        titled = {method.title: one for method, one in maps.items()}
        return {"": xf.plot.heatmaps(self.draw(), titled, caption=caption, **style)}


def is_data(path: Path) -> bool:
    """Whether the name of a file is that of an array, a volume, a signal or a clip."""
    return path.name.lower().endswith((*_ARRAY, *_VOLUME, *_SIGNAL, *_CLIP))


def read(path: Path) -> Given:
    """Return the input that is in a file, nothing scaled or resized.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or a package for it is not installed.
    """
    check_file("input", path, "a file")
    name = path.name.lower()
    kinds = {_ARRAY: _array, _VOLUME: _volume, _SIGNAL: _signal, _CLIP: _clip}
    reader = next(reader for suffixes, reader in kinds.items() if name.endswith(suffixes))
    try:
        return reader(path)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # a broken file makes decoders raise almost anything
        raise ValueError(f"input {str(path)!r} cannot be read: {error}") from error


def _array(path: Path) -> Given:
    values = np.load(path, allow_pickle=False)
    if values.ndim not in (2, 3, 4):
        wanted = "one input without a batch axis, (C, L), (C, H, W) or (C, D, H, W)"
        raise ValueError(f"it has shape {values.shape}; expected {wanted}")
    x = torch.from_numpy(values.astype(np.float32))[None]
    if values.ndim == 2:
        return Given(x, _drawn_signal(values, None))
    gray = values.mean(0, dtype=np.float64)
    if values.ndim == 4:
        return Given(x, lambda heatmap, **how: xf.plot.volume(gray, heatmap, **how))
    low, spread = gray.min(), float(np.ptp(gray)) or 1.0
    picture = (gray - low) / spread
    return Given(x, lambda heatmap, **how: xf.plot.heatmaps(picture, {"": heatmap}, **how))


def _volume(path: Path) -> Given:
    nibabel = _needed("nibabel", "medical")
    image = nibabel.load(path)
    values = image.get_fdata(dtype=np.float32)
    if values.ndim not in (3, 4):
        raise ValueError(f"it has shape {values.shape}; expected (X, Y, Z), or (X, Y, Z, C) with C channels")
    channels = np.moveaxis(values, -1, 0) if values.ndim == 4 else values[None]
    spacing = [float(length) for length in image.header.get_zooms()[:3]]
    units = image.header.get_xyzt_units()[0].replace("unknown", "units")

    def draw(heatmap: Any, **how: Any) -> Any:
        known = {"spacing": spacing, "unit": units, "axes": ("x", "y", "z")}
        return xf.plot.volume(channels.mean(0), heatmap, **known, **how)

    def save(target: Path, heatmap: np.ndarray) -> None:
        nibabel.save(nibabel.Nifti1Image(heatmap.astype(np.float32), image.affine), target)

    return Given(torch.from_numpy(np.ascontiguousarray(channels))[None], draw, ".nii.gz", save)


def _signal(path: Path) -> Given:
    values, rate = _needed("soundfile", "audio").read(path, dtype="float32", always_2d=True)
    channels = np.ascontiguousarray(values.T)
    return Given(torch.from_numpy(channels)[None], _drawn_signal(channels, float(rate)))


def _drawn_signal(values: np.ndarray, rate: float | None) -> Callable[..., Any]:
    def draw(heatmap: Any, *, colormap: str, caption: str, **_: Any) -> Any:
        window = min(256, values.shape[1]) if rate and values.shape[1] > 1 else None
        how = {"rate": rate, "spectrogram": window, "colormap": colormap, "caption": caption}
        return xf.plot.signal(values, heatmap, **how)

    return draw


def _clip(path: Path) -> Given:
    av = _needed("av", "video")
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) > _FRAMES:
                raise ValueError(f"it has more than {_FRAMES} frames; cut it into shorter clips")
        fps = float(stream.average_rate) if stream.average_rate else None
    clip = np.stack(frames)
    x = torch.from_numpy(clip).permute(3, 0, 1, 2).float().div(255)[None].contiguous()
    return Given(x, lambda heatmap, **how: xf.plot.video(clip, heatmap, fps=fps, **how))


def _needed(package: str, extra: str) -> Any:
    remedy = f'pip install "xcam-fn[{extra}]"'
    return needed(package, f"it needs the package {package}, which is not installed; {remedy}")
