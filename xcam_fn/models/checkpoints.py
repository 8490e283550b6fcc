"""Checkpoints: read without running code, and fitted to a network."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from xcam_fn.names import check_file, type_of

State = Mapping[str, Tensor]

_WRAPPERS = ("state_dict_ema", "state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_EXPECTED = "expected a file of torch.save(model.state_dict(), path), or .safetensors"
_LEGACY_HEADER = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_state(path: Path) -> State:
    """The tensors of a checkpoint by key, without what training scripts wrap around; no code of it is run."""
    check_file("weights", path, "a checkpoint file")
    found = _read(path)
    if isinstance(found, Mapping):
        found = next((found[w] for w in _WRAPPERS if isinstance(found.get(w), Mapping)), found)
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{_named(path)} holds {type_of(found)} that is no state dict; {_EXPECTED}")
    for key, value in found.items():
        size = value.numel() * value.element_size()
        if size > path.stat().st_size:  # few numbers, repeated by strides; a network would need them all
            found = f"{_named(path)} declares {size:,} bytes for {key!r}"
            raise ValueError(f"{found}, more than the file has; {_EXPECTED}")
    if all(_plain(key) == key for key in found):
        return found  # as it is: it carries the versions of the modules that wrote it
    return {_plain(key): value for key, value in found.items()}


def read_onnx(path: Path) -> State:
    """The parameters in an ONNX file that torch exported, by the names that they had in the network.

    The weights of linear layers, and constants, lost theirs: the former are turned back and named after the
    layer, the latter are named after the node that reads them.
    """
    import onnx  # noqa: PLC0415 (an extra)
    from onnx import numpy_helper  # noqa: PLC0415

    graph = onnx.load(path).graph
    stored = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    found: dict[str, Tensor] = {}
    for node in graph.node:
        place = node.name.strip("/").replace("/", ".")
        for name in filter(stored.__contains__, node.input):
            if not name.startswith("onnx::"):
                found[name] = stored[name]
            elif node.op_type == "MatMul":
                found[f"{place.removesuffix('.MatMul')}.weight"] = stored[name].T
            else:
                found[place] = stored[name]
    return found


def _plain(key: str) -> str:
    """The key without what wrappers put in front, and in today's spelling of DenseNet's layers."""
    while key.startswith(_PREFIXES):
        key = key.partition(".")[2]
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", key)


def class_count(model: nn.Module, state: State, built_with: int) -> int:
    """The number of classes that a checkpoint was made for, of a network built with another number.

    It is the one length where the checkpoint differs from that number and in nothing else.
    """
    shapes = [(own.shape, state[key].shape) for key, own in model.state_dict().items() if key in state]
    lengths = {
        there[0] for here, there in shapes if there and here != there and here == (built_with, *there[1:])
    }
    return lengths.pop() if len(lengths) == 1 else built_with


def filled(model: nn.Module, state: State, name: str, path: Path) -> nn.Module:
    """The same network, the caller's own, with the state dict of `path` loaded into it."""
    own = model.state_dict()
    problems = [
        f"{key!r} has shape {tuple(state[key].shape)} but the model has {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        lacking = [key for key in own if key not in state], [key for key in state if key not in own]
    else:
        lacking = model.load_state_dict(state, strict=False)
    for what, keys, of in zip(("missing", "unexpected"), lacking, (own, state), strict=True):
        if keys:
            problems.append(f"{len(keys)} of {len(of)} keys are {what}, such as {keys[0]!r}")
    if problems:
        said, wanted = "; ".join(problems[:3]), "a state dict of this network"
        raise ValueError(f"{_named(path)} does not fit model {name!r}: {said}; expected {wanted}")
    return model


def _read(path: Path) -> Any:
    is_safe = path.suffix == ".safetensors"
    if not is_safe:
        _check_header(path)
    try:
        return load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        unsafe = "holds more than tensors and is not loaded, since this could run code from the file"
        remedy = "save a state dict: torch.save(model.state_dict(), path)"
        raise ValueError(f"{_named(path)} {unsafe}; {remedy}") from error
    except Exception as error:  # a damaged file makes the readers raise almost anything
        damage = "the file is damaged or truncated; copy it again"
        raise ValueError(f"{_named(path)} cannot be read: {damage}") from error


def _check_header(path: Path) -> None:
    """Raise for files that torch.save did not write: torch.load warns about some of them, or tries."""
    with path.open("rb") as file:
        header = file.read(len(_LEGACY_HEADER))
    members = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else []
    if path.suffix in (".onnx", ".pt2", ".xml"):
        problem = "is an exported network; in Python, use rise(..., scorer=a function) for it"
    elif any(member.filename.endswith("/constants.pkl") for member in members):
        problem = "is a TorchScript program, not a checkpoint"
    elif sum(member.file_size for member in members) > path.stat().st_size:
        problem = "is compressed, unlike checkpoints of torch.save"
    elif header == _LEGACY_HEADER or header.startswith(b"PK"):
        return
    elif header.startswith(b"\x80"):
        problem = "is a plain pickle and is not loaded, since this could run code from the file"
    else:
        problem = "is not a checkpoint"
    raise ValueError(f"{_named(path)} {problem}; {_EXPECTED}")


def _named(path: Path) -> str:
    return f"weights {str(path)!r}"
