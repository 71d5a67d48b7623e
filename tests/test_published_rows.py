"""Δm and mean ranks of published tables, from their rows, against what their papers print.

A table's first row are its single-task networks. Columns: method, mIoU, pixel accuracy, absolute and relative depth
error; of NYUv2 also mean and median angle and the shares within 11.25, 22.5 and 30 degrees; then Δm, where less is
better, as papers print it. `delta_m` has the opposite sign.
"""

import pytest

from mtl.report.baselines import published
from mtl.report.multitask import delta_m, mean_rank

# NYUv2, SegNet-MTAN, with Δm as printed. LS to Nash-MTL: Navon et al., ICML 2022, table 2. Aligned, AlignedUB:
# Senushkin et al., CVPR 2023. IMGrad, COST: their papers. The others: the NTKMTL paper, NeurIPS 2025, table 1.
NYUV2 = """
STL 38.30 63.76 .6754 .2780 25.01 19.21 30.14 57.20 69.15 0
LS 39.29 65.33 .5493 .2263 28.15 23.96 22.09 47.50 61.08 5.59
SI 38.45 64.27 .5354 .2201 27.60 23.37 22.53 48.57 62.32 4.39
RLW 37.17 63.77 .5759 .2410 28.27 24.18 22.26 47.05 60.62 7.78
DWA 39.11 65.31 .5510 .2285 27.61 23.18 24.17 50.18 62.39 3.57
UW 36.87 63.17 .5446 .2260 27.04 22.61 23.54 49.05 63.65 4.05
MGDA 30.47 59.90 .6070 .2555 24.88 19.45 29.18 56.88 69.36 1.38
PCGrad 38.06 64.64 .5550 .2325 27.41 22.80 23.86 49.83 63.14 3.97
GradDrop 39.39 65.12 .5455 .2279 27.48 22.96 23.38 49.44 62.87 3.58
CAGrad 39.79 65.49 .5486 .2250 26.31 21.58 25.61 52.36 65.58 0.20
IMTL-G 39.35 65.60 .5426 .2256 26.02 21.19 26.20 53.13 66.24 -0.76
MoCo 40.30 66.07 .5575 .2135 26.67 21.83 25.61 51.78 64.85 0.16
Nash-MTL 40.13 65.93 .5261 .2171 25.26 20.08 28.40 55.47 68.15 -4.04
Aligned 40.82 66.33 .53 .22 25.19 19.71 28.88 56.23 68.54 -4.93
AlignedUB 43.11 67.22 .55 .22 25.67 20.57 27.58 54.37 67.12 -3.48
AlignedLibMTL 40.15 66.05 .5520 .2291 25.37 19.89 28.30 55.29 67.95 -3.12
FAMO 38.88 64.90 .5474 .2194 25.06 19.57 29.21 56.61 68.98 -4.10
SDMGrad 40.47 65.90 .5225 .2084 25.07 19.99 28.54 55.74 68.53 -4.84
DB-MTL 41.42 66.45 .5251 .2160 25.03 19.50 28.72 56.17 68.73 -5.36
STCH 41.35 66.07 .4965 .2010 26.55 21.81 24.84 51.39 64.86 -1.35
FairGrad 39.74 66.01 .5377 .2236 24.84 19.60 29.26 56.58 69.16 -4.66
GO4Align 40.42 65.37 .5492 .2167 24.76 18.94 30.54 57.87 69.84 -6.08
NTKMTL 39.68 65.43 .5296 .2168 24.24 18.63 30.74 58.72 70.78 -6.99
NTKMTL-SR 40.23 65.28 .5261 .2136 24.88 19.58 29.53 56.67 69.08 -5.35
IMGrad 40.20 66.19 .52 .22 25.15 19.94 28.69 55.80 68.44 -4.57
COST 38.06 64.71 .54 .23 24.47 18.80 30.84 58.25 70.30 -5.39
"""

# The same network, trained anew by LibMTL (its documents, segnet_results.pdf). LibMTL prints no Δm against this row of
# single tasks: these were computed apart from our code.
LIBMTL = """
STL 38.30 63.76 .6754 .2780 25.01 19.21 30.14 57.20 69.15 0
EW 40.89 66.14 .5524 .2347 27.27 22.41 24.38 50.18 63.36 2.35
DWA 40.50 65.65 .5358 .2222 27.58 22.93 23.30 49.16 62.57 2.94
UW 39.34 64.88 .5294 .2242 26.47 21.30 25.86 52.40 65.47 -0.09
MGDA 29.91 60.06 .5901 .2432 24.55 18.63 30.49 58.02 70.14 -0.70
GradNorm 40.12 65.65 .5213 .2180 25.50 19.84 28.46 55.39 67.85 -4.03
PCGrad 40.61 65.89 .5416 .2287 26.97 22.05 24.68 50.90 64.05 1.36
GradVac 40.90 65.50 .5766 .2438 27.26 22.39 24.55 50.22 63.34 3.14
IMTL 41.19 66.37 .5323 .2237 26.06 20.77 26.76 53.48 66.32 -2.03
GradDrop 40.00 65.61 .5886 .2517 28.05 23.54 22.81 48.01 61.33 6.30
CAGrad 41.27 66.70 .5409 .2356 25.35 19.81 28.44 55.47 68.05 -3.64
Nash 40.66 66.25 .5339 .2266 25.11 19.59 28.70 55.97 68.52 -4.37
RLW 38.82 64.45 .5718 .2366 28.09 23.65 22.54 47.76 61.27 6.21
MoCo 40.72 66.33 .5689 .2455 27.11 22.40 24.11 50.19 63.61 3.05
Aligned 40.15 66.05 .5520 .2291 25.37 19.89 28.30 55.29 67.95 -3.12
"""

# NYUv2, LibMTL's DeepLab, with Δp as printed, averaged within the tasks first: Lin et al., "Dual-Balancing", table 1.
DB_MTL = """
STL 53.50 75.39 .3926 .1605 21.99 15.16 39.04 65.00 75.16 0
EW 53.93 75.53 .3825 .1577 23.57 17.01 35.04 60.99 72.05 -1.78
DB-MTL 53.92 75.60 .3768 .1557 21.97 15.37 38.43 64.81 75.24 1.15
"""

# Cityscapes, SegNet-MTAN, with Δm as printed; sources as of NYUv2.
CITYSCAPES = """
STL 74.01 93.16 .0125 27.77 0
LS 75.18 93.49 .0155 46.77 22.60
SI 70.95 91.73 .0161 33.83 14.11
RLW 74.57 93.41 .0158 47.79 24.38
DWA 75.24 93.52 .0160 44.37 21.45
UW 72.02 92.85 .0140 30.13 5.89
MGDA 68.84 91.54 .0309 33.50 44.14
PCGrad 75.13 93.48 .0154 42.07 18.29
GradDrop 75.27 93.53 .0157 47.54 23.73
CAGrad 75.16 93.48 .0141 37.60 11.64
IMTL-G 75.33 93.49 .0135 38.41 11.10
Nash 75.41 93.66 .0129 35.02 6.82
MoCo 75.42 93.55 .0149 34.19 9.90
GradNorm 73.72 93.04 .0124 34.11 5.63
Aligned 75.77 93.69 .0133 32.66 5.27
AlignedUB 74.89 93.46 .0131 33.92 6.37
FAMO 74.54 93.29 .0145 32.59 8.13
SDMGrad 74.53 93.52 .0137 34.01 7.74
FairGrad 75.72 93.68 .0134 32.25 5.18
GO4Align 72.63 93.03 .0164 27.58 8.13
NTKMTL 73.71 92.71 .0136 27.21 1.92
NTKMTL-SR 72.58 92.93 .0124 31.65 3.84
COST 75.73 93.53 .0133 31.53 4.30
IMGrad 75.13 93.45 .0128 34.95 6.61
"""

# NYUv2: Elich et al., "Examining Common Paradigms in Multi-Task Learning", appendix A4; Adam.
PARADIGMS_SEGNET = """
STL .392 .646 .607 .258 24.74 18.49 .308 .582 .700 0
EW .398 .650 .530 .212 29.53 25.02 .216 .454 .584 10.08
UW .401 .652 .522 .213 27.93 22.80 .243 .494 .623 5.42
RLW .390 .638 .537 .218 30.83 26.78 .196 .424 .554 14.28
IMTL .380 .644 .524 .216 26.35 20.77 .270 .534 .660 2.06
PCGrad .406 .654 .529 .215 28.60 23.75 .231 .477 .606 7.39
CAGrad .405 .661 .527 .211 25.85 20.02 .282 .550 .674 -.65
Aligned-MTL .385 .648 .519 .212 25.51 19.66 .288 .557 .680 -.86
AdaTask .394 .650 .518 .211 26.29 20.67 .273 .536 .661 1.00
MTL-IO .377 .637 .551 .225 30.05 25.50 .215 .447 .574 12.69
"""

# The same with DeepLabV3.
PARADIGMS_DEEPLAB = """
STL .552 .767 .365 .152 21.16 14.52 .402 .668 .768 0
EW .552 .770 .352 .143 22.54 16.05 .366 .634 .742 2.70
UW .532 .755 .358 .141 22.01 15.30 .383 .650 .753 1.59
RLW .556 .768 .360 .150 22.37 15.87 .370 .638 .745 2.96
IMTL .532 .756 .353 .140 21.34 14.61 .399 .666 .766 -.39
PCGrad .558 .772 .357 .146 22.33 15.81 .371 .639 .746 2.34
CAGrad .531 .755 .357 .143 21.42 14.67 .399 .664 .764 .10
Aligned-MTL .531 .752 .355 .144 21.15 14.49 .403 .669 .768 -.33
AdaTask .553 .768 .353 .142 21.44 14.83 .395 .661 .763 -.39
MTL-IO .554 .768 .362 .146 23.31 16.75 .352 .617 .728 5.01
"""

# Cityscapes, from the same appendix.
PARADIGMS_STREETS_SEGNET = """
STL .7122 .9221 .0134 29.88 0
EW .6898 .9165 .0196 109.84 79.43
UW .7052 .9202 .0136 35.69 5.44
RLW .7013 .9196 .0197 103.61 73.91
IMTL .6963 .9170 .0148 45.63 16.55
PCGrad .6770 .9135 .0226 103.88 80.56
CAGrad .7088 .9208 .0162 66.39 35.81
Aligned .7164 .9246 .0154 64.89 32.76
AdaTask .7039 .9196 .0146 52.17 21.28
"""

# The same with DeepLabV3.
PARADIGMS_STREETS_DEEPLAB = """
STL .7203 .9253 .0132 47.37 0
EW .7247 .9268 .0128 47.73 -.80
UW .7224 .9259 .0122 44.37 -3.65
RLW .7230 .9263 .0133 47.76 .26
IMTL .7226 .9259 .0121 45.25 -3.38
PCGrad .7247 .9272 .0130 47.24 -.58
CAGrad .7245 .9264 .0124 45.56 -2.59
Aligned .7225 .9259 .0122 47.70 -1.79
AdaTask .7234 .9260 .0124 47.21 -1.77
"""


HIGHER = [True, True, False, False, False, False, True, True, True]
TASKS = ["segmentation"] * 2 + ["depth"] * 2 + ["normals"] * 5
# Their papers print another Δm than their rows give. Of the last two, the printed depths have two digits.
CONTRADICT = {("NYUV2", "IMTL-G"): -0.60, ("NYUV2", "Aligned"): -4.77, ("NYUV2", "IMGrad"): -4.44}


def read(table: str) -> dict[str, list[str]]:
    return {name: numbers for name, *numbers in map(str.split, table.strip().splitlines())}


def rounding(value: str, single: str) -> float:
    """How much the gain of one metric may be off, in percent, since both numbers were rounded for print."""
    a, b = float(value), float(single)
    halves = [0.5 * 10 ** -len(text.partition(".")[2]) for text in (value, single)]
    return 100 * (halves[0] / b + a * halves[1] / b**2)


def rows(*names: str):
    return [
        pytest.param(table, method, id=f"{table}-{method}")
        for table in names
        for method in list(read(globals()[table]))[1:]
    ]


def gain(table: str, method: str, tasks=None) -> tuple[float, float, float]:
    """Δm of a row, what is printed, and how far rounding may put them apart."""
    found = read(globals()[table])
    single, (*values, printed) = next(iter(found.values()))[: len(found[method]) - 1], found[method]
    higher, names = HIGHER[: len(values)], None if tasks is None else tasks[: len(values)]
    off = [rounding(v, b) for v, b in zip(values, single, strict=True)]
    return (
        -delta_m(list(map(float, values)), list(map(float, single)), higher, names), float(printed), sum(off) / len(off)
    )  # fmt: skip


@pytest.mark.parametrize(("table", "method"), rows("NYUV2", "LIBMTL", "CITYSCAPES"))
def test_flat(table, method):
    """All metrics alike."""
    found, printed, _ = gain(table, method)
    if (table, method) in CONTRADICT:
        assert abs(found - printed) > 0.1
        printed = CONTRADICT[table, method]
    # .0001 of Cityscapes' .0125 is a fifth of a percent of Δm.
    assert found == pytest.approx(printed, abs=0.11 if table == "CITYSCAPES" else 0.03)


@pytest.mark.parametrize("method", ["EW", "DB-MTL"])
def test_averaged_within_the_tasks(method):
    """Positive is good here. Flat, EW would have -3.85."""
    found, printed, _ = gain("DB_MTL", method, TASKS)
    assert -found == pytest.approx(printed, abs=0.02)
    assert abs(gain("DB_MTL", "EW")[0] - 3.85) < 0.01


@pytest.mark.parametrize(("table", "method"), rows(
    "PARADIGMS_SEGNET", "PARADIGMS_DEEPLAB", "PARADIGMS_STREETS_SEGNET", "PARADIGMS_STREETS_DEEPLAB"
))  # fmt: skip
def test_flat_up_to_rounding(table, method):
    """Three digits are printed, and Δm is a mean over seeds."""
    found, printed, off = gain(table, method)
    assert found == pytest.approx(printed, abs=off + 0.01)


@pytest.mark.parametrize(("method", "flat", "within"), [
    ("LS", 5.59, -0.88), ("PCGrad", 3.97, -1.11), ("MGDA", 1.38, 1.66), ("Nash-MTL", -4.05, -7.65),
    ("FairGrad", -4.66, -7.52),
])  # fmt: skip
def test_the_two_definitions_swap_places(method, flat, within):
    """Flat, MGDA beats PCGrad and FairGrad beats Nash-MTL; averaged within the tasks, the other way round."""
    assert gain("NYUV2", method)[0] == pytest.approx(flat, abs=0.01)
    assert gain("NYUV2", method, TASKS)[0] == pytest.approx(within, abs=0.01)


@pytest.mark.parametrize(("name", "table", "shares"), [
    ("nyuv2_segnet_mtan", "NYUV2", 1), ("nyuv2_libmtl", "DB_MTL", 1), ("cityscapes_segnet_mtan", "CITYSCAPES", 1),
    ("nyuv2_paradigms_segnet", "PARADIGMS_SEGNET", 100), ("nyuv2_paradigms_deeplabv3", "PARADIGMS_DEEPLAB", 100),
    ("cityscapes_paradigms_segnet", "PARADIGMS_STREETS_SEGNET", 100),
    ("cityscapes_paradigms_deeplabv3", "PARADIGMS_STREETS_DEEPLAB", 100),
])  # fmt: skip
def test_the_shipped_constants_are_the_rows_of_single_tasks(name, table, shares):
    """Shares in percent, as our metrics are."""
    row = [float(x) for x in read(globals()[table])["STL"][:-1]]
    up = HIGHER[: len(row)]
    wanted = [x * shares if better else x for x, better in zip(row, up, strict=True)]
    assert list(published()[name].values.values()) == pytest.approx(wanted)


def test_mean_ranks():
    """MR of the eleven methods in Nash-MTL's table 2; where two rows are equal, its places differ by one of nine."""
    printed = {"LS": 8.11, "SI": 7.11, "RLW": 10.11, "DWA": 6.88, "UW": 6.44, "MGDA": 5.44, "PCGrad": 6.88,
               "GradDrop": 6.44, "CAGrad": 3.77, "IMTL-G": 3.11, "Nash-MTL": 1.55}  # fmt: skip
    found = read(NYUV2)
    ranks = mean_rank([list(map(float, found[method][:-1])) for method in printed], HIGHER)
    assert ranks == pytest.approx(list(printed.values()), abs=0.13)
