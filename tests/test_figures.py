"""What the figures show: lines and points read back from matplotlib against numbers computed by hand."""

import itertools
import random
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colors
from matplotlib import pyplot as plt
from scipy.optimize import minimize
from tree import write_run

from mtl.report.figures import paper, per_run
from mtl.report.figures.style import COLOURS, REFERENCE, REST
from mtl.report.protocols import benchmarks
from mtl.report.runs import load

UP = {"a_accuracy": True, "b_error": False}


def read(root):
    collection = load([root])
    assert not collection.damaged
    (benchmark,) = benchmarks(collection.runs, collection.stopped)
    return benchmark


@pytest.fixture
def axes(request):
    """`axes(benchmark, "cost")`: the axes of one figure as drawn."""
    made = []

    def call(benchmark, name):
        (arch,) = benchmark.archs
        figure = next(f for f in per_run.figures(benchmark)[arch] if f.name == name)
        with plt.rc_context(paper.LOOK):
            made.append(paper.render(figure, per_run.styles(benchmark), name))
        return made[-1].axes

    yield call
    for canvas in made:
        plt.close(canvas)


def lines(axis):
    """{strategy: (x, y)} of the lines that belong to one."""
    return {k.get_label(): k.get_xydata().T.tolist() for k in axis.lines if not k.get_label().startswith("_")}


def names(benchmark):
    return {f.name for members in per_run.figures(benchmark).values() for f in members}


def test_learning_curves_are_means_in_bands_from_the_lowest_to_the_highest_seed(tmp_path, axes):
    for seed, curve in enumerate([[1.0, 2.0, 9.0], [2.0, 6.0, 3.0], [6.0, 1.0, 3.0]]):
        write_run(tmp_path, "dwa", seed, {"test/a_accuracy": curve, "test/b_error": [3.0, 2.0, 1.0]}, higher=UP)
    write_run(tmp_path, "equal", 0, {"test/a_accuracy": [1.0, 2.0, 4.0], "test/b_error": [3.0, 3.0, 3.0]}, higher=UP)
    left, right = axes(read(tmp_path), "learning-curves")
    assert lines(left) == {"dwa": [[1, 2, 3], [3, 3, 5]], "equal": [[1, 2, 3], [1, 2, 4]]}
    (band,) = left.collections
    corners = {tuple(p) for p in band.get_paths()[0].vertices}
    assert {(1, 1), (1, 6), (2, 1), (2, 6), (3, 3), (3, 9)} <= corners
    assert {y for x, y in corners if x == 2} == {1, 6}
    assert lines(right)["equal"] == [[1, 2, 3], [3, 3, 3]]
    assert "↑" in left.get_title() and "↓" in right.get_title()
    assert {t.get_text() for t in left.texts} == {"dwa", "equal"}


def test_long_curves_are_drawn_at_some_epochs_and_the_caption_says_so(tmp_path):
    write_run(tmp_path, "dwa", 0, {"test/a_accuracy": [float(e * e) for e in range(1, 451)]})
    long = next(f for f in per_run.figures(read(tmp_path))["resnet20"] if f.name == "learning-curves")
    (trace,) = long.panels[0].traces
    assert trace.x == list(range(3, 451, 3)) and trace.y == [e * e for e in trace.x]
    assert "longer than 200 epochs" in long.caption
    write_run(tmp_path / "short", "dwa", 0, {"test/a_accuracy": [1.0] * 200})
    short = next(f for f in per_run.figures(read(tmp_path / "short"))["resnet20"] if f.name == "learning-curves")
    assert len(short.panels[0].traces[0].x) == 200 and "longer" not in short.caption


def test_what_the_microscope_saw_is_drawn_for_any_strategy(tmp_path, axes):
    seen = {
        "micro/tasks/cosine/all": [0.5, 0.25],
        "micro/tasks/cosine/stem": [0.1, 0.2],
        "micro/tasks/cosine/top": [0.3, 0.4],
    }
    write_run(tmp_path, "equal", 0, {"test/a_accuracy": [1.0, 2.0], **seen})
    write_run(tmp_path, "pcgrad", 0, {"test/a_accuracy": [1.0, 2.0], "grad/cosine": [0.6, 0.7]})
    (axis,) = axes(read(tmp_path), "gradients")
    assert {tuple(line.get_ydata()) for line in axis.get_lines()} >= {(0.5, 0.25), (0.6, 0.7)}
    stem, top = axes(read(tmp_path), "layers")
    assert [axis.get_title() for axis in (stem, top)] == ["stem", "top"]
    assert [tuple(axis.get_lines()[0].get_ydata()) for axis in (stem, top)] == [(0.1, 0.2), (0.3, 0.4)]


def test_epochs_without_a_figure_and_nan_leave_a_gap_not_a_shift(tmp_path, axes):
    write_run(tmp_path, "dwa", 0, {"test/a_accuracy": [1.0, 2.0, 3.0], "grad/cosine": [None, 0.5, 0.25]})
    write_run(tmp_path, "dwa", 1, {"test/a_accuracy": [1.0, 2.0, 3.0], "grad/cosine": [0.9, float("nan"), 0.75]})
    (axis,) = axes(read(tmp_path), "gradients")
    assert lines(axis) == {"dwa": [[3], [0.5]]}


def test_weights_are_shares_and_their_sum(tmp_path, axes):
    tasks = {"weights/a": [1.0, 3.0], "weights/b": [1.0, 1.0], "weights/c": [2.0, -4.0]}
    write_run(tmp_path, "dwa", 0, {"test/a_accuracy": [1.0, 2.0], **tasks})
    panels = axes(read(tmp_path), "weights")
    assert [lines(p)["dwa"][1] for p in panels] == [[0.25, 0.375], [0.25, 0.125], [0.5, -0.5], [4, 8]]


def test_of_two_tasks_one_share_is_enough(tmp_path, axes):
    write_run(tmp_path, "dwa", 0, {"test/a_accuracy": [1.0, 2.0], "weights/a": [1.0, 3.0], "weights/b": [1.0, 1.0]})
    share, total = axes(read(tmp_path), "weights")
    assert lines(share)["dwa"][1] == [0.5, 0.75] and lines(total)["dwa"][1] == [2, 4]


def test_parallel_coordinates_put_the_better_end_up_and_end_with_delta_m(tmp_path, axes):
    for loss, a, b in (("dwa", 40.0, 2.0), ("equal", 60.0, 4.0), ("mgda", 50.0, 3.5)):
        write_run(tmp_path, loss, 0, {"test/a_accuracy": [a], "test/b_error": [b]}, higher=UP)
    write_run(tmp_path, "single", 0, {"test/a_accuracy": [50.0]}, task="a", digest="a")
    write_run(tmp_path, "single", 0, {"test/b_error": [4.0]}, task="b", digest="b", higher={"b_error": False})
    benchmark = read(tmp_path)
    # Δm by hand: dwa (−20 % + 50 %) / 2, equal (+20 % + 0 %) / 2, mgda (0 % + 12.5 %) / 2
    assert per_run.delta_m(benchmark) == pytest.approx({"dwa": 15, "equal": 10, "mgda": 6.25})
    (axis,) = axes(benchmark, "parallel-coordinates")
    found = {k: y for k, (_, y) in lines(axis).items() if len(y) > 2 or k in ("dwa", "equal", "mgda")}
    assert found["dwa"] == pytest.approx([0, 1, 1])
    assert found["equal"] == pytest.approx([1, 0, 3.75 / 8.75])
    assert found["mgda"] == pytest.approx([0.5, 0.25, 0])
    assert {t.get_text() for t in axis.texts} >= {"40", "60", "4", "2", "6.25", "15"}


def test_pareto_shows_every_run_the_means_and_the_baselines(tmp_path, axes):
    for seed, (a, b) in enumerate([(1.0, 5.0), (3.0, 1.0)]):
        write_run(tmp_path, "dwa", seed, {"test/a_accuracy": [a], "test/b_accuracy": [b]})
    write_run(tmp_path, "equal", 0, {"test/a_accuracy": [4.0], "test/b_accuracy": [1.0]})
    write_run(tmp_path, "mgda", 0, {"test/a_accuracy": [1.0], "test/b_accuracy": [2.0]})
    write_run(tmp_path, "single", 0, {"test/a_accuracy": [2.5]}, task="a")
    (axis,) = axes(read(tmp_path), "pareto")
    points = {(c.get_label(), *p) for c in axis.collections for p in c.get_offsets().tolist()}
    assert points == {("dwa", 1, 5), ("dwa", 3, 1), ("dwa", 2, 3), ("equal", 4, 1), ("mgda", 1, 2)}
    rule, front = axis.lines
    assert rule.get_xdata() == [2.5, 2.5] and {t.get_text() for t in axis.texts} == {"a alone"}
    assert front.get_xydata().tolist() == [[2, 3], [2, 1], [4, 1]]  # with the corner; mgda is dominated


@pytest.mark.parametrize(("up", "right"), list(itertools.product([True, False], repeat=2)))
def test_the_front_is_that_of_a_sweep_from_the_best_end(up, right):
    draw = random.Random(3)
    points = [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(30)]
    front = per_run.pareto_front(points, up, right)
    better = {True: max, False: min}[right]
    # Sweeping from the best first coordinate, a point is on the front when its second one is a new record.
    record, expected = None, []
    for x in sorted({p[0] for p in points}, reverse=up):
        y = better(b for a, b in points if a == x)
        if record is None or (y != record and better(y, record) == y):
            expected.append((x, y))
            record = y
    assert front == sorted(expected)


def test_more_than_two_tasks_make_a_matrix(tmp_path):
    write_run(tmp_path, "dwa", 0, {f"test/{t}_accuracy": [1.0] for t in "abcdefg"})
    (pareto,) = [f for f in per_run.figures(read(tmp_path))["resnet20"] if f.name == "pareto"]
    assert len(pareto.panels) == 10 and "5 of 7" in pareto.caption


def test_cost_is_milliseconds_a_step(tmp_path, axes):
    write_run(tmp_path, "dwa", 0, {"test/a_accuracy": [7.0]}, rate=200.0, batch=50)
    (axis,) = axes(read(tmp_path), "cost")
    assert axis.collections[0].get_offsets().tolist() == [[250.0, 7.0]]


def test_learning_rates_join_what_differs_in_nothing_else(tmp_path, axes):
    for i, (lr, a) in enumerate([(0.1, 5.0), (0.01, 7.0), (1.0, 1.0)]):
        for seed in (0, 1):
            write_run(tmp_path, "dwa", seed, {"test/a_accuracy": [a + seed]}, lr=lr, digest=f"{i}")
    write_run(tmp_path, "equal", 0, {"test/a_accuracy": [9.0]})
    (axis,) = axes(read(tmp_path), "learning-rates")
    assert lines(axis) == {"dwa, lr 0.01": [[0.01, 0.1, 1.0], [7.5, 5.5, 1.5]]}
    assert axis.get_xscale() == "log"


def test_figures_without_data_are_left_out(tmp_path):
    write_run(tmp_path, "dwa", 0, {"test/a_accuracy": [1.0, 2.0]})
    assert names(read(tmp_path)) == {"learning-curves", "cost"}


def test_of_fifty_strategies_the_best_eight_and_equal_weighting_stand_out(tmp_path, axes):
    for i in range(50):
        write_run(tmp_path, f"m{i:02}", 0, {"test/a_accuracy": [0.0, float(i)], "test/b_accuracy": [0.0, 1.0]})
    write_run(tmp_path, "equal", 0, {"test/a_accuracy": [0.0, -1.0], "test/b_accuracy": [0.0, 1.0]})
    benchmark = read(tmp_path)
    best = {f"m{i}" for i in range(42, 50)}
    looks = per_run.styles(benchmark)
    assert {k for k, v in looks.items() if v.prominent} == best | {"equal"}
    assert {looks[k].colour for k in best} == set(COLOURS) and looks["equal"].colour == REFERENCE
    for name in ("learning-curves", "parallel-coordinates"):
        axis = axes(benchmark, name)[0]
        drawn = {k.get_label(): k for k in axis.lines if not k.get_label().startswith("_")}
        assert len(drawn) == 51
        for label, line in drawn.items():  # the same colour in all figures
            assert colors.to_hex(line.get_color()).upper() == looks[label].colour
        assert colors.to_hex(drawn["m03"].get_color()).upper() == REST
        assert {t.get_text() for t in axis.texts if t.get_text() in looks} == best | {"equal"}
    (pareto,) = axes(benchmark, "pareto")
    (legend,) = pareto.figure.legends
    shown = [t.get_text() for t in legend.get_texts()]
    assert shown == [f"m{i}" for i in range(49, 41, -1)] + ["equal", "42 others"]


@pytest.mark.parametrize("seed", range(5))
def test_names_are_moved_apart_as_little_as_possible(seed):
    draw = np.random.default_rng(seed)
    wanted, gap = draw.uniform(0.3, 0.7, 6), 0.1
    found = np.array(paper.spread(wanted, gap))
    order = np.argsort(wanted)
    limits = [{"type": "ineq", "fun": lambda h, a=a, b=b: h[b] - h[a] - gap} for a, b in itertools.pairwise(order)]
    limits += [{"type": "ineq", "fun": lambda h: np.concatenate([h, 1 - h])}]
    oracle = minimize(lambda h: ((h - wanted) ** 2).sum(), np.linspace(0, 1, 6)[np.argsort(order)], constraints=limits)
    assert found == pytest.approx(oracle.x, abs=1e-3)


def test_too_many_names_share_the_room():
    assert paper.spread([0.5] * 5, 0.3) == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_files_are_written_in_every_format_and_are_not_blank(tmp_path):
    for loss, seed in itertools.product(("dwa", "equal"), (0, 1)):
        write_run(tmp_path / "runs", loss, seed, {"test/a_accuracy": [1.0 + seed, 2.0]})
    files = paper.draw(read(tmp_path / "runs"), tmp_path / "figures", paper.FORMATS)
    assert {f.name for f in files} == {
        f"synthetic-resnet20-{n}.{s}" for n in ("learning-curves", "cost") for s in paper.FORMATS
    }
    for file in files:
        if file.suffix == ".png":
            assert plt.imread(file)[..., :3].std() > 0.02
        elif file.suffix == ".pdf":
            content = file.read_bytes()
            assert b"/FontFile2" in content and b"/Type3" not in content  # embedded, and not as bitmaps
        else:
            tags = [e.tag for e in ElementTree.parse(file).iter()]
            assert sum(t.endswith("path") for t in tags) > 20


def test_a_file_is_the_same_when_drawn_again(tmp_path):
    write_run(tmp_path / "runs", "dwa", 0, {"test/a_accuracy": [1.0, 2.0]})
    benchmark = read(tmp_path / "runs")
    first, second = (paper.draw(benchmark, tmp_path / n, ("svg",)) for n in "12")
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]


def test_architectures_have_figures_of_their_own_and_one_colour_per_strategy(tmp_path):
    for arch, loss in itertools.product(("resnet20", "vgg"), ("dwa", "equal")):
        write_run(tmp_path, loss, 0, {"test/a_accuracy": [1.0, 2.0]}, arch=arch)
    benchmark = read(tmp_path)
    found = per_run.figures(benchmark)
    assert set(found) == {"resnet20", "vgg"} and set(per_run.styles(benchmark)) == {"dwa", "equal"}
    assert all(len(f.panels[0].traces) == 2 for members in found.values() for f in members if f.curves)
