"""Every code block of README.md, CONTRIBUTING.md, docs/ and the pages made of data is run.

Python blocks of one page run in order in one namespace, prepared with what `prepared` says and, where a page
has `<!-- setup: code -->`, with that. Console blocks are run and have to print what they show; commands in sh
blocks, which may take hours, are parsed by the real command. A block under `<!-- no-run: reason -->` is not run.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import skimage.data
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

import hooks
import networks
import xcam_fn as xf
from xcam_fn import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
CLASSES = 1000

pytestmark = [
    pytest.mark.usefixtures("unchecked"),  # as a reader runs them
    pytest.mark.filterwarnings(
        "ignore:.torch.jit.script. is deprecated:FutureWarning"
    ),  # torch's own, in jvp
]

_PART = re.compile(
    r"<!-- setup:\s(?P<setup>.*?)\s-->"
    r"|(?:<!-- no-run: (?P<reason>[^\n]*?) -->\s*)?"
    r"^```(?P<kind>\w*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)


class Part(NamedTuple):
    """A block of code, or what is set up before one."""

    kind: str
    code: str
    line: int
    reason: str | None


def parts(text: str) -> Iterator[Part]:
    for found in _PART.finditer(text):
        line = text[: found.start("setup" if found["setup"] else "code")].count("\n")
        if found["setup"]:
            yield Part("setup", found["setup"], line, None)
        elif found["kind"]:
            yield Part(found["kind"], found["code"], line, found["reason"])


class SmallResNet(ResNet):
    """The names of torchvision's ResNet-34 from `conv1` to `layer4.2.relu`, with an eighth of its channels."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 3])
        self.fc = nn.Linear(64, CLASSES)

    def _make_layer(self, block: Any, planes: int, *args: Any, **more: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *args, **more)


def prepared(photographs: torch.Tensor) -> dict[str, Any]:
    """The names that pages use without saying where they come from."""
    return {
        "xf": xf,
        "torch": torch,
        "F": F,
        "net": xf.models.load("lite0"),  # EfficientNet-Lite0 with its weights
        "model": networks.seeded(SmallResNet()),
        "x": photographs,  # two images, (2, 3, 224, 224)
        "y": torch.tensor([281, 652]),  # their labels
        "picture": Image.fromarray(skimage.data.chelsea()).resize((224, 224)),
    }


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(name: str, text: str, names: dict[str, Any]) -> None:
    mpl.use("agg")
    for part in parts(text):
        if part.kind in ("python", "setup") and part.reason is None:
            code = compile("\n" * part.line + part.code, name, "exec")
            exec(code, names)
    plt.close("all")


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_python_blocks_run(page, photographs, folder):
    run_page(str(page), page.read_text(encoding="utf-8"), prepared(photographs))


def test_the_pages_that_are_made_run(photographs, folder):
    names = prepared(F.interpolate(photographs[:1], size=(72, 72)))
    for name in xf.METHODS:
        run_page(name, hooks.method_page(name), names)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_are_commands(page, folder, capsys):
    for part in parts(page.read_text(encoding="utf-8")):
        if part.reason is not None:
            continue
        if part.kind == "sh":
            for command in part.code.replace("\\\n", " ").strip().splitlines():
                check_command(command)
        elif part.kind == "console":
            run_console(part.code, capsys)


def check_command(line: str) -> None:
    """What a line of a shell would start, parsed and not run."""
    words = shlex.split(line, comments=True)
    match words[:1]:
        case []:
            return
        case ["xcam"]:
            cli.app.parse_args(words[1:], exit_on_error=False, print_error=False)
        case ["make"]:
            targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
            assert set(words[1:]) <= set(targets), line
        case ["pip"]:
            about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            for extras in re.findall(r"(?:xcam-fn|\.)\[(.*?)\]", line):
                assert set(extras.split(",")) <= set(about["optional-dependencies"]), line
        case ["python"]:
            assert words[1] == "-m" or (ROOT / words[1]).is_file(), line
        case [other]:
            assert (ROOT / other).is_file(), line


def run_console(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command after a $, which has to print what stands below it, where anything does."""
    for one in re.split(r"^\$ ", code, flags=re.M)[1:]:
        command, _, shown = one.partition("\n")
        words = shlex.split(command, comments=True)
        assert words[0] == "xcam", command
        assert cli.main(words[1:]) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        if shown.strip():
            assert printed.strip() == shown.strip()


def test_what_is_not_run_says_why():
    for page in PAGES:
        for part in parts(page.read_text(encoding="utf-8")):
            assert part.reason is None or len(part.reason) > 10, f"{page}: {part.code}"


def test_a_block_that_fails_is_noticed(photographs, folder):
    with pytest.raises(AssertionError):
        run_page("page", "<!-- setup: a = 1 -->\n```python\nassert a == 2\n```\n", {})
    with pytest.raises(Exception, match="layr"):
        check_command("xcam explain --example --layr layer4")
