"""Batches against torchvision's transforms, their draws, and the benchmarks against what their sources document."""

import hashlib
import http.client
import pickle
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from conftest import REAL_CIFAR100, needs_real_data
from scipy.stats import chisquare

from mtl.config.errors import SetupError, UserError
from mtl.data import batches, cifar100
from mtl.data.base import Benchmark, Split
from mtl.data.batches import EvaluationBatches, TrainingBatches, draw
from mtl.data.cifar100 import CIFAR100
from mtl.data.digits import Digits
from mtl.data.synthetic import Synthetic
from mtl.random import stream
from mtl.tasks import Classification, Regression

CPU = torch.device("cpu")


@dataclass
class Numbered(Benchmark):
    """Images of one colour that spells their number, which is also their label; crops of 8x8 never lose it all."""

    size: int = 70

    tasks = (Classification("number", 2**16), Regression("negative"))
    image_shape = (3, 8, 8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    crop_padding, flip = 4, True

    def load(self):
        n = torch.arange(self.size)
        colour = torch.stack([n // 256, n % 256, torch.full_like(n, 255)], 1).to(torch.uint8)
        split = Split(colour[:, None, None].expand(-1, 8, 8, -1).contiguous(), {"number": n, "negative": -n.float()})
        return split, split.take(torch.arange(self.size).flip(0))


def read_numbers(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(t)[:, None, None] for t in (Numbered.mean, Numbered.std))
    values = ((images * std + mean) * 255).round().amax((2, 3)).long()
    assert (values[:, 2] == 255).all()
    return 256 * values[:, 0] + values[:, 1]


def epoch_of(benchmark: Benchmark, epoch: int = 0, seed: int = 0, split: Split | None = None) -> list:
    return list(TrainingBatches(split or benchmark.load()[0], benchmark, CPU, seed).epoch(epoch))


def assert_same(actual: list, expected: list) -> None:
    assert len(actual) == len(expected) > 0
    for (images, targets), (others, labels) in zip(actual, expected, strict=True):
        assert torch.equal(images, others) and images.stride() == others.stride()
        assert targets.keys() == labels.keys() and all(torch.equal(targets[k], labels[k]) for k in labels)


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("residency", ["device", "host"])
def test_augmentation_is_bitwise_torchvisions(residency):
    """Pad, crop, flip, to_tensor and normalise of each PIL image at the same offsets."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (60, 32, 32, 3), generator=generator, dtype=torch.uint8)
    split = Split(images, {"fine": torch.arange(60), "coarse": torch.arange(60) % 20})
    draws = draw(60, 5, 2, padding=4, flip=True)
    batches = epoch_of(CIFAR100(batch_size=25, residency=residency, workers=0), epoch=2, seed=5, split=split)
    assert [len(x) for x, _ in batches] == [25, 25, 10]
    assert torch.equal(torch.cat([t["fine"] for _, t in batches]), draws.order)
    for i, actual in enumerate(torch.cat([x for x, _ in batches])):
        image = TF.pad(TF.to_pil_image(images[draws.order[i]].permute(2, 0, 1)), [4], fill=0)
        image = TF.crop(image, int(draws.top[i]), int(draws.left[i]), 32, 32)
        image = TF.hflip(image) if draws.flip[i] else image
        expected = TF.normalize(TF.to_tensor(image), CIFAR100.mean, CIFAR100.std)
        assert actual.dtype == torch.float32 and torch.equal(actual, expected), i


def test_evaluation_is_bitwise_torchvisions():
    """to_tensor and normalise of every image in order."""
    images = torch.randint(256, (7, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    ((actual, _),) = EvaluationBatches(Split(images, {}), CIFAR100(), CPU)
    for image, x in zip(images, actual, strict=True):
        assert torch.equal(x, TF.normalize(TF.to_tensor(image.numpy()), CIFAR100.mean, CIFAR100.std))


def test_offsets_and_flips_are_uniform_and_independent():
    """All 9 x 9 corners with and without flip are equally likely; the order is a permutation."""
    n = 81_000
    draws = draw(n, 3, 1, padding=4, flip=True)
    assert all((int(t.min()), int(t.max())) == (0, 8) for t in (draws.top, draws.left))
    cells = torch.bincount((draws.top * 9 + draws.left) * 2 + draws.flip, minlength=162)
    assert chisquare(cells.numpy()).pvalue > 0.001
    assert abs(draws.flip.float().mean() - 0.5) < 0.01
    assert torch.equal(draws.order.sort().values, torch.arange(n))
    assert abs(np.corrcoef(draws.order, np.arange(n))[0, 1]) < 0.02


def fields(draws) -> dict[str, torch.Tensor]:
    return {"order": draws.order, "crop": torch.stack([draws.top, draws.left]), "flip": draws.flip}


def test_draws_are_a_function_of_seed_and_epoch():
    """Not of the global generator; other seeds and other epochs draw otherwise, also with seed and epoch swapped."""
    first = fields(draw(500, 1, 2, 4, True))
    torch.manual_seed(99)
    torch.rand(3)
    again = fields(draw(500, 1, 2, 4, True))
    assert all(torch.equal(first[k], again[k]) for k in first)
    for seed, epoch in ((1, 3), (2, 2), (2, 1), (12, 0)):
        other = fields(draw(500, seed, epoch, 4, True))
        assert not any(torch.equal(first[k], other[k]) for k in first), (seed, epoch)
    assert_same(epoch_of(Numbered(), 3), [list(t.epoch(k)) for t in [TrainingBatches(Numbered().load()[0], Numbered(), CPU, 0)]
                                          for k in range(4)][3])  # fmt: skip


@pytest.mark.parametrize("changed", ["order", "crop", "flip"])
def test_a_changed_stream_leaves_the_others(changed, monkeypatch):
    """Every choice has a stream of its own."""
    before = fields(draw(500, 1, 2, 4, True))
    monkeypatch.setattr(batches, "stream", lambda seed, name, epoch: stream(seed + (name == changed), name, epoch))
    after = fields(draw(500, 1, 2, 4, True))
    assert [k for k in before if not torch.equal(before[k], after[k])] == [changed]


@pytest.mark.parametrize("padding, flip, expected", [(0, True, {"crop"}), (4, False, {"flip"})])
def test_what_a_benchmark_does_not_augment_is_left(padding, flip, expected):
    """Without a crop or a flip, those draws are 0 and the others as before."""
    plain, full = fields(draw(500, 1, 2, padding, flip)), fields(draw(500, 1, 2, 4, True))
    assert {k for k in full if not torch.equal(plain[k], full[k])} == expected
    assert not any(plain[k].any() for k in expected)


RESIDENCES = [("device", 0), ("host", 0), ("host", 2)]


@pytest.mark.parametrize("residency, workers", RESIDENCES)
@pytest.mark.parametrize(
    "size, sizes", [(64, [32, 32]), (70, [32, 32, 6]), (66, [32, 32, 2]), (65, [32, 32]), (5, [5])]
)
def test_an_epoch_visits_every_sample_once(residency, workers, size, sizes):
    """Images keep their labels; the last batch may be smaller, but a remainder of exactly one is left out."""
    benchmark = Numbered(size=size, batch_size=32, residency=residency, workers=workers)
    train = TrainingBatches(benchmark.load()[0], benchmark, CPU, seed=0)
    seen = list(train.epoch(0))
    assert [len(x) for x, _ in seen] == sizes and len(train) == len(sizes)
    numbers = torch.cat([t["number"] for _, t in seen])
    assert torch.equal(read_numbers(torch.cat([x for x, _ in seen])), numbers)
    assert torch.equal(torch.cat([t["negative"] for _, t in seen]), -numbers.float())
    assert len(set(numbers.tolist())) == len(numbers) == sum(sizes)


@pytest.mark.parametrize("residency, workers", [*RESIDENCES[1:], ("mapped", 2)])
def test_residency_does_not_change_a_bit(residency, workers, tmp_path):
    """Training and evaluation batches from the host, memory-mapped or not, equal those from the device."""
    benchmark = Numbered(size=501, batch_size=100)
    split = benchmark.load()[0]
    elsewhere = split
    if residency == "mapped":
        split.images.numpy().tofile(tmp_path / "images")
        mapped = np.memmap(tmp_path / "images", np.uint8, "r+", shape=tuple(split.images.shape))
        elsewhere = Split(torch.from_numpy(mapped), split.targets)
    host = Numbered(size=501, batch_size=100, residency="host", workers=workers)
    assert_same(epoch_of(host, 1, split=elsewhere), epoch_of(benchmark, 1))
    evaluation = list(EvaluationBatches(split, benchmark, CPU))
    assert_same(list(EvaluationBatches(elsewhere, host, CPU)), evaluation)
    assert [len(x) for x, _ in evaluation] == [500, 1]
    assert torch.equal(read_numbers(torch.cat([x for x, _ in evaluation])), torch.arange(501))


@pytest.mark.parametrize("residency", ["device", "host"])
def test_batches_are_channels_last(residency):
    """In training and evaluation, without a copy of the images' layout."""
    benchmark = Numbered(residency=residency, workers=0)
    images = [*epoch_of(benchmark), *EvaluationBatches(benchmark.load()[1], benchmark, CPU)]
    for x, _ in images:
        assert x.shape[1:] == (3, 8, 8) and x.stride() == (192, 1, 24, 3)
        assert x.is_contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------------------------------- splits


def numbers(split: Split) -> list[int]:
    return split.targets["number"].tolist()


def test_validation_split():
    """Disjoint, complete, mixed, the same whatever was drawn before; test data and labels stay as they are."""
    splits = Numbered(size=70, val_fraction=0.2).splits()
    torch.manual_seed(7)
    again = Numbered(size=70, val_fraction=0.2, batch_size=8).splits()
    train, val = numbers(splits["train"]), numbers(splits["val"])
    assert (len(train), len(val)) == (56, 14) and sorted(train + val) == list(range(70))
    assert val != list(range(14)) and val != list(range(56, 70))
    assert all(numbers(splits[k]) == numbers(again[k]) for k in splits)
    assert numbers(splits["test"]) == list(reversed(range(70)))
    for split in splits.values():
        assert split.images[:, 0, 0, 1].tolist() == numbers(split)


def test_limits():
    """The first samples of each split; validation data is taken from what is left."""
    splits = Numbered(limit_train=20, limit_test=3).splits()
    assert splits.keys() == {"train", "test"}
    assert numbers(splits["train"]) == list(range(20)) and numbers(splits["test"]) == [69, 68, 67]
    held = Numbered(limit_train=20, val_fraction=0.25).splits()
    assert len(held["val"]) == 5 and sorted(numbers(held["train"]) + numbers(held["val"])) == list(range(20))


def test_a_validation_split_is_never_silently_empty():
    """A fraction of a small data set that rounds to no sample is refused or gives one sample."""
    try:
        val = Numbered(limit_train=20, val_fraction=0.01).splits()["val"]
    except UserError:
        return
    assert len(val) > 0


# ----------------------------------------------------------------------------------------------- CIFAR-100, fake files


class Touch:
    """A pickle that creates a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """tmp_path/source/cifar-100-python with 6 + 4 images, declared genuine; `.images`, `.declare(name)`."""
    folder = tmp_path / "source" / "cifar-100-python"
    folder.mkdir(parents=True)
    rng, declared = np.random.default_rng(0), {}
    monkeypatch.setattr(cifar100, "MD5", declared)

    class Fake:
        root, images = folder.parent, {}

        @staticmethod
        def declare(name: str, payload: bytes) -> None:
            (folder / name).write_bytes(payload)
            declared[name] = hashlib.md5(payload).hexdigest()

    for name, count in (("train", 6), ("test", 4)):
        Fake.images[name] = images = rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        rows = np.stack([np.concatenate([image[:, :, c].ravel() for c in range(3)]) for image in images])
        fine = list(range(count))
        content = {b"data": rows, b"fine_labels": fine, b"coarse_labels": [19 - f for f in fine], b"filenames": []}
        Fake.declare(name, pickle.dumps(content, protocol=2))
    return Fake


def serve(monkeypatch, archive) -> list:
    """Replace the download by `archive(work)`; returns the list of calls."""
    calls = []

    def download(url, work, filename, md5):
        calls.append((url, filename, md5))
        archive(Path(work))

    monkeypatch.setattr(cifar100, "download_and_extract_archive", download)
    return calls


def refuse(*_):
    pytest.fail("must not download")


def copy_of(fake):
    def archive(work: Path):
        (work / "cifar-100-python").mkdir()
        (work / "cifar-100-python.tar.gz").write_bytes(b"archive")
        for file in (fake.root / "cifar-100-python").iterdir():
            (work / "cifar-100-python" / file.name).write_bytes(file.read_bytes())

    return archive


def test_cifar100_layout(fake, monkeypatch):
    """Rows are red, green and blue planes of 32x32; both label lists are read; nothing is downloaded."""
    serve(monkeypatch, refuse)
    for name, split in zip(("train", "test"), CIFAR100(root=str(fake.root)).load(), strict=True):
        assert np.array_equal(split.images.numpy(), fake.images[name]) and split.images.dtype == torch.uint8
        assert split.targets["fine"].tolist() == list(range(len(split)))
        assert split.targets["coarse"].tolist() == [19 - f for f in range(len(split))]
        assert all(t.dtype == torch.int64 for t in split.targets.values())


@pytest.mark.parametrize("name", ["train", "test"])
def test_cifar100_never_opens_a_damaged_pickle(fake, name, tmp_path):
    """One flipped byte: an error with file and md5; the pickle in it, which still opens, is not opened."""
    marker, file = tmp_path / "opened", fake.root / "cifar-100-python" / name
    payload = pickle.dumps((Touch(marker), b"some bytes"))
    fake.declare(name, payload)
    file.write_bytes(payload.replace(b"some bytes", b"some bytez"))
    with pytest.raises(SetupError, match=f"{re.escape(str(file))}.*{hashlib.md5(payload).hexdigest()}"):
        CIFAR100(root=str(fake.root)).load()
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists()


def test_cifar100_missing_and_not_to_be_downloaded(monkeypatch, tmp_path):
    """The error names the folder and the variable; nothing is made."""
    serve(monkeypatch, refuse)
    with pytest.raises(SetupError, match=f"{re.escape(str(tmp_path / 'no' / 'cifar-100-python'))}.*MTL_DATA"):
        CIFAR100(root=str(tmp_path / "no"), download=False).load()
    assert not list(tmp_path.iterdir())


FAILURES = [
    URLError("no route to host"),
    RuntimeError("File not found or corrupted."),
    PermissionError(13, "Permission denied"),
    http.client.BadStatusLine("<html>"),
    tarfile.ReadError("unexpected end of data"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("partial", [False, True])
def test_cifar100_failed_download_leaves_nothing(monkeypatch, tmp_path, error, partial):
    """An error with cause, folder and ways out; no folder that was not there, no part of the archive."""

    def archive(work: Path):
        if partial:
            (work / "cifar-100-python").mkdir()
            (work / "cifar-100-python" / "train").write_bytes(b"half")
        raise error

    serve(monkeypatch, archive)
    root = tmp_path / "a" / "b"
    with pytest.raises(SetupError, match=f"{re.escape(str(root))}.*{re.escape(str(error))}.*MTL_DATA"):
        CIFAR100(root=str(root)).load()
    assert not list(tmp_path.iterdir())


def test_cifar100_failed_or_interrupted_download_leaves_what_was_there(monkeypatch, tmp_path, fake):
    """Files of an incomplete folder and its neighbours survive; Ctrl-C passes through and leaves no part either."""
    root = tmp_path / "root"
    (root / "cifar-100-python").mkdir(parents=True)
    (root / "cifar-100-python" / "test").write_bytes(b"kept")
    for error, raised in ((URLError("down"), SetupError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def archive(work: Path, error=error):
            copy_of(fake)(work)
            raise error

        serve(monkeypatch, archive)
        with pytest.raises(raised):
            CIFAR100(root=str(root)).load()
        assert [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()] == ["cifar-100-python/test"]


@pytest.mark.parametrize("before", ["nothing", "incomplete"])
def test_cifar100_download(monkeypatch, tmp_path, fake, before):
    """torchvision's address and md5; the folder arrives whole, in place of an incomplete one, and is read."""
    root = tmp_path / "new" / "root"
    if before == "incomplete":
        (root / "cifar-100-python").mkdir(parents=True)
        (root / "cifar-100-python" / "train").write_bytes(b"old")
    source = torchvision.datasets.CIFAR100
    calls = serve(monkeypatch, copy_of(fake))
    for _ in range(2):  # the second time it is there
        train, test = CIFAR100(root=str(root)).load()
        assert np.array_equal(train.images.numpy(), fake.images["train"]) and len(test) == 4
    assert calls == [(source.url, source.filename, source.tgz_md5)]
    assert [p.name for p in root.iterdir()] == ["cifar-100-python"]


def test_cifar100_damaged_file_is_replaced_once_deleted(monkeypatch, tmp_path, fake):
    """A complete folder is never overwritten; the error's advice, to delete the file and run again, works."""
    root = tmp_path / "root"
    root.mkdir()
    copy_of(fake)(root)
    (file := root / "cifar-100-python" / "test").write_bytes(b"damaged")
    serve(monkeypatch, refuse)
    with pytest.raises(SetupError, match=r"test is damaged .* delete it and run again"):
        CIFAR100(root=str(root)).load()
    file.unlink()
    calls = serve(monkeypatch, copy_of(fake))
    assert len(CIFAR100(root=str(root)).load()[1]) == 4 and len(calls) == 1


# ------------------------------------------------------------------------------------------------ CIFAR-100, real files

SUPERCLASSES = """
aquatic_mammals: beaver dolphin otter seal whale
fish: aquarium_fish flatfish ray shark trout
flowers: orchid poppy rose sunflower tulip
food_containers: bottle bowl can cup plate
fruit_and_vegetables: apple mushroom orange pear sweet_pepper
household_electrical_devices: clock keyboard lamp telephone television
household_furniture: bed chair couch table wardrobe
insects: bee beetle butterfly caterpillar cockroach
large_carnivores: bear leopard lion tiger wolf
large_man-made_outdoor_things: bridge castle house road skyscraper
large_natural_outdoor_scenes: cloud forest mountain plain sea
large_omnivores_and_herbivores: camel cattle chimpanzee elephant kangaroo
medium_mammals: fox porcupine possum raccoon skunk
non-insect_invertebrates: crab lobster snail spider worm
people: baby boy girl man woman
reptiles: crocodile dinosaur lizard snake turtle
small_mammals: hamster mouse rabbit shrew squirrel
trees: maple_tree oak_tree palm_tree pine_tree willow_tree
vehicles_1: bicycle bus motorcycle pickup_truck train
vehicles_2: lawn_mower rocket streetcar tank tractor
"""  # https://www.cs.toronto.edu/~kriz/cifar.html


@pytest.fixture(scope="module")
def real():
    return CIFAR100(root=str(REAL_CIFAR100), download=False).load()


@needs_real_data
def test_cifar100_classes(real):
    """Balanced in both splits; the coarse class is the superclass that the documentation gives to the fine one."""
    for split, size in zip(real, (50_000, 10_000), strict=True):
        assert split.images.shape == (size, 32, 32, 3)
        for name, classes in (("fine", 100), ("coarse", 20)):
            assert torch.bincount(split.targets[name]).tolist() == [size // classes] * classes
    pairs = {pair for s in real for pair in zip(s.targets["fine"].tolist(), s.targets["coarse"].tolist(), strict=True)}
    names = pickle.loads((REAL_CIFAR100 / "cifar-100-python" / "meta").read_bytes(), encoding="latin1")
    fine, coarse = names["fine_label_names"], names["coarse_label_names"]
    table = [line.split(": ") for line in SUPERCLASSES.strip().splitlines()]
    assert pairs == {(fine.index(f), coarse.index(c)) for c, members in table for f in members.split()}
    assert len(pairs) == 100 and set(Counter(c for _, c in pairs).values()) == {5}


@needs_real_data
def test_cifar100_normalisation_constants(real):
    """Mean and standard deviation of the training images, from their histograms."""
    values = torch.arange(256).double() / 255
    for channel, (mean, std) in enumerate(zip(CIFAR100.mean, CIFAR100.std, strict=True)):
        counts = torch.bincount(real[0].images[..., channel].flatten(), minlength=256).double()
        actual = (counts @ values) / counts.sum()
        assert actual.item() == pytest.approx(mean, abs=1e-3)
        assert ((counts @ (values - actual) ** 2) / counts.sum()).sqrt().item() == pytest.approx(std, abs=1e-3)


@needs_real_data
@pytest.mark.parametrize("train", [True, False])
def test_cifar100_equals_torchvisions(real, train):
    """Images and fine labels of a few hundred samples."""
    split, peer = real[0 if train else 1], torchvision.datasets.CIFAR100(REAL_CIFAR100, train)
    for i in torch.randperm(len(peer), generator=torch.Generator().manual_seed(0))[:300].tolist():
        image, label = peer[i]
        assert np.array_equal(split.images[i].numpy(), np.asarray(image)) and split.targets["fine"][i] == label


# ------------------------------------------------------------------------------------------------- digits and synthetic


def test_digits_are_scikit_learns():
    """Every image once, with its digit, parity and standardised ink; the constants normalise the training images."""
    from sklearn.datasets import load_digits

    train, test = Digits().load()
    assert (len(train), len(test)) == (1297, 500) and train.images.shape[1:] == (8, 8, 1)
    data = load_digits()
    ink = data.images.mean((1, 2))
    ink = (ink - ink.mean()) / ink.std(ddof=1)
    expected = sorted(
        zip(data.images.reshape(-1, 64).tolist(), data.target, data.target % 2, ink.round(3), strict=True)
    )
    images = torch.cat([train.images, test.images]).flatten(1).float().mul(16 / 255).round()
    targets = {k: torch.cat([train.targets[k], test.targets[k]]) for k in ("digit", "odd", "ink")}
    actual = sorted(zip(images.tolist(), *(targets[k].tolist() for k in targets), strict=True))
    assert [row[:3] for row in actual] == [row[:3] for row in expected]
    assert [row[3] for row in actual] == pytest.approx([row[3] for row in expected], abs=1e-3)
    assert torch.bincount(test.targets["digit"], minlength=10).min() > 30  # mixed before it is split
    pixels = train.images.float() / 255
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((Digits.mean[0], Digits.std[0]), abs=0.005)


def test_synthetic_labels_and_prefix():
    """Deterministic; 20 groups of 5; a larger data set starts with the smaller one, across a chunk of 4,096 too."""
    torch.manual_seed(3)
    large, test = Synthetic(train_size=4100, test_size=40).load()
    assert large.targets["fine"].unique().tolist() == list(range(100))
    assert torch.equal(large.targets["coarse"], large.targets["fine"] // 5)
    assert not torch.equal(large.images[:40], test.images)
    for size in (7, 40, 4097):
        torch.manual_seed(size)
        small, others = Synthetic(train_size=size, test_size=min(size, 40)).load()
        assert torch.equal(small.images, large.images[:size]) and torch.equal(others.images, test.images[:size])
        assert all(torch.equal(small.targets[k], large.targets[k][:size]) for k in ("fine", "coarse"))


def test_synthetic_is_learnable():
    """The nearest class mean of the training pixels is far above chance (1 % and 5 %) on test images."""
    train, test = Synthetic(train_size=2000, test_size=200).load()
    x, y = train.images.flatten(1).float(), test.images.flatten(1).float()
    for task in Synthetic.tasks:
        means = torch.stack([x[train.targets[task.name] == c].mean(0) for c in range(task.outputs)])
        assert (torch.cdist(y, means).argmin(1) == test.targets[task.name]).float().mean() > 0.8
