"""The literature's network for QM9, in plain torch: NNConv, GRU and Set2Set.

Gilmer et al., "Neural Message Passing for Quantum Chemistry", ICML 2017, as in Nash-MTL, FAMO and LibMTL, which build
it with torch_geometric. 616,960 shared parameters, and 65 for each task.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl.data.columns import Ragged

ELEMENTS = (1, 6, 7, 8, 9)  # H, C, N, O, F
KINDS = 4  # of bonds: single, double, triple, aromatic
FEATURES = 11  # of an atom; see `describe`
WIDTH, HIDDEN = 64, 128


class NNConvNet(nn.Module):
    """Features (N, 64) of molecules, from atomic numbers, positions and bonds.

    Args:
        rounds: of messages.
        steps: of Set2Set.
    """

    inputs, out_features = ("numbers", "positions", "bonds"), WIDTH

    def __init__(self, rounds: int = 3, steps: int = 3):
        super().__init__()
        self.rounds = rounds
        self.first = nn.Linear(FEATURES, WIDTH)
        self.conv = NNConv(WIDTH, KINDS + 1, HIDDEN)
        self.gru = nn.GRUCell(WIDTH, WIDTH)
        self.set2set = Set2Set(WIDTH, steps)
        self.last = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, numbers: Ragged, positions: Ragged, bonds: Ragged) -> Tensor:
        """Atoms of N molecules to features (N, 64)."""
        edges = _edges(positions, bonds)
        here = torch.ones_like(numbers.values, dtype=torch.bool)
        here = numbers.with_values(here).padded(edges.shape[1], False)
        atoms = torch.relu(self.first(describe(numbers, bonds, positions.dtype)))
        for _ in range(self.rounds):
            message = torch.relu(self.conv(numbers.with_values(atoms), edges, here))
            atoms = self.gru(message, atoms)
        return torch.relu(self.last(self.set2set(numbers.with_values(atoms), here)))


class NNConv(nn.Module):
    """A message is Θ(edge) · atom, with a matrix Θ from a network of two layers; then a mean over the other atoms.

    The matrices, 4,096 numbers for each pair of atoms, are never built. Θ is linear in its network's hidden layer h. So
    the sum over j of Θ(h_ij) x_j is a linear map of the sum over j of h_ij ⊗ x_j, which is much smaller.

    Args:
        width: of atoms.
        features: of an edge.
        hidden: width of the network's hidden layer.
    """

    def __init__(self, width: int, features: int, hidden: int):
        super().__init__()
        self.inner = nn.Linear(features, hidden)
        self.outer = nn.Linear(hidden, width * width)
        self.root = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, atoms: Ragged, edges: Tensor, here: Tensor) -> Tensor:
        """(A, width) new atoms.

        Args:
            atoms: of N molecules, (A, width).
            edges: (N, L, L, features) of all pairs of atoms; L is the number of atoms of the largest molecule.
            here: (N, L) bool, whether there is such an atom.
        """
        width, most = atoms.values.shape[1], here.shape[1]
        other = here[:, :, None] & here[:, None, :] & ~torch.eye(most, dtype=torch.bool, device=here.device)
        hidden = torch.relu(self.inner(edges)) * other[..., None]
        x = atoms.padded(most)
        products = torch.einsum("nijk,njc->nikc", hidden, x.to(hidden.dtype)).flatten(2)  # (N, L, hidden · width)
        # In torch_geometric, row k of the network's last layer holds Θ as (input, output) numbers.
        weight = self.outer.weight.view(width, width, -1).permute(1, 2, 0).reshape(width, -1)
        summed = F.linear(products, weight)
        constant = (other.to(x.dtype) @ x) @ self.outer.bias.view(width, width)
        mean = (summed + constant) / other.sum(2, keepdim=True).clamp(min=1)
        return mean[atoms.owner(), atoms.within()] + self.root(atoms.values) + self.bias


class Set2Set(nn.Module):
    """Vinyals et al., "Order Matters", ICLR 2016: a vector (N, 2 · width) of each set, whatever the order in it.

    Args:
        width: of the set's members.
        steps: in which an LSTM asks for a weighted mean of the members.
    """

    def __init__(self, width: int, steps: int):
        super().__init__()
        self.steps, self.lstm = steps, nn.LSTMCell(2 * width, width)

    def forward(self, members: Ragged, here: Tensor) -> Tensor:
        """The vectors of N sets.

        Args:
            members: (A, width).
            here: (N, L) bool, whether there is such a member.
        """
        x = members.padded(here.shape[1])
        result = x.new_zeros(len(x), 2 * x.shape[2])
        state = (x.new_zeros(len(x), x.shape[2]),) * 2
        for _ in range(self.steps):
            state = self.lstm(result, state)
            query = state[0]
            scores = (x @ query.to(x.dtype)[:, :, None]).squeeze(2).masked_fill(~here, -1e9)  # not −inf: NaN in a
            weights = scores.softmax(1) * here  # set without members
            result = torch.cat([query, (weights[:, :, None] * x).sum(1).to(query.dtype)], 1)
        return result


def describe(numbers: Ragged, bonds: Ragged, dtype: torch.dtype) -> Tensor:
    """(A, 11) features of the atoms, as in torch_geometric's QM9.

    Is H, C, N, O, F; atomic number; is aromatic, sp, sp2, sp3; number of hydrogens. RDKit's hybridisation is guessed
    from the bonds: sp with a triple or two double bonds, sp2 with a double or aromatic one. RDKit also calls an N or O
    beside a double bond sp2.
    """
    number, (first, second, kind) = numbers.values, _flat_bonds(numbers, bonds)
    kinds = F.one_hot(kind, KINDS).to(dtype)
    has = number.new_zeros(len(number), KINDS, dtype=dtype)
    has = has.index_add(0, first, kinds).index_add(0, second, kinds)
    hydrogen = (number == 1).to(dtype)
    hydrogens = torch.zeros_like(hydrogen)
    hydrogens = hydrogens.index_add(0, first, hydrogen[second]).index_add(0, second, hydrogen[first])
    _, double, triple, aromatic = has.unbind(1)
    heavy, bonded = number > 1, has.sum(1) > 0
    sp = (triple > 0) | (double > 1)
    sp2 = ~sp & ((double > 0) | (aromatic > 0))
    flags = torch.stack([aromatic > 0, sp, sp2, heavy & bonded & ~sp & ~sp2], 1)
    element = torch.stack([number == e for e in ELEMENTS], 1)
    return torch.cat([element, number[:, None], flags, hydrogens[:, None]], 1).to(dtype)


def _flat_bonds(numbers: Ragged, bonds: Ragged) -> Tensor:
    """(3, B) first atom, second atom and kind of each bond; atoms are counted through the batch."""
    start = numbers.starts()[bonds.owner()]
    first, second, kind = bonds.values.unbind(1)
    return torch.stack([first + start, second + start, kind])


def _edges(positions: Ragged, bonds: Ragged) -> Tensor:
    """(N, L, L, 5) of all pairs of atoms: four kinds of bonds as 0 or 1, and the distance in angstrom."""
    places = positions.padded()
    # Not torch.cdist: its derivative at 0 is not needed, and it would be less exact.
    distance = (places[:, :, None] - places[:, None, :]).norm(dim=3)
    kinds = distance.new_zeros(*distance.shape, KINDS)
    first, second, kind = bonds.values.unbind(1)
    sample = bonds.owner()
    kinds[sample, first, second, kind] = 1
    kinds[sample, second, first, kind] = 1
    return torch.cat([kinds, distance[..., None]], 3)
