"""CIFAR-100 with its fine (100) and coarse (20) labels: Krizhevsky, "Learning Multiple Layers of Features from Tiny
Images", 2009. 50,000 training and 10,000 test images of 32x32 RGB; every coarse class is five fine classes.
"""

import os
import pickle
import tempfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import torch
from filelock import FileLock
from torchvision.datasets import CIFAR100 as Published
from torchvision.datasets.utils import calculate_md5, download_and_extract_archive

from mtl.data import Benchmark, Crop, Flip, Image, Split
from mtl.errors import SetupError, one_line, remove_empty
from mtl.tasks import Classification

FOLDER = Published.base_folder
MD5 = dict([*Published.train_list, *Published.test_list])


@dataclass
class CIFAR100(Benchmark):
    """Two classification tasks on CIFAR-100, with the standard augmentation: RandomCrop(32, padding=4) and flip.

    Args:
        root: the folder that contains cifar-100-python/, or into which it is downloaded.
        download: whether to download the data if it is missing.
    """

    root: str = "data"
    download: bool = True

    tasks = (Classification("fine", 100), Classification("coarse", 20))
    inputs = {"image": Image((3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}
    augment = (Crop(padding=4), Flip())

    def load(self) -> dict[str, Split]:
        folder = Path(self.root) / FOLDER
        if not _complete(folder):
            if not self.download:
                raise SetupError(
                    f"CIFAR-100 is not in {folder.resolve()} and data.download=false; "
                    "set data.root (or the environment variable MTL_DATA) to the folder that holds it"
                )
            _download(Path(self.root).resolve())
        return {name: _read(folder / name) for name in ("train", "test")}


def _complete(folder: Path) -> bool:
    # Only whether the files exist. `_read` checks their content.
    return all((folder / name).is_file() for name in MD5)


def _download(root: Path) -> None:
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    lock = root / ".cifar-100.lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # of several processes one downloads; the others wait, and then find the data
            try:
                if not _complete(root / FOLDER):
                    _fetch(root)
            finally:
                lock.unlink(missing_ok=True)
    except (KeyboardInterrupt, URLError, HTTPException, OSError, RuntimeError) as error:
        remove_empty(made)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise SetupError(
            f"CIFAR-100 is not in {root / FOLDER} and could not be downloaded ({one_line(error)}); either put "
            f"cifar-100-python/ there yourself (from {Published.url}), or set data.root or MTL_DATA to the "
            "folder that holds it, or try data=digits, which needs no download"
        ) from error


def _fetch(root: Path) -> None:
    print(f"downloading CIFAR-100 (169 MB) to {root}", flush=True)
    # On the same disk as the target. So the finished folder appears in one rename, and an interruption leaves nothing.
    with tempfile.TemporaryDirectory(dir=root, prefix=".cifar-100-") as work:
        download_and_extract_archive(Published.url, work, filename=Published.filename, md5=Published.tgz_md5)
        if not (root / FOLDER).exists():
            (Path(work) / FOLDER).rename(root / FOLDER)
            return
        for file in (Path(work) / FOLDER).iterdir():  # an incomplete folder: other files in it are the user's and stay
            os.replace(file, root / FOLDER / file.name)


def _read(file: Path) -> Split:
    # The md5 comes first, because opening a pickle runs code. A file that is not the published one is never opened.
    if calculate_md5(file) != MD5[file.name]:
        raise SetupError(
            f"{file.resolve()} is damaged (its md5 is not {MD5[file.name]}); delete it and run again to fetch it anew"
        )
    with file.open("rb") as f:
        content = pickle.load(f, encoding="bytes")
    # The file stores channels first. Channels last is the order of every image column here.
    images = torch.from_numpy(content[b"data"]).view(-1, 3, 32, 32).permute(0, 2, 3, 1).contiguous()
    labels = {name: torch.tensor(content[f"{name}_labels".encode()]) for name in ("fine", "coarse")}
    return Split({"image": images, **labels})
