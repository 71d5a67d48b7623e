"""data=table: a user's own CSV or npz with images or numbers. What is read, what is refused, and the model in use."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from mtl.archs.mlp import MLP
from mtl.data import DataTable
from mtl.data.base import build_benchmark
from mtl.engine.loaded import load
from mtl.errors import ConfigError, SetupError
from mtl.tasks import Classification, Regression

SPECIES = ("owl", "crow", "jay")  # crow is in no row


def table(file: Path, header: list, rows: list, delimiter: str = ",") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        csv.writer(opened, delimiter=delimiter).writerows([header, *rows])
    return file


@pytest.fixture
def birds(tmp_path) -> Path:
    """Six images of two sizes; every row but the last two is for training."""
    rows = []
    for i in range(6):
        size = (12, 8) if i % 2 else (8, 8)
        Pillow.new("RGB", size, (40 * i, 0, 255)).save(tmp_path / f"{i}.png")
        rows.append(
            [
                f"{i}.png",
                ("owl", "owl", "jay")[i % 3] if i != 1 else "",
                10.0 * i if i != 2 else "",
                "train" if i < 4 else "test",
            ]
        )
    return table(tmp_path / "birds.csv", ["photo", "species", "weight", "part"], rows)


def birds_data(file: Path, **options) -> DataTable:
    options = {"image": "photo", "height": 8, "width": 8, "split": "part", **options}
    return DataTable(file=str(file), labels={"species": "class", "weight": "number"}, **options)


def test_images_classes_and_numbers_by_hand(birds):
    data = birds_data(birds)
    splits = data.splits()
    train, test = (splits[name].batch(slice(None)) for name in ("train", "test"))
    # Rows 0 to 3: owl, none, jay, owl.
    assert data.tasks[0].classes == ("jay", "owl") and len(train["image"]) == 4
    assert train["species"].tolist() == [1, -100, 0, 1]
    assert train["weight"][:2].tolist() == [0, 10] and train["weight"][2].isnan()
    mean, std = np.mean([0, 10, 30]), np.std([0, 10, 30])
    assert (data.tasks[1].mean, data.tasks[1].std) == pytest.approx((mean, std))
    assert train["image"].shape == (4, 8, 8, 3) and train["image"].dtype == torch.uint8
    assert [int(image[0, 0, 0]) for image in (*train["image"], *test["image"])] == [0, 40, 80, 120, 160, 200]


def test_a_class_that_training_lacks_is_named_with_its_row(birds):
    birds.write_text(birds.read_text().replace("4.png,owl", "4.png,crow"))
    with pytest.raises(
        SetupError, match=r"birds\.csv, row 6: species is 'crow', which is none of .*: jay, owl; data\.lab"
    ):
        birds_data(birds).splits()
    listed = DataTable(file=str(birds), labels={"species": ["owl", "crow", "jay"]}, image="photo", height=8, width=8,
                       split="part")  # fmt: skip
    assert listed.splits()["test"].column("species").tolist() == [1, 2]
    assert listed.tasks == (Classification("species", 3, "species", SPECIES),)


def test_images_are_decoded_once_and_anew_when_a_file_changes(birds, capfd):
    first = birds_data(birds).splits()["train"].column("image").clone()
    assert "reading 6 images" in capfd.readouterr().out
    assert torch.equal(birds_data(birds).splits()["train"].column("image"), first) and capfd.readouterr().out == ""
    Pillow.new("RGB", (9, 9), (7, 0, 0)).save(birds.parent / "0.png")
    assert birds_data(birds).splits()["train"].column("image")[0, 0, 0, 0] == 7
    assert "reading 6 images" in capfd.readouterr().out and len([*birds.parent.glob("mtl-cache/*.npy")]) == 2


@pytest.mark.parametrize(("rows", "names"), [
    (["10", "9", "2"], ("2", "9", "10")), (["b", "a", "10"], ("10", "a", "b")), (["-1", "1", ""], ("-1", "1")),
])  # fmt: skip
def test_classes_are_sorted_as_numbers_where_all_are(tmp_path, rows, names):
    file = table(tmp_path / "t.csv", ["x", "y"], [[i, row] for i, row in enumerate(rows * 4)])
    data = DataTable(file=str(file), labels={"y": "class"})
    assert data.tasks[0].classes == names


def test_numbers_are_standardised_by_the_training_rows(tmp_path):
    rows = [[x, y, x + y, "test" if x == 9 else "train"] for x, y in ((1, 5), (2, 5), (3, 5), (9, 6))]
    file = table(tmp_path / "t.csv", ["x", "y", "sum", "part"], rows, ";")
    data = DataTable(file=str(file), labels={"sum": "number"}, split="part", features=["y", "x"])
    train, test = data.splits()["train"], data.splits()["test"]
    ready = data.inputs["row"].ready(train.column("row"))
    expected = np.array([[0, -1], [0, 0], [0, 1]]) / np.array([1, np.std([1, 2, 3])])  # y does not vary
    np.testing.assert_allclose(ready, expected, atol=1e-6)
    assert train.column("row").tolist() == [[5, 1], [5, 2], [5, 3]] and test.column("row").tolist() == [[6, 9]]
    assert train.column("sum").tolist() == [6, 7, 8]


def test_a_standardised_task_compares_in_units_and_learns_without(tmp_path):
    task, plain = Regression("x", mean=100.0, std=20.0), Regression("x")
    prediction, target = torch.tensor([[0.5], [1.0], [0.0]]), torch.tensor([120.0, 90.0, torch.nan])
    torch.testing.assert_close(task.loss(prediction, target), plain.loss(prediction, (target - 100) / 20))
    metric, state = task.metrics[0], task.metrics[0].zero()
    metric.update(state, prediction, target)
    assert metric.compute(state)["mae"] == pytest.approx((10 + 30) / 2)
    assert task.answers(prediction)["number"].tolist() == [110, 120, 100]


def test_rows_are_divided_in_the_same_way_by_every_process(tmp_path):
    file = table(tmp_path / "t.csv", ["x", "y"], [[i, i % 2] for i in range(50)])
    parts = [DataTable(file=str(file), labels={"y": "class"}, test_fraction=0.3).splits() for _ in range(2)]
    train, test = (parts[0][name].column("row")[:, 0].tolist() for name in ("train", "test"))
    assert len(test) == 15 and sorted(train + test) == list(range(50)) and train == sorted(train)
    assert test == parts[1]["test"].column("row")[:, 0].tolist() != list(range(35, 50))


def test_a_test_file_and_a_validation_column(tmp_path):
    header = ["x", "y", "part"]
    file = table(tmp_path / "a.csv", header, [[i, i % 2, "val" if i > 5 else "Train"] for i in range(8)])
    other = table(tmp_path / "b.csv", ["more", *header], [["text", i, 1, ""] for i in range(3)])
    data = DataTable(file=str(file), labels={"y": "class"}, features=["x"], test_file=str(other))
    assert [len(data.splits()[name]) for name in ("train", "test")] == [8, 3]
    file.write_text(file.read_text().replace("7,1,val", "7,1,test"))
    splits = DataTable(file=str(file), labels={"y": "class"}, split="part").splits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "val": 1, "test": 1}


def test_an_archive_holds_arrays(tmp_path):
    images = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
    np.savez(tmp_path / "d.npz", photos=images, x=np.eye(4, 2), age=np.array([1.5, np.nan, 2.5, 3.5]),
             kind=np.array([3, 7, -100, 3]), name=np.array(["a", "b", "", "a"]))  # fmt: skip
    labels = {"age": "number", "kind": "class", "name": "class"}
    data = DataTable(file=str(tmp_path / "d.npz"), labels=labels, image="photos", channels=1, features=["x"],
                     test_fraction=0.25)  # fmt: skip
    found = {
        name: torch.cat([split.column(name) for split in data.splits().values()]) for name in ("kind", "image", "row")
    }
    assert found["image"].shape == (4, 5, 6, 1) and found["row"].shape == (4, 2)
    assert sorted(found["kind"].tolist()) == [-100, 0, 0, 1]
    assert [task.outputs for task in data.tasks] == [1, 2, 2] and list(data.inputs) == ["image", "row"]


@pytest.mark.parametrize(("change", "options", "said"), [
    (("species", "spezies"), {}, r"there is no column 'species', only photo, spezies, .*did you mean spezies\?"),
    ((",30.0,", ",3x,"), {}, r"birds\.csv, row 5: weight is '3x', which is no number"),
    ((",30.0,", ',"3,5",'), {}, r"row 5: weight is '3,5', which is no number; write it with a decimal point"),
    ((",30.0,", ",inf,"), {}, "row 5: weight is 'inf'; a number is needed"),
    (("3.png", "9.png"), {}, r"row 5: there is no image .*9\.png; did you mean"),
    (("3.png", ""), {}, "row 5: photo is empty"),
    (("3.png,owl", "3.png,owl,"), {}, "row 5: 5 cells, and the header has 4"),
    ((",train", ",trian"), {}, r"row 2: part is 'trian'; train, val or test is needed"),
    ((",test", ",val"), {}, "no row has the part 'test'"),
    (("jay", "owl"), {}, "species has only the class 'owl'; two are needed"),
    (("part", "species"), {"split": None}, "two columns have the name 'species'"),
    (("x", "x"), {"height": None, "width": None}, r"1\.png: is 8 high and 12 wide, and the first image 8 and 8; set"),
    (("x", "x"), {"image": None}, "row 2: photo is '0.png', which is no number; data.features="),
    (("x", "x"), {"image": None, "features": ["weight"]}, "data.features: 'weight' is a label, image or split already"),
    (("x", "x"), {"image": None, "features": []}, "no column is left for the network to read"),
])  # fmt: skip
def test_mistakes_in_a_table_are_one_line(birds, change, options, said):
    birds.write_text(birds.read_text().replace(*change))
    with pytest.raises((SetupError, ConfigError), match=said) as error:
        data = birds_data(birds, **options)
        build_benchmark_of(data)
        data.splits()
    assert "\n" not in str(error.value)


def build_benchmark_of(data: DataTable) -> None:
    assert data.tasks and data.inputs


@pytest.mark.parametrize(("options", "said"), [
    ({"labels": {}}, "data.labels: names no column"),
    ({"labels": {"y": ["a"]}}, r"data.labels: y has the classes \['a'\]; two or more"),
    ({"split": "part", "test_file": "b.csv"}, "data.split: test_file has the test rows"),
    ({"height": 3}, "data.height: height and width must both be given"),
])  # fmt: skip
def test_options_that_contradict(options, said):
    node = {"_target_": "mtl.data.table.DataTable", "file": "x.csv", "labels": {"y": "class"}, **options}
    with pytest.raises(ConfigError, match=said):
        build_benchmark(node)


def test_files_that_are_no_tables(tmp_path):
    for name, content, said in (("a.csv", b"", "there is no column 'y', only"), ("b.csv", b"x,y\n", "no samples"),
                                ("c.csv", b"x,y\n1,\xff\n", "not UTF-8"), ("d.npz", b"no archive", "is damaged"),
                                ("e.csv", None, "No such file")):  # fmt: skip
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(SetupError, match=said):
            assert DataTable(file=str(tmp_path / name), labels={"y": "class"}).tasks


def test_a_damaged_image_is_named_and_nothing_is_left(birds):
    (birds.parent / "3.png").write_bytes((birds.parent / "3.png").read_bytes()[:40])
    with pytest.raises(SetupError, match=r"3\.png: is damaged, or no image"):
        birds_data(birds).splits()
    assert not [*birds.parent.glob("mtl-cache/*.npy")] and not [*birds.parent.glob("mtl-cache/.part*")]


def test_names_of_columns_become_names_of_tasks(tmp_path):
    file = table(tmp_path / "t.csv", ["x", "row", "weight in g"], [[i, i % 2, i] for i in range(9)])
    data = DataTable(file=str(file), labels={"row": "class", "weight in g": "number"})
    assert [task.name for task in data.tasks] == ["row", "weight_in_g"] and list(data.inputs) == ["row"]
    assert {name: split.columns["row"].shape[1] for name, split in data.splits().items()} == {"train": 1, "test": 1}


# -- runs -------------------------------------------------------------------------------------------------------------

QUICK = ("logger=none", "trainer.epochs=1", "trainer.device=cpu", "data.batch_size=2", "seed=0")


def test_a_run_from_the_command_line_and_its_model_without_the_data(cli, birds, capfd, tmp_path):
    from mtl.predict import main as predict

    words = (*QUICK, f"data.file={birds}", "data.image=photo", "data.height=8", "data.width=8", "data.split=part",
             "data.flip=true", "data.labels={species: class, weight: number}")  # fmt: skip
    run = cli("data=table", "arch=mlp", "arch.width=8", *words)
    assert run.code == 0, run.err
    assert "table-birds: 4 train, 2 test; tasks species (2), weight (1)" in run.out
    (folder,) = tmp_path.glob("outputs/table-birds/mlp/equal/*/seed0")
    # The same file elsewhere is the same run.
    shutil.copytree(birds.parent, moved := tmp_path / "moved", ignore=shutil.ignore_patterns("outputs", "moved"))
    words = [word.replace(str(birds), str(moved / "birds.csv")) for word in words]
    assert "finished" in cli("data=table", "arch=mlp", "arch.width=8", *words).out
    kept = birds.read_text()
    birds.unlink()
    loaded = load(folder)
    assert loaded.tasks[0].classes == ("jay", "owl") and loaded.tasks[1].mean == pytest.approx(40 / 3)
    capfd.readouterr()
    assert predict([str(folder), str(birds.parent / "0.png")]) == 0
    header, line = capfd.readouterr().out.splitlines()
    assert header == "file,species_class,species_probability,weight_number" and line.split(",")[1] in ("jay", "owl")
    # A table of new images, without labels.
    (tmp_path / "new.csv").write_text("photo\n1.png\n0.png\n")
    assert predict([str(folder), str(tmp_path / "new.csv"), "--out", str(tmp_path / "a.npz")]) == 0
    saved = np.load(tmp_path / "a.npz")
    assert saved["species_class"].tolist()[1] == line.split(",")[1]
    assert [Path(name).name for name in saved["files"].tolist()] == ["new.csv:2", "new.csv:3"]
    birds.write_text(kept)
    notes = json.loads((folder / "run.json").read_text())
    assert notes["facts"]["labels"]["species"] == ["jay", "owl"] and len(notes["own"]["data"]["file"]) == 8


def test_a_yaml_of_ones_own_needs_only_what_differs(cli, tmp_path):
    rows = [[i, i % 5, "yes" if i % 2 else "no", i * 3.5] for i in range(40)]
    table(tmp_path / "people.csv", ["id", "height", "smokes", "age"], rows)
    (tmp_path / "my_conf" / "data").mkdir(parents=True)
    (tmp_path / "my_conf" / "data" / "people.yaml").write_text(
        "_target_: mtl.data.table.DataTable\nfile: people.csv\nfeatures: [height]\n"
        "labels: {smokes: class, age: number}\n"
    )
    run = cli("--config-dir", "my_conf", "data=people", "arch=mlp", *QUICK, "data.test_fraction=0.25", "loss=pcgrad")
    assert run.code == 0, run.err
    assert "people: 30 train, 10 test" in run.out and "smokes_accuracy" in run.out and "age_mae" in run.out
    wrong = cli("--config-dir", "my_conf", "data=people", "arch=mlp", *QUICK, "data.labels.age=numbre")
    assert wrong.code == 2 and "number" in wrong.err and len(wrong.err.strip().splitlines()) == 1
    missing = cli("data=table", "data.file=none.csv", "data.labels={y: class}", *QUICK)
    assert missing.code == 2 and missing.err.strip() == "error: data.file=none.csv: No such file or directory"


def test_a_perceptron_reads_all_inputs_side_by_side():
    net = MLP({"image": (1, 2, 3), "row": (4,)}, width=5, depth=2, dropout=0.1)
    image, row = torch.randn(7, 1, 2, 3), torch.randn(7, 4)
    assert net.inputs == ("image", "row") and net(image, row).shape == (7, 5) and net.out_features == 5
    linear = MLP({"row": (4,)}, depth=0)
    assert torch.equal(linear(row), row) and linear.out_features == 4
