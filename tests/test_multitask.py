"""Multi-task metrics and the statistics of the report against hand-computed values, scipy and brute force."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from mtl.report import multitask
from mtl.report.statistics import holm, paired, verdict


def test_delta_m_and_achievement_by_hand():
    # 55 of 50: +10 %. 12 of 10 where lower is better: -20 %, and 10 / 12 of the potential.
    assert multitask.delta_m([55, 12], [50, 10], [True, False]) == pytest.approx((10 - 20) / 2)
    assert multitask.achievement([55, 12], [50, 10], [True, False]) == pytest.approx((110 + 100 / 1.2) / 2)
    assert multitask.delta_m([-0.1], [-0.2], [True]) == pytest.approx(50)
    assert multitask.delta_m([40, 80, 3], [40, 80, 3], [True, True, False]) == 0
    assert math.isnan(multitask.delta_m([1, math.nan], [1, 1], [True, True]))
    assert math.isnan(multitask.delta_m([1], [0], [True]))
    assert math.isnan(multitask.achievement([-15], [-20], [False]))  # 133 % of the potential it is not
    # SegNet on NYUv2 as in Nash-MTL's table 1: nine metrics, MGDA's published 1.38
    single = [38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15]
    mgda = [30.47, 59.90, 0.6070, 0.2555, 24.88, 19.45, 29.18, 56.88, 69.36]
    higher = [True, True, False, False, False, False, True, True, True]
    assert -multitask.delta_m(mgda, single, higher) == pytest.approx(1.38, abs=0.005)
    tasks = ["segmentation"] * 2 + ["depth"] * 2 + ["normals"] * 5  # averaged within the tasks first, as LibMTL does
    gains = 100 * np.where(higher, 1, -1) * (np.array(mgda) / single - 1)
    expected = np.mean([gains[:2].mean(), gains[2:4].mean(), gains[4:].mean()])
    assert multitask.delta_m(mgda, single, higher, tasks) == pytest.approx(expected)
    assert -expected == pytest.approx(1.66, abs=0.005)


def test_ranks_are_those_of_scipy():
    draw = np.random.default_rng(0)
    for _ in range(50):
        figures = draw.integers(0, 4, (7, 3)).astype(float)  # many ties
        higher = draw.random(3) < 0.5
        expected = np.stack([stats.rankdata(-f if h else f) for f, h in zip(figures.T, higher, strict=True)], 1)
        assert (multitask.ranks(figures, higher) == expected).all()
        assert multitask.mean_rank(figures, higher) == pytest.approx(expected.mean(1))
    assert multitask.ranks([[math.nan], [1.0], [math.nan], [2.0]], [True]).ravel().tolist() == [3.5, 2.0, 3.5, 1.0]


def test_the_pareto_front_is_that_of_brute_force():
    draw = random.Random(0)

    def dominates(a, b):
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))

    for _ in range(50):
        points = [tuple(draw.randrange(5) for _ in range(3)) for _ in range(20)]
        best = [not any(dominates(q, p) for q in points) for p in points]
        assert multitask.pareto_optimal(points, [True] * 3).tolist() == best
        assert multitask.pareto_optimal([[-x for x in p] for p in points], [False] * 3).tolist() == best
        rivals = points[:5]
        free = [not any(dominates(q, p) for q in rivals) for p in points]
        assert multitask.pareto_optimal(points, [True] * 3, rivals).tolist() == free
    assert multitask.pareto_optimal([[math.nan, 9], [1, 1]], [True, True]).tolist() == [False, True]


def test_intervals_are_those_of_scipy_and_of_all_resamples():
    ours, reference = [70.1, 71.0, 69.0, 72.5], [69.0, 70.2, 69.4, 70.0]
    d = np.subtract(ours, reference)
    found, test = paired(ours, reference, higher=True), stats.ttest_rel(ours, reference)
    assert found.student == pytest.approx(tuple(test.confidence_interval()))
    assert (found.mean, found.p) == pytest.approx((d.mean(), test.pvalue))
    assert (found.n, found.wins, found.losses) == (4, 3, 1)
    assert paired(ours, reference, higher=False).wins == 1
    means = np.sort([np.mean(x) for x in itertools.product(d, repeat=4)])  # all 256 resamples, equally likely
    assert found.bootstrap == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)), abs=0.06)
    assert found == paired(ours, reference, higher=True)  # the resamples are always the same


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("differences", "family", "words"),
    [
        ([], 1, "no seed in common"),
        ([2.0], 1, "1 seed: too few to tell"),
        ([2.0, 2.1], 1, "2 seeds: too few to tell"),  # though t's interval excludes 0
        ([2.0, 2.0, 2.0], 1, "3 seeds: too few to tell"),  # no spread to judge by
        ([0.0, 0.0, 0.0], 1, "the same in every seed"),
        ([2.0, 2.1, 1.0], 1, "better"),
        ([2.0, 2.1, 1.0], 9, "perhaps better"),
        ([-2.0, -2.1, -1.0], 1, "worse"),
        ([2.0, 2.1, -0.1], 1, "3 seeds: too few to tell"),
        ([2.0, 2.1, -0.1, -2.0, 0.5], 1, "no difference seen"),
    ],
)
def test_the_verdict_says_what_so_few_seeds_can_tell(differences, family, words):
    found = paired(differences, [0.0] * len(differences), True)
    assert verdict(found, family * found.p, True) == words
    opposite = {"better": "worse", "worse": "better", "perhaps better": "perhaps worse"}
    assert verdict(found, family * found.p, False) == opposite.get(words, words)
