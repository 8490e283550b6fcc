"""Checkpoints: read without running code, and fitted to a network."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xcam_fn.models.images import check_file

State = Mapping[str, Tensor]

_WRAPPERS = ("state_dict_ema", "state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_EXPECTED = "expected what torch.save(model.state_dict(), path) writes"
_LEGACY_HEADER = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_state(path: Path) -> State:
    """Return the tensors of a checkpoint by their key, without what training scripts wrap around them.

    The file is read with weights_only: no code of it is run.
    """
    found = _unpickled(path)
    if isinstance(found, Mapping):
        found = next((found[w] for w in _WRAPPERS if isinstance(found.get(w), Mapping)), found)
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(
            f"weights {str(path)!r} hold a {type(found).__name__} without a state dict; {_EXPECTED}"
        )
    if all(_plain(key) == key for key in found):
        return found  # as it is: it carries the versions of the modules that wrote it
    return {_plain(key): value for key, value in found.items()}


def _plain(key: str) -> str:
    """The key without what wrappers put in front, and in today's spelling of DenseNet's layers."""
    while key.startswith(_PREFIXES):
        key = key.partition(".")[2]
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", key)


def class_count(model: nn.Module, state: State, built_with: int) -> int:
    """Return the number of classes that a checkpoint was made for, of a network built with another number.

    It is the one length that the checkpoint has wherever the network has `built_with` and the shapes differ
    in nothing else; `built_with` where there is none.
    """
    shapes = [(own.shape, state[key].shape) for key, own in model.state_dict().items() if key in state]
    lengths = {
        there[0]
        for here, there in shapes
        if here != there and len(here) == len(there) and here == (built_with, *there[1:])
    }
    return lengths.pop() if len(lengths) == 1 else built_with


def filled(model: nn.Module, state: State, name: str, path: Path) -> nn.Module:
    """Return the same network, the caller's own, with the state dict of `path` loaded into it."""
    own = model.state_dict()
    problems = [
        f"{key!r} has shape {tuple(state[key].shape)} where the model has {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    else:
        missing, unexpected = model.load_state_dict(state, strict=False)
    if missing:
        problems.append(f"{len(missing)} of {len(own)} keys are missing, first {missing[0]!r}")
    if unexpected:
        problems.append(f"{len(unexpected)} of {len(state)} keys are unexpected, first {unexpected[0]!r}")
    if problems:
        raise ValueError(
            f"weights {str(path)!r} do not fit model {name!r}: {'; '.join(problems[:3])}; expected the "
            "state dict of this very network"
        )
    return model


def _unpickled(path: Path) -> Any:
    """What a checkpoint holds; no code of it is run."""
    check_file("weights", path, "a checkpoint file")
    _check_header(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights {str(path)!r} hold more than tensors, and loading that would run code from the file, "
            "so it was not loaded; save a state dict: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise ValueError(
            f"weights {str(path)!r} cannot be read: the file is damaged or cut off; copy it again"
        ) from error


def _check_header(path: Path) -> None:
    """Raise for files that torch.save did not write: torch.load warns about some of them, or tries."""
    with path.open("rb") as file:
        header = file.read(len(_LEGACY_HEADER))
    members = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if any(member.endswith("/constants.pkl") for member in members):
        problem = "is a TorchScript archive, a program and not a checkpoint"
    elif header == _LEGACY_HEADER or header.startswith(b"PK"):
        return
    elif header.startswith(b"\x80"):
        problem = "is a plain pickle, and loading it could run code from the file, so it was not loaded"
    else:
        problem = "is not a checkpoint"
    raise ValueError(f"weights {str(path)!r} {problem}; {_EXPECTED}")
