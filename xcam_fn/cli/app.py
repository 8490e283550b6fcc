"""The command that opens the app: `app`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import tempfile
from collections.abc import Iterator

from xcam_fn.cli.options import Network
from xcam_fn.cli.text import show

_HOST = "127.0.0.1"


def app(
    *,
    network: Network = Network(),
    port: int = 7860,
    device: str = "cpu",
    browser: bool = True,
) -> None:
    """Open the app: drop a photograph, choose, and look. It runs on this machine only; Ctrl-C ends it.

    Args:
        network: what is chosen at the beginning.
        port: of this machine's own address, 127.0.0.1.
        device: where to compute, such as cpu or cuda.
        browser: open the page in a browser.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('xcam app needs gradio, which is not installed; pip install "xcam-fn[app]"')
    _check_port(port)
    with _ended_by_any_signal(), _kept_in_a_folder():
        from xcam_fn.app.page import serve  # only now, for the folder counts for what it imports

        def ready(address: str) -> None:
            show(f"xcam app is at {address} (Ctrl-C ends it)")

        with contextlib.suppress(KeyboardInterrupt):
            serve(network.model, network.weights or "", device, port, browser=browser, ready=ready)


def _check_port(port: int) -> None:
    if not 0 < port < 65536:
        raise ValueError(f"--port {port}: expected 1 to 65535")
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((_HOST, port))
        except OSError as error:
            raise ValueError(
                f"--port {port} of {_HOST} cannot be used ({error.strerror}); give another"
            ) from None


@contextlib.contextmanager
def _ended_by_any_signal() -> Iterator[None]:
    """What ends the process is a KeyboardInterrupt, so that the folder is removed."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), signal.default_int_handler) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@contextlib.contextmanager
def _kept_in_a_folder() -> Iterator[None]:
    """Whatever the packages write goes into a folder that is removed in the end; none asks the network."""
    with tempfile.TemporaryDirectory(prefix="xcam-app-", ignore_cleanup_errors=True) as folder:
        settings = {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_ALLOWED_PATHS": "",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
            "MPLCONFIGDIR": folder,
            "TMPDIR": folder,
        }
        environment, temporary = os.environ.copy(), tempfile.tempdir
        os.environ.update(settings)
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = temporary
            os.environ.clear()
            os.environ.update(environment)
