"""Reference ("oracle") versions of the methods that need more than one Gramian: the (T, P) Jacobian itself, several
batches of it, or a state of its size. float64 NumPy/SciPy, explicit gradient vectors.

Written from the equations as restated for this work (the papers' text was not at hand) before the implementations
were opened; they share no code with them. Where the authors' code, LibMTL and TorchJD differ, the difference is an
argument. Every rule returns or holds the update direction d; `J` has one task gradient a row.
"""

import numpy as np
from scipy.optimize import minimize

from .gramian import OracleError, project_simplex
from .weighting import ExcessMtlOracle


def _rows(J):
    J = np.array(J, dtype=np.float64)
    if J.ndim != 2 or not np.isfinite(J).all():
        raise ValueError("J must be a finite (T, P) matrix")
    return J


def _norm(v):
    """Euclidean norm, safe from under- and overflow of the squares."""
    largest = np.abs(v).max() if v.size else 0.0
    return 0.0 if largest == 0 else float(largest * np.sqrt(sum((x / largest) ** 2 for x in v)))


def _combine(weights, J):
    """sum_i w_i g_i, one vector after the other."""
    total = np.zeros(J.shape[1])
    for w, g in zip(weights, J, strict=True):
        total = total + w * g
    return total


def _products(J, vector):
    return np.array([float(np.sum(g * vector)) for g in J])


# ----------------------------------------------------------------------------------------- trackers and two batches


class MocoOracle:
    """MoCo, Fernando et al., ICLR 2023 (Algorithm 1; official heshandevaka/MoCo, LibMTL part).

    y_i <- y_i - beta_t (y_i - g_i); lam <- Proj(lam - gamma_t (Y Y^T lam + rho lam)) with the NEW y; d = Y^T lam with
    both new. beta_t = beta / t^sigma, gamma_t = gamma / t^sigma_gamma (default: sigma), t from 1. Y_0 = 0 ("zero",
    official, no bias correction) or the first gradient ("gradient"); lam_0 = 1/T. normalise: g_i L_i / ||g_i|| is
    tracked in place of g_i (LibMTL always; a zero gradient counts as zero). The official code has a factor 2 before
    gamma (`factor`), LibMTL a softmax instead of the projection.
    """

    def __init__(self, T, P, beta=0.5, sigma=0.5, gamma=0.1, rho=0.0, normalise=False, sigma_gamma=None,
                 start="zero", factor=1.0):  # fmt: skip
        self.Y, self.lam, self.t = np.zeros((T, P)), np.full(T, 1.0 / T), 0
        self.beta, self.gamma, self.rho, self.factor = beta, gamma, rho, factor
        self.sigma, self.sigma_gamma = sigma, sigma if sigma_gamma is None else sigma_gamma
        self.normalise, self.start = normalise, start

    def step(self, J, losses=None):
        J = _rows(J)
        self.t += 1
        if self.normalise:
            for i, loss in enumerate(losses):
                length = _norm(J[i])
                J[i] = J[i] / length * loss if length > 0 else 0.0
        if self.t == 1 and self.start == "gradient":
            self.Y = J.copy()
        beta, gamma = self.beta / self.t**self.sigma, self.gamma / self.t**self.sigma_gamma
        for i in range(len(J)):
            self.Y[i] = self.Y[i] - beta * (self.Y[i] - J[i])
        slope = _products(self.Y, _combine(self.lam, self.Y)) + self.rho * self.lam
        self.lam = project_simplex(self.lam - self.factor * gamma * slope)
        return _combine(self.lam, self.Y)


class ModoOracle:
    """MoDo, Chen et al., NeurIPS 2023 (eq. 2.9): two independent batches with Jacobians J1, J2.

    lam <- Proj(lam - gamma (J1 J2^T lam + rho lam)); d = mean of J1 and J2, transposed, times the NEW lam. lam_0 = 1/T.
    (The official code takes the sum, leaving the mean to the learning rate.)
    """

    def __init__(self, T, gamma=0.1, rho=0.0):
        self.lam, self.gamma, self.rho = np.full(T, 1.0 / T), gamma, rho

    def step(self, J1, J2):
        J1, J2 = _rows(J1), _rows(J2)
        slope = _products(J1, _combine(self.lam, J2)) + self.rho * self.lam
        self.lam = project_simplex(self.lam - self.gamma * slope)
        return (_combine(self.lam, J1) + _combine(self.lam, J2)) / 2


class SdmGradOracle:
    """SDMGrad, Xiao et al., NeurIPS 2023, in the form of the authors' supervised code (OptMN-Lab/sdmgrad).

    A_ij = <g_i(xi1), g_j(xi2)> / s^2 with s = mean_i sqrt(max(A_ii, 0) + 1e-4) before the division; b = row means of
    A. S steps of projected SGD on w: buf <- momentum buf + (A w + lam b) (buf new at every call), w <- Proj(w - lr
    buf). w starts at 1/T and is kept from call to call. d = J3^T (w + lam/T) / (1 + lam), J3 the third batch's.
    max(., 0): with two batches a diagonal entry can be negative (LibMTL, TorchJD). LibMTL: lr 5.
    """

    def __init__(self, T, lam=0.3, lr=10.0, momentum=0.5, steps=20):
        self.w, self.lam, self.lr, self.momentum, self.steps = np.full(T, 1.0 / T), lam, lr, momentum, steps

    def step(self, J1, J2=None, J3=None):
        J1 = _rows(J1)
        J2 = J1 if J2 is None else _rows(J2)
        J3 = J1 if J3 is None else _rows(J3)
        T = len(J1)
        A = np.array([_products(J2, g) for g in J1])
        scale = np.mean([np.sqrt(max(A[i, i], 0.0) + 1e-4) for i in range(T)])
        A = A / scale**2
        b = np.array([sum(row) / T for row in A])
        buf = np.zeros(T)
        for _ in range(self.steps):
            buf = self.momentum * buf + np.array([np.sum(row * self.w) for row in A]) + self.lam * b
            self.w = project_simplex(self.w - self.lr * buf)
        self.weights = (self.w + self.lam / T) / (1.0 + self.lam)
        return _combine(self.weights, J3)


# ------------------------------------------------------------------------------------------------- unit gradients


def config(J):
    """ConFIG, Liu, Chu & Thuerey, ICLR 2025: d = (sum_i <g_i, u>) u, u = unit(pinv(U) 1), U the unit rows of J.

    The pseudo-inverse is NumPy's SVD of the explicit (T, P) matrix; a zero gradient is a zero row of U. u = 0 if
    pinv(U) 1 = 0.
    """
    J = _rows(J)
    U = np.array([g / _norm(g) if _norm(g) > 0 else 0.0 * g for g in J])
    x = np.linalg.pinv(U, rcond=1e-10) @ np.ones(len(J))
    if np.linalg.norm(x) < 1e-10:
        return 0.0 * x
    u = x / np.linalg.norm(x)
    return float(np.sum(_products(J, u))) * u


class DbMtlOracle:
    """DB-MTL, Lin et al., 2023 (Algorithm 1), from the gradients of the RAW losses.

    g_i = grad log(L_i + eps) = grad L_i / (L_i + eps); ghat_i <- b ghat_i + (1 - b) g_i, ghat = 0 at first, no bias
    correction, b = beta / t^sigma; d = max_j ||ghat_j|| sum_i ghat_i / (||ghat_i|| + eps). The heads get
    grad log(L_i + eps): their own gradients times `heads`. eps = 1e-8 in both places.
    """

    def __init__(self, T, P, beta=0.9, sigma=0.0, eps=1e-8):
        self.ghat, self.beta, self.sigma, self.eps, self.t = np.zeros((T, P)), beta, sigma, eps, 0

    def step(self, J, losses):
        self.t += 1
        self.heads = 1.0 / (np.array(losses, dtype=np.float64) + self.eps)
        b = self.beta / self.t**self.sigma
        self.ghat = b * self.ghat + (1.0 - b) * (_rows(J) * self.heads[:, None])
        norms = [_norm(g) for g in self.ghat]
        return max(norms) * sum(g / (n + self.eps) for g, n in zip(self.ghat, norms, strict=True))


def ntkmtl(J, p=0.5):
    """NTKMTL, NeurIPS 2025, n = 1 (official jianke0604/NTKMTL): w_i = (tr G / G_ii)^p; returns w. G_ii > 0."""
    squares = np.array([_norm(g) ** 2 for g in _rows(J)])
    return (squares.sum() / squares) ** p


# ------------------------------------------------------------------------------------------------------- GradDrop


def graddrop(J, uniform, leak=0.0):
    """GradDrop, Chen et al., NeurIPS 2020, Algorithm 1 (lines 10-15) element by element, given the draw U.

    P = (1 + sum g / sum |g|) / 2; g_i counts in full where P > U and g_i > 0, or P < U and g_i < 0, else leak g_i.
    """
    J = _rows(J)
    d = np.zeros(J.shape[1])
    for e in range(J.shape[1]):
        size = np.abs(J[:, e]).sum()
        P = 0.5 * (1.0 + (J[:, e].sum() / size if size > 0 else 0.0))
        for g in J[:, e]:
            keep = (g > 0 and uniform[e] < P) or (g < 0 and uniform[e] > P)
            d[e] += g if keep else leak * g
    return d


def graddrop_features(z, grads, uniform, leak=0.0):
    """GradDrop where the paper has it, on features z (B, F) with grads (T, B, F); returns d (B, F).

    The sign of task i at feature f is that of s_i = sum_b sign(z_bf) grad_ibf; one draw U_f and one mask for the
    whole batch.
    """
    s = np.einsum("bf,ibf->if", np.sign(z), grads)
    d = np.zeros(np.shape(z))
    for f in range(d.shape[1]):
        size = np.abs(s[:, f]).sum()
        P = 0.5 * (1.0 + (s[:, f].sum() / size if size > 0 else 0.0))
        for i in range(len(s)):
            keep = (s[i, f] > 0 and uniform[f] < P) or (s[i, f] < 0 and uniform[f] > P)
            d[:, f] += grads[i][:, f] * (1.0 if keep else leak)
    return d


# ------------------------------------------------------------------------------------------------------ ConicGrad


def conicgrad_value(J, d, c):
    """(min_i <g_i, u>, cos(d, g0)) of the unit vector u along d: the objective and the constrained angle."""
    J, u = _rows(J), d / np.linalg.norm(d)
    g0 = J.mean(axis=0)
    return float((J @ u).min()), float(u @ g0 / np.linalg.norm(g0))


def conicgrad(J, c):
    """ConicGrad, Hassanpour et al., 2025: ||g0|| d, d the unit vector of largest min_i <g_i, d> with cos(d, g0) >= c.

    In an orthonormal basis of the row space, by SLSQP from several starts on the convex hull of the admissible unit
    vectors, {||d|| <= 1, <d, g0/||g0||> >= c}: maximise t with t <= <g_i, d>. Unless 0 is in the convex hull of the
    g_i the solution has norm 1 and is unique; otherwise OracleError. Good to about 1e-6 in d, 1e-10 in the value.
    """
    J = _rows(J)
    T, scale = len(J), max(_norm(g) for g in J)
    J = J / scale
    _, s, V = np.linalg.svd(J, full_matrices=False)
    V = V[s > 1e-10 * s[0]]
    A = J @ V.T
    g0 = A.mean(axis=0)
    length = np.linalg.norm(g0)
    if length < 1e-10:
        raise OracleError("the mean gradient is zero")
    e0, r = g0 / length, len(g0)
    limits = [
        {"type": "ineq", "fun": lambda x: A @ x[:r] - x[r], "jac": lambda x: np.c_[A, -np.ones(T)]},
        {"type": "ineq", "fun": lambda x: 1.0 - x[:r] @ x[:r], "jac": lambda x: np.r_[-2.0 * x[:r], 0.0]},
        {"type": "ineq", "fun": lambda x: x[:r] @ e0 - c, "jac": lambda x: np.r_[e0, 0.0]},
    ]
    slope, best = np.r_[np.zeros(r), -1.0], None
    for start in (e0, *(e0 + 0.3 * g / (np.linalg.norm(g) or 1.0) for g in A[:2])):
        d = start / np.linalg.norm(start)
        found = minimize(lambda x: -x[r], np.r_[d, (A @ d).min()], jac=lambda x: slope, constraints=limits,
                         method="SLSQP", options={"maxiter": 500, "ftol": 1e-15})  # fmt: skip
        d = found.x[:r]
        if np.linalg.norm(d) > 1.0 - 1e-6 and d @ e0 >= c - 1e-9:
            d = d / np.linalg.norm(d)
            if best is None or (A @ d).min() > (A @ best).min():
                best = d
    if best is None:
        raise OracleError("Pareto stationary, or no convergence")
    return scale * length * (best @ V)


# -------------------------------------------------------------------------------------------------- for the tests


def stepper(method, T, P, uniform=None, **options):
    """step(J of each batch, losses) -> d, of the method called so (file name in mtl/losses), with its state."""
    if method in ("modo", "sdmgrad"):
        peer = {"modo": ModoOracle, "sdmgrad": SdmGradOracle}[method](T, **options)
        return lambda J, losses: peer.step(*J)
    if method in ("moco", "db_mtl"):
        peer = {"moco": MocoOracle, "db_mtl": DbMtlOracle}[method](T, P, **options)
        return lambda J, losses: peer.step(J[0], losses)
    if method == "excess_mtl":
        peer = ExcessMtlOracle(T, **options)
        return lambda J, losses: _combine(peer.step(J[0]), J[0])
    if method == "ntkmtl":
        return lambda J, losses: _combine(ntkmtl(J[0], **options), J[0])
    if method == "graddrop":
        return lambda J, losses: graddrop(J[0], uniform, **options)
    return {"config": lambda J, losses: config(J[0])}[method]


CASES = {  # stepper[-variant]: the strategy, its arguments, the oracle's; an empty {} checks the strategy's defaults
    "moco": ("MoCo", {}, dict(beta=0.5, sigma=0.5, gamma=0.1, rho=0.0, normalise=True)),
    "moco-rho": ("MoCo", a := dict(beta=0.2, gamma=0.7, sigma=0.0, rho=0.4, normalise=False), a),
    "modo": ("MoDo", {}, dict(gamma=0.1, rho=0.1)),
    "modo-small": ("MoDo", dict(lr=1e-3, rho=0.0), dict(gamma=1e-3, rho=0.0)),
    "sdmgrad": ("SDMGrad", {}, dict(lam=0.3, lr=10.0, momentum=0.5, steps=20)),
    "sdmgrad-short": ("SDMGrad", dict(regularisation=0.1, lr=0.3, momentum=0.0, steps=1),
                      dict(lam=0.1, lr=0.3, momentum=0.0, steps=1)),
    "config": ("ConFIG", {}, {}),
    "db_mtl": ("DBMTL", {}, dict(beta=0.9, sigma=0.0)),
    "db_mtl-decay": ("DBMTL", a := dict(beta=0.4, sigma=0.5), a),
    "excess_mtl": ("ExcessMTL", {}, dict(eta=0.01)),
    "excess_mtl-fast": ("ExcessMTL", a := dict(eta=1.0), a),
    "ntkmtl": ("NTKMTL", {}, dict(p=0.5)),
    "ntkmtl-nyu": ("NTKMTL", dict(power=0.75), dict(p=0.75)),
    "graddrop": ("GradDrop", {}, dict(leak=0.0)),
    "graddrop-leak": ("GradDrop", a := dict(leak=0.25), a),
}  # fmt: skip


def assert_close(actual, expected, tol=1e-9, scale=None):
    actual, expected = np.asarray(actual), np.asarray(expected)
    scale = np.abs(expected).max() if scale is None else scale
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol * scale)


def batches(P, steps, T, samples, kind="", scale=1.0):
    """`steps` times ([(T, P) Jacobian of each batch], losses (T,)); the batches are correlated, as those of one
    network are. kind: "" random, or one of the degenerate ones below."""
    rng, i = np.random.default_rng(T), np.arange(T)[:, None]
    centre, length = rng.normal(size=(T, P)), scale * 10.0 ** rng.uniform(-1, 0.5, (T, 1))
    change = {
        "": lambda J: J,
        "zero_row": lambda J: J * (i != T // 2),
        "zeros": lambda J: 0 * J,
        "identical": lambda J: J[:1] + 0 * J,
        "opposite": lambda J: J[:1] * (-1.0) ** i,
    }[kind]
    for _ in range(steps):
        J = [change(length * (centre + 0.5 * rng.normal(size=(T, P)))) for _ in range(samples)]
        yield J, rng.uniform(0.1, 3, T)


class TwoHeads:
    """z = tanh(x W), prediction z.h_i, L_i = mean squared error: data, parameters and, on paper, all gradients."""

    def __init__(self, samples=9, seed=3):
        rng = np.random.default_rng(seed)
        self.x, self.y = rng.normal(size=(samples, 4)), rng.normal(size=(2, samples))
        self.W, self.h = rng.normal(size=(4, 3)), rng.normal(size=(2, 3))

    def features(self, rows=slice(None)):
        return np.tanh(self.x[rows] @ self.W)

    def losses(self, rows=slice(None)):
        return np.mean((self.features(rows) @ self.h.T - self.y[:, rows].T) ** 2, axis=0)

    def of_features(self, rows=slice(None)):
        """(T, N, 3): dL_i/dz = 2/N (z.h_i - y_i) h_i."""
        z = self.features(rows)
        return np.array([np.outer(2 * (z @ h - y[rows]) / len(z), h) for h, y in zip(self.h, self.y, strict=True)])

    def of_heads(self, rows=slice(None)):
        """(T, 3): dL_i/dh_i = 2/N sum_n (z.h_i - y_i) z."""
        z = self.features(rows)
        return np.array([2 * (z @ h - y[rows]) @ z / len(z) for h, y in zip(self.h, self.y, strict=True)])

    def chain(self, dz, rows=slice(None)):
        """(12,): a gradient of the features (N, 3) taken through the backbone, x^T (dz (1 - z^2))."""
        return (self.x[rows].T @ (dz * (1 - self.features(rows) ** 2))).reshape(-1)

    def of_shared(self, rows=slice(None)):
        """(T, 12)."""
        return np.array([self.chain(dz, rows) for dz in self.of_features(rows)])
