"""Curvature of the reduced problem x -> cost(z*(x), x): Gauss-Newton matrices and the automatic input step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jiio import tree
from jiio.autodiff import pull
from jiio.constraint import Free, L2Ball, LinfBall
from jiio.joint import equilibrium
from jiio.precondition import Matrix, Scalar
from jiio.problem import Problem, State
from jiio.solution import Work
from jiio.step import Step
from jiio.tree import Tree

# Up to this many coordinates of x the automatic step forms each sample's own Gauss-Newton matrix.
SMALL_INPUT = 64
LINEAR_STEPS = 60
LINEAR_TOL = 1e-2
SETTLED = 1e-3  # of z where a model is measured
# z hardly falls behind an x that takes it along: x waits only where z or mu are no solution at all
MEASURED_LAG = 1.0


class Linearization:
    """f and the gradient of cost, linearised at one (z, x): products with J, J^T and the Hessian of cost."""

    def __init__(self, problem: Problem, z: Tree, x: Tensor, *, work: Work):
        self.form, self.work, self.batch = z, work, len(x)
        self.inputs = [leaf.detach().requires_grad_() for leaf in (*tree.leaves(z), x)]
        with torch.enable_grad():
            z, x = tree.build(z, self.inputs[:-1]), self.inputs[-1]
            self.f = tree.leaves(problem.evaluate(z, x))
            cost = problem.cost(z, x, *problem.context)
            # J^T seed is linear in seed, so differentiating it in seed gives J: no forward mode needed of the user's ops
            self.seeds = [torch.zeros_like(leaf, requires_grad=True) for leaf in self.f]
            self.pulled = pull(self.f, self.seeds, self.inputs, graph=True)
            self.cost_gradient = pull([cost], [torch.ones_like(cost)], self.inputs, graph=True)

    def push(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """J_z dz + J_x dx, leaf by leaf, of direction = (*dz, dx)."""
        self.work.add(vjp=self.batch)
        return pull(self.pulled, direction, self.seeds, retain=True)

    def pull(self, mu: Sequence[Tensor]) -> list[Tensor]:
        """(*J_z^T mu, J_x^T mu)."""
        self.work.add(vjp=self.batch)
        return pull(self.f, mu, self.inputs, retain=True)

    def cost_hessian(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """Second derivative of cost in (z, x) along (*dz, dx)."""
        self.work.add(cost_grad=self.batch)
        return pull(self.cost_gradient, direction, self.inputs, retain=True)

    def tangent(self, dx: Tensor) -> list[Tensor]:
        """dz*/dx dx, the fixed point of dz = J_z dz + J_x dx."""
        return _linear_fixed_point(lambda dz: self.push([*dz, dx]), [torch.zeros_like(leaf) for leaf in self.seeds])

    def reduce(self, gradient: Sequence[Tensor]) -> Tensor:
        """(dz*/dx)^T v_z + v_x of gradient = (*v_z, v_x): one adjoint solve."""
        v_z = [leaf.detach() for leaf in gradient[:-1]]

        def adjoint(mu: Sequence[Tensor]) -> list[Tensor]:
            return [p + v for p, v in zip(self.pull(mu)[:-1], v_z, strict=True)]

        return self.pull(_linear_fixed_point(adjoint, v_z))[-1] + gradient[-1].detach()


def _linear_fixed_point(F: Callable[[Sequence[Tensor]], list[Tensor]], start: Sequence[Tensor]) -> list[Tensor]:
    """Iterate each sample to relative residual `LINEAR_TOL`; a finished one is frozen, so the batch has no say in it."""
    s = list(start)
    done = torch.zeros(len(s[0]), dtype=torch.bool, device=s[0].device)
    for _ in range(LINEAR_STEPS):
        moved = F(s)
        change = tree.norm(tuple(a - b for a, b in zip(moved, s, strict=True)))
        s = list(tree.where(done, tuple(s), tuple(moved)))
        done = done | (change <= LINEAR_TOL * tree.norm(tuple(moved)))
        if bool(done.all()):
            break
    return s


def response(problem: Problem, z: Tree, x: Tensor, *, work: Work | None = None) -> tuple[Tree, Tensor]:
    """The tangent dz*/dx and the Gauss-Newton matrices T^T C T of x -> cost(z*(x), x), T = (dz*/dx, 1) and C the Hessian of
    cost in (z, x): the curvature of f is left out.

    x: (batch, d).  z: near its equilibrium.  Returns leaves (batch, d, ...), and (batch, d, d). Takes about 10 d VJPs a
    sample, more where the contraction is near 1.
    """
    if x.dim() != 2:
        raise ValueError(f"a Gauss-Newton matrix needs x of shape (batch, d), got {tuple(x.shape)}")
    linear = Linearization(problem, z, x, work=work if work is not None else Work())
    tangent = tree.apply(lambda leaf: tree.stack_like(leaf, x.shape[1]), tree.detach(z))
    left, right = [], []
    for i, unit in enumerate(torch.eye(x.shape[1], dtype=x.dtype, device=x.device)):
        dx = unit.expand_as(x)
        dz = linear.tangent(dx)
        for stack, leaf in zip(tree.leaves(tangent), dz, strict=True):
            stack[:, i] = leaf
        left.append(tree.flatten((*dz, dx)))
        right.append(tree.flatten(tuple(linear.cost_hessian((*dz, dx)))))
    matrix = torch.stack(left, dim=1) @ torch.stack(right, dim=2)
    return tangent, (matrix + matrix.mT) / 2


def gauss_newton(problem: Problem, z: Tree, x: Tensor, *, work: Work | None = None) -> Tensor:
    """The Gauss-Newton matrices of `response`, (batch, d, d)."""
    return response(problem, z, x, work=work)[1]


def newton_step(problem: Problem, start: State, *, rate: float = 0.3) -> Step:
    """One step for all problems of a model, measured on the few that `problem` holds, at the x (batch, d) of `start`: the
    inverse of their mean Gauss-Newton matrix, and their mean tangent, by which z moves along with x.

    It costs what `solve(step=None)` spends on its own batch; keep the step. Best measured where solutions lie: solve a few
    problems first and give `solution.value` as `start`. x must be free.

    >>> problem = Problem(lambda z, x: 0.9 * z + x, lambda z, x: (z - 1).square().sum(1))
    >>> step = newton_step(problem, problem.start(torch.zeros(1, 2), torch.zeros(1, 2)))
    >>> [tuple(leaf.shape) for leaf in tree.leaves(step.tangent)]
    [(1, 2, 2)]
    """
    z = equilibrium(problem, start.z, start.x, work=Work(), tol=SETTLED, max_steps=500).value
    tangent, matrix = response(problem, z, start.x)
    return Step(Matrix(inverse_of(matrix.mean(0)), rate), lag=MEASURED_LAG, tangent=tree.apply(_mean, tangent))


def _mean(stack: Tensor) -> Tensor:
    """The mean over the batch, of size 1 there, in storage as `stack` is: `mean` alone would turn it over."""
    return torch.empty_like(stack[:1]).copy_(stack.mean(0, keepdim=True))


def inverse_of(matrix: Tensor, *, floor: float = 1e-4) -> Tensor:
    """Inverse of symmetric matrices (..., d, d), eigenvalues in absolute value and at least `floor` of the largest.

    >>> inverse_of(torch.diag(torch.tensor([2.0, 4.0])))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    values = values.abs()
    values = torch.maximum(values, floor * values.amax(-1, keepdim=True)).clamp_min(torch.finfo(matrix.dtype).tiny)
    return ((vectors / values[..., None, :]) @ vectors.mT).to(matrix.dtype)


def curvature(problem: Problem, z: Tree, x: Tensor, *, steps: int = 4, work: Work | None = None) -> Tensor:
    """Largest Gauss-Newton curvature of each sample's reduced problem, (batch,), by power iteration from its gradient.

    A lower estimate: power iteration approaches the largest eigenvalue from below. 0 where the gradient vanishes.
    """
    linear = Linearization(problem, z, x, work=work if work is not None else Work())
    direction = linear.reduce(linear.cost_gradient)
    value = x.new_zeros(len(x))
    for _ in range(steps):
        size = tree.norm(direction).clamp_min(torch.finfo(x.dtype).tiny)
        direction = direction / size.view(-1, *[1] * (x.dim() - 1))
        product = linear.cost_hessian((*linear.tangent(direction), direction))
        direction = linear.reduce(product)
        value = torch.maximum(value, tree.norm(direction))
    return value


def automatic_step(problem: Problem, z: Tree, x: Tensor, *, work: Work) -> Step:
    """The input step that `solve` takes when none is given, from each sample's curvature at its start.

    A free x of up to 64 coordinates: the inverse of the sample's own Gauss-Newton matrix at a third of a Newton step, and
    its tangent, as much memory as 64 equilibria.
    Otherwise plain steps of half the inverse of the largest curvature.
    """
    if isinstance(problem.constraint, Free) and x.dim() == 2 and x.shape[1] <= SMALL_INPUT:
        tangent, matrix = response(problem, z, x, work=work)
        return Step(Matrix(inverse_of(matrix, floor=1e-3)), tangent=tangent)
    largest = curvature(problem, z, x, work=work)
    largest = torch.maximum(largest, _least_curvature(problem, x, largest))
    return Step(Scalar(0.5, scale=1 / largest))


def _least_curvature(problem: Problem, x: Tensor, largest: Tensor) -> Tensor:
    """Where power iteration saw no curvature, steps are bounded by the size of the set, or by 1 for a free x."""
    bounded = isinstance(problem.constraint, L2Ball | LinfBall)
    scale = torch.as_tensor(problem.constraint.scale if bounded else 1.0, dtype=x.dtype, device=x.device)
    return (1e-3 / scale).expand_as(largest)
