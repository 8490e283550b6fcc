"""Measures the peak memory of one case in its own process, and prints one line of JSON.

    python -m benchmarks.memory CASE LIBRARY SECONDS

CASE is the text of a `Case`, LIBRARY a key of `LIBRARIES`. It stops after SECONDS; its peak so far counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
from pathlib import Path

from benchmarks.cases import Case, prepared
from benchmarks.libraries import LIBRARIES

_STATUS = Path("/proc/self/status")


def main(case: str, library: str, seconds: float) -> None:
    """Run the case and print its peak above the memory of the process with network and images loaded."""
    setting = prepared(Case.loads(case), sample=sys.maxsize, peer_sample=sys.maxsize)
    with contextlib.ExitStack() as stack:
        job = LIBRARIES[library](setting, stack)
        if job is None:
            raise ValueError(f"{library} has no {setting.case.task}")
        reset_peak()
        before = resident("VmRSS")

        def finish(finished: bool) -> None:
            print(json.dumps({"bytes": resident("VmHWM") - before, "finished": finished}), flush=True)
            os._exit(0)

        timer = threading.Timer(seconds, finish, [False])
        timer.daemon = True
        timer.start()
        job.call()
        timer.cancel()
        finish(True)


def reset_peak() -> None:
    """Reset the peak reached while loading the network, if the system supports it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Resident memory in bytes: now (VmRSS) or at its peak (VmHWM).

    On Linux not ru_maxrss, which a child inherits from its parent.
    """
    if _STATUS.exists():
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
