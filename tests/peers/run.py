"""Run another library's own tests on the package of `xcam_fn.compat` that has its names.

    python tests/peers/run.py PATH [arguments of pytest]

PATH is a checkout of pytorch-grad-cam, TorchCAM or XplainCAM, told by the package in it. Its tests are copied to a
temporary folder and run there, each import of the library answered by ours. It prints how many passed, how many failed,
and how many do not apply, with a reason for each; the exit status is 0 where no test failed without a reason.
This file is the plugin of that pytest as well.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
import weakref
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[2]
NEEDED = ("tests", "examples/both.png", "scripts", "data")  # of a checkout, where they are there

# Why tests that fail do not apply, by what their names and errors look like.
REASONS: dict[str, dict[str, str]] = {
    "pytorch_grad_cam": {
        r"test_all_cam_models_can_run\[FullGrad-True-": "FullGrad adds no weighted channels up: no eigen_smooth",
    },
    "torchcam": {
        r"has no counterpart in xcam_fn\.compat|test_explain": "explain is not there: xcam explain does it",
        r"no attribute '(_\w+|hook_\w+)'|test_output_target_validation": "reads TorchCAM's private names",
        r"test_cam_(context_manager|remove_hooks|precheck)|test_finercam_lifecycle": "counts hooks: there are none",
        r"test_legrad_rejects": "LeGrad refuses other blocks and arguments here, or in other words",
        r"test_(package_version|unknown_attribute)\b": "asks the package for its own version, or words",
        r"Regex pattern did not match|test_gradcam_reports_disconnected": "refused too, in other words",
        r"and the model fails on it: RuntimeError: scoring failed": "the model's own error is the cause of ours",
        r"rejects_invalid_baseline_result\[<lambda>": "a baseline may return a number here",
        r"test_overlay_mask_preserves_nan_alpha": "NaN is no share of a picture, and refused",
    },
    "xplaincam": {},
}


# -- the plugin: in the process that runs the tests ---------------------------------------------------------


class InPlace(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """What answers imports of a library, and of all in it, by our modules."""

    def __init__(self, peer: str) -> None:
        self.peer, self.specs = peer, {}

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        is_peers = fullname == self.peer or fullname.startswith(f"{self.peer}.")
        return importlib.machinery.ModuleSpec(fullname, self) if is_peers else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        module = importlib.import_module(f"xcam_fn.compat.{spec.name}")
        self.specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: Any) -> None:
        module.__spec__ = self.specs[next(name for name in self.specs if module is sys.modules.get(name))]


def pytest_configure() -> None:
    """Put ours in the library's place, and random weights in that of weights to be downloaded."""
    peer = os.environ["XCAM_PEER"]
    sys.meta_path.insert(0, InPlace(peer))
    random_weights()
    if (
        importlib.util.find_spec("psutil") is None
    ):  # of the system's memory; that of this process says as much
        import resource

        usage = lambda: (0, 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # noqa: E731
        sys.modules["psutil"] = types.ModuleType("psutil")
        vars(sys.modules["psutil"])["virtual_memory"] = usage
    if peer == "torchcam":
        remember_forwards()


def random_weights() -> None:
    import torch
    from torchvision.models._api import WeightsEnum

    class Downloaded(dict[str, Any]):
        pass

    load, module = torch.nn.Module.load_state_dict, torch.nn.Module
    WeightsEnum.get_state_dict = lambda self, *_, **__: Downloaded()
    module.load_state_dict = lambda self, state, *a, **k: (
        None if type(state) is Downloaded else load(self, state, *a, **k)
    )
    torch.manual_seed(0)


def remember_forwards() -> None:
    """Keep the last input and output of each model, of which its extractors are not told."""
    import torch
    from torch import nn

    core = importlib.import_module("xcam_fn.compat.torchcam.methods.core")
    known: Any = weakref.WeakKeyDictionary()
    call, last = nn.Module.__call__, core.last_call
    depth = [0]

    def remembering(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        depth[0] += 1
        try:
            output = call(self, *args, **kwargs)
        finally:
            depth[0] -= 1
        if depth[0] == 0 and args and isinstance(args[0], torch.Tensor):
            known[self] = (args[0], output)
        return output

    nn.Module.__call__ = remembering
    core.last_call = lambda model: last(model) or known.get(model)


def pytest_collect_file(file_path: Path, parent: Any) -> Any:
    """XplainCAM's test is a program, api.py, that does one thing for each of its methods."""
    import pytest

    class Program(pytest.File):
        def collect(self) -> Any:
            tree = ast.parse(self.path.read_text())
            table = next(
                node.value
                for node in tree.body
                if isinstance(node, ast.Assign) and node.targets[0].id == "cams_dict"
            )
            for key, value in zip(table.keys, table.values, strict=True):
                yield Method.from_parent(self, name=key.value, tree=tree, table=table, entry=(key, value))

    class Method(pytest.Item):
        def __init__(self, *, tree: ast.Module, table: ast.Dict, entry: Any, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.tree, self.table, self.entry = tree, table, entry

        def runtest(self) -> None:
            import torchvision

            torchvision.models.vgg19 = small_vgg
            self.table.keys, self.table.values = [[one] for one in self.entry]
            exec(compile(self.tree, str(self.path), "exec"), {"__name__": "api"})

        def reportinfo(self) -> Any:
            return self.path, None, self.name

    return Program.from_parent(parent, path=file_path) if file_path.name == "api.py" else None


def small_vgg(**_: Any) -> Any:
    """A VGG of as many layers as matter, so that its program ends."""
    from torchvision.models.vgg import VGG, make_layers

    return VGG(make_layers([4, "M", 4, "M", 8, "M", 8, "M", 512, "M"]))


# -- the program ---------------------------------------------------------------------------------------------


def main() -> int:
    """Run the tests of a checkout and print what came of them."""
    checkout = Path(sys.argv[1])
    peer = next((name for name in REASONS if (checkout / name).is_dir()), None)
    if peer is None:
        print(f"{checkout}: expected a checkout with one of the packages {', '.join(REASONS)}")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in NEEDED:
            source = checkout / name
            if source.is_dir():
                shutil.copytree(source, place / name)
            elif source.is_file():
                (place / name).parent.mkdir(exist_ok=True)
                shutil.copy(source, place / name)
        (place / "pytest.ini").write_text("[pytest]\n")
        paths = [str(ROOT), str(Path(__file__).parent), str(place)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XCAM_PEER": peer, "MPLBACKEND": "agg"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "run",
            "-q",
            "--tb=short",
            "--junitxml=found.xml",
            "-p",
            "no:cacheprovider",
        ]
        subprocess.run([*command, *sys.argv[2:], "tests"], cwd=place, env=env, check=False)
        found = ET.parse(place / "found.xml").getroot()
    return report(found, REASONS[peer])


def report(found: ET.Element, reasons: dict[str, str]) -> int:
    """Print the counts and why tests do not apply; 1 where one failed for no such reason, or none ran."""
    counts, why, failed = Counter(), Counter(), []
    for case in found.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = [part for part in case if part.tag in ("failure", "error", "skipped")]
        told = "\n".join([name, *(part.get("message", "") for part in bad)])
        reason = next((reason for pattern, reason in reasons.items() if re.search(pattern, told)), None)
        if not bad:
            counts["passed"] += 1
        elif bad[0].tag == "skipped" or reason:
            counts["not applicable"] += 1
            why[reason or bad[0].get("message", "skipped")] += 1
        else:
            counts["failed"] += 1
            failed.append(name)
    print("\n".join(f"failed: {name}" for name in failed))
    for kind in ("passed", "failed", "not applicable"):
        print(f"{kind}: {counts[kind]}")
    for reason, count in why.most_common():
        print(f"  {count} {reason}")
    return 1 if failed or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
