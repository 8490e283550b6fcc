"""Any data set, shards and their merging, several devices, and a Ray cluster: the same numbers as one process."""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import weakref
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import skimage.data
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import networks
import xcam_fn as xf
from test_evaluate import dump, results_in
from xcam_fn import cli, evaluate
from xcam_fn.evaluate import cluster, items, report, shards, store
from xcam_fn.models import LoadedModel
from xcam_fn.models.images import Preset

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray, which reads it once, is to stay on this machine

ROOT = Path(__file__).parents[1]
XCAM = Path(sysconfig.get_path("scripts")) / "xcam"
SMALL = ("--model", "squeezenet1_1", "--weights", "random", "--image-size", "64", "--metrics", "complexity")
PRESET = Preset(32, 36, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
METHODS = ["gradcam", "layercam"]
COUNT = 7


def small() -> LoadedModel:
    model = networks.seeded(networks.Linearized()).eval()
    classes = model(torch.zeros(1, 3, 32, 32)).shape[1]
    return LoadedModel(model, PRESET, [f"class {i}" for i in range(classes)], "small")


@pytest.fixture(scope="module")
def network() -> LoadedModel:
    return small()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of photographs, cut out of one."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(COUNT):
        Image.fromarray(skimage.data.astronaut()[i * 40 : i * 40 + 200, 50:300]).save(folder / f"{i}.png")
    return folder


def run(network, data, output, **options) -> evaluate.Outcome:
    given = {"metric_names": ["complexity"], "batch_size": 2} | options
    return evaluate.run(network, data, given.pop("methods", METHODS), output=output, **given)


@pytest.fixture(scope="module")
def whole(network, data, tmp_path_factory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(network, data, folder)[:4] == (COUNT, 0, 2 * COUNT, 0)
    return folder


def tables(folder: Path) -> list[str]:
    """All that a run holds, in order; the tables that are made of it follow."""
    return sorted(dump(folder))


def scores(folder: Path) -> list:
    """The scores without what the photographs are known by."""
    with store.reading(folder) as run_store:
        rows = [
            (int(n), b.method, v.tolist())
            for b in run_store.blocks()
            for n, v in zip(b.numbers, b.values, strict=True)
        ]
        return [(*row, run_store.heatmaps(row[0])[row[1]]) for row in sorted(rows)]


# -- any data set ---------------------------------------------------------------------------------------------------


def triples(data: Path) -> list:
    return [(path, i % 3, path.name) for i, path in enumerate(sorted(data.glob("*.png")))]


def hugging_face(data: Path, names=("class 2", "class 0", "class 1")) -> datasets.Dataset:
    columns = {"image": [str(path) for path, *_ in triples(data)], "kind": [i % 3 for i in range(COUNT)]}
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict(columns, features=features)


def tar(data: Path, folder: Path) -> str:
    with webdataset.TarWriter(str(folder / "photographs.tar")) as writer:
        for path, label, name in triples(data):
            writer.write({"__key__": name.removesuffix(".png"), "png": path.read_bytes(), "cls": label})
    return str(folder / "photographs.tar")


def prepared(data: Path) -> TensorDataset:
    return TensorDataset(torch.cat([xf.images.prepare(path, PRESET)[0] for path, *_ in triples(data)]))


class Named:
    """A map-style data set of tensors as the network takes them."""

    def __init__(self, data: Path) -> None:
        self.data = prepared(data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int):
        return self.data[i][0], torch.tensor(i % 3), f"{i}.png"


KINDS = {
    "a folder": lambda data, _: data,
    "a list of triples": lambda data, _: triples(data),
    "bytes": lambda data, _: [(path.read_bytes(), i, name) for path, i, name in triples(data)],
    "arrays": lambda data, _: [(np.asarray(Image.open(path)), i, name) for path, i, name in triples(data)],
    "a generator of PIL images": lambda data, _: ((Image.open(path), i, name) for path, i, name in triples(data)),
    "tensors": lambda data, _: Named(data),
    "a DataLoader": lambda data, _: DataLoader(Named(data), batch_size=3),
    "a DataLoader of lists": lambda data, _: DataLoader(triples(data), batch_size=3, collate_fn=list),
    "a Dataset of Hugging Face": lambda data, _: hugging_face(data),
    "WebDataset": lambda data, place: webdataset.WebDataset(tar(data, place), shardshuffle=False).decode("pil").to_tuple("png", "cls", "__key__"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # PIL's, of files that the test leaves open
def test_every_kind_of_data_set_gives_the_same_scores_and_is_continued(kind, network, data, whole, tmp_path):
    make = functools.partial(KINDS[kind], data, tmp_path)
    outcome = run(network, make(), tmp_path / "out")
    assert outcome[:4] == (COUNT, 0, 2 * COUNT, 0)
    assert scores(tmp_path / "out") == scores(whole)
    images = report.read(tmp_path / "out").images
    names = [image.name.removesuffix(".png") for image in images]
    assert names == [str(i) for i in range(COUNT)]
    classes = [2, 0, 1] if "Hugging" in kind else [0, 1, 2]
    assert [image.label for image in images] == [
        None if kind == "a folder" else classes[i % 3] for i in range(COUNT)
    ]
    before = dump(tmp_path / "out")
    with contextlib.closing(store.sqlite3.connect(tmp_path / "out" / store.FILE)) as connection, connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        for table in ("pictures", "heatmaps", "results", "images"):
            connection.execute(f"DELETE FROM {table} WHERE number IN (2, 3)")
    assert run(network, make(), tmp_path / "out") == outcome
    assert sorted(dump(tmp_path / "out")) == sorted(before)


def test_items_that_changed_are_computed_anew_and_those_that_are_gone_forgotten(network, data, tmp_path):
    given = [(np.asarray(Image.open(path)), None, name) for path, _, name in triples(data)]
    run(network, iter(given), tmp_path / "out")
    changed = [*given[:3], (given[3][0][::-1], None, "3.png"), *given[4:6]]
    assert run(network, iter(changed), tmp_path / "out")[:3] == (6, 0, 12)
    run(network, iter(changed), tmp_path / "fresh")
    assert tables(tmp_path / "out") == tables(tmp_path / "fresh")
    assert scores(tmp_path / "out")[6] != scores(tmp_path / "out")[4]


def test_memory_stays_flat(network, tmp_path):
    """No more items are alive at a time than are read ahead."""
    alive, most = set(), 0

    class Counted(Named):
        def __init__(self) -> None:
            pass

        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int):
            nonlocal most
            x = torch.full((3, 32, 32), i / 40)
            alive.add(i)
            most = max(most, len(alive))
            weakref.finalize(x, alive.discard, i)
            return x, torch.tensor(0), str(i)

    assert run(network, Counted(), tmp_path / "out", batch_size=2, methods=["gradcam"])[:3] == (40, 0, 40)
    assert most <= 2 * 5


@pytest.mark.usefixtures("unchecked")
def test_items_of_wrong_shapes_are_written_down_and_wrong_data_sets_are_refused(network, data, tmp_path):
    good = torch.rand(3, 32, 32)
    given = [(good, 0, "a"), (torch.rand(1, 32, 32), 0, "b"), (torch.rand(3, 16, 16), 0, "c"), (good * torch.nan, 0, "d"),
             (torch.ones(3, 32, 32, dtype=torch.uint8), 0, "e"), (good, "class 9", "f"), (b"none", 0, "g")]  # fmt: skip
    assert run(network, given, tmp_path / "out")[:3] == (7, 6, 2)
    assert run(network, iter(given), tmp_path / "stream")[:3] == (7, 6, 2)
    errors = [image.error for image in report.read(tmp_path / "out").images]
    words = [
        None,
        "shape (1, 32, 32)",
        "16 x 16 pixels; expected 32 x 32",
        "NaN",
        "uint8",
        "class 'class 9'",
        "not an image",
    ]
    assert all(w in str(e) if w else e is None for w, e in zip(words, errors, strict=True)), errors

    def broken():
        yield good, 0, "a"
        raise OSError("the disk\nis gone")

    for wrong, error, said in (
        ([1, 2], TypeError, "item 0 is an int; expected (x, label, name)"),
        ([(good, 0)], TypeError, "item 0 is a tuple of 2; expected (x, label, name)"),
        ([(good, 0, 5)], TypeError, "the name of item 0 is an int"),
        ([(good, 0.5, "a")], TypeError, "the label of item 0 is a float"),
        ([(object(), 0, "a")], TypeError, "x of item 0 is an object"),
        ([(torch.rand(2), 0, "a")], ValueError, "x is torch.float32 of shape (2,)"),
        (5, TypeError, "photographs is an int"),
        ({"a": 1}, TypeError, "photographs is a dict"),
        ([], ValueError, "photographs is empty"),
        (iter([]), ValueError, "photographs is empty"),
        (broken(), ValueError, "the data set fails at item 1: OSError: the disk is gone"),
        (DataLoader(Named(data), shuffle=True), ValueError, "the DataLoader shuffles"),
        (hugging_face(data).rename_column("kind", "image2").cast_column("image2", datasets.Value("int64")).add_column("more", [None] * COUNT).cast_column("more", datasets.Image()), ValueError, "select_columns"),
    ):  # fmt: skip
        with pytest.raises(error, match=re.escape(said)):
            run(network, wrong, tmp_path / "wrong")


def test_classes_of_a_data_set_are_the_network_s_by_name_or_by_number():
    assert items.class_numbers(["boxer", "Tench"], ["tench", "cat", "boxer"]) == {0: 2, 1: 0}
    assert items.class_numbers(["n1", "n2"], ["tench", "cat"]) == {0: 0, 1: 1}
    assert items.class_numbers(["n1", "n2"], ["tench", "cat", "boxer"]) == {}


def test_the_command_takes_a_data_set_of_hugging_face(data, tmp_path, capsys):
    hugging_face(data).save_to_disk(tmp_path / "set")
    datasets.DatasetDict({"test": hugging_face(data)}).save_to_disk(tmp_path / "splits")
    command = [
        "evaluate",
        f"hf:{tmp_path / 'set'}",
        *SMALL,
        "--num-images",
        "2",
        "--output",
        str(tmp_path / "out"),
    ]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("2 photographs, 2 results in ")
    found = [image.name for image in report.read(tmp_path / "out").images]
    order = np.random.default_rng(0).permutation(COUNT)
    assert found == [f"{i}.png" for i in order[:2]]
    for path, said in (
        ("splits", f"holds several splits; give one: hf:{tmp_path / 'splits' / 'test'}"),
        ("none", "no data set there; expected a folder written by save_to_disk"),
    ):
        assert cli.main(["evaluate", f"hf:{tmp_path / path}", *SMALL]) == 2
        assert said in capsys.readouterr().err


# -- shards ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(network, data, tmp_path_factory) -> list[Path]:
    """The folders of three shards."""
    folder = tmp_path_factory.mktemp("parts")
    places = [folder / f"part {i}" for i in (1, 2, 3)]
    rows = [run(network, data, place, shard=f"{i}/3").photographs for i, place in enumerate(places, 1)]
    assert rows == [3, 2, 2]  # whole batches
    return places


def test_shards_merged_are_the_run_of_one_machine(network, data, whole, parts, tmp_path):
    merged = evaluate.merge(parts[::-1], tmp_path / "out")
    assert merged[:4] == (2 * COUNT, 0, [], [])
    assert tables(tmp_path / "out") == tables(whole)
    assert evaluate.merge(parts, tmp_path / "out") == merged
    assert tables(tmp_path / "out") == tables(whole)
    assert run(network, data, tmp_path / "out")[:4] == (COUNT, 0, 2 * COUNT, 0)  # a run like any other
    assert tables(tmp_path / "out") == tables(whole)


def test_a_shard_that_is_missing_or_has_not_ended_is_named(network, data, whole, parts, tmp_path):
    with pytest.raises(ValueError, match="shard 2/3 is in no folder; run the missing shards, or merge"):
        evaluate.merge([parts[0], parts[2]], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged = evaluate.merge([parts[0], parts[2]], tmp_path / "out", partial=True)
    assert (merged.results, merged.missing) == (10, ["shard 2/3 is in no folder"])
    killed = tmp_path / "killed"
    with contextlib.suppress(KeyboardInterrupt):
        run(network, data, killed, shard="2/3", methods={"gradcam": "gradcam", "layercam": interrupted})
    with pytest.raises(ValueError, match="not shards of one run: methods is"):
        evaluate.merge([parts[0], killed], tmp_path / "other")
    (copied := tmp_path / "copied").mkdir()
    (copied / store.FILE).write_bytes((parts[1] / store.FILE).read_bytes())
    with pytest.raises(ValueError, match=r"copied: shard 2/3 has not ended"):
        evaluate.merge([parts[0], copied, parts[2]], tmp_path / "out")
    (copied / "run.json").write_bytes((parts[1] / "run.json").read_bytes())
    with contextlib.closing(store.sqlite3.connect(copied / store.FILE)) as connection, connection:
        connection.execute("DELETE FROM heatmaps WHERE number = 2")
        connection.execute("DELETE FROM results WHERE number = 2")
    with pytest.raises(ValueError, match=r"copied: shard 2/3 has not done 1 photographs"):
        evaluate.merge([parts[0], copied, parts[2]], tmp_path / "out")
    merged = evaluate.merge([parts[0], copied, parts[1], parts[2]], tmp_path / "out")  # the whole one counts
    assert merged.twice == [f"shard 2/3 is in {copied} and in {parts[1]}"]
    assert tables(tmp_path / "out") == tables(whole)


def interrupted(*_arguments, **_options):
    raise KeyboardInterrupt


def test_what_cannot_be_merged_is_refused(network, data, whole, parts, tmp_path):
    run(network, data, tmp_path / "other", shard="2/3", batch_size=1)
    run(network, data, tmp_path / "of two", shard="2/2")
    for given, said in (
        ([whole], "holds a whole run; expected one written with --shard"),
        ([parts[0], tmp_path / "other"], r"not shards of one run: batch size is 2 and 1"),
        ([parts[0], tmp_path / "of two"], "the number of shards is 3 and 2"),
        ([], "runs is empty"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate.merge(given, tmp_path / "out")
    with pytest.raises(ValueError, match="is one of the shards; choose another folder"):
        evaluate.merge(parts, parts[0])
    run(network, data, tmp_path / "by one", batch_size=1)
    with pytest.raises(ValueError, match="holds a run with other settings: batch size was 1 and is 2"):
        evaluate.merge(parts, tmp_path / "by one")
    with pytest.raises(ValueError, match="holds a run with other settings: shard was '1/3' and is None"):
        run(network, data, parts[0])
    with pytest.raises(FileNotFoundError, match="holds no results"):
        evaluate.merge([tmp_path], tmp_path / "out")


@pytest.mark.parametrize("text", ["0/3", "4/3", "2", "a/b", "1/0", "-1/3", ""])
def test_a_shard_count_that_does_not_fit(text, network, data, tmp_path):
    with pytest.raises(ValueError, match=rf"shard='{text}': expected i/n with 1 <= i <= n"):
        run(network, data, tmp_path / "out", shard=text)
    assert not (tmp_path / "out").exists()


def test_more_shards_than_batches_are_refused(network, data, tmp_path):
    with pytest.raises(
        ValueError, match="shard='5/5': the run has 4 batches; expected at most as many shards"
    ):
        run(network, data, tmp_path / "out", shard="5/5")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}, "3/4"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "1/2"),
        ({"JOB_COMPLETION_INDEX": "63", "JOB_COMPLETIONS": "64"}, "64/64"),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}, "ID=9 .* is no shard"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x .* is no shard"),
        ({"RANK": "0"}, "no variable of a scheduler is set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "2"}, "RANK and JOB_COMPLETION_INDEX"),
    ],
)  # fmt: skip
def test_a_scheduler_says_which_shard(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "/" in expected:
        assert str(shards.shard_of("env")) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            shards.shard_of("env")


def test_the_command_merges_and_says_where_hardware_differs(parts, whole, tmp_path, monkeypatch, capsys):
    for i, part in enumerate(parts):
        (tmp_path / f"{i}").mkdir()
        for name in (store.FILE, "run.json"):
            (tmp_path / f"{i}" / name).write_bytes((part / name).read_bytes())
    other = tmp_path / "1" / "run.json"
    other.write_text(other.read_text().replace('"threads": 1', '"threads": 8'))
    command = ["merge", *(str(tmp_path / f"{i}") for i in range(3)), "--output", str(tmp_path / "out")]
    assert cli.main(command) == 0
    done = capsys.readouterr()
    assert done.out.startswith(f"{2 * COUNT} results in ")
    assert re.search(r"warning: the shards ran on other hardware.*\['cpu'\] 1; .*\['cpu'\] 8", done.err)
    assert tables(tmp_path / "out") == tables(whole)
    assert cli.main(command[:2] + command[-2:]) == 2
    assert "shard 2/3 is in no folder" in capsys.readouterr().err
    monkeypatch.setattr(xf.evaluate, "merge", lambda *_, **__: shards.Merged(3, 2, [], [], []))
    assert cli.main(command) == 1
    assert "and 2 results failed" in capsys.readouterr().err


# -- several devices ------------------------------------------------------------------------------------------------


def test_several_devices_divide_the_batches(network, data, whole, tmp_path):
    threads, meet = set(), threading.Barrier(2, timeout=30)

    def together(model, layer, x, cls=None):
        """Grad-CAM that goes on once two threads have come to it."""
        threads.add(threading.get_ident())
        with contextlib.suppress(threading.BrokenBarrierError):
            meet.wait()
        return xf.gradcam(model, layer, x, cls)

    methods = {"gradcam": together, "layercam": "layercam"}
    outcome = run([network, small()], data, tmp_path / "out", methods=methods, batch_size=2)
    assert outcome[:4] == (COUNT, 0, 2 * COUNT, 0)
    assert len(threads) == 2
    assert tables(tmp_path / "out") == tables(whole)


def test_networks_that_are_not_the_same_are_refused(network, data, tmp_path):
    other = small()
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    with pytest.raises(
        ValueError, match="network: 2 with different weights; expected one, or copies on several devices"
    ):
        run([network, other], data, tmp_path / "out")
    with pytest.raises(ValueError, match="ray: got 2 devices, but each actor uses one"):
        run([network, network], data, tmp_path / "out", ray="local")


def test_the_command_takes_several_devices(data, tmp_path, capsys):
    command = ["evaluate", str(data), *SMALL, "--num-images", "3", "--output"]
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    assert cli.main([*command, str(tmp_path / "two"), "--device", "cpu,cpu"]) == 0
    assert tables(tmp_path / "two") == tables(tmp_path / "one")
    assert cli.main([*command, str(tmp_path / "two"), "--device", "cpu,nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


# -- Ray ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_what_ray_cannot_do_is_refused(network, data, tmp_path, monkeypatch):
    lock = threading.Lock()

    def locked(model, layer, x, cls=None):
        with lock:
            return xf.gradcam(model, layer, x, cls)

    class Locked(Named):
        def __init__(self) -> None:
            super().__init__(data)
            self.lock = lock

    other = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with other.accept()[0] as caller:
            caller.sendall(b"220 a server of mail")

    threading.Thread(target=answer, daemon=True).start()
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = free.getsockname()[1]
    for given, options, error, said in (
        (
            data,
            {"ray": f"127.0.0.1:{closed}"},
            ConnectionError,
            f"there is no cluster at '127.0.0.1:{closed}'",
        ),
        (
            data,
            {"ray": f"127.0.0.1:{other.getsockname()[1]}"},
            ConnectionError,
            "the server there is not Ray",
        ),
        (
            data,
            {"ray": "somewhere"},
            ValueError,
            "ray='somewhere': expected HOST:PORT of a cluster, 'auto', or",
        ),
        (data, {"ray": "ray://a:1"}, ValueError, "ray='ray://a:1': expected HOST:PORT"),
        (iter(triples(data)), {"ray": "local"}, ValueError, "can only be read in order"),
        (data, {"ray": "local", "methods": {"mine": locked}}, TypeError, "methods cannot be pickled"),
        (Locked(), {"ray": "local"}, TypeError, "photographs cannot be pickled"),
    ):
        with pytest.raises(error, match=re.escape(said)):
            run(network, given, tmp_path / "out", **options)
        assert (tmp_path / "out").exists() == (error is ConnectionError)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    other.close()
    assert time.monotonic() - began < 30
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=re.escape('pip install "xcam-fn[ray]"')):
        run(network, data, tmp_path / "out", ray="local")


WITH_RAY = [
    pytest.mark.filterwarnings(f"ignore::{kind}")  # its own
    for kind in (
        "DeprecationWarning",
        "FutureWarning",
        "ResourceWarning",
        "pytest.PytestUnraisableExceptionWarning",
    )
]


def with_ray(test):
    """A test that has the cluster, in which Ray may warn of itself."""
    return functools.reduce(lambda marked, mark: mark(marked), WITH_RAY, test)


@pytest.fixture(scope="module")
def local():
    """A cluster on this machine, as the command starts it; each run in this process connects to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        with cluster.connected("local") as ray:
            yield ray


def actors() -> list[psutil.Process]:
    """The processes in which batches are computed."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "MapWorker" in process.name() + "".join(process.cmdline()[:1])]


@with_ray
def test_a_local_cluster_listens_on_this_machine_alone(local):
    listening = [
        connection.laddr.ip
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 3
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


@with_ray
def test_actors_find_what_one_process_finds_also_where_one_is_killed(local, network, data, whole, tmp_path):
    def slow(model, layer, x, cls=None):
        time.sleep(0.3)
        return xf.gradcam(model, layer, x, cls)

    killed = []

    def kill() -> None:
        while not killed:
            time.sleep(0.05)
            if results_in(tmp_path / "out") >= 2:
                killed.extend(actors()[:1])
                killed[0].kill()

    class Broken(Named):
        """The same with one item more, which cannot be read."""

        def __len__(self) -> int:
            return COUNT + 1

    thread = threading.Thread(target=kill)
    thread.start()
    methods = {"gradcam": slow, "layercam": "layercam", "failing": lambda *_: 1 / 0}
    outcome = run(network, Broken(data), tmp_path / "out", methods=methods, ray="local")
    thread.join()
    assert outcome[:4] == (COUNT + 1, 1, 2 * COUNT, COUNT)
    assert scores(tmp_path / "out") == scores(whole)
    found = report.read(tmp_path / "out")
    assert {f.error for f in found.failures if f.method == "failing"} == {
        "ZeroDivisionError: division by zero"
    }
    assert "IndexError" in str(found.images[COUNT].error)
    assert shards.notes(tmp_path / "out") == shards.notes(whole) | {"rows": COUNT + 1}


@with_ray
def test_a_driver_that_was_killed_goes_on_where_it_was(local, data, tmp_path):
    methods = (
        "--methods",
        "gradcam",
        "smoothgradcam_pp",
        "--option",
        "num_samples=60",
    )  # slow enough to be killed
    command = ["evaluate", str(data), *SMALL, *methods, "--output", str(tmp_path / "out")]
    address = local.get_runtime_context().gcs_address
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # as this process: other threads round in another way
    process = subprocess.Popen(
        [XCAM, *command, "--ray", address], env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while process.poll() is None and results_in(tmp_path / "out") < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, said
    assert 0 < results_in(tmp_path / "out") < 2 * COUNT
    assert cli.main([*command, "--ray"]) == 0
    assert cli.main([*command[:-1], str(tmp_path / "one")]) == 0
    assert tables(tmp_path / "out") == tables(tmp_path / "one")
