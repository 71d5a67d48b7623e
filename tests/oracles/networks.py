"""Oracles for the methods that look into the network, on a tiny one in NumPy.

Written from the equations alone. First derivatives are written out by hand; derivatives of objectives that contain
first derivatives (saliency, look-ahead steps, the terms of heads) are complex-step derivatives of the written-out
scalar, exact to rounding: f'(x) = Im f(x + ih) / h. Nothing here differentiates by back-propagation.
"""

from itertools import combinations

import numpy as np
from scipy.linalg import expm
from scipy.optimize import minimize, root

Params = dict[str, np.ndarray]


# ---------------------------------------------------------------------------------------------------- the network
class Net:
    """z = tanh(W x + b), at every position if x has any; y_k = V_k vec(R_k z) + c_k, with R_k = 1 unless given.

    The losses are means over the samples: half the squared error, cross-entropy, logistic loss (targets +-1), and
    then again from the start.
    """

    def __init__(self, outputs=(2, 3, 1)):
        self.outputs = tuple(outputs)
        self.tasks = range(len(self.outputs))

    def head(self, k: int) -> tuple[str, str]:
        return f"V{k}", f"c{k}"

    shared = ("W", "b")

    def init(self, rng, inputs: int, channels: int, positions: int = 1) -> Params:
        p = {"W": rng.normal(size=(channels, inputs)) / 2, "b": rng.normal(size=channels) / 4}
        for k, m in enumerate(self.outputs):
            p[f"V{k}"], p[f"c{k}"] = rng.normal(size=(m, channels * positions)), rng.normal(size=m) / 4
        return p

    def batch(self, rng, samples: int, inputs: int, space: tuple[int, ...] = ()):
        x = rng.normal(size=(samples, inputs, *space))
        kinds = (
            lambda m: rng.normal(size=(samples, m)),
            lambda m: np.eye(m)[rng.integers(m, size=samples)],
            lambda m: rng.choice([-1.0, 1.0], size=(samples, m)),
        )
        return x, [kinds[k % 3](m) for k, m in enumerate(self.outputs)]

    def features(self, p: Params, x):
        b = p["b"].reshape(-1, *[1] * (x.ndim - 2))
        return np.tanh(np.einsum("ci,ni...->nc...", p["W"], x) + b)

    def head_losses(self, p: Params, z, targets, rotations=None):
        """The losses, and by hand their gradients with respect to what the heads see (K arrays of z's shape)."""
        losses, gradients = [], []
        for k, t in zip(self.tasks, targets, strict=True):
            r = z if rotations is None else np.einsum("ab,nb...->na...", rotations[k], z)
            y = r.reshape(len(z), -1) @ p[f"V{k}"].T + p[f"c{k}"]
            if k % 3 == 0:
                loss, dy = ((y - t) ** 2).sum() / 2, y - t
            elif k % 3 == 1:
                e = np.exp(y)
                loss, dy = (np.log(e.sum(1)) - (t * y).sum(1)).sum(), e / e.sum(1, keepdims=True) - t
            else:
                loss, dy = np.log(1 + np.exp(-t * y)).sum(), -t / (1 + np.exp(t * y))
            losses.append(loss / len(z))
            gradients.append((dy @ p[f"V{k}"]).reshape(z.shape) / len(z))
        return np.stack(losses), gradients

    def losses(self, p: Params, batch, rotations=None):
        return self.head_losses(p, self.features(p, batch[0]), batch[1], rotations)[0]

    def pull_back(self, p: Params, x, dz) -> Params:
        """The shared gradient that a gradient at the features leads to, by hand."""
        d = dz * (1 - self.features(p, x) ** 2)
        d, x = d.reshape(*d.shape[:2], -1), x.reshape(*x.shape[:2], -1)
        return {"W": np.einsum("ncs,nis->ci", d, x), "b": d.sum((0, 2))}

    def gradients(self, p: Params, batch) -> list[Params]:
        """The gradient of each task, by hand; parameters of other heads are zero. Works for complex p."""
        x, targets = batch
        z = self.features(p, x)
        flat, dz = z.reshape(len(z), -1), self.head_losses(p, z, targets)[1]
        out = []
        for k, t in zip(self.tasks, targets, strict=True):
            g = {name: np.zeros_like(value) for name, value in p.items()} | self.pull_back(p, x, dz[k])
            y = flat @ p[f"V{k}"].T + p[f"c{k}"]
            dy = (y - t, np.exp(y) / np.exp(y).sum(1, keepdims=True) - t, -t / (1 + np.exp(t * y)))[k % 3] / len(z)
            g[f"V{k}"], g[f"c{k}"] = dy.T @ flat, dy.sum(0)
            out.append(g)
        return out


def derivative(f, p: Params, names=None) -> Params:
    """Of a real function of parameters, by complex steps."""
    out = {}
    for name in names if names is not None else p:
        out[name] = np.zeros(p[name].shape)
        for i in np.ndindex(*p[name].shape):
            moved = p[name].astype(complex)
            moved[i] += 1e-30j
            out[name][i] = np.imag(f({**p, name: moved})) / 1e-30
    return out


def flat(p: Params, names=None):
    return np.concatenate([np.ravel(p[name]) for name in (names if names is not None else p)])


def combine(weights, gradients: list[Params]) -> Params:
    return {n: sum(w * g[n] for w, g in zip(weights, gradients, strict=True)) for n in gradients[0]}


def absolute(x):
    """|x| that complex steps can differentiate."""
    return np.where(np.real(x) < 0, -x, x)


def norm(x):
    return np.sqrt((x * x).sum())


def softmax(v):
    e = np.exp(v)
    return e / e.sum()


# ------------------------------------------------------------------------------------------- 1.8 GradDrop, features
def graddrop(z, gradients, u, leak=0.0, eps=1e-7):
    """The combined gradient at z; u has the shape of one sample's features, leak one number or one a task."""
    signs = [(np.sign(z) * g).sum(0) for g in gradients]
    p = 0.5 * (1 + sum(signs) / (sum(np.abs(s) for s in signs) + eps))
    out = np.zeros_like(z)
    for s, g, rest in zip(signs, gradients, np.broadcast_to(leak, len(signs)), strict=True):
        mask = (p > u) * (s > 0) + (p < u) * (s < 0)
        out += (rest + (1 - rest) * mask)[None] * g
    return out


# ----------------------------------------------------------------------------------------------------- 1.9 RotoGrad
def rotograd_features(gradients, reference):
    """C times the sum of the unit gradients; gradients and reference norms belong to the unrotated features."""
    norms = np.array([norm(g) for g in gradients])
    alpha = norms / reference
    alpha = alpha / alpha.sum()
    return (alpha * norms).sum() * sum(g / n for g, n in zip(gradients, norms, strict=True))


def rotograd_target(gradients):
    """The authors' v: the mean of the gradients, each of them at the norm of the mean gradient."""
    size = norm(sum(gradients) / len(gradients))
    return sum(g / norm(g) for g in gradients) * size / len(gradients)


def rotation_loss_code(rotation, target, rotated):
    """Mean over samples of |R v - gradient at what the head sees|^2, the authors' code."""
    return ((np.einsum("ab,nb->na", rotation, target) - rotated) ** 2).sum() / len(target)


def rotation_loss_paper(rotation, gradients, rotated):
    """- sum_n < R^T gtilde_n, v_n >, v the mean over tasks of the (whole-batch) normalised gradients."""
    v = sum(g / norm(g) for g in gradients) / len(gradients)
    return -(np.einsum("ab,na->nb", rotation, rotated) * v).sum()


def rotation(a):
    return expm(a - a.T)


# ------------------------------------------------------------------------------------------------------ 2.2 LDC-MTL
def ldc_mtl_objective(logits, losses, coefficient, total=None):
    """CelebA's form; `total` is the detached sum of the weights."""
    w = 1 / (1 + np.exp(-logits))
    total = np.real(w).sum() if total is None else total
    scaled = w * losses
    return scaled.sum() / total + coefficient * sum(absolute(scaled[k] - scaled[k + 1]) for k in range(len(losses) - 1))


def ldc_mtl(logits, losses, coefficient):
    """d/d losses (the weights of the tasks' gradients) and d/d logits, by hand."""
    w = 1 / (1 + np.exp(-logits))
    s = np.sign(np.diff(-w * losses))
    push = np.append(s, 0) - np.append(0, s)
    outer = 1 / w.sum() + coefficient * push
    return w * outer, losses * w * (1 - w) * outer


# ------------------------------------------------------------------------------------------------------ 2.3 Rep-MTL
def saliency_entropy(saliencies, eps=0.0):
    """TSR: the mean over samples and positions of the entropy over tasks of |channel mean of the saliency|."""
    shat = np.stack([absolute(s.reshape(*s.shape[:2], -1).mean(1)) for s in saliencies])  # K x B x HW
    p = shat / (shat.sum(0) + eps)
    return -(p * np.log(p + eps)).sum() / shat[0].size


def affinities(s):
    """B vectors of unit length: the channel affinity of the spatially averaged saliency, sample by sample."""
    s = s.reshape(*s.shape[:2], -1).mean(2)
    m = (s[:, :, None] * s[:, None, :]).reshape(len(s), -1)
    return m / np.sqrt((m * m).sum(1, keepdims=True))


def saliency_alignment(saliencies, temperature):
    """CSA: positives are the tasks' affinities of the same sample, negatives the anchors of the other samples."""
    anchor, tasks = affinities(sum(saliencies) / len(saliencies)), [affinities(s) for s in saliencies]
    total = 0.0
    for b in range(len(anchor)):
        others = sum(np.exp((anchor[b] * anchor[k]).sum() / temperature) for k in range(len(anchor)) if k != b)
        total += sum(-((anchor[b] * m[b]).sum() / temperature - np.log(others)) for m in tasks)
    return total / len(anchor)


def rep_mtl_objective(net: Net, p: Params, batch, tsr, csa, temperature):
    losses, saliencies = net.head_losses(p, net.features(p, batch[0]), batch[1])
    entropy = tsr * saliency_entropy(saliencies) if tsr else 0.0
    return losses.sum() + entropy + (csa * saliency_alignment(saliencies, temperature) if csa else 0.0)


# -------------------------------------------------------------------------------------------------- 3.4 Auto-Lambda
def look_ahead(net: Net, p: Params, batch, weights, lr, momentum=0.0, buffers=None, decay=0.0) -> Params:
    """theta' after one step of SGD over all parameters; weights may be complex."""
    g = combine(weights, net.gradients(p, batch))
    old = buffers if buffers is not None else {n: 0.0 for n in p}
    return {n: p[n] - lr * (g[n] + momentum * old[n] + decay * p[n]) for n in p}


def outer_gradient(net: Net, p: Params, train, outer, weights, primary, **step):
    """The true derivative of the primary tasks' loss after the step with respect to the weights."""

    def objective(w):
        moved = look_ahead(net, p, train, w["w"], **step)
        return sum(net.losses(moved, outer)[i] for i in primary)

    return derivative(objective, {"w": np.asarray(weights, float)})["w"]


def outer_gradient_differences(net: Net, p: Params, train, outer, weights, primary, lr, eps=0.01, **step):
    """The authors' estimate of it: central differences along the outer gradient at theta'."""
    moved = look_ahead(net, p, train, weights, lr=lr, **step)
    d = combine([float(i in primary) for i in net.tasks], net.gradients(moved, outer))
    e = eps / np.linalg.norm(flat(d))
    up = net.losses({n: p[n] + e * d[n] for n in p}, train)
    down = net.losses({n: p[n] - e * d[n] for n in p}, train)
    return -lr * (up - down) / (2 * e)


# --------------------------------------------------------------------------------------------------------- 3.5 MOML
def moml_hypergradients(net: Net, p: Params, train, outer, logits, lr):
    """Row t: the derivative of task t's outer loss after one inner step with respect to the logits, unrolled."""
    rows = []
    for t in net.tasks:
        objective = lambda v, t=t: net.losses(look_ahead(net, p, train, softmax(v["v"]), lr), outer)[t]  # noqa: E731
        rows.append(derivative(objective, {"v": np.asarray(logits, float)})["v"])
    return np.stack(rows)


def min_norm(rows):
    """Convex weights of the shortest combination of the rows: the best of all faces of the simplex."""
    gram, k, best = rows @ rows.T, len(rows), (np.inf, None)
    for size in range(1, k + 1):
        for face in map(list, combinations(range(k), size)):
            kkt = np.block([[gram[np.ix_(face, face)], -np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            inner = np.linalg.lstsq(kkt, np.append(np.zeros(size), 1.0), rcond=None)[0][:size]
            if (inner >= -1e-12).all():
                w = np.zeros(k)
                w[face] = inner
                best = min(best, (w @ gram @ w, tuple(w)))
    return np.array(best[1])


# ------------------------------------------------------------------------------------------------------ 4.2 ConsMTL
def fairgrad(gram):
    """a > 0 with G a = a^(-1/2): the minimum of a convex function of log a near it, polished by a root finder."""
    value = lambda s: np.exp(s) @ gram @ np.exp(s) / 2 - 2 * np.exp(s / 2).sum()  # noqa: E731
    near = minimize(value, -np.log(np.diag(gram)) / 1.5, method="Nelder-Mead", options={"maxiter": 4000}).x
    a = root(lambda s: gram @ np.exp(s) * np.exp(s / 2) - 1, near, tol=1e-14)
    assert np.abs(a.fun).max() < 1e-9, a
    return np.exp(a.x)


def consmtl_head(net: Net, p: Params, batch, k, alpha, strength, clip=0.1) -> tuple[Params, Params]:
    """Head k's gradient: its own plus the clipped one of - strength <gradient of l_k at z, delta>; and both parts."""
    z = net.features(p, batch[0])
    delta = sum(a * g for a, g in zip(alpha, net.head_losses(p, z, batch[1])[1], strict=True))
    own = {n: net.gradients(p, batch)[k][n] for n in net.head(k)}
    agreement = lambda q: -strength * (net.head_losses(q, z, batch[1])[1][k] * delta).sum()  # noqa: E731
    extra = derivative(agreement, p, net.head(k))
    bound, size = clip * np.linalg.norm(flat(own)), np.linalg.norm(flat(extra))
    scale = min(1.0, bound / size) if size > 0 else 1.0
    extra = {n: scale * g for n, g in extra.items()}
    return {n: own[n] + extra[n] for n in own}, extra


# ------------------------------------------------------------------------------------------------------- optimizers
class Adam:
    """Kingma and Ba, coordinate by coordinate alike; the eps is outside the root."""

    def __init__(self, betas=(0.9, 0.999), eps=1e-8):
        self.betas, self.eps, self.t, self.m, self.v = betas, eps, 0, 0.0, 0.0

    def direction(self, g):
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        return self.m / (1 - b1**self.t) / (np.sqrt(self.v / (1 - b2**self.t)) + self.eps)


class AdaGrad:
    def __init__(self, eps=1e-10):
        self.eps, self.total = eps, 0.0

    def direction(self, g):
        self.total = self.total + g * g
        return g / (np.sqrt(self.total) + self.eps)


class RMSProp:
    def __init__(self, gamma=0.99, eps=1e-8):
        self.gamma, self.eps, self.mean = gamma, eps, 0.0

    def direction(self, g):
        self.mean = self.gamma * self.mean + (1 - self.gamma) * g * g
        return g / (np.sqrt(self.mean) + self.eps)


class Momentum:
    def __init__(self, momentum=0.9):
        self.momentum, self.buffer = momentum, 0.0

    def direction(self, g):
        self.buffer = self.momentum * self.buffer + g
        return self.buffer


class AdaTask:
    """One rule a task for shared parameters, the sum of their directions; one rule for all of a head's gradient.

    A task that is absent from a batch leaves its rule alone, moments and counter, and adds nothing. Its head rests.
    """

    def __init__(self, net: Net, rule):
        self.net = net
        self.per_task = {n: [rule() for _ in net.tasks] for n in net.shared}
        self.heads = {n: rule() for k in net.tasks for n in net.head(k)}

    def step(self, p: Params, task_gradients: list[Params], lr, decay=0.0, present=None) -> Params:
        """The base rules add weight decay themselves where they are decoupled: p - lr * decay * p first."""
        present = [True for _ in self.net.tasks] if present is None else present
        new = {}
        resting = {n for k, there in zip(self.net.tasks, present, strict=True) if not there for n in self.net.head(k)}
        for n in p:
            old = p[n] * (1 - lr * decay)
            if n in resting:
                new[n] = p[n]
            elif n in self.per_task:
                rules = zip(self.per_task[n], task_gradients, present, strict=True)
                new[n] = old - lr * sum(r.direction(g[n]) for r, g, there in rules if there)
            else:
                new[n] = old - lr * self.heads[n].direction(sum(g[n] for g in task_gradients))
        return new


class MTLIO:
    """A forward, a backward and a step of its own Adam for every task in turn; each sees what the ones before did."""

    def __init__(self, net: Net, rule):
        self.net = net
        self.rules = [{n: rule() for n in (*net.shared, *net.head(k))} for k in net.tasks]

    def step(self, p: Params, batch, lr, present=None) -> Params:
        for k in self.net.tasks:
            if present is None or present[k]:
                g = self.net.gradients(p, batch)[k]
                p = {**p, **{n: p[n] - lr * rule.direction(g[n]) for n, rule in self.rules[k].items()}}
        return p


class Signum:
    def __init__(self, beta=0.9):
        self.beta, self.m = beta, 0.0

    def step(self, p, g, lr, decay=0.0):
        self.m = self.beta * self.m + (1 - self.beta) * g
        return p - lr * (np.sign(self.m) + decay * p)
