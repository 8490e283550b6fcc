"""Times calls in turns, and describes the machine."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

PACKAGES = ("xcam-fn", "torch", "torchvision", "grad-cam", "torchcam", "captum")

Call = Callable[[], Any]


class Result(NamedTuple):
    """The timings of one way to compute a map.

    Attributes:
        value: the result of its first call, or None.
        first: seconds of the first call.
        seconds: seconds of the later calls, one per round.
        error: "" if it ran, else the error that it raised.
        share: the share of the work that was run; the seconds are scaled to all of it.
    """

    value: Any
    first: float
    seconds: list[float]
    error: str
    share: float = 1.0

    @property
    def median(self) -> float:
        """The median of the later calls, in seconds."""
        return float(np.median(self.seconds))

    def scaled(self, share: float) -> Result:
        """The seconds scaled to all the work, if only a share of it was run."""
        seconds = [second / share for second in self.seconds]
        return self._replace(first=self.first / share, seconds=seconds, share=share)


def measure(calls: dict[str, Call], seconds: float, rounds: tuple[int, int] = (1, 15)) -> dict[str, Result]:
    """Time the first call of each, then those that did not fail in turns, A B C A B C …

    Changes of the machine's load thus affect all alike. A call of milliseconds runs once right before it is
    timed, so that the cache holds its own weights and not those of the previous call.

    Args:
        calls: the calls to time, by name.
        seconds: no round begins after this time, except for the minimum number of rounds.
        rounds: the minimum and maximum number of rounds.
    """
    results = {name: _first(call) for name, call in calls.items()}
    running = [name for name in calls if not results[name].error]
    start = time.monotonic()
    for number in range(rounds[1]):
        if number >= rounds[0] and time.monotonic() - start > seconds:
            break
        gc.collect()
        for name in running:
            if results[name].first < 1:
                calls[name]()
            results[name].seconds.append(timed(calls[name])[1])
    return results


def timed(call: Call) -> tuple[Any, float]:
    """The result of a call and its seconds, with the garbage collector off."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        value = call()
        return value, time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()


def _first(call: Call) -> Result:
    try:
        value, elapsed = timed(call)
    except Exception as error:  # any error of another library is its result
        return Result(None, 0.0, [], f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return Result(value, elapsed, [], "")


def ratios(result: Result | None, reference: Result | None) -> list[float]:
    """The ratios of a result's seconds to the reference's, by round; empty if either did not run."""
    if result is None or reference is None or not (result.seconds and reference.seconds):
        return []
    return [a / b for a, b in zip(result.seconds, reference.seconds, strict=True)]


def machine(load: float) -> str:
    """The machine, the versions and the load average at the start of the benchmark, in one line."""
    parts = (
        _processor(),
        f"{os.cpu_count()} cores",
        f"{torch.get_num_threads()} threads",
        torch.backends.cpu.get_cpu_capability(),
        f"{'with' if bfloat16_units() else 'without'} bfloat16 units",
        f"load {load:.2f} at the start",
        f"Python {platform.python_version()}",
        *(f"{name} {version(name)}" for name in PACKAGES),
    )
    return ", ".join(parts)


def bfloat16_units() -> bool:
    """Whether the processor has bfloat16 units; without them it is emulated, and far slower than float32."""
    return torch.cuda.is_available() or any(
        flag in _cpuinfo() for flag in ("avx512_bf16", "amx_bf16", "bf16 ")
    )


def load() -> float:
    """The load average of the last minute; on a busy machine, timings mean little."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def _cpuinfo() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text()
    return ""


def _processor() -> str:
    for line in _cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def empty_compile_cache() -> Iterator[None]:
    """Give the compiler an empty cache, so the setup time is that of a first run."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def progress(what: str) -> None:
    """Report on stderr what is being measured."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
