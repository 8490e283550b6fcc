"""The command that opens the app: `app`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import tempfile
from collections.abc import Iterator

from xcam_fn.cli.options import Network, is_own
from xcam_fn.cli.text import show

_HOST = "127.0.0.1"


def app(*, network: Network = Network(), port: int = 7860, device: str = "cpu", browser: bool = True) -> None:
    """Open the app in a browser and explain the photographs you drop. It runs on this machine only.

    Args:
        network: the network shown first.
        port: the port on 127.0.0.1.
        device: where to compute, such as cpu or cuda.
        browser: open the page in a browser.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('xcam app needs gradio, which is not installed; pip install "xcam-fn[app]"')
    if is_own(network.model):
        remedy = "the app takes networks by name; xcam explain takes your own"
        raise ValueError(f"--model {network.model!r}: {remedy}")
    if not 0 < port < 65536:
        raise ValueError(f"--port {port}: expected 1 to 65535")
    try:
        socket.create_server((_HOST, port)).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ValueError(f"--port {port} of {_HOST} cannot be used ({reason}); choose another") from None
    with _alone(), contextlib.suppress(KeyboardInterrupt):
        from xcam_fn.app.page import serve  # only now, for the folder counts for what it imports

        def ready(address: str) -> None:
            show(f"xcam app is at {address} (Ctrl-C stops it)")

        serve(network.model, network.weights or "", device, port, browser=browser, ready=ready)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """What packages write goes into a folder that is removed, none asks the network, signals are Ctrl-C."""
    with contextlib.ExitStack() as restored:
        for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
            number = getattr(signal, name)
            restored.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        temporary = tempfile.TemporaryDirectory(prefix="xcam-app-", ignore_cleanup_errors=True)
        folder = restored.enter_context(temporary)
        restored.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
        restored.callback(os.environ.update, os.environ.copy())
        restored.callback(os.environ.clear)
        tempfile.tempdir = folder
        os.environ |= dict.fromkeys(("GRADIO_TEMP_DIR", "MPLCONFIGDIR", "TMPDIR"), folder)
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_ALLOWED_PATHS": ""}
        os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
        yield
