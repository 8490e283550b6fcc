"""The peak memory of one case, in a process of its own: prints one line of JSON.

    python -m benchmarks.memory NETWORK METHOD BATCH SECONDS

METHOD is "bare forward" or a name of `METHODS`. The case is ended after SECONDS; its peak so far counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
from pathlib import Path

import torch

import xcam_fn as xf
from benchmarks import common

_STATUS = Path("/proc/self/status")


def main(name: str, method: str, batch: int, seconds: float) -> None:
    """Run the case and print its peak above what the process had with the network and the input loaded."""
    network = next(common.networks([name]))
    x = common.photographs(network.preset, batch)
    reset_peak()
    before = resident("VmRSS")

    def finish(finished: bool) -> None:
        print(json.dumps({"bytes": resident("VmHWM") - before, "finished": finished}), flush=True)
        os._exit(0)

    timer = threading.Timer(seconds, finish, [False])
    timer.daemon = True
    timer.start()
    if method == "bare forward":
        with torch.no_grad():
            network.model(x)
    else:
        xf.METHODS[method](network.model, network.layer, x)
    timer.cancel()
    finish(True)


def reset_peak() -> None:
    """Forget the peak that loading the network reached, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Resident memory in bytes: now (VmRSS) or at its peak (VmHWM).

    Not ru_maxrss where Linux has better: a child starts with its parent's.
    """
    if _STATUS.exists():
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
