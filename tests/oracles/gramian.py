"""Reference ("oracle") versions of multi-task gradient-balancing rules, in float64 NumPy/SciPy.

Written from the papers' equations, without sight of the implementation they test. (The papers' own text was not at
hand: equations are as restated for this work, and compared with public code for MoCo, SDMGrad, MoDo, GradVac, IMTL-G,
GradNorm, Aligned-MTL and PIVRG.) They are slow and meant to be obviously right: each takes, where one exists, another
road than the usual one (explicit gradient vectors instead of the Gramian, exhaustive enumeration of supports,
Lawson-Hanson NNLS, Newton on the update direction instead of on the weights), and those that optimise check their own
optimality conditions and raise `OracleError` rather than return a wrong answer.

Every rule takes the Jacobian `J` of shape (T, P), one task gradient g_i a row, and returns the weights `w` of shape
(T,) such that the update direction is d = J.T @ w; rules with a state return the new state too. Where rows are
linearly dependent, d can be unique while w is not: compare d then.
"""

from itertools import combinations

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import brentq, nnls

ENUMERATION_LIMIT = 11  # up to this many tasks, supports are enumerated: 2^11 - 1 small systems


class OracleError(RuntimeError):
    """The method has no (unique) answer here, or the oracle could not certify the one it found."""


# ------------------------------------------------------------------------------------------------------- helpers


def _as_matrix(J):
    J = np.array(J, dtype=np.float64)
    if J.ndim != 2 or J.size == 0 or not np.isfinite(J).all():
        raise ValueError("J must be a finite, non-empty (T, P) matrix")
    return J


def _row_norms(J):
    """Norms of the rows, safe from under- and overflow of the squares."""
    largest = np.abs(J).max(axis=1)
    safe = np.where(largest > 0, largest, 1.0)
    return largest * np.sqrt(((J / safe[:, None]) ** 2).sum(axis=1))


def _normalised(J):
    """(rows in an orthonormal basis of their span, scaled so that the longest has norm 1; that scale).

    An isometry followed by a common factor: every inner product keeps its value up to scale**2.
    """
    J = _as_matrix(J)
    scale = float(_row_norms(J).max())
    if scale == 0.0:
        raise OracleError("all gradients are zero")
    J = J / scale
    if J.shape[1] > J.shape[0]:
        J = np.linalg.qr(J.T, mode="r").T  # J^T = Q R, so the rows of R^T are the gradients in the basis Q
    return J, scale


def _supports(T):
    for size in range(1, T + 1):
        for support in combinations(range(T), size):
            yield list(support)


# -------------------------------------------------------------------------------------------------- the simplex


def project_simplex(v):
    """Euclidean projection of v onto {x >= 0, sum x = 1}: x = max(v - theta, 0), theta found by bisection.

    KKT conditions of min ||x - v||^2 over the simplex; sum max(v - theta, 0) falls from >= 1 at max(v) - 1 to 0 at
    max(v). The support found gives theta once more in closed form, to remove the bisection's rounding.
    """
    v = np.array(v, dtype=np.float64)
    v = v - v.max()  # the projection does not see a common shift
    low, high = -1.0, 0.0
    for _ in range(200):
        theta = 0.5 * (low + high)
        if np.maximum(v - theta, 0.0).sum() >= 1.0:
            low = theta
        else:
            high = theta
    support = v > high
    theta = (v[support].sum() - 1.0) / support.sum()
    x = np.maximum(v - theta, 0.0)
    if abs(x.sum() - 1.0) > 1e-12:
        raise OracleError("projection onto the simplex failed")
    return x


# --------------------------------------------------------------------------------------------------------- MGDA


def _affine_min_norm(A):
    """Coefficients (sum 1, any sign) of the point of least norm in the affine hull of the rows of A."""
    if len(A) == 1:
        return np.ones(1)
    z = np.linalg.lstsq((A[1:] - A[0]).T, -A[0], rcond=None)[0]
    return np.concatenate([[1.0 - z.sum()], z])


def _min_norm_gap(A, alpha):
    """||d||^2 - min_j g_j.d >= 0 at d = A^T alpha, zero only at the point of least norm in the convex hull."""
    d = A.T @ alpha
    return float(d @ d - (A @ d).min())


def _min_norm_candidates(A, supports):
    for support in supports:
        inside = _affine_min_norm(A[support])
        if (inside >= 0).all():
            alpha = np.zeros(len(A))
            alpha[support] = inside
            yield alpha / alpha.sum()


def _min_norm_nnls(A):
    """Point of least norm in the convex hull of the rows of A by NNLS (Lawson & Hanson), any number of rows.

    min_{x >= 0} ||A^T x||^2 + (sum x - 1)^2: with x = t alpha, alpha on the simplex, this is t^2 m(alpha) + (t - 1)^2,
    whose minimum over t grows with m; so x is proportional to the minimiser of m = ||A^T alpha||^2, exactly.
    """
    T, P = A.shape
    stacked = np.vstack([A.T, np.ones((1, T))])
    x = nnls(stacked, np.concatenate([np.zeros(P), [1.0]]), maxiter=1000 * T)[0]
    alpha = x / x.sum()
    candidates = [alpha, *_min_norm_candidates(A, [list(np.flatnonzero(alpha > 0))])]
    return min(candidates, key=lambda a: _min_norm_gap(A, a))


def mgda(J):
    """MGDA (Desideri, C. R. Acad. Sci. 2012): alpha = argmin_{alpha in simplex} ||sum_i alpha_i g_i||^2.

    T <= 11: for every support, the least-norm point of its affine hull; among those with alpha >= 0, the one with the
    smallest KKT gap ||d||^2 - min_j g_j.d. Larger T: NNLS. alpha is not unique if the g_i are affinely dependent.
    """
    A, _ = _normalised(J)
    if len(A) <= ENUMERATION_LIMIT:
        alpha = min(_min_norm_candidates(A, _supports(len(A))), key=lambda a: _min_norm_gap(A, a))
    else:
        alpha = _min_norm_nnls(A)
    if _min_norm_gap(A, alpha) > 1e-12:
        raise OracleError("MGDA: optimality not reached")
    return alpha


# --------------------------------------------------------------------------------------------- gradient surgery


def pcgrad(J, orders):
    """PCGrad (Yu et al., NeurIPS 2020, Algorithm 1), with the random orders given: orders[i] lists the j != i.

    g_i^PC starts at g_i; for each j in orders[i], if g_i^PC . g_j < 0: g_i^PC -= (g_i^PC . g_j) / ||g_j||^2 g_j, with
    the unprojected g_j. d = sum_i g_i^PC (the sum, not the mean).
    """
    J = _as_matrix(J)
    J = J / (_row_norms(J).max() or 1.0)
    T = len(J)
    weights = np.zeros(T)
    total = np.zeros(J.shape[1])
    for i in range(T):
        g, coefficients = J[i].copy(), np.eye(T)[i]
        for j in orders[i]:
            inner = float(g @ J[j])
            if inner < 0:
                factor = inner / float(J[j] @ J[j])
                g = g - factor * J[j]
                coefficients[j] -= factor
        weights += coefficients
        total += g
    if not np.allclose(J.T @ weights, total, rtol=0, atol=1e-9 * (1 + np.abs(weights).sum())):
        raise OracleError("PCGrad: the coefficients do not give the vector")
    return weights


def gradvac(J, orders, rho_hat, beta):
    """Gradient Vaccine (Wang et al., ICLR 2021, Algorithm 1).

    g~_i starts at g_i; for each j in orders[i]: rho = cos(g~_i, g_j); if rho < rho_hat_ij,
    g~_i += ||g~_i|| (rho_hat sqrt(1 - rho^2) - rho sqrt(1 - rho_hat^2)) / (||g_j|| sqrt(1 - rho_hat^2)) g_j; then in
    either case rho_hat_ij <- (1 - beta) rho_hat_ij + beta rho, rho as measured before the change. d = sum_i g~_i.
    A zero vector has cosine 0 with all others, and nothing is added then. Returns (weights, new rho_hat).
    """
    J = _as_matrix(J)
    J = J / (_row_norms(J).max() or 1.0)
    T = len(J)
    rho_hat = np.array(rho_hat, dtype=np.float64)  # a copy
    weights = np.zeros(T)
    total = np.zeros(J.shape[1])
    for i in range(T):
        g, coefficients = J[i].copy(), np.eye(T)[i]
        for j in orders[i]:
            norm_i, norm_j = np.linalg.norm(g), np.linalg.norm(J[j])
            rho, target = 0.0, rho_hat[i, j]
            if norm_i > 0 and norm_j > 0:
                u, v = g / norm_i, J[j] / norm_j
                rho = float(np.clip(u @ v, -1.0, 1.0))
                if rho < target:
                    sine = np.linalg.norm(u - rho * v)  # sqrt(1 - rho^2) without its cancellation
                    sine_target = np.sqrt((1.0 - target) * (1.0 + target))
                    factor = norm_i * (target * sine - rho * sine_target) / (norm_j * sine_target)
                    g = g + factor * J[j]
                    coefficients[j] += factor
            rho_hat[i, j] = (1.0 - beta) * target + beta * rho
        weights += coefficients
        total += g
    if not np.allclose(J.T @ weights, total, rtol=0, atol=1e-9 * (1 + np.abs(weights).sum())):
        raise OracleError("GradVac: the coefficients do not give the vector")
    return weights, rho_hat


# ------------------------------------------------------------------------------------------------------- CAGrad


def _cagrad_on_support(A, support, g0, r):
    """Candidates (violation, lam) with d = g0 + r e, e = sum_{i in support} lam_i g_i, ||e|| = 1, g_i.d equal there.

    A_S d = mu 1 and e in the span of A_S give e = (mu p - q) / r, p = A_S^+ 1, q = A_S^+ A_S g0; ||e|| = 1 is then a
    quadratic in mu. Linearly dependent supports are skipped (Caratheodory: an independent one spans the same e).
    """
    A_S = A[support]
    if len(A_S) > A_S.shape[1]:
        return
    Q, R = np.linalg.qr(A_S.T)
    diagonal = np.abs(np.diag(R))
    if diagonal.min() <= 1e-11 * diagonal.max():
        return
    p = solve_triangular(R, np.ones(len(A_S)), trans="T")  # in the basis Q
    q = Q.T @ g0
    centre = (p @ q) / (p @ p)
    rest = q - centre * p
    discriminant = r * r - rest @ rest
    if discriminant < 0:
        return
    half = np.sqrt(discriminant / (p @ p))
    for mu in (centre + half, centre - half):
        inside = solve_triangular(R, (mu * p - q) / r)
        if (inside >= 0).all() and inside.sum() > 0:
            lam = np.zeros(len(A))
            lam[support] = inside
            d = g0 + r * (A.T @ lam)
            yield abs(float(mu - (A @ d).min())), lam


def cagrad(J, c):
    """CAGrad (Liu et al., NeurIPS 2021, Algorithm 1): weights of d = g0 + c ||g0|| / ||g_w|| g_w, not rescaled.

    g0 = mean gradient, w = argmin over the simplex of F(w) = g_w.g0 + c ||g0|| ||g_w||; result 1/T + c||g0||/||g_w|| w.
    dF/dw_i = g_i.d, so KKT: g_i.d = mu on the support of w, >= mu off it. T <= 11: every support, each solved in
    closed form. Larger T: with theta = c||g0|| / ||g_w||, w is the least-norm point of the hull of the g_i + g0/theta
    (complete the square), so theta is found by brentq, and the support so found solved as before. c = 0 gives the
    mean. Undefined (OracleError) if the minimum is at g_w = 0.
    """
    A, _ = _normalised(J)
    T = len(A)
    g0 = A.mean(axis=0)
    r = c * float(np.linalg.norm(g0))
    if c == 0:
        return np.full(T, 1.0 / T)
    if r < 1e-14:
        raise OracleError("CAGrad: the mean gradient vanishes")
    if T <= ENUMERATION_LIMIT:
        supports = _supports(T)
    else:
        least = float(np.linalg.norm(A.T @ _min_norm_nnls(A)))

        def w_of(theta):
            return _min_norm_nnls(theta * A + g0)

        def excess(log_theta):
            theta = np.exp(log_theta)
            return theta * np.linalg.norm(A.T @ w_of(theta)) - r

        low, high = np.log(r) - 1e-6, np.log(r / max(least, 1e-7)) + 1e-6  # least <= ||g_w|| <= 1
        if excess(high) < 0:
            raise OracleError("CAGrad: no minimum with g_w != 0")
        w = w_of(np.exp(brentq(excess, low, high, xtol=1e-14, rtol=1e-14)))
        supports = [list(np.flatnonzero(w > tiny)) for tiny in (0.0, 1e-12, 1e-10, 1e-8)]
    candidates = [found for support in supports for found in _cagrad_on_support(A, support, g0, r)]
    violation, lam = min(candidates, key=lambda found: found[0], default=(np.inf, None))
    if violation > 1e-10:
        raise OracleError("CAGrad: no minimum with g_w != 0")
    return 1.0 / T + r * lam


def _distance_to_polyhedron(A, h):
    """min ||z|| subject to A z >= h, by Lawson & Hanson's LDP (an NNLS); inf if there is no such z."""
    T, P = A.shape
    stacked = np.vstack([A.T, h[None, :]])
    target = np.concatenate([np.zeros(P), [1.0]])
    residual = target - stacked @ nnls(stacked, target, maxiter=1000 * T)[0]
    if np.linalg.norm(residual) < 1e-13 or residual[-1] <= 0:
        return np.inf
    return float(np.linalg.norm(residual[:-1]) / residual[-1])


def cagrad_primal_value(J, c):
    """CAGrad's primal (Liu et al., NeurIPS 2021): max over ||d - g0|| <= c ||g0|| of min_i g_i.d.

    mu is reached if and only if the polyhedron {d: J d >= mu} comes within c ||g0|| of g0; bisection on mu, the
    distance by least-distance programming. At the dual's w, equal to g_w.g0 + c ||g0|| ||g_w||.
    """
    A, scale = _normalised(J)
    g0 = A.mean(axis=0)
    r = c * float(np.linalg.norm(g0))
    start = A @ g0
    low, high = float(start.min()), float((start + r * _row_norms(A)).min())
    for _ in range(120):
        mu = 0.5 * (low + high)
        if _distance_to_polyhedron(A, mu - start) <= r:
            low = mu
        else:
            high = mu
    return 0.5 * (low + high) * scale * scale


# ----------------------------------------------------------------------------------------------------- IMTL-G


def imtl_g(J):
    """IMTL-G (Liu et al., ICLR 2021, closed form): alpha_{2:T} = g_1 U^T (D U^T)^-1, alpha_1 = 1 - sum alpha_{2:T}.

    D has the rows g_1 - g_i and U the rows u_1 - u_i (u_i = g_i / ||g_i||), i = 2..T: sum alpha = 1 and d has equal
    projections on all u_i. No sign constraint. Needs non-zero gradients and D U^T regular.
    """
    J = _as_matrix(J)
    T = len(J)
    if T == 1:
        return np.ones(1)
    norms = _row_norms(J)
    if norms.min() == 0:
        raise OracleError("IMTL-G: a gradient is zero")
    unit = J / norms[:, None]
    J = J / norms.max()
    D, U = J[0] - J[1:], unit[0] - unit[1:]
    M = D @ U.T
    # For T = 2, M is a single number: rounding, compared with D, if the two gradients are parallel.
    if np.linalg.cond(M) > 1e13 or np.abs(M).max() <= 1e-13 * np.linalg.norm(D):
        raise OracleError("IMTL-G: D U^T is singular")
    rest = np.linalg.solve(M.T, U @ J[0])  # alpha M = g_1 U^T as rows
    return np.concatenate([[1.0 - rest.sum()], rest])


# ------------------------------------------------------- utilities of s_i = g_i.d: Nash-MTL, FairGrad and PIVRG


def _utility_weights(J, v, p):
    """w > 0 with w_i = v_i (g_i.d)^-p and d = J^T w: the maximiser d of sum_i v_i U(g_i.d) - ||d||^2 / 2.

    U'(s) = s^-p (U = log for p = 1, s^(1-p)/(1-p) otherwise): strictly concave on the open cone {g_i.d > 0}, hence a
    unique d, found by damped Newton on the vector d itself. It exists if and only if that cone is not empty (0 is
    not in the convex hull of the g_i). With unit rows u_i and norms n_i the same equation holds for
    v'_i = v_i n_i^(1-p), and the common factor of v' only scales d: so no scale of J matters.
    """
    J = _as_matrix(J)
    norms = _row_norms(J)
    if norms.min() == 0:
        raise OracleError("a gradient is zero: no solution")
    U, _ = _normalised(J / norms[:, None])
    U = U / _row_norms(U)[:, None]
    log_v = np.log(v) + (1.0 - p) * np.log(norms)
    v_unit = np.exp(log_v - log_v.max())

    start = U.T @ _min_norm_nnls(U)  # positive inner product with every row unless 0 is in the hull
    if (U @ start).min() <= 1e-12:
        raise OracleError("Pareto stationary: no solution")

    def loss(d):
        t = U @ d
        if t.min() <= 0:
            return np.inf
        utility = np.log(t) if p == 1 else t ** (1.0 - p) / (1.0 - p)
        return 0.5 * d @ d - v_unit @ utility

    def newton(d):
        t = U @ d
        gradient = d - U.T @ (v_unit * t**-p)
        hessian = np.eye(len(d)) + U.T @ ((p * v_unit * t ** (-p - 1.0))[:, None] * U)
        return gradient, -cho_solve(cho_factor(hessian), gradient)

    d = start / np.linalg.norm(start)
    d = d * (v_unit @ (U @ d) ** (1.0 - p)) ** (1.0 / (1.0 + p))  # the best length along this ray
    for _ in range(500):
        gradient, step = newton(d)
        slope = float(gradient @ step)
        if slope > -1e-20 * (d @ d):
            break
        size, here = 1.0, loss(d)
        while loss(d + size * step) > here + 1e-4 * size * slope and size > 1e-9:
            size *= 0.5
        if loss(d + size * step) >= here:  # as low as rounding lets it
            break
        d = d + size * step
    best, best_error = d, np.inf
    for _ in range(20):  # full steps, as long as the equation gets better
        gradient, step = newton(d)
        error = float(np.linalg.norm(gradient))
        if error >= best_error:
            break
        best, best_error = d, error
        d = d + step
        if (U @ d).min() <= 0:
            break
    w_unit = v_unit * (U @ best) ** -p
    if np.abs(U @ (U.T @ w_unit) / (U @ best) - 1.0).max() > 1e-9:
        raise OracleError("Newton's method did not converge")
    # w_unit is for v' / max v'; d scales as (max v')^(1/(1+p)), and n_i w_i is the weight of u_i
    return w_unit * np.exp(log_v.max() / (1.0 + p)) / norms


def nash_mtl(J):
    """Nash-MTL (Navon et al., ICML 2022, Claim 3.1): alpha > 0 with (G^T G) alpha = 1/alpha, elementwise.

    By its primal: d maximises sum_i log(g_i.d) - ||d||^2/2, alpha_i = 1/(g_i.d); so ||d||^2 = T.
    """
    J = _as_matrix(J)
    return _utility_weights(J, np.ones(len(J)), 1.0)


def fairgrad(J, alpha):
    """FairGrad (Ban & Ji, ICML 2024): w > 0 with (G^T G) w = w^(-1/alpha), elementwise, alpha > 0.

    By its primal: d maximises the alpha-fair utility sum_i (g_i.d)^(1-alpha)/(1-alpha) less ||d||^2/2, and
    w_i = (g_i.d)^-alpha.
    """
    if not alpha > 0:
        raise ValueError("alpha must be positive")
    J = _as_matrix(J)
    return _utility_weights(J, np.ones(len(J)), float(alpha))


def pivrg(J, v):
    """PIVRG (Qin et al., CVPR 2025): w > 0 with (G^T G) w = (v/w)^(1/2), elementwise, v > 0 the given targets.

    By its primal: d minimises sum_i v_i / (g_i.d) + ||d||^2/2 on {g_i.d > 0}, w_i = v_i / (g_i.d)^2.
    """
    J = _as_matrix(J)
    v = np.array(v, dtype=np.float64)
    if v.shape != (len(J),) or not (v > 0).all():
        raise ValueError("v must be positive, one a task")
    return _utility_weights(J, v, 2.0)


def pivrg_targets(delta_m, b, tau_min):
    """PIVRG's performance-informed weights (Qin et al., CVPR 2025): v = T softmax(delta / tau), sum v = T.

    tau = max((max delta - min delta) / ln b, tau_min), so that max v / min v <= b. delta_m is the relative drop of
    each task (larger: worse), in the unit of tau_min (per cent in the authors' code).
    """
    delta = np.array(delta_m, dtype=np.float64)
    tau = max((delta.max() - delta.min()) / np.log(b), tau_min)
    e = np.exp((delta - delta.max()) / tau)
    return len(delta) * e / e.sum()


# ---------------------------------------------------------------------------------------------------- Aligned-MTL


def aligned_mtl(J, mode="min"):
    """Aligned-MTL (Senushkin et al., CVPR 2023, Algorithm 1) with a preference vector of ones.

    G = J J^T = V L V^T; w = sigma V L^(-1/2) V^T 1 over the non-zero eigenvalues; by the SVD J = V S Q^T, L = S^2.
    sigma^2 is the least ("min", the paper's), the median ("median") or the mean ("rmse") non-zero eigenvalue. As in
    TorchJD: the median of an even number is the LOWER middle one (torch.median's convention, not NumPy's), and an
    eigenvalue counts as zero up to max(L) T eps (eps of float64).
    """
    J = _as_matrix(J)
    T = len(J)
    scale = float(np.abs(J).max())
    if scale == 0.0:
        return np.ones(T)
    V, s, _ = np.linalg.svd(J / scale, full_matrices=False)
    keep = s**2 > s.max() ** 2 * T * np.finfo(np.float64).eps
    V, s = V[:, keep], s[keep]
    eigenvalues = np.sort(s**2)
    sigma2 = {
        "min": eigenvalues[0],
        "median": eigenvalues[(len(eigenvalues) - 1) // 2],
        "rmse": eigenvalues.mean(),
    }[mode]
    return np.sqrt(sigma2) * (V @ ((V.T @ np.ones(T)) / s))


# ------------------------------------------------------------------------------------------------- the dual cone


def _project_dual_cone(J, x):
    """lam >= 0 with x + J^T lam the Euclidean projection of x onto {y: J y >= 0}: NNLS min ||J^T lam + x||.

    (Moreau: the residual of projecting -x onto the cone of the rows.) Columns are scaled to unit norm, which leaves
    the problem the same. Certified by the KKT conditions.
    """
    J = _as_matrix(J)
    norms, length = _row_norms(J), float(np.linalg.norm(x))
    lam = np.zeros(len(J))
    rows = np.flatnonzero(norms > 0)  # a zero row constrains nothing
    if length == 0 or len(rows) == 0:
        return lam
    unit, x = J[rows] / norms[rows, None], x / length
    inside = nnls(unit.T, -x, maxiter=1000 * len(rows))[0]
    support = inside > 0
    if support.any():
        polished = np.linalg.lstsq(unit[support].T, -x, rcond=None)[0]
        if (polished >= 0).all():
            inside[support] = polished
    y = x + unit.T @ inside
    if (unit @ y).min() < -1e-11 or abs(inside @ (unit @ y)) > 1e-10 * (1 + inside.sum()):
        raise OracleError("projection onto the dual cone: optimality not reached")
    lam[rows] = inside * length / norms[rows]
    return lam


def upgrad(J):
    """UPGrad (Quinton & Rey, 2024, arXiv:2406.16232): mean over i of the projection of g_i onto {x: J x >= 0}.

    The projection is J^T v_i, v_i = argmin_{v >= e_i} v^T G v, that is v_i = e_i + lam_i; w = mean_i v_i. No
    normalisation or regularisation of G. v_i is not unique if rows are dependent, d is.
    """
    J = _as_matrix(J)
    J = J / (_row_norms(J).max() or 1.0)
    T = len(J)
    return np.mean([np.eye(T)[i] + _project_dual_cone(J, J[i]) for i in range(T)], axis=0)


def dualproj(J):
    """DualProj (GEM's projection, Lopez-Paz & Ranzato, NeurIPS 2017): the mean gradient projected onto {x: J x >= 0}.

    argmin_{v >= 1/T} v^T G v, that is v = 1/T + lam.
    """
    J = _as_matrix(J)
    J = J / (_row_norms(J).max() or 1.0)
    return 1.0 / len(J) + _project_dual_cone(J, J.mean(axis=0))


# ----------------------------------------------------------------------------------- single steps of the iterative


def sdmgrad_step(J1, J2, w, lam, lr, momentum=0.0, buf=None):
    """One step on w of SDMGrad (Xiao et al., NeurIPS 2023, Algorithm 1): projected SGD on ||J^T w + lam g0||^2 / 2.

    Gradient J1 (J2^T w + lam g0_2), g0_2 the mean row of J2, J1 and J2 from two independent batches. Momentum as in
    torch.optim.SGD without dampening: buf <- momentum buf + gradient (the gradient itself if buf is None), then
    w <- Proj(w - lr buf). The Jacobians are used as they are (the authors' code divides G by a scale first).
    Returns (w, buf).
    """
    J1, J2 = _as_matrix(J1), _as_matrix(J2)
    w = np.array(w, dtype=np.float64)
    vector = lam * J2.mean(axis=0)
    for j in range(len(J2)):
        vector = vector + w[j] * J2[j]
    gradient = np.array([J1[i] @ vector for i in range(len(J1))])
    buf = gradient if buf is None else momentum * np.array(buf, dtype=np.float64) + gradient
    return project_simplex(w - lr * buf), buf


def modo_step(J1, J2, lam, gamma, rho):
    """One step on lambda of MoDo (Chen et al., NeurIPS 2023): Proj(lambda - gamma (J1 J2^T + rho I) lambda)."""
    J1, J2 = _as_matrix(J1), _as_matrix(J2)
    lam = np.array(lam, dtype=np.float64)
    vector = np.zeros(J2.shape[1])
    for j in range(len(J2)):
        vector = vector + lam[j] * J2[j]
    gradient = np.array([J1[i] @ vector for i in range(len(J1))]) + rho * lam
    return project_simplex(lam - gamma * gradient)


def moco_step(Y, J, losses, lam, beta, gamma, rho):
    """One step of MoCo (Fernando et al., ICLR 2023) in the form of LibMTL; returns (Y, lam, d).

    ghat_i = g_i loss_i / ||g_i||; Y <- Y - beta (Y - ghat); lam <- softmax(lam - gamma (Y Y^T + rho I) lam) with the
    new Y; d = Y^T lam with both new. beta and gamma are the effective ones of this step (LibMTL: beta / step^sigma).
    A zero gradient counts as ghat_i = 0.
    """
    Y, J = np.array(Y, dtype=np.float64), _as_matrix(J)
    lam, losses = np.array(lam, dtype=np.float64), np.array(losses, dtype=np.float64)
    norms = _row_norms(J)
    for i in range(len(J)):
        ghat = J[i] / norms[i] * losses[i] if norms[i] > 0 else np.zeros(J.shape[1])
        Y[i] = Y[i] - beta * (Y[i] - ghat)
    combined = sum(lam[j] * Y[j] for j in range(len(Y)))
    logits = lam - gamma * (np.array([Y[i] @ combined for i in range(len(Y))]) + rho * lam)
    e = np.exp(logits - logits.max())
    lam = e / e.sum()
    return Y, lam, sum(lam[j] * Y[j] for j in range(len(Y)))


def gradnorm_step(norms, w, losses, initial_losses, alpha, lr):
    """One step on the weights of GradNorm (Chen et al., ICML 2018, Algorithm 1); returns the new w.

    n_i = ||grad of the unweighted L_i||, G_i = w_i n_i; L_grad = sum_i |G_i - Gbar r_i^alpha| with Gbar = mean G_i and
    r_i = (L_i/L_i(0)) / mean_j(L_j/L_j(0)), the target Gbar r_i^alpha held constant; w <- w - lr dL_grad/dw, then
    w <- T w / sum w. dL_grad/dw_i = n_i sign(G_i - target_i), 0 at the kink.
    """
    norms, w = np.array(norms, dtype=np.float64), np.array(w, dtype=np.float64)
    ratio = np.array(losses, dtype=np.float64) / np.array(initial_losses, dtype=np.float64)
    target = np.mean(w * norms) * (ratio / ratio.mean()) ** alpha
    w = w - lr * norms * np.sign(w * norms - target)
    return len(w) * w / w.sum()
