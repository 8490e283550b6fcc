"""The command `xcam`: arguments in, text out. What takes long to import is imported where it is used."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from xcam_fn.cli.app import app as open_app
from xcam_fn.cli.datasets import evaluate, latency, merge, report
from xcam_fn.cli.networks import export, layers, methods
from xcam_fn.cli.photographs import compare, explain, gallery
from xcam_fn.cli.text import say

_BAD_INPUT = 2
_INTERRUPTED = 130

app = App(
    name="xcam",
    help="Class activation maps: see which parts of a photograph drove a network's decision.",
    version=lambda: importlib.metadata.version("xcam-fn"),
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)
_ARGUMENTS = {
    explain: "PHOTO...",
    compare: "PHOTO",
    gallery: "PHOTO",
    evaluate: "DATA",
    merge: "RUN...",
    report: "DIR...",
}
for command, argument in _ARGUMENTS.items():
    app.command(command, usage=f"Usage: xcam {command.__name__} {argument} [OPTIONS]")
for command in (latency, export, open_app, methods, layers):
    app.command(command)


def main(arguments: Sequence[str] | None = None, app: App = app) -> int:
    """The exit status: 0, 1 where some photographs or results failed, 2 for bad input, 130 for Ctrl-C."""
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`head`, say) has all it wanted; without this, Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (CycloptsError, ValueError, TypeError, OSError) as error:
        say("error", _of_file(error) if isinstance(error, OSError) and error.strerror else error)
        return _BAD_INPUT
    return status or 0


def _of_file(error: OSError) -> str:
    """What the system says of a file, in words: its own text begins with a number."""
    named = "" if error.filename is None else f"{str(error.filename)!r}: "
    return f"{named}{error.strerror}; check the path, its permissions and the room on the disk"
