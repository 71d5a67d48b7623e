"""NYUv2 and Cityscapes in MTAN's files: columns, labels that are missing, damage, and arrays that are made once."""

import errno
import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from mtl.data.base import build_benchmark
from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.data.cityscapes import Cityscapes
from mtl.data.nyuv2 import NYUv2
from mtl.errors import SetupError
from mtl.tasks import Depth, Disparity, Normals, Segmentation
from mtl.views import View

REAL = Path(__file__).parents[2] / "shared" / "data" / "nyuv2"
H, W = 32, 40
SIZES = {"train": 5, "val": 3}
CPU = torch.device("cpu")


def fake(folder: Path, labels: dict[str, int], normals: bool, shape=(H, W)) -> Path:
    """A few files in MTAN's layout; the first row of pixels has no label."""
    draw = np.random.default_rng(0)
    for split, size in SIZES.items():
        for i in range(size):
            maps = {"image": draw.integers(0, 256, (*shape, 3)) / 255, "depth": draw.uniform(0.5, 9, (*shape, 1))}
            maps |= {name: draw.integers(0, count, shape) for name, count in labels.items()}
            maps["depth"][0] = 0
            for name in labels:
                maps[name][0] = -1
            if normals:
                maps["normal"] = draw.normal(size=(*shape, 3))
                maps["normal"] /= np.linalg.norm(maps["normal"], axis=-1, keepdims=True)
                maps["normal"][0] = 0
            for kind, array in maps.items():
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
                np.save(folder / split / kind / f"{i}.npy", array.astype(np.float32))
    return folder


@pytest.fixture
def nyuv2(tmp_path) -> Path:
    return fake(tmp_path / "nyuv2", {"label": 13}, normals=True)


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    return fake(tmp_path / "cityscapes2", {"label_7": 7, "label_19": 19}, normals=False)


@pytest.fixture(autouse=True)
def threads():
    torch.set_num_threads(1)


def arrays(folder: Path) -> list[Path]:
    return sorted((folder / "mtl-cache").glob("*.npy"))


def stack(folder: Path, kind: str) -> torch.Tensor:
    files = sorted(folder.joinpath(kind).glob("*.npy"), key=lambda file: int(file.stem))
    return torch.from_numpy(np.stack([np.load(file) for file in files]))


# ------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("inside", [False, True])
def test_columns_are_the_files(nyuv2, inside):
    """Of the folder itself, or of the one that holds it; 8-bit images come back exactly; -1 becomes -100."""
    benchmark = NYUv2(root=str(nyuv2 if inside else nyuv2.parent))
    splits = benchmark.splits()
    assert benchmark.inputs["image"].shape == (3, H, W) and {n: len(s) for n, s in splits.items()} == {
        "train": 5, "test": 3
    }  # fmt: skip
    for split, folder in (("train", "train"), ("test", "val")):
        columns = splits[split].columns
        assert columns["image"].dtype == torch.uint8 and columns["segmentation"].dtype == torch.int8
        torch.testing.assert_close(columns["image"] / 255, stack(nyuv2 / folder, "image"))
        label = stack(nyuv2 / folder, "label")
        assert torch.equal(columns["segmentation"].float(), label.masked_fill(label < 0, -100))
        assert torch.equal(columns["depth"], stack(nyuv2 / folder, "depth").squeeze(-1))
        assert torch.equal(columns["normals"], stack(nyuv2 / folder, "normal"))
    for task in benchmark.tasks:
        assert task.units(splits["train"].columns[task.column]).tolist() == [(H - 1) * W] * 5


@pytest.mark.parametrize("classes", [7, 19])
def test_cityscapes_has_two_granularities(cityscapes, classes):
    benchmark = Cityscapes(root=str(cityscapes.parent), classes=classes)
    label = stack(cityscapes / "val", f"label_{classes}")
    assert [task.outputs for task in benchmark.tasks] == [classes, 1]
    column = benchmark.splits()["test"].columns["segmentation"]
    assert torch.equal(column.float(), label.masked_fill(label < 0, -100))
    assert len(arrays(cityscapes)) == 6
    Cityscapes(root=str(cityscapes), classes=26 - classes).splits()  # images and depth are not decoded again
    assert len(arrays(cityscapes)) == 8


def test_libmtls_name_of_the_seven_classes(cityscapes):
    for split in SIZES:
        (cityscapes / split / "label_7").rename(cityscapes / split / "label")
    assert len(Cityscapes(root=str(cityscapes)).splits()["train"]) == 5
    with pytest.raises(SetupError, match=r"train/label_19 is missing"):
        shutil.rmtree(cityscapes / "train" / "label_19")
        Cityscapes(root=str(cityscapes), classes=19).splits()


def test_the_scale_of_disparity_is_a_switch(cityscapes):
    """A crop shown 1.5 times larger: depth becomes 1/1.5 of it; disparity 1.5 times as much."""
    column = torch.full((1, 6, 6), 3.0)
    view = View(torch.full((1, 2), 1 / 1.5), torch.zeros(1, 2))
    published, right = (Cityscapes(depth_scaling=how).tasks[1] for how in ("divide", "multiply"))
    assert type(published) is Depth and type(right) is Disparity
    torch.testing.assert_close(published.moves(column, None, view), torch.full((1, 6, 6), 2.0))
    torch.testing.assert_close(right.moves(column, None, view), torch.full((1, 6, 6), 4.5))
    assert torch.equal(right.moves(column, None, None), column)
    batches = [
        torch.cat([b["depth"] for b in TrainingBatches(s["train"], made, CPU, 1).epoch(0)])
        for how in ("divide", "multiply")
        for made in [Cityscapes(root=str(cityscapes), depth_scaling=how, batch_size=5)]
        for s in [made.splits()]
    ]
    ratios = (batches[1] / batches[0])[batches[0] > 0]
    assert {round(x, 2) for x in ratios.unique().tolist()} <= {1.0, 1.44, 2.25} and ratios.max() > 1.1


def test_augmentation_moves_all_maps_together(nyuv2):
    """Each map holds its columns' numbers: classes, depth times its scale and image agree wherever there is a label."""
    for split, size in SIZES.items():
        for i in range(size):
            across = np.broadcast_to(np.arange(W) // 4, (H, W))
            np.save(nyuv2 / split / "label" / f"{i}.npy", across.astype(np.int64))
            np.save(nyuv2 / split / "depth" / f"{i}.npy", (across + 1.0)[..., None])
    benchmark = NYUv2(root=str(nyuv2), batch_size=5)
    for batch in TrainingBatches(benchmark.splits()["train"], benchmark, CPU, seed=3).epoch(0):
        scale = (batch["segmentation"] + 1) / batch["depth"]
        for one in scale:
            assert one.std() < 1e-5 and round(one.mean().item(), 3) in (1.0, 1.2, 1.5)
        lengths = batch["normals"].norm(dim=-1)
        assert ((lengths - 1).abs().lt(1e-5) | (lengths == 0)).all()


def test_without_augmentation_the_maps_are_the_files(nyuv2):
    benchmark = NYUv2(root=str(nyuv2), augmented=False, batch_size=5)
    (batch,), column = (
        TrainingBatches(benchmark.splits()["train"], benchmark, CPU, 0).epoch(0),
        stack(nyuv2 / "train", "depth"),
    )
    assert sorted(batch["depth"].sum((1, 2)).tolist()) == pytest.approx(sorted(column.sum((1, 2, 3)).tolist()))


# ------------------------------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize(("data", "names"), [
    ("nyuv2", ["nyuv2.zip", "/nowhere/nyuv2", "image/, label/, depth/, normal/"]),
    ("cityscapes", ["cityscapes2.zip", "/nowhere/cityscapes2", "image/, label_7/, depth/"]),
])  # fmt: skip
@pytest.mark.parametrize("by", ["option", "environment"])
def test_missing_data_is_one_line(cli, monkeypatch, tmp_path, data, names, by):
    monkeypatch.setenv("MTL_DATA", "nowhere" if by == "environment" else "elsewhere")
    words = ["data.root=nowhere"] if by == "option" else []
    result = cli(f"data={data}", "arch=fcn", "logger=none", *words)
    (line,) = result.err.splitlines()
    assert result.code == 1 and not (tmp_path / "outputs").exists()
    for name in (*names, f"{tmp_path}/nowhere", "data.root", "MTL_DATA", "https://github.com/lorenmt/mtan"):
        assert name in line


def write(folder: Path, name: str, array: np.ndarray) -> None:
    np.save(folder / name, array.astype(np.float32))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def archive(file):
    with file.open("wb") as target:
        np.savez(target, np.zeros((6, 8)))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda d: cut(d / "train/depth/3.npy"), r"train/depth/3.npy is damaged or unreadable \(.+\); fetch it again"),
    (lambda d: cut(d / "train/image/0.npy"), r"train/image/0.npy is damaged"),
    (lambda d: (d / "val/normal/1.npy").write_bytes(b""), r"val/normal/1.npy is damaged"),
    (lambda d: (d / "val/label/1.npy").write_text("hello"), r"val/label/1.npy is damaged"),
    (lambda d: np.save(d / "val/label/1.npy", np.array([{}])), r"val/label/1.npy is damaged .*allow_pickle"),
    (lambda d: archive(d / "train/depth/1.npy"), r"train/depth/1.npy is damaged .*holds an .npz archive"),
    (lambda d: np.save(d / "train/image/0.npy", np.zeros((0, 0, 3))), r"train/image/0.npy is damaged .*\(0, 0, 3\)"),
    (lambda d: np.save(d / "val/normal/0.npy", np.full((6, 8, 3), np.inf)), r"val/normal/0.npy: an infinite normal"),
    (lambda d: (d / "train/label/2.npy").unlink(), r"train/label/2.npy is missing; the files are numbered from 0"),
    (lambda d: (d / "train/label/4.npy").unlink(), r"train/label/4.npy is missing: \S+ has 5 files, \S+label 4"),
    (lambda d: shutil.rmtree(d / "val/depth"), r"val/depth is missing: a folder with 0.npy"),
    (lambda d: write(d, "val/image/2.npy", np.full((H, W, 3), 200.0)), r"2.npy: an image of 200 to 200; .* 0 to 1"),
    (lambda d: write(d, "val/image/2.npy", np.full((H, W, 3), np.nan)), r"2.npy: an image of nan to nan"),
    (lambda d: write(d, "val/image/2.npy", np.zeros((3, H, W))), r"2.npy: an image \(H, W, 3\) is needed, not float32"),
    (lambda d: write(d, "val/label/0.npy", np.full((H, W), 13)), r"0.npy: the label 13; -1, or a class from 0 to 12"),
    (lambda d: write(d, "val/label/0.npy", np.full((H, W), 0.5)), r"0.npy: the label 0.5"),
    (lambda d: write(d, "val/normal/0.npy", np.full((H, W, 3), 255)), r"0.npy: a normal with a component of size 255"),
    (lambda d: write(d, "val/depth/0.npy", np.full((H, W, 1), -2)), r"0.npy: the depth -2; numbers from 0"),
    (lambda d: write(d, "val/depth/1.npy", np.ones((H, W + 1, 1))), r"1.npy: the shape \(32, 41\), but 0.npy has"),
    (lambda d: write(d, "val/normal/1.npy", np.ones((H, W))), r"1.npy: a map \(H, W, 3\) of normals is needed"),
    (lambda d: write(d, "val/normal/1.npy", np.ones((H, W, 3))), r"'normals': sample 1 has the label 1.0"),
])  # fmt: skip
def test_damage_is_named(nyuv2, damage, message):
    damage(nyuv2)
    with pytest.raises(SetupError, match=message):
        NYUv2(root=str(nyuv2)).splits()
    assert not list(nyuv2.glob("mtl-cache/.part-*"))


def test_a_damaged_first_image_is_named_before_anything_is_built(nyuv2, cli):
    (nyuv2 / "train" / "image" / "0.npy").write_bytes(b"\x93NUMPY")
    result = cli("data=nyuv2", f"data.root={nyuv2}", "arch=fcn", "logger=none")
    assert result.code == 1 and re.fullmatch(r"error: \S+train/image/0.npy is damaged .*\n", result.err)


def test_the_pack_of_pictures_is_not_mtans_layout(tmp_path):
    (tmp_path / "train" / "image").mkdir(parents=True)
    (tmp_path / "train" / "image" / "0001.jpg").touch()
    with pytest.raises(SetupError, match=r"train/image/0.npy is missing"):
        build_benchmark({"_target_": "mtl.data.nyuv2.NYUv2", "root": str(tmp_path)})


def test_another_size_than_said_is_refused(nyuv2):
    assert NYUv2(root=str(nyuv2), height=H, width=W).inputs["image"].shape == (3, H, W)
    with pytest.raises(SetupError, match=r"data.width=384: \S+/0.npy is 32x40; data.width=null takes any size"):
        build_benchmark({"_target_": "mtl.data.nyuv2.NYUv2", "root": str(nyuv2), "width": 384})


# -------------------------------------------------------------------------------------------------------------- arrays


def test_files_are_decoded_once_and_again_when_they_change(nyuv2, capsys):
    first = NYUv2(root=str(nyuv2)).splits()["train"].columns["depth"].clone()
    assert len(arrays(nyuv2)) == 8 and "reading 5 files" in capsys.readouterr().out
    file = nyuv2 / "train" / "depth" / "2.npy"
    before, times = file.read_bytes(), file.stat()
    file.write_bytes(b"?" * len(before))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # nobody can see it without opening the file
    again = NYUv2(root=str(nyuv2)).splits()["train"].columns["depth"]
    assert torch.equal(again, first) and "reading" not in capsys.readouterr().out
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    with pytest.raises(SetupError, match=r"depth/2.npy is damaged"):
        NYUv2(root=str(nyuv2)).splits()


def test_a_part_of_an_array_is_never_used(nyuv2):
    expected = NYUv2(root=str(nyuv2)).splits()["test"].columns["normals"].clone()
    (found,) = [file for file in arrays(nyuv2) if file.name.startswith("val-normal")]
    for harm in (lambda: cut(found), lambda: found.write_bytes(b"")):
        harm()
        (nyuv2 / "mtl-cache" / ".part-of-a-killed-process").touch()
        assert torch.equal(NYUv2(root=str(nyuv2)).splits()["test"].columns["normals"], expected)
        assert not list(nyuv2.glob("mtl-cache/.part*"))


def test_columns_are_mapped_and_can_be_streamed(nyuv2):
    """From the host, with the same batches as from memory; nobody writes into the file."""
    host = NYUv2(root=str(nyuv2), residency="host", workers=0, batch_size=2, eval_batch_size=2)
    near = NYUv2(root=str(nyuv2), residency="device", batch_size=2)
    one, two = (list(TrainingBatches(b.splits()["train"], b, CPU, 0).epoch(0)) for b in (host, near))
    assert len(one) == 2 and all(
        torch.equal(a[k], b[k]) or a[k].isnan().any() for a, b in zip(one, two, strict=True) for k in a
    )
    test = host.splits()["test"]
    assert [len(b["image"]) for b in EvaluationBatches(test, host, CPU)] == [2, 1]
    marks = [file.read_bytes() for file in arrays(nyuv2)]
    test.columns["depth"].fill_(7)
    assert marks == [file.read_bytes() for file in arrays(nyuv2)]


def _load(root: str, barrier, queue) -> None:
    barrier.wait()
    split = NYUv2(root=root).splits()["train"]
    queue.put(split.columns["depth"].double().sum().item())


def test_processes_that_start_at_once_make_the_arrays_once(nyuv2, capfd):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_load, args=(str(nyuv2), barrier, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    sums = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert sums == {stack(nyuv2 / "train", "depth").double().sum().item()} and len(arrays(nyuv2)) == 8
    assert capfd.readouterr().out.count("reading") == 8


@pytest.mark.parametrize("way", ["full", "file"])
def test_arrays_that_cannot_be_written_are_one_line(nyuv2, tmp_path, monkeypatch, way):
    cache = tmp_path / "cache"
    if way == "full":

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    else:
        cache.touch()
    with pytest.raises(SetupError, match=r"cache/train-image-\w+.npy cannot be written .*; set data.cache to a folder"):
        NYUv2(root=str(nyuv2), cache=str(cache)).splits()
    assert not cache.is_dir() or [file.name for file in cache.iterdir()] == [".lock"]
    monkeypatch.undo()
    assert NYUv2(root=str(nyuv2), cache=str(tmp_path / "other")).splits() and not arrays(nyuv2)


# ---------------------------------------------------------------------------------------------------------- whole runs

FEW = (
    "arch.width=2",
    "trainer.epochs=1",
    "trainer.device=cpu",
    "logger=none",
    "data.limit_train=4",
    "data.batch_size=2",
)


@pytest.mark.parametrize(("options", "names"), [
    (("experiment=nyuv2", "loss=nash_mtl"), ["segmentation_miou", "segmentation_pixel_accuracy", "depth_abs_err",
     "depth_rel_err", "normals_mean", "normals_median", "normals_11", "normals_22", "normals_30"]),
    (("experiment=cityscapes", "loss=famo", "data.classes=19"), ["segmentation_miou", "segmentation_pixel_accuracy",
     "depth_abs_err", "depth_rel_err"]),
    (("experiment=cityscapes", "loss=pcgrad", "arch=segnet", "microscope.every=1", "microscope.samples=2",
          "trainer.deterministic=true"),
     ["segmentation_miou", "segmentation_pixel_accuracy", "depth_abs_err", "depth_rel_err"]),
    (("experiment=nyuv2_paradigms", "loss=single", "loss.task=depth", "optimizer=signsgd"),
     ["depth_abs_err", "depth_rel_err"]),
    (("experiment=nyuv2_amtl", "loss=amtl", "arch.depth=18", "arch.weights=null", "data.val_fraction=0.5",
      "loss.potentials={segmentation: 50, depth: 0.5, normals: 20}"),
     ["segmentation_miou", "segmentation_pixel_accuracy", "depth_abs_err", "depth_rel_err", "normals_mean",
      "normals_median", "normals_11", "normals_22", "normals_30"]),
])  # fmt: skip
def test_an_experiment_trains(cli, nyuv2, cityscapes, options, names):
    result = cli(*options, f"data.root={nyuv2.parent}", *FEW)
    assert result.code == 0, result.err
    assert [line.split()[0] for line in result.out.splitlines() if re.match(r"\w+_\w+ +[\d.]+ ", line)] == names
    (config,) = Path("outputs").rglob("run.json")
    assert json.loads(config.read_text())["status"] == "finished"


def test_a_run_is_not_taken_for_that_of_another_size(cli, nyuv2, tmp_path):
    """Two folders whose images differ in size share an identity. A run of one is neither skipped nor resumed."""
    other = fake(tmp_path / "large" / "nyuv2", {"label": 13}, normals=True, shape=(64, 64))
    command = ("data=nyuv2", "arch=fcn", *FEW[1:], "loss=single", "loss.task=depth")
    assert cli(*command, f"data.root={nyuv2.parent}").code == 0
    (file,) = Path("outputs").rglob("run.json")
    assert json.loads(file.read_text())["inputs"] == {"image": [3, H, W]}
    assert cli(*command, f"data.root={tmp_path / 'gone'}").code == 0  # skipped: a finished run needs no data
    wrong = f"error: {file.parent} was trained on inputs image of 3x{H}x{W}, but the data has 3x64x64; set another"
    for status in ("finished", "interrupted"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "status": status}))
        run = cli(*command, f"data.root={other.parent}")
        assert run.code == 2 and run.err.startswith(wrong) and run.err.count("\n") == 1, run.err


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not (REAL / "classes.json").is_file(), reason="the real NYUv2 is not at hand")
def test_real_frames(tmp_path):
    """Four frames of each split, of 144x192, through MTAN's layout."""
    to13 = np.array(json.loads((REAL / "classes.json").read_text())["label40_to_13"])
    for split in SIZES:
        for i, path in enumerate(sorted((REAL / split / "image").glob("*.jpg"))[:4]):

            def read(kind, end):
                return np.asarray(Pillow.open(REAL / split / kind / (path.stem + end)))  # noqa: B023

            normal = read("normal", ".jpg").astype(np.float32) / 127.5 - 1
            maps = {
                "image": read("image", ".jpg") / 255, "label": to13[read("label", ".png")] - 1,
                "depth": (read("depth", ".png")[..., None] + 0.5) * 9.99547 / 255,
                "normal": normal / np.linalg.norm(normal, axis=-1, keepdims=True),
            }  # fmt: skip
            for kind, array in maps.items():
                (tmp_path / split / kind).mkdir(parents=True, exist_ok=True)
                np.save(tmp_path / split / kind / f"{i}.npy", array)
    benchmark = NYUv2(root=str(tmp_path))
    splits = benchmark.splits()
    assert benchmark.inputs["image"].shape == (3, 144, 192)
    batch = next(iter(EvaluationBatches(splits["test"], benchmark, CPU)))
    torch.testing.assert_close(
        batch["image"].permute(0, 2, 3, 1).double(), stack(tmp_path / "val", "image"), atol=1e-6, rtol=0
    )
    assert batch["depth"].min() > 0.7 and batch["depth"].max() < 10
    segmentation, _, normals = benchmark.tasks
    assert isinstance(segmentation, Segmentation) and isinstance(normals, Normals)
    assert 0.6 < segmentation.units(batch["segmentation"]).sum() / batch["segmentation"].numel() < 1
    assert normals.units(batch["normals"]).tolist() == [144 * 192] * 4
