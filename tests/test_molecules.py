"""Molecules: pairs of atoms, networks that see no order and no direction, QM9's files, units and splits."""

import csv
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mtl.archs import nnconv
from mtl.archs.check import check_model
from mtl.archs.model import HardSharing, count_parameters
from mtl.archs.mpnn import MPNN
from mtl.archs.nnconv import NNConv, NNConvNet, Set2Set, describe
from mtl.config.identity import identify
from mtl.data import Ragged
from mtl.data.molecules import Molecules, _chains
from mtl.data.qm9 import QM9, TARGETS
from mtl.data.sdf import with_aromatic
from mtl.errors import SetupError
from mtl.evaluate import evaluate
from mtl.parallel.split_batch import drawing, forward
from mtl.random import stream
from mtl.report.__main__ import main as report
from mtl.tasks.groups import places_of_alike
from mtl.tasks.quantity import Quantity, Standard

NETS = {"mpnn": lambda: MPNN(width=16, cutoff=3.0), "nnconv": NNConvNet}


def batch(size: int = 9) -> dict[str, Ragged]:
    """Molecules in float64, with one that has no atom among them."""
    columns = Molecules(train_size=size).splits()["train"].columns
    numbers, positions, bonds = (columns[name] for name in ("numbers", "positions", "bonds"))
    samples = [[c[i] for i in range(size)] for c in (numbers, positions, bonds)]
    for one in samples:
        one.insert(3, one[0][:0])
    # Other bonds and hydrogens than the chains have.
    samples[0][1][0], samples[2][1][0, 2], samples[2][2][1, 2] = 1, 1, 2
    return dict(zip(("numbers", "positions", "bonds"), map(Ragged.of, samples), strict=True))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().double().eval()


def run(net: nn.Module, molecules: dict[str, Ragged]) -> torch.Tensor:
    return net(*(molecules[name] for name in net.inputs))


def test_pairs_are_all_pairs_of_different_rows_of_a_sample():
    column = Ragged(torch.zeros(9), torch.tensor([3, 0, 1, -1, 5]))
    first, second = column.pairs()
    owner = column.owner().tolist()
    wanted = [(i, j) for i in range(9) for j in range(9) if i != j and owner[i] == owner[j]]
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("name", NETS)
def test_a_batch_equals_a_loop_over_its_molecules(name):
    net, molecules = build(name), batch()
    features = run(net, molecules)
    assert features.shape == (10, net.out_features) and features.isfinite().all()
    for i in range(10):
        alone = run(net, {key: column[i : i + 1] for key, column in molecules.items()})
        torch.testing.assert_close(features[i : i + 1], alone, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(features.square().sum(), [*net.parameters()])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", NETS)
def test_order_of_the_atoms_and_place_in_space_change_nothing(name):
    net, molecules = build(name), batch()
    draws = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(molecules["numbers"][i]), generator=draws) for i in range(10)]
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=draws, dtype=torch.float64))[0]
    moved: dict[str, list] = {"numbers": [], "positions": [], "bonds": []}
    for i, order in enumerate(orders):
        moved["numbers"].append(molecules["numbers"][i][order])
        moved["positions"].append(molecules["positions"][i][order] @ rotation + torch.tensor([1.0, -2.0, 3.0]).double())
        bonds, now = molecules["bonds"][i].clone(), order.argsort()
        bonds[:, :2] = now[bonds[:, :2]]
        moved["bonds"].append(bonds.flip(0))
    found = run(net, {key: Ragged.of(samples) for key, samples in moved.items()})
    torch.testing.assert_close(found, run(net, molecules), rtol=1e-8, atol=1e-10)


def test_atoms_beyond_the_cutoff_send_no_message():
    net = build("mpnn")
    numbers = Ragged.of([torch.tensor([6, 8])])
    near, far = (Ragged.of([torch.tensor([[0.0, 0, 0], [d, 0, 0]]).double()]) for d in (3.001, 50.0))
    assert torch.equal(net(numbers, near), net(numbers, far))
    closer = Ragged.of([torch.tensor([[0.0, 0, 0], [2.5, 0, 0]]).double()])
    assert not torch.allclose(net(numbers, closer), net(numbers, far))


@pytest.mark.parametrize("name", NETS)
def test_the_networks_pass_every_check_of_a_network(name):
    benchmark = Molecules()
    model = HardSharing(NETS[name](), benchmark.tasks)
    names = [task.name for task in benchmark.tasks]
    assert check_model(model, benchmark.example(2, torch.Generator()), names).features.shape == (
        2,
        model.trunk.out_features,
    )


@pytest.mark.parametrize("name", NETS)
def test_processes_can_divide_a_batch_of_molecules(name):
    """Two parts of a batch, computed alone and put together, and no random number that would be drawn twice."""
    net, molecules = build(name), batch()
    inputs = [molecules[key] for key in net.inputs]
    assert drawing(net, inputs) is None
    found = torch.zeros(10, net.out_features, dtype=torch.float64)

    def sum_(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == found.shape:
            found.add_(tensor.detach())
        return tensor

    for rank in range(3):
        forward(net, inputs, rank, 3, sum_)
    torch.testing.assert_close(found, run(net, molecules).detach())


def test_nnconv_has_the_parameters_of_the_literature():
    model = HardSharing(NNConvNet(), QM9().tasks)
    heads = sum(p.numel() for task in QM9().tasks for p in model.own_parameters(task.name))
    assert (count_parameters(model), heads) == (617_675, 715)


def graph():
    """Atoms, pairs and edges of a batch, for NNConv in both forms."""
    torch.manual_seed(1)
    molecules = batch()
    numbers, positions = molecules["numbers"], molecules["positions"]
    edges = nnconv._edges(positions, molecules["bonds"])
    here = numbers.with_values(torch.ones_like(numbers.values, dtype=torch.bool)).padded()
    first, second = positions.pairs()
    owner, within = numbers.owner(), numbers.within()
    attributes = edges[owner[first], within[first], within[second]]
    return numbers.with_values(torch.randn(len(owner), 4).double()), edges, here, first, second, attributes


def test_nnconv_equals_a_matrix_for_each_pair_of_atoms():
    atoms, edges, here, first, second, attributes = graph()
    conv = NNConv(4, 5, 7).double()
    nn.init.normal_(conv.bias)
    wanted = torch.zeros_like(atoms.values)
    for i in range(len(wanted)):
        messages = [
            atoms.values[j] @ conv.outer(conv.inner(edge).relu()).view(4, 4)
            for a, j, edge in zip(first, second, attributes, strict=True)
            if a == i
        ]
        wanted[i] = conv.root(atoms.values[i]) + conv.bias + (sum(messages) / len(messages) if messages else 0)
    torch.testing.assert_close(conv(atoms, edges, here), wanted)


def test_nnconv_and_set2set_equal_torch_geometrics():
    peers = pytest.importorskip("torch_geometric.nn")
    atoms, edges, here, first, second, attributes = graph()
    conv, both = NNConv(4, 5, 7).double(), Set2Set(4, 3).double()
    peer = peers.NNConv(4, 4, nn.Sequential(conv.inner, nn.ReLU(), conv.outer), aggr="mean").double()
    peer.lin.weight, peer.bias = conv.root.weight, conv.bias
    found = peer(atoms.values, torch.stack([second, first]), attributes)
    torch.testing.assert_close(conv(atoms, edges, here), found)
    peer = peers.Set2Set(4, 3).double()
    for name, p in both.lstm.named_parameters():
        getattr(peer.lstm, f"{name}_l0").data = p.data
    torch.testing.assert_close(both(atoms, here)[here.any(1)], peer(atoms.values, atoms.owner())[here.any(1)])


def test_features_of_atoms():
    """Acetonitrile H3C-C≡N, and formaldehyde H2C=O."""
    numbers = Ragged.of([torch.tensor([6, 6, 7, 1, 1, 1]), torch.tensor([8, 6, 1, 1])])
    bonds = Ragged.of(
        [
            torch.tensor([[0, 1, 0], [1, 2, 2], [0, 3, 0], [4, 0, 0], [0, 5, 0]]),
            torch.tensor([[0, 1, 1], [1, 2, 0], [3, 1, 0]]),
        ]
    )
    columns = ["H", "C", "N", "O", "F", "number", "aromatic", "sp", "sp2", "sp3", "hydrogens"]
    found = [
        {name: int(value) for name, value in zip(columns, row, strict=True) if value}
        for row in describe(numbers, bonds, torch.float32).tolist()
    ]
    hydrogen = {"H": 1, "number": 1}
    assert found == [
        {"C": 1, "number": 6, "sp3": 1, "hydrogens": 3}, {"C": 1, "number": 6, "sp": 1}, {"N": 1, "number": 7, "sp": 1},
        hydrogen, hydrogen, hydrogen,
        {"O": 1, "number": 8, "sp2": 1}, {"C": 1, "number": 6, "sp2": 1, "hydrogens": 2}, hydrogen, hydrogen,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "bonds", "aromatic"),
    [
        ([6] * 6, [(i, (i + 1) % 6, 1 - i % 2) for i in range(6)], 6),  # benzene
        ([7, 6, 6, 6, 6], [(0, 1, 0), (1, 2, 1), (2, 3, 0), (3, 4, 1), (4, 0, 0)], 5),  # pyrrole
        ([6, 6, 6, 6, 6], [(0, 1, 0), (1, 2, 1), (2, 3, 0), (3, 4, 1), (4, 0, 0)], 0),  # cyclopentadiene
        ([6] * 4, [(0, 1, 1), (1, 2, 0), (2, 3, 1), (3, 0, 0)], 0),  # cyclobutadiene
        ([6] * 6, [(i, (i + 1) % 6, int(i in (0, 2))) for i in range(6)], 0),  # cyclohexadiene
    ],
)
def test_aromatic_rings(numbers, bonds, aromatic):
    assert sum(kind == 3 for _, _, kind in with_aromatic(numbers, bonds)) == aromatic


def test_molecules_do_not_depend_on_their_number_and_follow_from_geometry():
    few, many = (Molecules(train_size=n).load()["train"] for n in (30, 1100))
    assert torch.equal(few.columns["numbers"].values, many.columns["numbers"][:30].values)
    assert torch.equal(few.columns["positions"].values, many.columns["positions"][:30].values)
    benchmark = Molecules(train_size=30)
    part = benchmark.load()["train"]
    positions, numbers = (part.columns[name] for name in ("positions", "numbers"))
    charges = {6: 1, 7: -1, 8: 2}
    for i in range(30):
        p, q = positions[i].numpy(), np.array([charges[n] for n in numbers[i].tolist()])
        d2 = ((p[:, None] - p[None]) ** 2).sum(2)
        upper = np.triu_indices(len(p), 1)
        away = p - p.mean(0)
        wanted = {
            "dipole": np.linalg.norm((q[:, None] * away).sum(0)), "energy": (np.outer(q, q) / (1 + d2))[upper].sum(),
            "radius": np.sqrt((away**2).sum(1).mean()), "contacts": np.exp(-d2 / 2)[upper].sum(),
        }  # fmt: skip
        for task in benchmark.tasks:
            found = task.select(part.columns[task.column])[i].item() * task.standard.std + task.standard.mean
            assert found == pytest.approx(wanted[task.name], rel=1e-4, abs=1e-4)


def test_the_error_is_reported_in_units():
    task = Quantity("energy", unit="meV", standard=Standard())
    raw = torch.tensor([100.0, 130.0, 90.0, float("nan")], dtype=torch.float64)
    assert list(task.answers(torch.ones(2, 1))) == ["standardised"]
    task.standard.set(raw)
    labels = ((raw - task.standard.mean) / task.standard.std).float()
    predicted = torch.tensor([90.0, 130.0, 120.0, 1.0])
    outputs = ((predicted - task.standard.mean) / task.standard.std)[:, None]
    (metric,) = task.metrics
    state = metric.zero()
    metric.update(state, outputs, labels)
    assert metric.compute(state)["mae"] == pytest.approx(40 / 3, rel=1e-5)
    assert metric.scores[0].unit == " meV"
    torch.testing.assert_close(task.answers(outputs)["number"], predicted)
    assert task.loss(outputs, labels).item() == pytest.approx(1000 / 3 / task.standard.std**2, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- QM9's files

NAMES = ["A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "u0", "u298", "h298", "g298", "cv",
         "u0_atom", "u298_atom", "h298_atom", "g298_atom"]  # fmt: skip


def arrays(size: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    molecules = Molecules(train_size=size).load()["train"].columns
    draws = np.random.default_rng(seed)
    ends = np.concatenate([[0], molecules["numbers"].lengths.cumsum(0).numpy()])
    bonds = np.concatenate([[0], molecules["bonds"].lengths.cumsum(0).numpy()])
    return {
        "z": molecules["numbers"].values.numpy(),
        "pos": molecules["positions"].values.numpy().round(4).astype(np.float32),
        "offset": ends, "targets": draws.normal(size=(size, 19)).round(6), "target_names": np.array(NAMES),
        "bonds": molecules["bonds"].values.numpy(), "bond_offset": bonds,
    }  # fmt: skip


def save(path: Path, **changes) -> Path:
    content = {**arrays(), **changes}
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


def write_raw(folder: Path, content: dict[str, np.ndarray], skipped: list[int]) -> None:
    """The three raw files, with bonds and atoms in the fixed columns of the format."""
    folder.mkdir(parents=True, exist_ok=True)
    symbol = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}
    text, size = "", len(content["targets"])
    for i in range(size):
        a, b = content["offset"][i : i + 2]
        c, d = content["bond_offset"][i : i + 2]
        text += f"gdb_{i + 1}\n  -OEChem-\n\n{b - a:3d}{d - c:3d}  0  0  0  0  0  0  0999 V2000\n"
        for z, (x, y, w) in zip(content["z"][a:b], content["pos"][a:b], strict=True):
            text += f"{x:10.4f}{y:10.4f}{w:10.4f} {symbol[int(z)]}   0  0  0  0  0  0  0  0  0  0  0  0\n"
        for first, second, kind in content["bonds"][c:d]:
            text += f"{first + 1:3d}{second + 1:3d}{kind + 1:3d}  0  0  0  0\n"
        text += "M  END\n$$$$\n"
    (folder / "gdb9.sdf").write_text(text)
    with (folder / "gdb9.sdf.csv").open("w", newline="") as file:
        rows = [[f"gdb_{i + 1}", *row] for i, row in enumerate(content["targets"].tolist())]
        csv.writer(file).writerows([["mol_id", *NAMES], *rows])
    lines = [f"{i + 1:9d}  C  C" for i in skipped]
    (folder / "uncharacterized.txt").write_text("\n".join([*["heading"] * 9, *lines, f"{len(skipped)} compounds", ""]))


SIZES = {"test_size": 8, "val_size": 6}


def test_the_raw_files_hold_what_the_arrays_hold(tmp_path):
    """Without the uncharacterised molecules; labels in the order and the units of the papers."""
    content, skipped = arrays(), [3, 17]
    write_raw(tmp_path / "qm9", content, skipped)
    benchmark = QM9(root=str(tmp_path), **SIZES)
    parts = benchmark.splits()
    assert {name: len(part) for name, part in parts.items()} == {"train": 24, "val": 6, "test": 8}
    kept = [i for i in range(40) if i not in skipped]
    factors = {"homo": 27211.386246, "lumo": 27211.386246, "zpve": 27211.386246}
    order = ["mu", "alpha", "homo", "lumo", "r2", "zpve", "u0_atom", "u298_atom", "h298_atom", "g298_atom", "cv"]
    values = content["targets"][:, [NAMES.index(n) for n in order]][kept]
    values *= [43.36414 if n.endswith("atom") else factors.get(n, 1.0) for n in order]
    raw = torch.stack(
        [
            torch.cat([t.select(parts[s].columns["targets"]) for s in parts]) * t.standard.std + t.standard.mean
            for t in benchmark.tasks
        ],
        1,
    )
    assert list(TARGETS) == [t.name for t in benchmark.tasks]
    assert places_of_alike(benchmark.tasks) == [list(range(11))]  # in spite of their units: computed together
    torch.testing.assert_close(
        raw.sort(0).values, torch.from_numpy(values).sort(0).values.float(), rtol=1e-4, atol=1e-3
    )
    same = QM9(file=str(save(tmp_path / "all.npz")), test_size=40 - 32, val_size=2).load()
    atoms = sum(len(part.columns["numbers"].values) for part in same.values())
    assert atoms == content["offset"][-1]
    found = sum(len(part.columns["bonds"].values) for part in parts.values())
    assert found == content["bond_offset"][-1] - sum(np.diff(content["bond_offset"])[skipped])


def test_labels_are_standardised_by_training_molecules_alone(tmp_path):
    clean = save(tmp_path / "clean.npz")
    benchmark = QM9(file=str(clean), **SIZES)
    train = benchmark.load()["train"]
    label = train.columns["targets"][:, 2].double()
    assert label.mean().abs() < 1e-6 and label.std().item() == pytest.approx(1, rel=1e-6)
    # Poison all molecules that are not for training.
    order = torch.randperm(40, generator=stream(0, "qm9_split"))
    targets = arrays()["targets"]
    targets[order[:14].numpy()] = 1e9
    poisoned = str(save(tmp_path / "poisoned.npz", targets=targets))
    again = QM9(file=poisoned, **SIZES)
    assert torch.equal(again.load()["train"].columns["targets"], train.columns["targets"])
    assert again.facts() == benchmark.facts()
    leaky = QM9(file=poisoned, statistics="all", **SIZES)
    assert not torch.equal(leaky.load()["train"].columns["targets"], train.columns["targets"])
    # A model that is loaded keeps the statistics of its training, whatever data it is evaluated on.
    loaded = QM9(file=poisoned, statistics="all", **SIZES)
    loaded.recall(benchmark.facts())
    assert torch.equal(loaded.load()["train"].columns["targets"], train.columns["targets"])


def test_splits_are_fixed_or_follow_the_seed(tmp_path):
    file = str(save(tmp_path / "x.npz"))

    def held_out(split: str, seed: int) -> list[float]:
        torch.manual_seed(seed)  # as the engine does before `load`
        benchmark = QM9(file=file, split=split, **SIZES)
        part, task = benchmark.load()["test"], benchmark.tasks[0]
        return (task.select(part.columns["targets"]) * task.standard.std + task.standard.mean).sort().values.tolist()

    assert held_out("fixed", 0) == pytest.approx(held_out("fixed", 1))
    assert held_out("seed", 0) == pytest.approx(held_out("seed", 0))
    assert held_out("seed", 0) != pytest.approx(held_out("seed", 1))


def damage(name: str, change):
    def apply(tmp_path: Path) -> QM9:
        write_raw(tmp_path / "qm9", arrays(), [3])
        file = tmp_path / "qm9" / name
        file.write_text(change(file.read_text()))
        return QM9(root=str(tmp_path), **SIZES)

    return apply


def packed(**changes):
    return lambda tmp_path: QM9(file=str(save(tmp_path / "x.npz", **changes)), **SIZES)


def not_npz(tmp_path: Path) -> QM9:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 cut off")
    return QM9(file=str(tmp_path / "x.npz"), **SIZES)


BROKEN = {
    "none": (lambda p: QM9(root=str(p)), "QM9 is not in .*qm9: gdb9.sdf is missing.*data.file=X.npz.*data=molecules"),
    "no file": (lambda p: QM9(file=str(p / "y.npz")), "data.file=.*y.npz: no such file"),
    "cut": (not_npz, "is damaged, or no .npz file"),
    "no array": (packed(pos=None), "there is no array pos, only z, offset"),
    "offset": (packed(offset=np.arange(41)), "offset must go from 0 to [0-9]+ in 40 steps"),
    "targets": (packed(targets=np.zeros((40, 3))), r"targets have the shape \(40, 3\), and there are 19 target_names"),
    "names": (packed(target_names=np.array(["x", *NAMES[1:8], "y", *NAMES[9:]])), "there is no target r2, only x, B"),
    "constant": (packed(targets=np.ones((40, 19))), "labels of mu: 26 values with a standard deviation of 0.0"),
    "position": (packed(pos=np.where(np.arange(len(arrays()["pos"]))[:, None] == 3, np.nan, arrays()["pos"])),
                 r"split: positions: sample [0-9]+ has the row \[nan, nan, nan\]; finite numbers are needed"),
    "few": (lambda p: QM9(file=str(save(p / "x.npz"))), "40 molecules, too few.*data.test_size=4 data.val_size=4"),
    "sdf": (damage("gdb9.sdf", lambda t: t.replace(" C ", " X ", 1)), "gdb9.sdf is damaged: record 1 is no molecule"),
    "sdf cut": (damage("gdb9.sdf", lambda t: t[:-30]), "gdb9.sdf is damaged: the file ends within record 40"),
    "csv cut": (damage("gdb9.sdf.csv", lambda t: "\n".join(t.split("\n")[:-3])), "38 rows, and .* has 40 molecules"),
    "csv": (damage("gdb9.sdf.csv", lambda t: re.sub(r"gdb_1,[^,]*", "gdb_1,?", t, count=1)), "gdb9.sdf.csv is damaged"),
    "list": (damage("uncharacterized.txt", lambda t: t.replace("        4 ", "    9999 ")), "txt is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_file_is_named_in_one_line(case, tmp_path):
    make, message = BROKEN[case]
    with pytest.raises(SetupError, match=message) as raised:
        make(tmp_path).splits()
    assert "\n" not in str(raised.value)


# -------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_learns_molecules_and_predicts(cli, tmp_path):
    run = cli("data=molecules", "arch=mpnn", "arch.width=16", "data.train_size=256", "data.test_size=64", "logger=none",
              "optimizer=adam", "optimizer.lr=1e-2", "trainer.epochs=3", "data.batch_size=16",
              "trainer.device=cpu", "loss=pcgrad", "data.val_fraction=0.2", "schedule=plateau")  # fmt: skip
    assert run.code == 0, run.err
    assert " MMAC a sample" in run.out and " samples/s" in run.out and "image" not in run.out and "img" not in run.out
    (summary,) = tmp_path.rglob("summary.json")
    rows = [json.loads(line) for line in (summary.parent / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["test/radius_mae"] < 0.7 * rows[0]["test/radius_mae"]
    molecules = _chains(64, "test").columns
    np.savez(tmp_path / "new.npz", **{
        key: value for name in ("numbers", "positions", "bonds")
        for key, value in ((name, molecules[name].values.numpy()), (f"{name}_lengths", molecules[name].lengths.numpy()))
    })  # fmt: skip
    from mtl.predict import main

    assert main([str(summary.parent), str(tmp_path / "new.npz"), "--out", str(tmp_path / "out.csv")]) == 0
    with (tmp_path / "out.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["file"] for row in table] == [f"{tmp_path}/new.npz[{i}]" for i in range(64)]
    # In the unit, although no training molecule is read.
    error = np.abs(np.array([float(row["radius_number"]) for row in table]) - molecules["targets"][:, 2].numpy()).mean()
    assert error == pytest.approx(evaluate(summary.parent, {}, device="cpu").figures["test/radius_mae"], rel=1e-4)
    assert report([str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    (cost,) = (tmp_path / "report").glob("*-cost.csv")
    assert "samples/s" in cost.read_text()


def test_no_mean_is_taken_over_different_units(tmp_path, caplog):
    """The table at the end of a run of 11 tasks: dipole moments are not averaged with energies."""
    from mtl.engine.announce import footer
    from mtl.engine.directory import RunDirectory
    from mtl.engine.summary import units
    from mtl.report.overall import kinds
    from mtl.report.protocols import Protocol

    tasks = QM9(file="x.npz").tasks
    values = {f"test/{task.name}_mae": float(i) for i, task in enumerate(tasks)}
    summary = {"best": {key: {"value": value, "epoch": 2} for key, value in values.items()}, "last": values,
               "selected": None, "images_per_second": 1.0, "peak_memory_gib": 1.0, "seconds": 1.0}  # fmt: skip
    with caplog.at_level(logging.INFO, "mtl"):
        footer(summary, 2, RunDirectory(tmp_path), "python train.py", "sample", tasks)
    lines = [line.split() for line in caplog.messages[0].splitlines()[2:]]
    assert lines == [["mu_mae", "0", "2", "0"], ["alpha_mae", "1", "2", "1"],
                     ["mean", "mae", "(meV)", "of", "7", "tasks", "5.714", "each", "its", "own", "5.714"],
                     ["r2_mae", "4", "2", "4"], ["cv_mae", "10", "2", "10"]]  # fmt: skip
    # The report reads the units in summary.json.
    mains = {task.name: f"{task.name}_mae" for task in tasks}
    protocol = Protocol("qm9", dict.fromkeys(mains.values(), False), [], [], mains, units=units(tasks))
    assert list(kinds(protocol)) == ["mu_mae", "alpha_mae", "mean mae (meV) of 7 tasks", "r2_mae", "cv_mae"]


def test_the_identity_of_a_run_follows_the_content_of_its_file(tmp_path):
    """Not its place: a moved file is the same data, and another file of the same name is not."""
    content = {**arrays(), "targets": arrays(seed=1)["targets"]}
    (tmp_path / "there").mkdir()
    files = [save(tmp_path / "x.npz"), save(tmp_path / "there" / "y.npz"), save(tmp_path / "z.npz", **content)]
    node = {"_target_": "mtl.data.qm9.QM9"}
    rest = {"arch": {"_target_": "mtl.archs.mpnn.MPNN"}, "loss": {"_target_": "mtl.losses.Equal"}, "seed": 0}
    digests = [identify({"data": {**node, "file": str(file)}, **rest}, {"data": "qm9"}).digest for file in files]
    assert digests[0] == digests[1] != digests[2]


def test_an_image_network_is_refused_in_one_line(cli):
    run = cli("data=molecules", "arch=resnet20", "logger=none")
    assert run.code == 2 and "ResNet reads image; the data has numbers, positions, bonds" in run.err
