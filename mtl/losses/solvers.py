"""Small dense problems behind the Gramian methods: simplex QPs, cone projections, fairness equations.

- **Where**: in float64 on the CPU, where reading a value is free: iterations stop at convergence. A method brings its
  problem there by `mtl.losses.host.on_host`.
- **Scale**: every problem is solved on the matrix of cosines, C = D⁻¹GD⁻¹ with D = diag ‖g_i‖, and scaled back. The
  answer is then the same at 1e-8 and at 1e8. Gradients a million times smaller than another task's do not drown in
  rounding errors.
- **Absent tasks**: a function that takes `present` (T,) bool solves the problem without the absent tasks, exactly.
  Their weight is 0. A present task whose gradient is 0 does count: zero is the shortest gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cosines(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines C (T, T) of the task gradients and their norms (T,), in float64. A zero gradient gets the norm 1.

    The diagonal of C is 1 plus a ridge of a few rounding errors of the Gramian's own precision. With more tasks than
    independent gradients, rounding would otherwise make C indefinite, and the weights would be arbitrary.
    """
    ridge = 8 * len(gramian) * torch.finfo(gramian.dtype).eps
    gramian = double(gramian)
    norms = gramian.diagonal().clamp(min=0).sqrt()
    norms = norms.masked_fill(norms == 0, 1.0)
    matrix = gramian / norms / norms[:, None]
    matrix.diagonal().fill_(1.0 + ridge)
    return matrix, norms


def decomposable(matrix: Tensor) -> Tensor:
    """`matrix` (T, T), or the identity if an entry is not finite.

    LAPACK raises an error for a non-finite matrix. Such a step is lost anyway, and the engine reports it.
    """
    return torch.where(
        matrix.isfinite().all(), matrix, torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    )


def double(x: Tensor) -> Tensor:
    """`x` in float64, or in float32 on a device (MPS) that has no float64."""
    return x.float() if x.device.type == "mps" else x.double()


def shortest(gramian: Tensor, present: Tensor | None = None) -> Tensor:
    """(T,) the weights of the shortest vector in the convex hull of the gradients: argmin over the simplex of ‖Jᵀw‖².

    We solve min ½ uᵀGu − Σu over u ≥ 0 instead, and divide u by its sum. Both problems have the same optimality
    conditions, up to a factor.
    """
    matrix, norms = cosines(gramian)
    zero = gramian.diagonal() <= 0
    # In units of the unit gradients, where u∘norms takes the place of u, the vector of ones becomes 1/‖g_i‖.
    goal = 1 / norms
    if present is not None:  # a negative goal keeps the weight of an absent task at 0
        goal, zero = torch.where(present, goal, 0.0), zero & present
        goal = torch.where(present, goal, -goal.max())
    u = complementarity(matrix, -(goal / goal.abs().max().clamp(min=torch.finfo(goal.dtype).tiny))[None])[0] / norms
    # A zero gradient is itself the shortest vector. Several zero gradients share the weight.
    u = torch.where(zero.any(), zero.to(u), u)
    return u / u.sum().clamp(min=torch.finfo(u.dtype).tiny)


def project_on_cone(gramian: Tensor, weights: Tensor) -> Tensor:
    """Project vectors Jᵀw on the dual cone {d: g_i·d ≥ 0 for all i}.

    The projection is Jᵀv with v = argmin over v ≥ w of vᵀGv.

    Args:
        gramian: (T, T).
        weights: (B, T), each row the weights w of one vector.

    Returns:
        (B, T) v.
    """
    matrix, norms = cosines(gramian)
    start = weights.to(matrix) * norms
    largest = start.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    slopes = (start / largest) @ matrix
    # Gradients are usually close to orthogonal. A few projected Richardson steps then find nearly all tasks whose
    # weight rises: a good first guess for the exact solver.
    lift = (-slopes).clamp_(min=0)
    for _ in range(4):
        lift = lift.sub_(torch.addmm(slopes, lift, matrix), alpha=0.77).clamp_(min=0)
    return (start + largest * complementarity(matrix, slopes, lift > 0)) / norms


def complementarity(matrix: Tensor, vectors: Tensor, positive: Tensor | None = None) -> Tensor:
    """Minimise ½xᵀMx + qᵀx over x ≥ 0, for several q at once: x ≥ 0, y = Mx + q ≥ 0, xᵀy = 0.

    Args:
        matrix: (T, T) M, positive definite.
        vectors: (B, T), each row a q.
        positive: (B, T) bool, a guess which entries of x are positive.

    Returns:
        (B, T) x.
    """
    positive = vectors < 0 if positive is None else positive
    x, unsolved = _pivot(matrix, vectors, positive)
    if unsolved.any():
        # Pivoting can cycle if 0 lies nearly in the convex hull of the gradients.
        x[unsolved] = _interior_point(matrix, vectors[unsolved])
    return x.clamp(min=0)


def _interior_point(matrix: Tensor, vectors: Tensor) -> Tensor:
    """The problem of `complementarity` by Mehrotra's predictor-corrector: slower than pivoting, but it never cycles."""
    largest = vectors.abs().amax(1, keepdim=True)
    q = vectors / largest
    x, y = torch.ones_like(q), torch.ones_like(q)
    best, smallest = x, torch.full_like(largest, torch.inf)
    for _ in range(60):
        residual = x @ matrix + q - y
        gap = (x * y).mean(1, keepdim=True)
        error = gap + residual.abs().amax(1, keepdim=True)
        best, smallest = torch.where(error < smallest, x, best), torch.minimum(error, smallest)
        if (smallest < 1e-15).all():
            break
        factor, _ = torch.linalg.cholesky_ex(matrix + torch.diag_embed(y / x))

        # The Newton step for x∘dy + y∘dx = products, and the longest step that keeps x and y positive.
        def solve(products, factor=factor, residual=residual, x=x, y=y):
            dx = torch.cholesky_solve((products / x - residual).unsqueeze(2), factor).squeeze(2)
            dy = (products - y * dx) / x
            down = torch.cat([torch.where(dx < 0, -x / dx, 1.0), torch.where(dy < 0, -y / dy, 1.0)], 1)
            return dx, dy, down.amin(1, keepdim=True).clamp(max=1.0)

        dx, dy, length = solve(-x * y)
        centring = (((x + length * dx) * (y + length * dy)).mean(1, keepdim=True) / gap) ** 3
        dx, dy, length = solve(centring * gap - x * y - dx * dy)
        # 0.99: stop just before the boundary, where x or y would be 0 and the next factorisation would fail.
        x, y = (x + 0.99 * length * dx).clamp(min=1e-200), (y + 0.99 * length * dy).clamp(min=1e-200)
    return largest * best


def _pivot(matrix: Tensor, vectors: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Block principal pivoting (Júdice & Pires 1994; Kim & Park 2011).

    A guess says which entries of x are positive. Each round solves for these, and changes the guess of all entries
    that come out with the wrong sign. After three rounds without progress it changes the last such entry only
    (Murty's rule).

    Returns:
        x (B, T), and a (B,) bool: True where 12 rounds have found no solution.
    """
    B, T = vectors.shape
    solution = torch.zeros_like(vectors)
    rows = torch.arange(B, device=vectors.device)
    fewest = torch.full((B, 1), T + 1, device=vectors.device)
    tries = torch.full((B, 1), 3, device=vectors.device)
    order = torch.arange(1, T + 1, device=vectors.device)
    largest = vectors.abs().amax(1, keepdim=True)
    unsolved = torch.zeros(B, dtype=torch.bool, device=vectors.device)
    for _ in range(12):
        x = _masked_solve(matrix, -vectors, positive)
        y = torch.addmm(vectors, x, matrix)
        # Within rounding errors a small negative value counts as 0.
        wrong = torch.where(positive, x, y) < -1e-12 * (largest + x.abs().amax(1, keepdim=True))
        count = wrong.sum(1, keepdim=True)
        solution[rows] = x
        left = count[:, 0] > 0
        if not left.any():
            break
        if not left.all():  # go on with the unsolved problems only
            rows, vectors, positive, wrong, count, fewest, tries, largest = (
                t[left] for t in (rows, vectors, positive, wrong, count, fewest, tries, largest)
            )
        progress = count < fewest
        fewest = torch.minimum(fewest, count)
        tries = torch.where(progress, 3, tries - 1)
        last = order == (wrong * order).amax(1, keepdim=True)  # the wrong entry with the largest index
        positive = positive ^ torch.where(tries >= 0, wrong, wrong & last)
    else:
        unsolved[rows] = True
    return solution, unsolved


def _masked_solve(matrix: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """Solve M_SS x_S = right_S for a set S of tasks; x (B, T) is 0 outside S.

    Args:
        matrix: (T, T) M, symmetric positive definite.
        right: (B, T) right-hand sides.
        mask: (B, T) bool, the set S of each row; or (1, T), the same S for all rows.
    """
    kept = mask.to(matrix)
    blocks = (matrix * kept[:, :, None]).mul_(kept[:, None, :])  # in place: new memory costs more than the products
    blocks.diagonal(dim1=1, dim2=2).add_(1 - kept)  # the identity outside S, so that each block can be factorised
    factor, _ = torch.linalg.cholesky_ex(blocks)
    return torch.cholesky_solve((right * kept).unsqueeze(2), factor).squeeze(2)


def steepest_worst_case(gramian: Tensor, slopes: Tensor, radius: Tensor, present: Tensor | None = None) -> Tensor:
    """(T,) the weights u of the d = Jᵀu that maximises min_i (slope_i + g_i·d) over the ball ‖d‖ ≤ radius.

    At the optimum u ≥ 0 and uᵀGu = radius². u is positive only for the worst tasks, those that attain the minimum λ. If
    this set of tasks is known, u is linear in λ, and the radius gives a quadratic equation for λ. The set is found by
    pivoting, as in `complementarity`. If pivoting cycles, Newton's method finds λ.

    Args:
        gramian: (T, T).
        slopes: (T,) what each task gains at d = 0.
        radius: () of the ball, at least 0.
        present: (T,) bool; absent tasks are left out of the minimum.

    Returns:
        (T,) u.
    """
    matrix, norms = cosines(gramian)
    T = len(matrix)
    on = torch.ones_like(norms, dtype=torch.bool) if present is None else present
    unit = torch.where(radius > 0, radius, 1.0).to(matrix)
    # From here on the gradients have length 1 and the radius is 1: x = u∘norms / radius.
    p, q = 1 / norms, slopes.to(matrix) / norms / unit
    p = p / torch.where(on, p, torch.inf).min()
    both = torch.stack([p, q])
    order = torch.arange(1, T + 1, device=p.device)
    active = on & (slopes <= torch.where(on, slopes, torch.inf).min())  # first guess: the task that is worst at d = 0
    fewest, tries = torch.full_like(order[0], T + 1), torch.full_like(order[0], 3)
    for _ in range(60):
        solved = _masked_solve(matrix, both, active[None])
        (a, b), (_, c) = (solved @ both.T).unbind()
        level = (b + (b * b - a * (c - 1)).clamp_(min=0).sqrt_()) / a  # λ, from the quadratic equation uᵀGu = radius²
        x = level * solved[0] - solved[1]
        y = torch.addmv(q - level * p, matrix, x)
        wrong = on & (torch.where(active, x, y) < -1e-12 * (1 + x.abs().max()))
        count = wrong.sum()
        if not count:
            break
        progress = count < fewest
        fewest = torch.minimum(fewest, count)
        tries = torch.where(progress, 3, tries - 1)
        last = order == (wrong * order).max()
        active = active ^ torch.where(tries >= 0, wrong, wrong & last)
    else:  # pivoting has failed
        x = _lowest_level(matrix, p, q, on)
    return torch.where(radius > 0, unit * x.clamp(min=0) / norms, 0.0)


def _lowest_level(matrix: Tensor, p: Tensor, q: Tensor, on: Tensor) -> Tensor:
    """The x of `steepest_worst_case`, from the root λ of ‖d(λ)‖ = 1. d(λ) is the shortest d with q + g·d ≥ λp.

    The length ‖d(λ)‖ is convex and increasing in λ. Newton's method therefore descends to the root from above and never
    passes it.
    """
    kept = on.to(matrix)
    # Absent tasks get the identity, so that the matrix stays positive definite.
    matrix = matrix * kept * kept[:, None] + torch.diag(1 - kept)
    level = torch.where(on, (q + 1) / p, torch.inf).min()  # an upper bound: no d of length 1 lifts a task higher
    for _ in range(50):
        x = complementarity(matrix, torch.where(on, q - level * p, 1.0)[None])[0]
        # xᵀCx equals xᵀ(λp − q), because xᵀy = 0. This form does not cancel digits.
        length = (x @ (level * p - q)).clamp(min=1e-300).sqrt()
        if (length - 1).abs() < 1e-12:
            break
        level = level - length * (length - 1) / (x @ p)
    return x / length


def fair_weights(gramian: Tensor, alpha: float, targets: Tensor | None = None, iterations: int = 60) -> Tensor:
    """Solve G w = (v / w)^(1/α) for w > 0: the fairness equation of Nash-MTL (α = 1, v = 1), FairGrad and PIVRG.

    The equation says that the gradient of ½xᵀCx − Σ b x^(1−1/α)/(1−1/α) is 0, with x = w∘‖g‖ and
    b = v^(1/α) ‖g‖^(1/α−1). This function is strictly convex, and Newton's method minimises it. The steps are
    multiplicative, so that x stays positive.

    Args:
        gramian: (T, T); a task with a zero row is decoupled from the others and gets a finite weight.
        alpha: α > 0.
        targets: (T,) v > 0; None is 1.
        iterations: largest number of Newton steps.

    Returns:
        (T,) w.
    """
    matrix, norms = cosines(gramian)
    b = norms ** (1 / alpha - 1)
    # A task with a zero gradient is decoupled. Its b must not change the scale of the others, so it gets a typical one.
    live = gramian.diagonal() > 0
    typical = torch.where(live, b.log(), 0.0).sum() / live.sum().clamp(min=1)
    b = torch.where(live, b, typical.exp())
    if targets is not None:
        b = b * targets.to(b) ** (1 / alpha)
    mean = b.log().mean().exp()  # the geometric mean; with b / mean the iteration does not depend on the losses' scale
    b = b / mean
    power = alpha / (1 + alpha)
    x = (b / matrix.sum(1).clamp(min=1)) ** power
    for _ in range(iterations):
        pull = b * x ** (1 - 1 / alpha)
        residual = pull - x * (matrix @ x)
        if residual.abs().max() <= 1e-14 * pull.abs().max():
            break
        # The Hessian for log x, which belongs to multiplicative steps.
        hessian = matrix * x * x[:, None]
        hessian.diagonal().add_(pull / alpha)
        factor, _ = torch.linalg.cholesky_ex(hessian)
        step = torch.cholesky_solve(residual[:, None], factor)[:, 0]
        x = x * step.clamp(-1, 1).exp()  # a step changes x by a factor of e at most
    return mean**power * x / norms


def project_on_simplex(v: Tensor, present: Tensor | None = None) -> Tensor:
    """Euclidean projection of v (T,) onto {x ≥ 0, Σx = 1} (Held, Wolfe, Crowder 1974). Absent tasks get 0."""
    if present is not None:
        v = torch.where(present, v, -torch.inf)
    # Subtracting a constant does not change the projection, and large entries keep their differences. An entry that is
    # more than 1 below the largest is projected to 0 in any case.
    v = (v - v.max()).clamp_(min=-1)
    counts = torch.arange(1, len(v) + 1, device=v.device, dtype=v.dtype)
    # The threshold computed from the k largest entries rises with k while these stay positive, then falls. So the
    # largest threshold is the right one, and no search over k is needed.
    threshold = v.topk(len(v)).values.cumsum(0).sub_(1).div_(counts).max()
    shares = (v - threshold).clamp_(min=0)
    return shares if present is None else torch.where(present, shares, 0.0)
