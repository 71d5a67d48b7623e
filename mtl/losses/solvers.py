"""Small dense problems behind the Gramian methods: simplex QPs, cone projections, fairness equations.

Everything is tensor arithmetic in float64 on the gradients' own device. Iterations are bounded in number, so that
nothing waits for a GPU; on a CPU, where looking is free, they stop at convergence. Every problem is solved on the
matrix of cosines, C = D⁻¹GD⁻¹ with D = diag ‖g_i‖, and scaled back analytically: the answer is the same at 1e-8 and
at 1e8, and a task whose gradients are a million times smaller than another's is not lost in rounding.

Tasks are absent in exact terms: where a function takes `present` (T,) bool, its result is that of the problem without
the absent tasks, with weight 0 there. A present task whose gradient is 0 counts: zero is the shortest gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cosines(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """(C, norms) in float64: the (T, T) cosines of the task gradients, and their norms (T,), 1 where a gradient is 0.

    The diagonal of C is 1 plus a ridge of a few rounding errors of the Gramian's own precision: with more tasks than
    independent gradients, rounding would else make C indefinite and the weights arbitrary.
    """
    ridge = 8 * len(gramian) * torch.finfo(gramian.dtype).eps
    gramian = double(gramian)
    norms = gramian.diagonal().clamp(min=0).sqrt()
    norms = norms.masked_fill(norms == 0, 1.0)
    matrix = gramian / norms / norms[:, None]
    matrix.diagonal().fill_(1.0 + ridge)
    return matrix, norms


def decomposable(matrix: Tensor) -> Tensor:
    """`matrix` (T, T), or the identity if an entry is not finite: LAPACK raises there, and that step is lost anyway."""
    return torch.where(
        matrix.isfinite().all(), matrix, torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    )


def double(x: Tensor) -> Tensor:
    """`x` in float64, or in float32 on a device (MPS) that has no float64."""
    return x.float() if x.device.type == "mps" else x.double()


def shortest(gramian: Tensor, present: Tensor | None = None) -> Tensor:
    """argmin over the simplex of ‖Σ w_i g_i‖² (T,): the weights of the shortest vector in the gradients' convex hull.

    As the ray of argmin ½ uᵀGu − Σu over u ≥ 0, whose optimality conditions are those of the simplex up to scale.
    """
    matrix, norms = cosines(gramian)
    zero = gramian.diagonal() <= 0
    goal = 1 / norms
    if present is not None:
        goal, zero = torch.where(present, goal, 0.0), zero & present
        goal = torch.where(present, goal, -goal.max())
    u = complementarity(matrix, -(goal / goal.abs().max().clamp(min=torch.finfo(goal.dtype).tiny))[None])[0] / norms
    # A zero gradient is itself the shortest vector; several share the weight.
    u = torch.where(zero.any(), zero.to(u), u)
    return u / u.sum().clamp(min=torch.finfo(u.dtype).tiny)


def project_on_cone(gramian: Tensor, weights: Tensor) -> Tensor:
    """Project vectors Jᵀw on the dual cone {d: g_i·d ≥ 0 for all i}, in terms of weights: argmin over v ≥ w of vᵀGv.

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
    # Gradients are usually close to orthogonal: a few projected Richardson steps find nearly all that is lifted.
    lift = (-slopes).clamp_(min=0)
    for _ in range(4):
        lift = lift.sub_(torch.addmm(slopes, lift, matrix), alpha=0.77).clamp_(min=0)
    return (start + largest * complementarity(matrix, slopes, lift > 0)) / norms


def complementarity(matrix: Tensor, vectors: Tensor, positive: Tensor | None = None) -> Tensor:
    """Solve x ≥ 0, y = Mx + q ≥ 0, xᵀy = 0: the optimum of ½xᵀMx + qᵀx over x ≥ 0, for several q at once.

    Args:
        matrix: (T, T) positive definite.
        vectors: (B, T), each row a q.
        positive: (B, T) bool, a guess which x are.

    Returns:
        (B, T) x.
    """
    positive = vectors < 0 if positive is None else positive
    if not vectors.is_cpu:
        x, unsolved = _pivot(matrix, vectors, positive, rounds=4 + 2 * len(matrix))
        if len(matrix) > 3:  # up to three tasks the rounds always suffice
            x = torch.where(unsolved[:, None], _interior_point(matrix, vectors, rounds=30), x)
        return x.clamp(min=0)
    x, unsolved = _pivot(matrix, vectors, positive, rounds=12)
    if unsolved.any():
        # Gradients whose hull nearly holds 0 can send the pivoting round in circles.
        x[unsolved] = _interior_point(matrix, vectors[unsolved])
    return x.clamp(min=0)


def _interior_point(matrix: Tensor, vectors: Tensor, rounds: int = 60) -> Tensor:
    """The same problem by Mehrotra's predictor-corrector: slower than pivoting, but never lost."""
    largest = vectors.abs().amax(1, keepdim=True)
    q = vectors / largest
    x, y = torch.ones_like(q), torch.ones_like(q)
    best, smallest = x, torch.full_like(largest, torch.inf)
    for _ in range(rounds):
        residual = x @ matrix + q - y
        gap = (x * y).mean(1, keepdim=True)
        error = gap + residual.abs().amax(1, keepdim=True)
        best, smallest = torch.where(error < smallest, x, best), torch.minimum(error, smallest)
        if x.is_cpu and (smallest < 1e-15).all():
            break
        factor, _ = torch.linalg.cholesky_ex(matrix + torch.diag_embed(y / x))

        def solve(products, factor=factor, residual=residual, x=x, y=y):  # x∘dy + y∘dx = products
            dx = torch.cholesky_solve((products / x - residual).unsqueeze(2), factor).squeeze(2)
            dy = (products - y * dx) / x
            down = torch.cat([torch.where(dx < 0, -x / dx, 1.0), torch.where(dy < 0, -y / dy, 1.0)], 1)
            return dx, dy, down.amin(1, keepdim=True).clamp(max=1.0)

        dx, dy, length = solve(-x * y)
        centring = (((x + length * dx) * (y + length * dy)).mean(1, keepdim=True) / gap) ** 3
        dx, dy, length = solve(centring * gap - x * y - dx * dy)
        x, y = (x + 0.99 * length * dx).clamp(min=1e-200), (y + 0.99 * length * dy).clamp(min=1e-200)
    return largest * best


def _pivot(matrix: Tensor, vectors: Tensor, positive: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Block principal pivoting (Júdice & Pires 1994; Kim & Park 2011).

    Solve for the x that are thought positive and swap all that come out with the wrong sign; when three such rounds
    bring no progress, swap only the last one (Murty's rule).

    Returns:
        x (B, T), and whether the round limit came first (B,).
    """
    B, T = vectors.shape
    solution = torch.zeros_like(vectors)
    rows = torch.arange(B, device=vectors.device)
    fewest = torch.full((B, 1), T + 1, device=vectors.device)
    tries = torch.full((B, 1), 3, device=vectors.device)
    order = torch.arange(1, T + 1, device=vectors.device)
    largest = vectors.abs().amax(1, keepdim=True)
    for _ in range(rounds):
        x = _masked_solve(matrix, -vectors, positive)
        y = torch.addmm(vectors, x, matrix)
        wrong = torch.where(positive, x, y) < -1e-12 * (largest + x.abs().amax(1, keepdim=True))
        count = wrong.sum(1, keepdim=True)
        solution[rows] = x
        left = count[:, 0] > 0
        if vectors.is_cpu:  # go on with the unfinished problems only; a GPU is not asked
            if not left.any():
                break
            if not left.all():
                rows, vectors, positive, wrong, count, fewest, tries, largest = (
                    t[left] for t in (rows, vectors, positive, wrong, count, fewest, tries, largest)
                )
        progress = count < fewest
        fewest = torch.minimum(fewest, count)
        tries = torch.where(progress, 3, tries - 1)
        last = order == (wrong * order).amax(1, keepdim=True)
        positive = positive ^ torch.where(tries >= 0, wrong, wrong & last)
    unsolved = torch.zeros(B, dtype=torch.bool, device=left.device)
    unsolved[rows] = left[left] if len(rows) < len(left) else left
    return solution, unsolved


def _masked_solve(matrix: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """x (B, T) with M_SS x_S = right_S and 0 outside S, for each row's set S; M symmetric positive definite.

    Args:
        matrix: (T, T).
        right: (B, T).
        mask: (B, T) bool, or (1, T) for one S.
    """
    kept = mask.to(matrix)
    blocks = (matrix * kept[:, :, None]).mul_(kept[:, None, :])  # in place: fresh memory costs more than the products
    blocks.diagonal(dim1=1, dim2=2).add_(1 - kept)
    factor, _ = torch.linalg.cholesky_ex(blocks)
    return torch.cholesky_solve((right * kept).unsqueeze(2), factor).squeeze(2)


def steepest_worst_case(gramian: Tensor, slopes: Tensor, radius: Tensor, present: Tensor | None = None) -> Tensor:
    """argmax of min_i (slope_i + g_i·d) over the ball ‖d‖ ≤ radius, in terms of weights: d = Jᵀu.

    The optimum has u ≥ 0 and uᵀGu = radius², with u positive only on tasks that attain the minimum λ. Given the set of
    these tasks, u is linear in λ, and the radius fixes λ by a quadratic equation; the set is found as in
    `complementarity`. Where that goes in circles, Newton's method finds λ.

    Args:
        gramian: (T, T).
        slopes: (T,).
        radius: () ≥ 0.
        present: (T,) bool; an absent task is no part of the minimum.

    Returns:
        (T,) u.
    """
    matrix, norms = cosines(gramian)
    T = len(matrix)
    on = torch.ones_like(norms, dtype=torch.bool) if present is None else present
    unit = torch.where(radius > 0, radius, 1.0).to(matrix)
    p, q = 1 / norms, slopes.to(matrix) / norms / unit  # from here on the radius is 1, and x = u∘norms / radius
    p = p / torch.where(on, p, torch.inf).min()
    both = torch.stack([p, q])
    order = torch.arange(1, T + 1, device=p.device)
    active = on & (slopes <= torch.where(on, slopes, torch.inf).min())
    fewest, tries = torch.full_like(order[0], T + 1), torch.full_like(order[0], 3)
    for _ in range(60 if p.is_cpu else 4 + 2 * T):
        solved = _masked_solve(matrix, both, active[None])
        (a, b), (_, c) = (solved @ both.T).unbind()
        level = (b + (b * b - a * (c - 1)).clamp_(min=0).sqrt_()) / a  # λ, in units of the p
        x = level * solved[0] - solved[1]
        y = torch.addmv(q - level * p, matrix, x)
        wrong = on & (torch.where(active, x, y) < -1e-12 * (1 + x.abs().max()))
        count = wrong.sum()
        if p.is_cpu and not count:
            break
        progress = count < fewest
        fewest = torch.minimum(fewest, count)
        tries = torch.where(progress, 3, tries - 1)
        last = order == (wrong * order).max()
        active = active ^ torch.where(tries >= 0, wrong, wrong & last)
    if (count > 0) if p.is_cpu else (T > 3):
        x = torch.where(count > 0, _lowest_level(matrix, p, q, on), x)
    return torch.where(radius > 0, unit * x.clamp(min=0) / norms, 0.0)


def _lowest_level(matrix: Tensor, p: Tensor, q: Tensor, on: Tensor) -> Tensor:
    """The x of `steepest_worst_case` by a root of ‖d(λ)‖ = 1, d(λ) the shortest with q + g·d ≥ λp.

    That length is convex and increasing in λ: from above, Newton's method descends to the root and never passes it.
    """
    kept = on.to(matrix)
    matrix = matrix * kept * kept[:, None] + torch.diag(1 - kept)
    level = torch.where(on, (q + 1) / p, torch.inf).min()  # no d of length 1 lifts this task higher
    for _ in range(50 if p.is_cpu else 6):
        x = complementarity(matrix, torch.where(on, q - level * p, 1.0)[None])[0]
        length = (x @ (level * p - q)).clamp(min=1e-300).sqrt()  # xᵀCx, since xᵀy = 0, without its cancellation
        if p.is_cpu and (length - 1).abs() < 1e-12:
            break
        level = level - length * (length - 1) / (x @ p)
    return x / length


def fair_weights(gramian: Tensor, alpha: float, targets: Tensor | None = None, iterations: int = 60) -> Tensor:
    """Solve G w = (v / w)^(1/α) for w > 0: the fairness equation of Nash-MTL (α = 1, v = 1), FairGrad and PIVRG.

    Newton's method on the strictly convex potential ½xᵀCx − Σ b x^(1−1/α)/(1−1/α) that the equation is the stationarity
    of, with x = w∘‖g‖ and b = v^(1/α) ‖g‖^(1/α−1); steps are multiplicative, so that x stays positive.

    Args:
        gramian: (T, T); a task with a zero row is decoupled and gets a finite weight.
        alpha: α > 0.
        targets: (T,) v > 0; None is 1.
        iterations: bound on the Newton steps.

    Returns:
        (T,) w.
    """
    matrix, norms = cosines(gramian)
    b = norms ** (1 / alpha - 1)
    # A task without a gradient is decoupled; its b must not set the scale of the others'.
    live = gramian.diagonal() > 0
    typical = torch.where(live, b.log(), 0.0).sum() / live.sum().clamp(min=1)
    b = torch.where(live, b, typical.exp())
    if targets is not None:
        b = b * targets.to(b) ** (1 / alpha)
    mean = b.log().mean().exp()
    b = b / mean
    power = alpha / (1 + alpha)
    x = (b / matrix.sum(1).clamp(min=1)) ** power
    for _ in range(iterations):
        pull = b * x ** (1 - 1 / alpha)
        residual = pull - x * (matrix @ x)
        if residual.is_cpu and residual.abs().max() <= 1e-14 * pull.abs().max():
            break
        hessian = matrix * x * x[:, None]
        hessian.diagonal().add_(pull / alpha)
        factor, _ = torch.linalg.cholesky_ex(hessian)
        step = torch.cholesky_solve(residual[:, None], factor)[:, 0]
        x = x * step.clamp(-1, 1).exp()
    return mean**power * x / norms


def project_on_simplex(v: Tensor, present: Tensor | None = None) -> Tensor:
    """Euclidean projection of v (T,) onto {x ≥ 0, Σx = 1} (Held, Wolfe, Crowder 1974); absent tasks stay at 0."""
    if present is not None:
        v = torch.where(present, v, -torch.inf)
    # Subtracting the largest moves nothing, and large entries keep their differences; what is below −1 has no share.
    v = (v - v.max()).clamp_(min=-1)
    counts = torch.arange(1, len(v) + 1, device=v.device, dtype=v.dtype)
    # The threshold of the k largest entries rises with k as long as they stay positive, and falls from there on.
    threshold = v.topk(len(v)).values.cumsum(0).sub_(1).div_(counts).max()
    shares = (v - threshold).clamp_(min=0)
    return shares if present is None else torch.where(present, shares, 0.0)
