"""What Ray costs, and what is lost where processes are killed.

python -m benchmarks.scale speed --count 200      # one process against two actors
python -m benchmarks.scale kills                  # 20 of actors, drivers, shards and a worker node
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import skimage.data
import torch
from PIL import Image

import xcam_fn as xf
from xcam_fn import evaluate
from xcam_fn.evaluate import cluster, report

XCAM = str(Path(sysconfig.get_path("scripts")) / "xcam")
OWN = '''
import time
import xcam_fn as xf

def slow(A, G):
    """The mean gradient, slowly.

    Args:
        A: features, (B, K, *spatial).
        G: gradients, of the same shape.

    Returns:
        (B, K).
    """
    time.sleep(0.3)
    return G.mean(tuple(range(2, G.ndim)))

slow_cam = xf.from_gradients(slow, name="slow_cam", title="Slow-CAM", summary="gradients, slowly")
'''
METHODS = ["gradcam", "layercam", "xgradcam", "groupcam"]


def photographs(folder: Path, count: int) -> Path:
    """So many photographs, cut out of one."""
    folder.mkdir()
    for i in range(count):
        top, left = divmod(i * 37, 200)
        part = skimage.data.astronaut()[top * 8 : top * 8 + 256, left : left + 256]
        Image.fromarray(part).save(folder / f"{i:03}.png")
    return folder


def rows(folder: Path) -> list[str]:
    """All that a run holds but its settings."""
    with sqlite3.connect(folder / "results.sqlite") as connection:
        return sorted(line for line in connection.iterdump() if "INSERT" in line and '"settings"' not in line)


def tables(folder: Path) -> dict[str, bytes]:
    """The files of a report."""
    place = folder / "report"
    report.write(report.read(folder), place)
    return {name: (place / name).read_bytes() for name in ("table.csv", "table.md", "pairs.csv")}


def count(folder: Path) -> int:
    """How many results there are so far."""
    try:
        address = f"file:{folder / 'results.sqlite'}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
            return connection.execute("SELECT count(*) FROM results").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


# -- speed -----------------------------------------------------------------------------------------------


def speed(place: Path, number: int, actors: int) -> None:
    """Seconds of one process and of actors, each with one thread; the cluster is started before."""
    torch.set_num_threads(1)
    network = xf.models.load("lite0")
    data = photographs(place / "data", number)
    load = os.getloadavg()[0]

    def timed(name: str, some: Any, **options: Any) -> float:
        began = time.perf_counter()
        evaluate.run(network, some, METHODS, ["average_drop"], output=place / name, batch_size=2, **options)
        return time.perf_counter() - began

    alone = timed("one", data)
    began = time.perf_counter()
    with cluster.connected("local"):
        timed("warm", xf.dataset.photographs(data, network.categories)[: 2 * actors], ray="local")
        start, several = time.perf_counter() - began, timed("actors", data, ray="local")
    print(f"load {load:.1f}; {number} photographs x {len(METHODS)} methods: one process {alone:.1f} s")
    print(f"{actors} actors {several:.1f} s = {alone / several:.2f} x; start {start:.1f} s")
    assert rows(place / "one") == rows(place / "actors")


# -- kills -----------------------------------------------------------------------------------------------


def kills(place: Path, seed: int) -> None:
    """Twenty kills at random moments; each run ends with the tables of one that nothing stopped."""
    draw, data = random.Random(seed), photographs(place / "data", 24)
    (place / "own.py").write_text(OWN)
    network = ["--model", "squeezenet1_1", "--weights", "random", "--image-size", "64"]
    command = [
        XCAM, "evaluate", str(data), *network, "--methods", f"{place / 'own.py'}:slow_cam", "layercam",
        "--metrics", "average_drop", "--batch-size", "2", "--num-images", "0",
    ]  # fmt: skip
    subprocess.run([*command, "--output", str(place / "whole")], check=True)
    expected = rows(place / "whole"), tables(place / "whole")

    def compare(folder: Path, what: str) -> None:
        assert (rows(folder), tables(folder)) == expected, what
        print(f"{what}: the same rows and tables", flush=True)

    done = 0
    while done < 8:
        shutil.rmtree(place / "actors", ignore_errors=True)
        process = subprocess.Popen([*command, "--output", str(place / "actors"), "--ray"])
        for _ in range(4):
            reached(process, place / "actors", count(place / "actors") + draw.randint(2, 8))
            found = _actors(process.pid)
            done += sum(_killed(actor) for actor in draw.sample(found, min(1, len(found))))
        assert process.wait() == 0
        compare(place / "actors", f"{done} actors killed")
    for number in range(6):
        process = subprocess.Popen([*command, "--output", str(place / "driver"), "--ray"])
        reached(process, place / "driver", count(place / "driver") + draw.randint(1, 6))
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, left = psutil.wait_procs(below, timeout=60)
        print(
            f"driver {number + 1} killed; of {len(below)} processes {len(left)} are left after a minute",
            flush=True,
        )
    subprocess.run([*command, "--output", str(place / "driver"), "--ray"], check=True)
    compare(place / "driver", "6 drivers killed")
    parts = [place / f"part {i}" for i in (1, 2, 3)]
    for i, part in [*enumerate(parts, 1), *enumerate(parts[:2], 1)]:
        process = subprocess.Popen([*command, "--output", str(part), "--shard", f"{i}/3"])
        reached(process, part, count(part) + draw.randint(1, 6))
        process.send_signal(signal.SIGKILL)
        process.wait()
    for i, part in enumerate(parts, 1):
        subprocess.run([*command, "--output", str(part), "--shard", f"{i}/3"], check=True)
    for _ in range(2):
        subprocess.run([XCAM, "merge", *map(str, parts), "--output", str(place / "merged")], check=True)
        compare(place / "merged", "5 shards killed")
    with two_nodes() as (address, lose):
        process = subprocess.Popen([*command, "--output", str(place / "node"), "--ray", address])
        reached(process, place / "node", 8)
        lose()
        assert process.wait() == 0
    compare(place / "node", "a worker node lost")


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[str, Callable[[], object]]]:
    """The address of a cluster of two nodes, and what kills one of them."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    worker = nodes.add_node(num_cpus=1)
    try:
        yield str(nodes.address), lambda: nodes.remove_node(worker, allow_graceful=False)
    finally:
        nodes.shutdown()


def reached(process: subprocess.Popen[bytes], folder: Path, results: int) -> None:
    """Wait until a run has so many results, or has ended."""
    while process.poll() is None and count(folder) < results:
        time.sleep(0.01)


def _actors(pid: int) -> list[psutil.Process]:
    try:
        below = psutil.Process(pid).children(recursive=True)
        return [each for each in below if "MapWorker" in each.name() + "".join(each.cmdline()[:1])]
    except psutil.Error:
        return []


def _killed(process: psutil.Process) -> bool:
    try:
        process.kill()
    except psutil.Error:
        return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("speed", "kills"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue], a TextIO in its stub
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "speed":
            speed(Path(folder), options.count, options.actors)
        else:
            kills(Path(folder), options.seed)
