"""The certificates on disk are those of this code, and a method that is not what it claims makes them fail."""

from contextlib import nullcontext

import numpy as np
import pytest
import shipped
import torch
from torch.nn.utils import vector_to_parameters

from mtl.archs.fcn import FCN
from mtl.certify import agreement, certify, dense, main, optimality, pages, properties
from mtl.certify.problem import ANCHOR, HISTORY, TASKS, CertificateNetwork, experienced, make, problem, step
from mtl.errors import UserError
from mtl.losses import MOML, AutoLambda, CAGrad, PCGrad, RepMTL, Static, UPGrad

REGENERATE = "missing or out of date; run: make lists"


@pytest.fixture(autouse=True)
def threads():
    torch.set_num_threads(1)


METHODS = [name for name in shipped.options("loss") if name not in pages.SKIPPED]


@pytest.mark.parametrize("name", METHODS)
def test_the_page_is_up_to_date_and_every_claim_holds(name):
    certificate = certify(name)
    assert certificate.complaints() == []
    written = {file.name: file.read_text() for file in pages.DOCS.glob("*.md")}
    same = written.get(f"{name}.md") == pages.page(certificate)
    assert same, f"docs/methods/{name}.md: {REGENERATE}"
    lines = written["README.md"].splitlines()
    listed = pages.entry(certificate) in lines and pages.row(certificate) in lines
    assert listed, f"docs/methods/README.md: {REGENERATE}"


def test_the_index_lists_all_methods_and_nothing_else():
    lines = (pages.DOCS / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| [`")]
    listed = [line.split("`")[1] for line in rows]
    assert set(listed) <= set(pages.names()), f"docs/methods/README.md: {REGENERATE}"
    # A method that git does not track is listed or not, as its author likes.
    assert [name for name in listed if name in METHODS] == 2 * METHODS, f"docs/methods/README.md: {REGENERATE}"
    assert [line for line in lines if line not in rows] == pages.index([]).splitlines(), REGENERATE


def test_the_methods_of_today_keep_their_oracles():
    """A new method may come without one; its page says so."""
    assert set(agreement.oracles().STEPS) <= set(pages.names())
    assert len(agreement.oracles().STEPS) >= 50


def test_a_method_without_an_oracle_is_no_failure_and_its_page_says_so(monkeypatch):
    monkeypatch.delitem(agreement.oracles().STEPS, "equal")
    certificate = certify("equal")
    assert certificate.complaints() == []
    assert f"NumPy oracle, over ten steps | {pages.NO_ORACLE} |" in pages.page(certificate)


def test_a_claim_that_does_not_hold_is_named(monkeypatch, capsys):
    monkeypatch.setattr(CAGrad, "claims", ("non_conflicting",))
    assert main(["loss=cagrad"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: cagrad claims to be non conflicting and is not\n"
    assert captured.out.startswith("# `loss=cagrad`")


def test_a_broken_method_loses_its_properties_its_oracle_and_its_optimum(monkeypatch):
    honest = UPGrad.weights
    monkeypatch.setattr(UPGrad, "weights", lambda self, G, present=None: honest(self, G, present).flip(0))
    broken = certify("upgrad")
    assert broken.failed == ["linear", "non_conflicting"]
    assert not broken.properties["permutation"] and not broken.properties["exact_absence"]
    assert [line.split(" by ")[0] for line in broken.complaints()[2:]] == [
        "differs from its oracle",
        "misses its optimality conditions",
    ]


def test_a_method_without_numbers_is_no_agreement(monkeypatch):
    monkeypatch.setattr(UPGrad, "weights", lambda self, gramian, present=None: gramian[0] * torch.nan)
    broken = certify("upgrad")
    assert len(broken.complaints()) == 5 and agreement.bound(broken.oracle) == "no number"


# ------------------------------------------------------------------------------------------------------ the problem


def test_losses_and_gradients_are_those_that_were_set():
    tasks = problem(3)
    net = CertificateNetwork(make("equal"), tasks)
    shared, heads = net.gradients()
    torch.testing.assert_close(torch.stack(net.losses(tasks.slopes)[0]), tasks.values)
    torch.testing.assert_close(shared, tasks.slopes)
    torch.testing.assert_close(heads, tasks.residuals @ ANCHOR)
    mixed = tasks.taken([2, 0]).scaled(torch.tensor([3.0, 0.5]).double())
    torch.testing.assert_close(mixed.slopes, tasks.slopes[[2, 0]] * torch.tensor([[3.0], [0.5]]).double())


@pytest.mark.parametrize(("name", "method"), [("auto_lambda", AutoLambda), ("moml", MOML), ("rep_mtl", RepMTL)])
def test_what_looks_into_the_network_finds_something(name, method):
    """The weights have moved apart, or the regulariser has turned the step away from equal weighting's."""
    strategy, tasks = experienced(name), problem(0)
    d = step(strategy, tasks).shared
    assert isinstance(strategy, method) and properties.apart(d, tasks.slopes.sum(0)) > 0.02


def test_a_history_leaves_every_stateful_method_changed():
    for name in pages.names():
        fresh, old = make(name).memory(), experienced(name).memory()
        constant = ("equal", "static", "single", "rep_mtl")
        assert name in constant or not old or any(not torch.equal(v, old[k]) for k, v in fresh.items() if v is not None)


# ------------------------------------------------------------------------------------------------------- maps


def test_the_problem_on_maps_has_the_tasks_own_losses():
    """Three losses of rooms with missing pixels, and their gradients, from the network itself."""
    tasks, (rooms, columns) = dense.problem(4), dense._rooms()
    backbone = FCN(3, dense.WIDTH).double().eval()
    decoders = torch.nn.ModuleList(backbone.decoder(task) for task in rooms.tasks).double()
    vector_to_parameters(tasks.theta, backbone.parameters())
    vector_to_parameters(tasks.head, decoders.parameters())
    features, targets = backbone(columns["image"][tasks.rows]), [columns[t.column][tasks.rows] for t in rooms.tasks]
    pixels = dense.BATCH * dense.SIDE**2
    assert all(0 < task.count(target) < pixels for task, target in zip(rooms.tasks, targets, strict=True))
    losses = [t.loss(d(features), y) for t, d, y in zip(rooms.tasks, decoders, targets, strict=True)]
    torch.testing.assert_close(tasks.values, torch.stack(losses))
    rows = [torch.autograd.grad(x, backbone.parameters(), retain_graph=True) for x in losses]
    torch.testing.assert_close(tasks.slopes, torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    # The mean of two halves is the whole.
    network = tasks.network(make("equal"))
    halves = [torch.stack(network.losses(half)[0]) for half in tasks.batches(2)]
    torch.testing.assert_close(sum(halves) / 2, tasks.values)
    # A turned task has another gradient, and the same loss; a mixed one has both.
    matrix = torch.tensor([[1.0, 0, 0], [2, -1, 0], [0, 0, 3]]).double()
    for changed, values in ((tasks.turned(matrix), tasks.values), (tasks.mixed(matrix), matrix @ tasks.values)):
        torch.testing.assert_close(changed.values, values)
        torch.testing.assert_close(torch.stack(changed.network(make("equal")).losses(slice(0, 4))[0]), values)
        torch.testing.assert_close(changed.slopes, matrix @ tasks.slopes)


@pytest.mark.parametrize("name", ["gls", "cagrad", "graddrop", "rotograd"])
def test_verdicts_on_maps_are_those_on_vectors(name):
    """One method of each family; `python -m mtl.certify problem=dense` takes all. RotoGrad is not for maps."""
    faults, notes = dense.differences(name)
    assert faults == [] and len(notes) == (name == "rotograd")


def test_another_verdict_on_maps_is_named(monkeypatch, capsys):
    found = {False: ({"linear": True}, {"linear": True}), True: ({"linear": True}, {"linear": False})}
    monkeypatch.setattr(dense, "PROPERTIES", ["linear"])
    monkeypatch.setattr(dense, "verdicts", lambda name, *source: found[bool(source)])
    assert main(["problem=dense", "loss=equal"]) == 1
    out, err = capsys.readouterr()
    assert out == "equal: linear: [True, True] on vectors, [True, False] on maps (first step, later)\n"
    assert err == "error: 1 of 1 methods have other properties on maps\n"
    assert main(["problem=dense", "loss=excess_mtl"]) == 0
    assert "its constant 1e-7" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- properties


def test_what_holds_in_the_first_step_only_is_told_apart():
    """The log-variances of uncertainty weighting move with the losses' scale."""
    assert properties.linear("uncertainty", 0) and not properties.linear("uncertainty", HISTORY)
    assert (
        "| linear under scaling: A(diag(a + b) J) = A(diag(a) J) + A(diag(b) J) | only in the first step |"
        in (pages.DOCS / "uncertainty.md").read_text()
    )


def test_imtl_g_turns_against_all_tasks_when_one_gradient_is_short():
    assert not properties.non_conflicting("imtl_g", 0)


def test_permutation_finds_a_method_that_looks_at_the_position(monkeypatch):
    assert properties.permutation("static", HISTORY)
    monkeypatch.setattr(Static, "forward", lambda self, losses, present=None: losses[0] * 2 + losses[1:].sum())
    assert not properties.permutation("static", HISTORY)


def test_permuted_tasks_keep_their_draws(monkeypatch):
    """Without that PCGrad and RLW would only be permuted in distribution; GradDrop draws for parameters."""
    for name in ("pcgrad", "gradvac", "rlw"):
        assert properties.permutation(name, HISTORY)
    monkeypatch.setattr(properties, "drawn_for", lambda *args: nullcontext())
    assert not properties.permutation("rlw", HISTORY)


def test_absence_finds_a_method_that_counts_the_absent(monkeypatch):
    honest = PCGrad.weights
    monkeypatch.setattr(PCGrad, "weights", lambda self, G, present=None: honest(self, G, present) * len(G))
    assert not properties.exact_absence("pcgrad", HISTORY)


@pytest.mark.parametrize("name", ["moco", "modo", "sdmgrad"])
def test_absent_tasks_that_hold_the_whole_mixture_leave_the_others_their_memory(name):
    """The others begin with equal weights, and go on from step to step as if they were alone."""
    old, present = make(name), torch.tensor([True, False, True])
    old.mixture.copy_(torch.tensor([0.0, 1.0, 0.0]))
    ours, theirs = properties.selected(name, old, range(3)), properties.selected(name, old, [0, 2])
    for k in range(4):
        tasks = problem(k, dimensions=4)
        ours_, theirs_ = step(ours, tasks, present), step(theirs, tasks.taken([0, 2]))
        torch.testing.assert_close(ours_.weights[[0, 2]], theirs_.weights, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours_.shared, theirs_.shared, rtol=1e-9, atol=1e-12)
    assert ours.mixture[1] == 1 and theirs_.weights.std() > 1e-3


def test_a_method_that_cannot_know_of_absence_has_no_exact_absence(monkeypatch):
    """It is certified all the same: an absent task would be refused."""
    monkeypatch.setattr(UPGrad, "weights", lambda self, gramian: torch.ones_like(gramian[0]))
    assert not properties.exact_absence("upgrad", HISTORY) and properties.exact_absence("mgda", HISTORY)


# ------------------------------------------------------------------------------------------------------- optimality


def test_optimality_conditions_of_problems_solved_by_hand():
    """Two orthogonal gradients of lengths 1 and 2: the shortest vector of the hull, the bargain, and the mean."""
    J = np.array([[1.0, 0.0], [0.0, 2.0]])
    equal, fairgrad = make("equal"), make("fairgrad")
    assert optimality.shortest(J, np.array([0.8, 0.2]), equal) < 1e-15
    assert optimality.bargain(J, np.array([1.0, 0.5]), equal) < 1e-15  # w² ‖g‖² = 1
    assert optimality.fair(J, np.array([1.0, 4 ** (-2 / 3)]), fairgrad) < 1e-15  # ‖g‖² w^(3/2) = 1
    assert optimality.projection_of_mean(J, np.array([0.5, 0.5]), equal) < 1e-15
    J = np.array([[1.0, 0.0], [-1.0, 1.0]])  # the mean (0, ½) already serves both
    assert optimality.projection_of_mean(J, np.array([0.5, 0.5]), equal) < 1e-15
    J = np.array([[1.0, 0.0], [-3.0, 1.0]])  # the mean (−1, ½) goes to (0, ½)
    assert optimality.projection_of_mean(J, np.array([1.5, 0.5]), equal) < 1e-15
    for off in ([0.5, 0.5], [1.6, 0.5], [1.8, 0.6]):
        assert optimality.projection_of_mean(J, np.array(off), equal) > 0.01


@pytest.mark.parametrize("name", optimality.CONDITIONS)
def test_a_step_off_the_optimum_has_a_residual(name):
    strategy, tasks = make(name), problem(8, dimensions=4)
    strategy.max_norm = None
    weights, J = step(strategy, tasks).weights.numpy(), tasks.slopes.numpy()
    residual = optimality.CONDITIONS[name]
    assert residual(J, weights, strategy) < 1e-10
    for i in range(TASKS):
        assert residual(J, weights + 1e-3 * weights.max() * np.eye(TASKS)[i], strategy) > 1e-5


# --------------------------------------------------------------------------------------------------- the command


def test_a_stale_page_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    monkeypatch.setattr(pages, "names", lambda: ["equal"])
    assert main([]) == 0
    assert main(["check"]) == 0
    (tmp_path / "equal.md").write_text("old")
    (tmp_path / "gone.md").write_text("a method that is no more")
    assert main(["check"]) == 1
    assert [line.split(";")[0] for line in capsys.readouterr().err.splitlines()] == [
        "stale: docs/methods/equal.md",
        "stale: docs/methods/gone.md",
    ]


def test_without_the_tests_there_are_no_oracles(monkeypatch, tmp_path):
    """As in an installed package."""
    monkeypatch.setattr(agreement, "checkout", lambda: None)
    agreement.oracles.cache_clear()
    certificate = certify("equal")
    assert certificate.oracle is None and certificate.complaints() == []
    assert f"NumPy oracle, over ten steps | {pages.WITHOUT_ORACLES} |" in pages.page(certificate)
    agreement.oracles.cache_clear()


@pytest.mark.parametrize("words", [["loss=cagrat"], ["los=cagrad"]])
def test_a_mistyped_method_gets_one_line(words):
    with pytest.raises(UserError, match=r"did you mean cagrad|not understood") as error:
        main(words)
    assert "\n" not in str(error.value) and error.value.exit_code == 2


# ----------------------------------------------------------------------------------------------- a user's own method

WEIGHTED = """
import torch

class MultiTaskLoss(torch.nn.Module):
    \"\"\"The second loss counts twice.\"\"\"

    def forward(self, first, second, epoch, total_epochs):
        return first + 2 * second
"""
AVERAGED = """
import torch

class MultiTaskLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = None  # a plain attribute, which no state_dict knows

    def forward(self, first, second, epoch, total_epochs):
        now = torch.stack([first, second]).detach()
        self.mean = now if self.mean is None else (self.mean + now) / 2
        return (1 + (self.mean - now)[0].abs()) * first + 2 * second
"""
STRATEGY = """
from mtl.losses.base import LossWeighting, masked

class Power(LossWeighting):
    \"\"\"A power mean.\"\"\"

    claims = ("scale_free",)

    def __init__(self, tasks, power: float = 2.0):
        super().__init__(tasks)
        self.power = power

    def forward(self, losses, present=None):
        return masked(losses, present).pow(self.power).sum().pow(1 / self.power)
"""


def answer(text: str, key: str) -> str:
    """What a page says of a property."""
    rows = (line.split(" | ") for line in text.splitlines() if line.startswith("| "))
    return {row[0].removeprefix("| "): row[1].removesuffix(" |") for row in rows}[pages._sentence(key)]


def test_a_loss_in_a_file_is_measured_with_the_two_losses_that_it_takes(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(WEIGHTED)
    assert main(["loss=custom", f"loss.file={tmp_path / 'mine.py'}"]) == 0
    text = capsys.readouterr().out
    assert "**The second loss counts twice.**" in text and f"file: {tmp_path / 'mine.py'}" in text
    assert answer(text, "linear") == "yes" and answer(text, "task_scale_free") == "no"
    assert answer(text, "permutation").startswith("no") and answer(text, "random") == "no"
    assert answer(text, "exact_absence") == "not measured: it takes 2 losses, no fewer"


def test_what_a_module_remembers_in_plain_attributes_is_part_of_its_history(tmp_path):
    """The running mean of one step is that step's loss: only later steps depend on the losses before."""
    (tmp_path / "mine.py").write_text(AVERAGED)
    certificate = certify(f"custom loss.file={tmp_path / 'mine.py'}")
    assert certificate.first["linear"] and not certificate.later["linear"]


def test_a_strategy_in_a_config_folder_is_measured_and_its_claim_holds(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_strategy.py").write_text(STRATEGY)
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "strangers.yaml").write_text("_target_: own_strategy.Power\npower: 2.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["loss=strangers", "loss.power=3", "--config-dir", str(tmp_path / "conf")]) == 0
    text = capsys.readouterr().out
    assert "**A power mean.**" in text and "power: 3" in text
    assert answer(text, "scale_free") == "yes, as the paper claims" and answer(text, "exact_absence") == "yes"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["loss=custom"], "loss.file: required"),
        (["loss=custom", "loss.file=nope.py"], "nope.py does not exist"),
        (["loss=custom", "loss.file=BROKEN"], r"broken.py:4: AttributeError: .* no attribute 'nothing'"),
        (["loss=custom", "loss.file=FOUR"], "must take 2 losses"),
        (["loss=cagrad", "loss.x=1"], "loss.x: unknown key; allowed: c, rescale"),
        (["loss=cagrad", "loss.c=-1"], "loss.c=-1: must be"),
        (["loss=equal", "--config-dir", "nope"], "nope: is not a folder"),
        (["loss.c=1"], "say which: loss=NAME"),
    ],
)
def test_a_users_mistake_gets_one_line(words, reason, tmp_path):
    head = "import torch\nclass MultiTaskLoss(torch.nn.Module):\n    def forward(self, a, b, "
    (tmp_path / "broken.py").write_text(f"{head}epoch, total):\n        return self.nothing\n")
    (tmp_path / "four.py").write_text(f"{head}c, d, epoch, total):\n        return a\n")
    files = {"BROKEN": str(tmp_path / "broken.py"), "FOUR": str(tmp_path / "four.py")}
    for key, file in files.items():
        words = [word.replace(key, file) for word in words]
    with pytest.raises(UserError, match=reason) as error:
        main(words)
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_pages_replace_generated_pages_only(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    monkeypatch.setattr(pages, "names", lambda: ["equal"])
    (tmp_path / "gone.md").write_text(f"# a method that is no more\n\n{pages.GENERATED}\n")
    (tmp_path / "notes.md").write_text("mine")
    assert main([]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "equal.md", "notes.md"]
