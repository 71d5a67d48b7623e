"""`python -m mtl.predict`: image files, folders and arrays to a CSV or arrays; what a user reads of each task."""

import csv
import io
import os
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch import nn

import mtl
from mtl.data.base import Split
from mtl.data.digits import Digits
from mtl.data.inputs import Image, Numbers
from mtl.engine.loaded import load
from mtl.predict import main
from mtl.tasks import Classification, Regression, Task

SMALL = ("data=digits", "data.limit_train=64", "data.limit_test=16", "data.batch_size=32", "logger=none",
         "trainer.device=cpu", "trainer.epochs=1", "arch._target_=golden.problems.Net", "~arch.depth")  # fmt: skip


@dataclass(frozen=True)
class Darkness(Task):
    """A map: how dark each pixel is, against a map of zeros."""

    metrics = Regression("x").metrics

    def units(self, target):
        return torch.ones(len(target), dtype=torch.int64)

    def criterion(self, prediction, target):
        return (prediction - target[:, None, None]).square().mean((1, 2))


class Mapped(Digits):
    """Digits, with a task whose prediction is a map and one whose prediction is two numbers."""

    tasks = (Classification("digit", 10), Regression("ink"))
    inputs = {"image": Image((3, 6, 10))}

    def load(self):
        images, digit = torch.zeros(64, 6, 10, 3, dtype=torch.uint8), torch.arange(64) % 10
        split = Split({"image": images, "digit": digit, "ink": torch.zeros(64)})
        return {"train": split, "test": split}


class Two(Digits):
    """Two inputs, of which one is no image."""

    inputs = {"image": Image((1, 8, 8)), "age": Numbers((2,))}

    def load(self):
        return {
            name: Split({**part.columns, "age": torch.zeros(len(part), 2)}) for name, part in super().load().items()
        }


class Reader(nn.Module):
    inputs = ("image", "age")
    out_features = 66

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(66))

    def forward(self, images, ages):
        return self.scale * torch.cat([images.flatten(1), ages], 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return mtl.train(*SMALL, output_root=tmp_path_factory.mktemp("run")).directory


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder with images of several kinds, and the pixels that the model should see of the first two."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "deep").mkdir(parents=True)
    numbers = np.random.default_rng(0)
    grey = numbers.integers(0, 256, (8, 8), dtype=np.uint8)
    Picture.fromarray(grey).save("images/a.png")
    Picture.fromarray(np.stack([grey] * 3, 2)).save("images/b.bmp")
    Picture.fromarray(numbers.integers(0, 256, (20, 30, 4), dtype=np.uint8)).save("images/deep/c.png")
    Picture.fromarray(numbers.integers(0, 256, (16, 16), dtype=np.uint8)).convert("P").save("images/deep/d.gif")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / "._a.png").write_text("no image either")
    return grey


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_row_for_each_file_and_a_column_for_each_answer(trained, images, capsys):
    assert main([str(trained), "images"]) == 0
    out, err = capsys.readouterr()
    rows = table(out)
    assert [row["file"] for row in rows] == ["images/a.png", "images/b.bmp", "images/deep/c.png", "images/deep/d.gif"]
    assert list(rows[0]) == ["file", "digit_class", "digit_probability", "odd_class", "odd_probability", "ink_number"]
    assert err == "2 of 4 images resized to 8x8\n"
    expected = mtl.load(trained).predict(images[None, :, :, None])
    for row in rows[:2]:  # grey, and the same as RGB
        assert int(row["digit_class"]) == expected["digit"]["class"]
        assert float(row["digit_probability"]) == pytest.approx(expected["digit"]["probability"].item(), rel=1e-5)
        assert float(row["ink_number"]) == pytest.approx(expected["ink"]["number"].item(), rel=1e-5)


def test_arrays_and_images_in_the_order_given(trained, images, capsys):
    np.save("x.npy", np.stack([images] * 3)[..., None])
    np.savez("y.npz", image=images[None, :, :, None], digit=np.zeros(1))
    np.savez("z.npz", images[None, :, :, None])
    files = ["y.npz", "images/a.png", "x.npy", "z.npz"]
    assert main([str(trained), *files, "--out", "all.csv", "--epoch", "last", "--device", "cpu"]) == 0
    with open("all.csv") as file:
        rows = table(file.read())
    names = ["y.npz[0]", "images/a.png", "x.npy[0]", "x.npy[1]", "x.npy[2]", "z.npz[0]"]
    assert [row["file"] for row in rows] == names and len({row["ink_number"] for row in rows}) == 1
    assert main([str(trained), *files, "--out", "all.npz"]) == 0
    with np.load("all.npz", allow_pickle=False) as content:
        assert content["files"].tolist() == names and content["digit_class"].dtype == np.int64
        assert content["ink_number"] == pytest.approx([float(row["ink_number"]) for row in rows], rel=1e-5)
    assert "6 samples, net-equal-s42-" in capsys.readouterr().out
    assert not [name for name in os.listdir() if name.endswith(".tmp")]


def test_an_array_of_one_image_is_an_image_file(trained, images, capsys):
    """As in MTAN's folders: floats from 0 to 1 without the axis of samples. Beside pictures they do not count."""
    assert main([str(trained), "images/a.png"]) == 0
    wanted = table(capsys.readouterr().out)[0]
    os.mkdir("image")
    np.save("image/0.npy", (images / 255).astype(np.float32)[..., None])
    np.save("image/1.npy", (images / 255).astype(np.float16)[..., None])
    np.save("image/2.npy", images[..., None])
    np.savez("one.npz", images[..., None] / 255)
    np.savez("named.npz", image=images[None, :, :, None], year=2026)  # a number is no column
    files = ["image/0.npy", "image/1.npy", "image/2.npy"]
    assert main([str(trained), "image", "one.npz", "images/a.png"]) == 0
    rows = table(capsys.readouterr().out)
    assert [row.pop("file") for row in rows] == [*files, "one.npz", "images/a.png"] and wanted.pop("file")
    for row in rows:
        assert list(map(float, row.values())) == pytest.approx(list(map(float, wanted.values())), rel=1e-4)
    Picture.fromarray(images).save("image/x.png")
    assert main([str(trained), "image", "named.npz"]) == 0 and len(table(capsys.readouterr().out)) == 2


def test_a_picture_is_turned_upright_and_seen_in_color(images):
    picture = np.zeros((10, 6, 3), np.uint8)
    picture[0, :, 0] = 255  # the upper edge is red
    exif = Picture.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    Picture.fromarray(picture).save("turned.png", exif=exif)
    row, changed = Image((3, 6, 10)).open("turned.png")
    assert row.shape == (6, 10, 3) and not changed and row.dtype == torch.uint8
    assert row[:, -1, 0].eq(255).all() and row[:, :-1].eq(0).all()


def make_wrong(folder) -> None:
    (folder / "bad.png").write_bytes(b"hello")
    Picture.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Picture.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "deep.png")
    np.save(folder / "float.npy", np.zeros((2, 8, 8, 1), np.float32))
    np.save(folder / "wide.npy", np.zeros((8, 9, 1), np.float32))
    np.save(folder / "map.npy", np.zeros((8, 8), np.float32))
    np.save(folder / "bytes.npy", np.full((8, 8, 1), 255.0))
    np.save(folder / "number.npy", np.array(3.0))
    np.save(folder / "none.npy", np.zeros((0, 8, 8, 1), np.uint8))
    np.save(folder / "text.npy", np.array(["a"]))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(folder / "other.npz", imag=np.zeros(3), label=np.zeros(3))
    (folder / "torn.npz").write_bytes((folder / "other.npz").read_bytes()[:100])
    (folder / "empty").mkdir()


@pytest.mark.parametrize("words, message", [
    (["bad.png"], "bad.png: is damaged, or no image"),
    (["cut.jpg"], "cut.jpg: is damaged, or no image"),
    (["deep.png"], "deep.png: has more than 8 bits a channel"),
    (["images/notes.txt"], "images/notes.txt: is damaged, or no image"),
    (["float.npy"], "float.npy: inputs: image: float32 of shape (2, 8, 8, 1); uint8 images of shape (N, 8, 8, 1)"),
    (["wide.npy"], "wide.npy: float32 of shape (8, 9, 1); an image (8, 8, 1) of floats from 0 to 1 or of u"),
    (["map.npy"], "map.npy: float32 of shape (8, 8); an image (8, 8, 1) of floats"),
    (["bytes.npy"], "bytes.npy: an image of 255 to 255; numbers from 0 to 1 are needed"),
    (["number.npy"], "number.npy: holds a single number"),
    (["none.npy"], "none.npy: inputs: there are no samples"),
    (["text.npy"], "text.npy: is damaged, or holds more than numbers"),
    (["objects.npy"], "objects.npy: is damaged, or holds more than numbers"),
    (["other.npz"], "other.npz: inputs: image is missing; the model reads image; did you mean imag?"),
    (["torn.npz"], "torn.npz: is damaged, or holds more than numbers"),
    (["gone.png"], "gone.png: no such file or folder"),
    (["empty"], "empty: no image in this folder (.bmp"),
    (["images", "--out", "x.xlsx"], "--out x.xlsx: must end in .csv (a row for each file) or .npz (arrays)"),
    (["images", "--out", "gone/x.csv"], "--out gone/x.csv: there is no folder gone"),
    (["images", "--device", "cuda:99"], "this machine shows"),
])  # fmt: skip
def test_refusals(words, message, trained, images, capsys, tmp_path):
    make_wrong(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(trained), *words]) != 0
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err and err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before


def test_maps_go_into_arrays(trained, images, capsys, tmp_path):
    """A task's own prediction is what a user reads unless its class says more; here a map, and two numbers."""
    run = load(trained)
    run.learner.tasks[:] = [Darkness("dark"), Darkness("pair")]

    def predict(batch):
        dark = 1 - batch["image"].mean(1)
        return mtl.archs.model.Outputs([dark, dark[:, 0, :2]])

    run.learner.predict = predict
    found = run.predict(images[None, :, :, None])
    assert found["dark"]["prediction"].shape == (1, 8, 8) and found["pair"]["prediction"].shape == (1, 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtl.predict.load", lambda *_: run)
        assert main([str(trained), "images/a.png"]) == 2
        line = "dark_prediction is a map of 8x8 for each file, which no CSV holds; use --out FILE.npz"
        assert capsys.readouterr().err == f"error: {line}\n"
        assert main([str(trained), "images/a.png", "--out", "x.npz"]) == 0
        with np.load("x.npz") as content:
            assert np.array_equal(content["dark_prediction"], found["dark"]["prediction"])
        run.learner.tasks[:], run.learner.predict = (
            [Darkness("pair")],
            lambda batch: mtl.archs.model.Outputs([batch["image"][:, 0, 0, :2]]),
        )
        capsys.readouterr()
        assert main([str(trained), "images/a.png"]) == 0
        assert capsys.readouterr().out.splitlines()[0] == "file,pair_prediction_0,pair_prediction_1"


def test_an_answer_that_is_no_tensor_is_named(trained, images):
    run = load(trained)
    run.learner.tasks[:] = [Darkness("dark")]
    run.learner.predict = lambda batch: mtl.archs.model.Outputs([("boxes", "classes")])
    with pytest.raises(mtl.errors.ConfigError, match=r"task 'dark': Darkness.answers gives a tuple as prediction"):
        run.predict(images[None, :, :, None])


def test_several_inputs_come_as_columns(images, capsys, tmp_path):
    words = [w for w in SMALL if not w.startswith("arch._target_")]
    result = mtl.train(
        *words, "data._target_=test_predict.Two", "arch._target_=test_predict.Reader", output_root=tmp_path
    )
    folder = str(result.directory)
    assert main([folder, "images/a.png"]) == 2
    line = "error: images/a.png: the model reads image, age; give an .npz file with these\n"
    assert capsys.readouterr().err == line
    np.savez("x.npz", image=images[None, :, :, None], age=np.array([[3.0, 4.0]]))
    assert main([folder, "x.npz"]) == 0 and capsys.readouterr().out.count("\n") == 2
    np.savez("y.npz", image=np.stack([images] * 2)[..., None], age=np.array([[3.0, 4.0]]))
    assert main([folder, "y.npz"]) == 2
    assert "y.npz: inputs: the columns must have the same number of rows, not 2 of image, 1 of age" in (
        capsys.readouterr().err
    )


def test_other_sizes_and_colors(images, tmp_path):
    """A model of 6x10 color images reads grey ones of 8x8."""
    result = mtl.train(*SMALL, "data._target_=test_predict.Mapped", output_root=tmp_path)
    assert main([str(result.directory), "images", "--out", "x.csv"]) == 0
    with open("x.csv") as file:
        assert len(table(file.read())) == 4


def test_names_that_are_not_utf8(trained, images, capsys):
    os.rename(b"images/a.png", b"images/a\xff.png")
    assert main([str(trained), "images", "--out", "x.csv"]) == 0
    with open("x.csv", encoding="utf-8") as file:
        assert table(file.read())[0]["file"] == "images/a\ufffd.png"


def test_too_many_pixels_are_not_unpacked(trained, images, capsys, monkeypatch):
    monkeypatch.setattr(Picture, "MAX_IMAGE_PIXELS", 10)
    assert main([str(trained), "images/a.png"]) == 2
    assert capsys.readouterr().err == "error: images/a.png: has too many pixels; make it smaller first\n"


def test_a_full_disk_leaves_nothing_half_written(trained, images, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    assert main([str(trained), "images", "--out", "x.npz"]) == 1
    assert "error: cannot write x.npz in .: No space left on device" in capsys.readouterr().err
    assert not [name for name in os.listdir() if name.startswith("x.npz")]
    shutil.rmtree("images")
