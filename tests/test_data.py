"""Batches against torchvision's transforms, their draws, and the benchmarks against what their sources document."""

import gc
import hashlib
import http.client
import pickle
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from conftest import REAL_CIFAR100, needs_real_data
from scipy.stats import chisquare

from mtl.data import cifar100
from mtl.data.base import Benchmark, Split
from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.data.cifar100 import CIFAR100
from mtl.data.digits import Digits
from mtl.data.inputs import Image
from mtl.data.synthetic import Synthetic
from mtl.errors import SetupError, UserError
from mtl.random import stream
from mtl.tasks import Classification
from mtl.views import Crop, Flip

CPU = torch.device("cpu")
RESIDENCES = [("device", 0), ("host", 0), ("host", 2)]
FOLDER = "cifar-100-python"


@dataclass
class Numbered(Benchmark):
    """Images of one colour that spells their number, which is also their label; no crop loses all of it."""

    size: int = 70

    tasks = (Classification("number", 2**16),)
    inputs = {"image": Image((3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))}
    augment = (Crop(4), Flip())

    def load(self):
        n = torch.arange(self.size)
        colour = torch.stack([n // 256, n % 256, torch.full_like(n, 255)], 1).to(torch.uint8)
        split = Split({"image": colour[:, None, None].expand(-1, 8, 8, -1).contiguous(), "number": n})
        return {"train": split, "test": Split(split.batch(n.flip(0)))}

    def epoch(self, epoch: int, split: Split | None = None) -> list:
        return list(TrainingBatches(split or self.load()["train"], self, CPU, seed=0).epoch(epoch))

    @staticmethod
    def read(seen) -> tuple[list[int], list[int]]:
        """The numbers that the images spell and those that the labels say."""
        images, image = torch.cat([batch["image"] for batch in seen]), Numbered.inputs["image"]
        mean, std = torch.tensor([image.mean, image.std])
        high, low, _ = ((images.amax((2, 3)) * std + mean) * 255).round().long().unbind(1)
        return (256 * high + low).tolist(), torch.cat([batch["number"] for batch in seen]).tolist()


def assert_same(actual: list, expected: list) -> None:
    for batch, other in zip(actual, expected, strict=True):
        assert batch.keys() == other.keys() == {"image", "number"} and torch.equal(batch["image"], other["image"])
        assert batch["image"].stride() == other["image"].stride() and torch.equal(batch["number"], other["number"])


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("residency", ["device", "host"])
def test_batches_are_bitwise_torchvisions(residency):
    """pad, crop, flip, to_tensor and normalise of each PIL image at the offsets drawn; evaluation without the first."""
    images = torch.randint(256, (60, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    split, image = Split({"image": images, "fine": torch.arange(60)}), CIFAR100.inputs["image"]
    draws = drawn(60, 5, 2)
    benchmark = CIFAR100(batch_size=25, residency=residency, workers=0)
    seen = list(TrainingBatches(split, benchmark, CPU, seed=5).epoch(2))
    assert torch.equal(torch.cat([batch["fine"] for batch in seen]), draws["order"])
    shown = torch.cat([batch["image"] for batch in seen])
    for i, (top, left), flip, actual in zip(draws["order"], draws["crop"].T, draws["flip"], shown, strict=True):
        peer = TF.pad(TF.to_pil_image(images[i].permute(2, 0, 1)), 4, fill=0)
        peer = TF.crop(peer, int(top), int(left), 32, 32)
        expected = TF.to_tensor(TF.hflip(peer) if flip else peer)
        assert torch.equal(actual, TF.normalize(expected, image.mean, image.std))
    (batch,) = EvaluationBatches(split, benchmark, CPU)
    evaluated = batch["image"]
    assert evaluated.is_contiguous(memory_format=torch.channels_last) and not evaluated.is_contiguous()
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (b["image"] for b in seen))
    for one, actual in zip(images, evaluated, strict=True):
        assert torch.equal(actual, TF.normalize(TF.to_tensor(one.numpy()), image.mean, image.std))


@pytest.mark.parametrize("residency, workers", RESIDENCES)
@pytest.mark.parametrize(
    "size, sizes", [(64, [32, 32]), (70, [32, 32, 6]), (66, [32, 32, 2]), (65, [32, 32]), (5, [5])]
)
def test_an_epoch_visits_every_sample_once(residency, workers, size, sizes):
    """Images keep their labels; the last batch may be smaller, but a remainder of exactly one is left out."""
    benchmark = Numbered(size=size, batch_size=32, residency=residency, workers=workers)
    seen = benchmark.epoch(0)
    assert [len(batch["image"]) for batch in seen] == sizes
    assert len(TrainingBatches(benchmark.load()["train"], benchmark, CPU, seed=0)) == len(sizes)
    spelt, labels = Numbered.read(seen)
    assert spelt == labels and len(set(labels)) == len(labels) == sum(sizes)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_residency_does_not_change_a_bit(workers, mapped, tmp_path):
    """Batches from the host, memory-mapped or not, equal those from the device, in training and evaluation."""
    resident = Numbered(size=501, batch_size=100, residency="device")
    host = Numbered(size=501, batch_size=100, residency="host", workers=workers)
    split = elsewhere = resident.load()["train"]
    if mapped:
        split.columns["image"].numpy().tofile(tmp_path / "images")
        images = np.memmap(tmp_path / "images", np.uint8, "r+", shape=tuple(split.columns["image"].shape))
        elsewhere = Split({**split.columns, "image": torch.from_numpy(images)})
    assert_same(host.epoch(1, elsewhere), resident.epoch(1))
    evaluation = list(EvaluationBatches(split, resident, CPU))
    assert_same(list(EvaluationBatches(elsewhere, host, CPU)), evaluation)
    assert Numbered.read(evaluation) == (list(range(501)),) * 2


@pytest.mark.parametrize("residency, workers", RESIDENCES)
@pytest.mark.parametrize("padding", [0, 4])
def test_selected_rows_give_the_batches_of_a_copy(residency, workers, padding, monkeypatch):
    """A selection of a selection, in training and evaluation, wherever the data lives and whether it is cropped."""
    monkeypatch.setattr(Numbered, "augment", (Crop(padding), Flip()))
    benchmark = Numbered(size=300, batch_size=32, residency=residency, workers=workers)
    split, rows = benchmark.load()["train"], torch.randperm(300, generator=torch.Generator().manual_seed(3))
    even = torch.arange(250) % 2 == 0
    chosen, copy = split.select(rows).select(slice(250)).select(even), Split(split.batch(rows[:250][even]))
    assert chosen.columns["image"] is split.columns["image"] and len(chosen) == len(copy) == 125
    assert all(torch.equal(chosen.column(name), copy.columns[name]) for name in ("image", "number"))
    assert torch.equal(chosen.batch(slice(3, 9))["image"], copy.columns["image"][3:9])
    assert_same(benchmark.epoch(1, chosen), benchmark.epoch(1, copy))
    assert_same(list(EvaluationBatches(chosen, benchmark, CPU)), list(EvaluationBatches(copy, benchmark, CPU)))


def test_residency_counts_all_columns_of_selected_rows():
    """On the host's own 4 GiB: 2^18 images of 10 KB fit, and neither do the float maps beside them."""
    images, numbers = torch.zeros(10, 8, 6, 3, dtype=torch.uint8), torch.zeros(10).long()
    split = Split({"image": images, "number": numbers, "map": torch.zeros(10, 5, 5)})
    assert split.select(torch.tensor([7, 1, 2, 2])).bytes == 4 * (8 * 6 * 3 + 8 + 4 * 25)
    many = torch.zeros(1, 100, 100, 1, dtype=torch.uint8).expand(2**18, -1, -1, -1)
    maps = torch.zeros(1, 100, 100).expand(2**18, -1, -1)
    alone, with_maps = Split({"image": many}), Split({"image": many, "map": maps})
    few = with_maps.select(torch.arange(1000))
    assert [EvaluationBatches(s, Numbered(), CPU).resident for s in (alone, with_maps, few)] == [1, 0, 1]


def resident_memory() -> int:
    """Bytes of this process in memory, mapped pages of files included."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@dataclass
class Mapped(Numbered):
    """Large images in a file, cropped and flipped: blank, since nobody looks at them."""

    file: Path | None = None

    inputs = {"image": Image((3, 100, 100))}

    def load(self):
        images = torch.from_numpy(np.memmap(self.file, np.uint8, "r+", shape=(self.size, 100, 100, 3)))
        split = Split({"image": images, "number": torch.arange(self.size)})
        return {"train": split, "test": split}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts memory there")
@pytest.mark.parametrize("residency", ["host", "auto"])
def test_mapped_images_are_not_copied(residency, tmp_path):
    """Neither by limits and hold-out nor by batches: memory grows by less than a twentieth of 60 MB."""

    def read(size: int) -> int:
        sizes = {"batch_size": 4, "eval_batch_size": 4, "limit_train": size - 1, "val_fraction": 0.1}
        benchmark = Mapped(residency=residency, workers=0, **sizes)
        benchmark.size, benchmark.file = size, tmp_path / f"{size}"
        with benchmark.file.open("wb") as file:
            file.truncate(size * 30_000)
        before, splits = resident_memory(), benchmark.splits()
        train = TrainingBatches(splits["train"], benchmark, CPU, seed=0)
        held_out = [EvaluationBatches(splits[name], benchmark, CPU) for name in ("val", "test")]
        for part in (train.epoch(0), *held_out):
            next(iter(part))
        return resident_memory() - before

    read(100)  # what the first use of everything allocates
    assert read(2000) < 2000 * 30_000 / 20


def tensors_outside(mapped: torch.Tensor) -> int:
    """Bytes of all tensors of this process whose memory is not that of `mapped`."""
    start, found = mapped.data_ptr(), {}
    for value in gc.get_objects():
        if type(value) is torch.Tensor and value.device == CPU and value.layout == torch.strided:
            storage = value.untyped_storage()
            if not start <= storage.data_ptr() < start + mapped.nbytes:
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("residency", ["host", "auto"])
def test_no_tensor_beside_mapped_images_is_large(residency, tmp_path, monkeypatch):
    """In a whole epoch with crop and flip, and in evaluation: less than a twentieth of 60 MB, at any batch."""
    benchmark = Mapped(
        batch_size=4, eval_batch_size=4, limit_train=1990, val_fraction=0.1, residency=residency, workers=0
    )
    benchmark.size, benchmark.file = 2000, tmp_path / "images"
    with benchmark.file.open("wb") as file:
        file.truncate(2000 * 30_000)
    loaded = benchmark.load()
    monkeypatch.setattr(benchmark, "load", lambda: loaded)
    mapped, splits = loaded["train"].columns["image"], benchmark.splits()
    before, seen = tensors_outside(mapped), 0
    train = TrainingBatches(splits["train"], benchmark, CPU, seed=0)
    for part in (train.epoch(0), *(EvaluationBatches(splits[name], benchmark, CPU) for name in ("val", "test"))):
        for i, batch in enumerate(part):
            seen += len(batch["image"])
            if i % 250 == 1:
                assert tensors_outside(mapped) - before < mapped.nbytes / 20
    assert seen == 1791 + 199 + 2000


# --------------------------------------------------------------------------------------------------------------- draws


def drawn(size=500, seed=1, epoch=2, padding=4, stream=stream) -> dict[str, torch.Tensor]:
    """An epoch's order, the corners of its crops in the padded images, and whether they are flipped."""
    draws = partial(stream, seed)
    crop, flip = (a.draw(size, (32, 32), lambda name: draws(name, epoch)) for a in (Crop(padding), Flip()))
    order = torch.randperm(size, generator=draws("order", epoch))
    return {"order": order, "crop": crop.b.long().T + padding, "flip": flip.a[:, 1] < 0}


def changes(before, after) -> set[str]:
    return {k for k in before if not torch.equal(before[k], after[k])}


def test_draws_are_uniform_and_independent():
    """All 9 x 9 corners, with and without flip, are equally likely; the order is a permutation."""
    draws = drawn(81_000, 3, 1)
    (top, left), flip, order = draws["crop"], draws["flip"], draws["order"]
    assert [f(t).item() for t in (top, left) for f in (torch.min, torch.max)] == [0, 8, 0, 8]
    cells = torch.bincount((top * 9 + left) * 2 + flip, minlength=162)
    assert len(cells) == 162 and chisquare(cells.numpy()).pvalue > 0.001
    assert torch.equal(order.sort().values, torch.arange(81_000))
    assert abs(np.corrcoef(order, np.arange(81_000))[0, 1]) < 0.02


def test_draws_are_a_function_of_seed_and_epoch(monkeypatch):
    """Not of other draws; each choice has a stream of its own, and one that is not wanted leaves the others."""
    first = drawn()
    torch.manual_seed(99)
    assert not changes(first, drawn())
    for seed, epoch in ((1, 3), (2, 2), (2, 1), (12, 0)):
        assert changes(first, drawn(500, seed, epoch)) == set(first)
    assert changes(first, drawn(padding=0)) == {"crop"} and not drawn(padding=0)["crop"].any()
    for name in first:
        other = drawn(stream=lambda seed, n, epoch, name=name: stream(seed + (n == name), n, epoch))
        assert changes(first, other) == {name}
    seen = {}
    for augment in ((Crop(4), Flip()), (Crop(4),), (Flip(),), ()):
        monkeypatch.setattr(Numbered, "augment", augment)
        seen[augment] = Numbered.read(Numbered().epoch(2))
    assert len({tuple(map(tuple, spelt)) for spelt in seen.values()}) == 1  # the order is the same without them


def test_an_epoch_does_not_depend_on_those_before():
    """What a resumed run relies on."""
    train = TrainingBatches(Numbered().load()["train"], Numbered(), CPU, seed=0)
    third = [list(train.epoch(k)) for k in range(3)][2]
    assert_same(Numbered().epoch(2), third)


# -------------------------------------------------------------------------------------------------------------- splits


def test_splits():
    """Validation data is disjoint, mixed, taken after the limit, and the same whatever was drawn before."""
    plain = Numbered(limit_train=50, limit_test=3).splits()
    assert {k: s.column("number").tolist() for k, s in plain.items()} == {"train": [*range(50)], "test": [69, 68, 67]}
    splits = Numbered(limit_train=50, val_fraction=0.2).splits()
    torch.manual_seed(7)
    again = Numbered(limit_train=50, val_fraction=0.2, batch_size=8).splits()
    assert {k: len(s) for k, s in splits.items()} == {"train": 40, "val": 10, "test": 70}
    train, val, _ = (splits[k].column("number").tolist() for k in ("train", "val", "test"))
    assert sorted(train + val) == list(range(50)) and val not in (list(range(10)), list(range(40, 50)))
    for name, split in splits.items():
        assert torch.equal(split.column("number"), again[name].column("number"))
        assert split.column("image")[:, 0, 0, 1].tolist() == split.column("number").tolist()


def test_a_validation_split_is_never_silently_empty():
    """A fraction that rounds to no sample is refused, or gives one sample."""
    with suppress(UserError):
        assert len(Numbered(limit_train=20, val_fraction=0.01).splits()["val"]) > 0


# ----------------------------------------------------------------------------------------------- CIFAR-100, fake files


class Touch:
    """Its pickle creates a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Six training and four test images, declared genuine: `.images`, `.write(folder)`, `.serve(archive)`."""
    rng, payloads, images = np.random.default_rng(0), {}, {}
    for name, count in (("train", 6), ("test", 4)):
        images[name] = rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        rows = np.stack([np.concatenate([image[:, :, c].ravel() for c in range(3)]) for image in images[name]])
        content = {b"data": rows, b"fine_labels": [*range(count)], b"coarse_labels": [19 - f for f in range(count)]}
        payloads[name] = pickle.dumps(content, protocol=2)
    monkeypatch.setattr(cifar100, "MD5", {name: hashlib.md5(p).hexdigest() for name, p in payloads.items()})

    def write(folder: Path) -> Path:
        (folder / FOLDER).mkdir(parents=True)
        for name, payload in payloads.items():
            (folder / FOLDER / name).write_bytes(payload)
        return folder

    def serve(archive) -> list:
        """Downloads call `archive(work)` from now on; returns the list of their arguments."""
        calls = []

        def download(url, work, filename, md5):
            calls.append((url, filename, md5))
            archive(Path(work))

        monkeypatch.setattr(cifar100, "download_and_extract_archive", download)
        return calls

    serve(lambda work: pytest.fail("must not download"))
    return SimpleNamespace(images=images, write=write, serve=serve)


def test_cifar100_layout(fake, tmp_path):
    """Rows are a red, a green and a blue plane; both label lists are read; nothing is downloaded."""
    splits = CIFAR100(root=str(fake.write(tmp_path))).load()
    assert list(splits) == ["train", "test"]
    for name, split in splits.items():
        image, fine, coarse = (split.columns[key] for key in ("image", "fine", "coarse"))
        assert image.dtype == torch.uint8 and np.array_equal(image.numpy(), fake.images[name])
        assert fine.tolist() == list(range(len(split))) and torch.equal(coarse, 19 - fine)


@pytest.mark.parametrize("name", ["train", "test"])
def test_cifar100_never_opens_a_damaged_pickle(fake, name, tmp_path, monkeypatch):
    """One byte flipped: the error names file and md5, and the pickle, which can still be opened, is not opened."""
    marker, file = tmp_path / "opened", fake.write(tmp_path) / FOLDER / name
    payload = pickle.dumps((Touch(marker), b"some bytes"))
    md5 = hashlib.md5(payload).hexdigest()
    monkeypatch.setitem(cifar100.MD5, name, md5)
    file.write_bytes(payload.replace(b"some bytes", b"some bytez"))
    with pytest.raises(SetupError, match=f"{re.escape(str(file))}.*{md5}"):
        CIFAR100(root=str(tmp_path)).load()
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists()


def test_cifar100_missing_and_not_to_be_downloaded(fake, tmp_path):
    """The error names the folder and the variable; nothing is made."""
    with pytest.raises(SetupError, match=f"{re.escape(str(tmp_path / 'no' / FOLDER))}.*MTL_DATA"):
        CIFAR100(root=str(tmp_path / "no"), download=False).load()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["nothing", "incomplete"])
@pytest.mark.parametrize("error", [
    URLError("no route to host"), RuntimeError("File not found or corrupted."), PermissionError(13, "denied"),
    http.client.BadStatusLine("<html>"), KeyboardInterrupt("Ctrl-C"),
], ids=lambda e: type(e).__name__)  # fmt: skip
def test_cifar100_failed_download_leaves_all_as_it_was(fake, tmp_path, error, there):
    """Half the files were written: an error with folder, cause and ways out; no new folder, no old file lost."""

    def archive(work: Path):
        fake.write(work)
        raise error

    root = tmp_path / "a" / "b"
    if there == "incomplete":
        (fake.write(root) / FOLDER / "test").unlink()
    before = sorted(tmp_path.rglob("*"))
    fake.serve(archive)
    with pytest.raises(SetupError if isinstance(error, Exception) else KeyboardInterrupt) as raised:
        CIFAR100(root=str(root)).load()
    if isinstance(error, Exception):
        assert re.search(f"{re.escape(str(root))}.*{re.escape(str(error))}.*MTL_DATA", str(raised.value))
    assert sorted(tmp_path.rglob("*")) == before


def test_cifar100_download(fake, tmp_path):
    """From torchvision's address with its md5, once. A complete folder is never overwritten, not even a damaged one,
    but the error's advice, to delete the file and run again, works."""
    root, source = tmp_path / "new" / "root", torchvision.datasets.CIFAR100
    for before in ("nothing", "incomplete"):
        if before == "incomplete":
            (root / FOLDER / "notes.txt").write_text("of the user's own")
        calls = fake.serve(fake.write)
        for _ in range(2):  # the second time it is there
            splits = CIFAR100(root=str(root)).load()
            assert np.array_equal(splits["train"].columns["image"].numpy(), fake.images["train"])
            assert len(splits["test"]) == 4
        assert calls == [(source.url, source.filename, source.tgz_md5)], before
        assert [p.name for p in root.iterdir()] == [FOLDER]
        calls.clear()
        (root / FOLDER / "test").write_bytes(b"damaged")
        with pytest.raises(SetupError, match=r"test is damaged .* delete it and run again"):
            CIFAR100(root=str(root)).load()
        assert not calls
        (root / FOLDER / "test").unlink()
    assert (root / FOLDER / "notes.txt").read_text() == "of the user's own"


# ---------------------------------------------------------------------------------------------- CIFAR-100, real files

# https://www.cs.toronto.edu/~kriz/cifar.html
SUPERCLASSES = """
aquatic_mammals: beaver dolphin otter seal whale; fish: aquarium_fish flatfish ray shark trout
flowers: orchid poppy rose sunflower tulip; food_containers: bottle bowl can cup plate
fruit_and_vegetables: apple mushroom orange pear sweet_pepper
household_electrical_devices: clock keyboard lamp telephone television
household_furniture: bed chair couch table wardrobe; insects: bee beetle butterfly caterpillar cockroach
large_carnivores: bear leopard lion tiger wolf; large_man-made_outdoor_things: bridge castle house road skyscraper
large_natural_outdoor_scenes: cloud forest mountain plain sea
large_omnivores_and_herbivores: camel cattle chimpanzee elephant kangaroo
medium_mammals: fox porcupine possum raccoon skunk; non-insect_invertebrates: crab lobster snail spider worm
people: baby boy girl man woman; reptiles: crocodile dinosaur lizard snake turtle
small_mammals: hamster mouse rabbit shrew squirrel; trees: maple_tree oak_tree palm_tree pine_tree willow_tree
vehicles_1: bicycle bus motorcycle pickup_truck train; vehicles_2: lawn_mower rocket streetcar tank tractor
"""


@pytest.fixture(scope="module")
def real():
    return CIFAR100(root=str(REAL_CIFAR100), download=False).load()


@needs_real_data
def test_cifar100_classes(real):
    """Balanced in both splits; the coarse class of every image is the documented superclass of its fine one."""
    for split, size in zip(real.values(), (50_000, 10_000), strict=True):
        assert split.columns["image"].shape == (size, 32, 32, 3)
        for name, classes in (("fine", 100), ("coarse", 20)):
            assert torch.bincount(split.columns[name]).tolist() == [size // classes] * classes
    labels = [[s.columns[name].tolist() for name in ("fine", "coarse")] for s in real.values()]
    pairs = {pair for columns in labels for pair in zip(*columns, strict=True)}
    names = pickle.loads((REAL_CIFAR100 / FOLDER / "meta").read_bytes(), encoding="latin1")
    fine, coarse = names["fine_label_names"], names["coarse_label_names"]
    table = [line.split(": ") for line in re.split("[;\n] *", SUPERCLASSES.strip())]
    expected = [(fine.index(f), coarse.index(c)) for c, members in table for f in members.split()]
    assert sorted(pairs) == sorted(expected) and len(expected) == 100 == 5 * len(table)


@needs_real_data
def test_cifar100_images(real):
    """A few hundred equal torchvision's; the constants are the training images' mean and standard deviation."""
    for split, peer in zip(
        real.values(), (torchvision.datasets.CIFAR100(REAL_CIFAR100, t) for t in (True, False)), strict=True
    ):
        for i in torch.randperm(len(peer), generator=torch.Generator().manual_seed(0))[:300].tolist():
            image, label = peer[i]
            assert np.array_equal(split.columns["image"][i].numpy(), np.asarray(image))
            assert split.columns["fine"][i] == label
    values, image = np.arange(256) / 255, CIFAR100.inputs["image"]
    for channel, constants in enumerate(zip(image.mean, image.std, strict=True)):
        share = torch.bincount(real["train"].columns["image"][..., channel].flatten(), minlength=256).numpy() / (
            50_000 * 1024
        )
        mean = share @ values
        assert (mean, (share @ (values - mean) ** 2) ** 0.5) == pytest.approx(constants, abs=1e-3)


# ------------------------------------------------------------------------------------------------- digits and synthetic


def test_digits_are_scikit_learns():
    """Every image once, with its digit, parity and standardised ink; the constants normalise the training images."""
    from sklearn.datasets import load_digits

    both, data = Digits().load(), load_digits()
    joined = {name: torch.cat([both[part].column(name) for part in ("train", "test")]) for name in Digits().columns}
    assert [len(split) for split in both.values()] == [1297, 500] and joined["image"].shape[1:] == (8, 8, 1)
    ink = data.images.mean((1, 2))
    columns = (data.target, data.target % 2, (ink - ink.mean()) / ink.std(ddof=1))
    expected = np.column_stack([data.images.reshape(-1, 64), *columns])
    pixels = (joined["image"].flatten(1) / 255 * 16).round()
    actual = np.column_stack([pixels, *(joined[t.name] for t in Digits.tasks)])
    ordered = [rows[np.lexsort(rows[:, :64].T)] for rows in (actual, expected)]
    np.testing.assert_allclose(*ordered, atol=1e-5)
    assert torch.bincount(both["test"].column("digit"), minlength=10).min() > 30  # mixed before it is split
    images, image = both["train"].column("image") / 255, Digits.inputs["image"]
    assert (images.mean().item(), images.std().item()) == pytest.approx((*image.mean, *image.std), abs=0.005)


def test_synthetic_data():
    """Deterministic; 20 groups of 5; larger sets start with smaller ones, across a chunk of 4,096 too; learnable: the
    nearest class mean is far above chance (1 % and 5 %) on test images."""
    train, test = (s.columns for s in Synthetic(train_size=4100, test_size=40).load().values())
    assert train["fine"].unique().tolist() == list(range(100))
    assert torch.equal(train["coarse"], train["fine"] // 5)
    for size in (7, 40, 4097):
        torch.manual_seed(size)
        small, others = (s.columns for s in Synthetic(train_size=size, test_size=min(size, 40)).load().values())
        for part, whole in ((small, train), (others, test)):
            assert all(torch.equal(part[k], whole[k][: len(part[k])]) for k in ("image", "fine", "coarse"))
    x, y = train["image"].flatten(1).float(), test["image"].flatten(1).float()
    assert torch.cdist(y, x).min() > 0  # no test image is a training image
    for task in Synthetic.tasks:
        means = torch.stack([x[train[task.name] == c].mean(0) for c in range(task.outputs)])
        assert (torch.cdist(y, means).argmin(1) == test[task.name]).float().mean() > 0.8
