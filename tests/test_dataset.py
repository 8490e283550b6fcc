"""The photographs of a data set: folders, tables, labels, samples."""

import pytest
from PIL import Image

from xcam_fn.evaluate import dataset

CATEGORIES = ["tench", "tabby cat", "boxer"]


@pytest.fixture
def folder(tmp_path):
    """A folder to which files are added by name."""

    def add(*names: str):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / name)
        return tmp_path

    return add


def listed(*arguments, **options):
    return [(p.name, p.label) for p in dataset.photographs(*arguments, **options)]


def test_a_flat_folder(folder):
    data = folder("b.png", "a.JPG", ".hidden.png")
    (data / "notes.txt").write_text("not a photograph")
    assert listed(data, CATEGORIES) == [("a.JPG", None), ("b.png", None)]
    assert all(p.path.is_file() for p in dataset.photographs(data, CATEGORIES))


def test_a_folder_for_each_class_by_name_index_or_place(folder, tmp_path):
    data = folder("named/tabby cat/a.png", "named/Boxer/b.png", "empty/x/y/z.png") / "named"
    assert listed(data, CATEGORIES) == [("Boxer/b.png", 2), ("tabby cat/a.png", 1)]
    folder("index/0/a.png", "index/2/b.png")
    assert listed(tmp_path / "index", CATEGORIES) == [("0/a.png", 0), ("2/b.png", 2)]
    folder("synsets/n01/a.png", "synsets/n02/b.png")
    assert listed(tmp_path / "synsets", CATEGORIES) == [("n01/a.png", None), ("n02/b.png", None)]
    folder("synsets/n03/c.png")
    assert [label for _, label in listed(tmp_path / "synsets", CATEGORIES)] == [0, 1, 2]


@pytest.mark.parametrize(
    "text",
    [
        "file,class\na.png,1\nsub/b.png,boxer\n",
        "\ufefflabel,Path,other\n1,a.png,x\nBOXER, sub/b.png,y\n",
        "a.png,1\nsub/b.png,2\n\n",
    ],
)
def test_a_table(folder, text):
    data = folder("a.png", "sub/b.png")
    (data / "list.csv").write_text(text, encoding="utf-8")
    assert listed(data / "list.csv", CATEGORIES) == [("a.png", 1), ("sub/b.png", 2)]


def test_a_table_without_classes_and_labels_beside_a_folder(folder):
    data = folder("a.png", "b.png")
    (data / "list.csv").write_text("file\na.png\n")
    assert listed(data / "list.csv", CATEGORIES) == [("a.png", None)]
    (data / "labels.csv").write_text("file,class,synset\nb.png,2,n03\nother.png,0,n01\n")
    assert listed(data, CATEGORIES, labels=data / "labels.csv") == [("a.png", None), ("b.png", 2)]


def test_a_sample_is_the_same_each_time_and_grows(folder):
    data = folder(*(f"{i:02}.png" for i in range(30)))
    small, large = (listed(data, CATEGORIES, num_images=n, seed=3) for n in (5, 12))
    assert large[:5] == small
    assert small != listed(data, CATEGORIES, num_images=5, seed=4)
    assert len(set(large)) == 12
    assert listed(data, CATEGORIES, num_images=99) == listed(data, CATEGORIES)


@pytest.mark.usefixtures("unchecked")
def test_the_error_says_what_is_wrong(folder, tmp_path):
    data = folder("a.png")
    for text, words in (
        ("file,class\na.png,9\n", r"list.csv', line 2: .*9"),
        ("file,class\n,1\n", r"line 2: the path is missing"),
        ("x.png,1\n", r"none of its 1 files is among the 1 photographs"),
    ):
        (data / "list.csv").write_text(text)
        with pytest.raises(ValueError, match=words):
            listed(data, CATEGORIES, labels=data / "list.csv")
    (data / "list.csv").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match=r"is not a CSV file"):
        listed(data / "list.csv", CATEGORIES)
    with pytest.raises(FileNotFoundError, match=r"no such folder or CSV file"):
        listed(tmp_path / "none", CATEGORIES)
    with pytest.raises(FileNotFoundError, match=r"labels .*: no such file"):
        listed(data, CATEGORIES, labels=tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"holds no photographs; expected"):
        listed(tmp_path / "bare", CATEGORIES)
    with pytest.raises(ValueError, match=r"num_images=0 is out of range"):
        listed(data, CATEGORIES, num_images=0)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            "a.png,1",
            "2 photographs are named 'a.png'; name their paths below the data set, such as 'x/a.png'",
        ),
        ("x/a.png,1\nx/a.png,2", "'x/a.png' has classes 1 and 2; expected one"),
    ],
)
def test_labels_of_two_meanings(rows, words, folder):
    data = folder("x/a.png", "y/a.png")
    (data / "labels.csv").write_text(f"file,class\n{rows}\n")
    with pytest.raises(ValueError, match=words):
        listed(data, CATEGORIES, labels=data / "labels.csv")
    (data / "labels.csv").write_text("file,class\na.png,1\nx/a.png,2\n")
    assert listed(data, CATEGORIES, labels=data / "labels.csv") == [("x/a.png", 2), ("y/a.png", 1)]


def test_a_seed_is_not_negative(folder):
    with pytest.raises(ValueError, match="seed=-1 is out of range"):
        listed(folder("a.png", "b.png"), CATEGORIES, num_images=1, seed=-1)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_table_with_other_separators(separator, folder):
    data = folder("a;b.png")
    (data / "list.csv").write_text(f"file{separator}class\na.png{separator}1\n")
    with pytest.raises(ValueError, match=r"separated by .*; expected commas"):
        listed(data / "list.csv", CATEGORIES)
    (data / "list.csv").write_text("a;b.png\n")
    assert listed(data / "list.csv", CATEGORIES) == [("a;b.png", None)]
