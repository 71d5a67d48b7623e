"""Milliseconds of one weighting call, given the Gramian, beside TorchJD's for the same matrix in the same run.

    python benchmarks/weights.py                      T = 2, 10, 40; CPU, one thread
    python benchmarks/weights.py --device cuda

The Gramian is that of T random float32 gradients of 1,000 parameters. Half of their pairs conflict. This is harder
than training, where most pairs do not. The calls of both libraries alternate; the table gives medians over the rounds.
TorchJD runs with its defaults (Frank-Wolfe to 1e-3, norm_eps 1e-4), so its answers are less exact than ours. A dash:
TorchJD has no such method, or not on the Gramian. With --device cuda the Gramian is on the GPU and so are the weights:
a call includes the copies, if the method computes on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch

import mtl
from mtl.losses.signatures import taken
from mtl.tracking.console import table

L = mtl.losses
OURS = {
    "mgda": L.MGDA,
    "pcgrad": L.PCGrad,
    "gradvac": L.GradVac,
    "cagrad": L.CAGrad,
    "imtl_g": L.IMTLG,
    "imtl": L.IMTL,
    "gradnorm": L.GradNorm,
    "nash_mtl": L.NashMTL,
    "fairgrad": L.FairGrad,
    "pivrg": lambda T: L.PIVRG(T, [1.0] * T),
    "consmtl": L.ConsMTL,
    "aligned_mtl": L.AlignedMTL,
    "upgrad": L.UPGrad,
    "dualproj": L.DualProj,
    "config": L.ConFIG,
    "conicgrad": L.ConicGrad,
    "ntkmtl": L.NTKMTL,
    "modo": L.MoDo,
    "sdmgrad": L.SDMGrad,
}


def theirs() -> dict:
    """TorchJD's methods by our names, as functions of T; empty if TorchJD is not installed."""
    try:
        import torchjd.aggregation as jd
    except ImportError:
        return {}

    class Nash:
        def __init__(self, T: int):
            self.nash = jd.NashMTL(T)

        def __call__(self, gramian):  # TorchJD wants a Jacobian: a matrix root of the Gramian has the same Gramian
            ridge = 1e-6 * gramian.trace() * torch.eye(len(gramian), device=gramian.device)
            return self.nash(torch.linalg.cholesky(gramian + ridge))

    return {
        "mgda": lambda T: jd.MGDAWeighting(),
        "pcgrad": lambda T: jd.PCGradWeighting(),
        "gradvac": lambda T: jd.GradVacWeighting(),
        "cagrad": lambda T: jd.CAGradWeighting(c=0.4),
        "imtl_g": lambda T: jd.IMTLGWeighting(),
        "nash_mtl": Nash,
        "fairgrad": lambda T: jd.FairGradWeighting(alpha=2.0),
        "aligned_mtl": lambda T: jd.AlignedMTLWeighting(),
        "upgrad": lambda T: jd.UPGradWeighting(),
        "dualproj": lambda T: jd.DualProjWeighting(),
    }


def milliseconds(call, device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


@torch.no_grad()
def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tasks", type=int, nargs="+", default=[2, 10, 40])
    arguments.add_argument("--rounds", type=int, default=30)
    arguments.add_argument("--device", default="cpu")
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device, jd = torch.device(options.device), theirs()
    medians: dict[tuple[str, int, str], float] = {}
    for T in options.tasks:
        contenders = {("ours", name): make(T).to(device) for name, make in OURS.items()}
        contenders |= {("theirs", name): make(T) for name, make in jd.items()}
        times = {key: [] for key in contenders}
        for k in range(options.rounds):
            gradients = torch.randn(T, 1000, generator=torch.Generator().manual_seed(k)).to(device)
            gramian, losses = gradients @ gradients.T, torch.rand(T, device=device) + 0.5
            for (who, name), weighting in contenders.items():
                if who == "ours":
                    facts = taken(weighting, "weights", losses=losses)
                    call = lambda w=weighting, f=facts: w.weights(gramian, **f)  # noqa: B023, E731
                else:
                    call = lambda w=weighting: w(gramian)  # noqa: B023, E731
                times[who, name].append(milliseconds(call, device))
        for (who, name), values in times.items():
            medians[name, T, who] = statistics.median(values)
    head = ["method", *(f"{who}, T={T}" for T in options.tasks for who in ("ours", "TorchJD"))]
    rows = []
    for name in OURS:
        row = [name]
        for T in options.tasks:
            for who in ("ours", "theirs"):
                value = medians.get((name, T, who))
                row.append("–" if value is None else f"{value:.2f}")
        rows.append(row)
    print(f"ms a call, median of {options.rounds}, {device}, torch {torch.__version__}, one thread")
    print(table(head, rows))


if __name__ == "__main__":
    main()
