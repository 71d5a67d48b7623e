"""Handwritten digits: 1,797 real 8x8 images that ship with scikit-learn (Alpaydin & Kaynak, UCI, 1998).

Small enough to train a grid of methods in a minute, without a download. Every image has three tasks: the digit (10
classes), whether it is odd (2 classes), and the amount of ink (a number: the mean intensity, standardised).
"""

from dataclasses import dataclass

import torch

from mtl.data import Benchmark, Image, Split
from mtl.random import stream
from mtl.tasks import Classification, Regression


@dataclass
class Digits(Benchmark):
    """Three tasks on 1,297 training and 500 test images, without augmentation."""

    tasks = (Classification("digit", 10), Classification("odd", 2), Regression("ink"))
    inputs = {"image": Image((1, 8, 8), mean=(0.305,), std=(0.376,))}

    def load(self) -> dict[str, Split]:
        from sklearn.datasets import load_digits  # here, because it is slow to import and no other benchmark needs it

        data = load_digits()
        # Intensities from 0 to 16 become bytes, as image columns must be.
        images = torch.from_numpy(data.images).float().mul(255 / 16).round().to(torch.uint8)[..., None]
        digit = torch.from_numpy(data.target).long()
        ink = torch.from_numpy(data.images).float().mean((1, 2))
        ink = (ink - ink.mean()) / ink.std()
        both = Split({"image": images, "digit": digit, "odd": digit % 2, "ink": ink})
        # The file lists one group of writers after the other. Mixed, so that training and test have the same writers.
        # The order does not depend on the run's seed, so all runs have the same test set.
        both = Split(both.batch(torch.randperm(len(both), generator=stream(0, "digits_split"))))
        return {"train": both.select(slice(500, None)), "test": both.select(slice(500))}
