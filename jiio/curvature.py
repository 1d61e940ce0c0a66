"""Curvature of the reduced problem x -> cost(z*(x), x)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jiio import tree
from jiio.autodiff import pull, variable
from jiio.problem import Problem
from jiio.solution import Work
from jiio.solver import Anderson
from jiio.tree import Tree

LINEAR_STEPS = 60
LINEAR_TOL = 1e-2
LINEAR_SOLVER = Anderson(5)
RANK_FLOOR = 1e-6  # of curvatures along given directions, in parts of the largest


class Linearization:
    """f and the gradient of cost, linearised at one (z, x): products with J, J^T and the Hessian of cost.

    tol: relative residual to which tangents and adjoints are solved.
    """

    def __init__(self, problem: Problem, z: Tree, x: Tensor, *, work: Work, tol: float = LINEAR_TOL):
        self.form, self.work, self.tol, self.batch = z, work, tol, len(x)
        z, x = tree.apply(variable, z), variable(x)
        self.inputs = [*tree.leaves(z), x]
        with torch.enable_grad():
            self.f = tree.leaves(problem.evaluate(z, x))
            cost = problem.cost(z, x, *problem.context)
            problem.check_cost(cost, self.batch)
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
        zero = [torch.zeros_like(leaf) for leaf in self.seeds]
        return _linear_fixed_point(lambda dz: self.push([*dz, dx]), zero, self.tol)

    def reduce(self, gradient: Sequence[Tensor]) -> Tensor:
        """(dz*/dx)^T v_z + v_x of gradient = (*v_z, v_x): one adjoint solve."""
        v_z = [leaf.detach() for leaf in gradient[:-1]]

        def adjoint(mu: Sequence[Tensor]) -> list[Tensor]:
            return [p + v for p, v in zip(self.pull(mu)[:-1], v_z, strict=True)]

        return self.pull(_linear_fixed_point(adjoint, v_z, self.tol))[-1] + gradient[-1].detach()

    def product(self, dx: Tensor) -> Tensor:
        """The Gauss-Newton matrix of x -> cost(z*(x), x) times dx: a tangent, a product with the Hessian of cost, an adjoint
        solve."""
        return self.reduce(self.cost_hessian((*self.tangent(dx), dx)))


def _linear_fixed_point(
    F: Callable[[Sequence[Tensor]], list[Tensor]], start: Sequence[Tensor], tol: float
) -> list[Tensor]:
    """Iterate each sample to relative residual `tol`; a finished one is frozen, so the batch has no say in it.

    Mixed by Anderson, which is GMRES on a linear map: at a contraction of 0.9 a fifth of the products of a plain iteration.
    Not by `iterate`, which returns s as it was measured: F(s) is there already and a step closer, of the four to six that a
    tangent takes; and a sample that fails has nothing better to return.
    """
    s, found, memory = tuple(start), tuple(start), LINEAR_SOLVER.init(tuple(start))
    done = torch.zeros(len(start[0]), dtype=torch.bool, device=start[0].device)
    for k in range(LINEAR_STEPS):
        moved = tuple(F(s))
        change = tree.norm(tree.apply(torch.sub, moved, s))
        found = tree.where(done, found, moved)
        done = done | (change <= tol * tree.norm(moved))
        if bool(done.all()):
            break
        s, memory = LINEAR_SOLVER.step(memory, k, s, moved)
    return list(found)


def response(
    problem: Problem, z: Tree, x: Tensor, *, tol: float = LINEAR_TOL, work: Work | None = None
) -> tuple[Tree, Tensor]:
    """The tangent dz*/dx and the Gauss-Newton matrices T^T C T of x -> cost(z*(x), x), T = (dz*/dx, 1) and C the Hessian of
    cost in (z, x): the curvature of f is left out.

    x: (batch, ...), of d numbers.  z: near its equilibrium.  tol: relative residual of each column of T.  Returns leaves
    (batch, d, ...), and (batch, d, d). Takes 5 to 10 d VJPs a sample.
    """
    linear = Linearization(problem, z, x, work=work if work is not None else Work(), tol=tol)
    numbers = x[0].numel()
    tangent = tree.apply(lambda leaf: tree.stack_like(leaf, numbers), tree.detach(z))
    units = [unit.view(x.shape[1:]).expand_as(x) for unit in torch.eye(numbers, dtype=x.dtype, device=x.device)]
    for i, dx in enumerate(units):
        for stack, leaf in zip(tree.leaves(tangent), linear.tangent(dx), strict=True):
            stack[:, i] = leaf
    columns = []  # of T^T C T, one by one: T is all that is held of this size
    for i, dx in enumerate(units):
        *along_z, along_x = linear.cost_hessian((*(stack[:, i] for stack in tree.leaves(tangent)), dx))
        parts = [tree.products(*pair) for pair in zip(tree.leaves(tangent), along_z, strict=True)]
        columns.append(tree.total([*parts, along_x.flatten(1)]))
    matrix = torch.stack(columns, dim=2)
    return tangent, (matrix + matrix.mT) / 2


def leading(
    problem: Problem, z: Tree, x: Tensor, rank: int, *, tol: float = LINEAR_TOL, work: Work
) -> tuple[Tensor, Tensor, Tensor]:
    """About the `rank` largest curvatures of each sample's reduced problem, whatever their sign, as positive numbers, falling,
    (batch, rank), their directions, (batch, d, rank), and the norm of its gradient, (batch,).

    By the Nystrom approximation of the Gauss-Newton matrix H from its products with `rank` directions Q, the gradient's and
    seeded random ones (Halko, Martinsson and Tropp 2011, section 5.4): estimates from below where no curvature is negative, in
    the time of `rank` tangents and as many adjoint solves. tol: of these.
    """
    linear = Linearization(problem, z, x, work=work, tol=tol)
    generator = torch.Generator().manual_seed(0)
    # whatever torch's default dtype and device, the same
    random = torch.randn(x[0].numel(), rank - 1, generator=generator, dtype=torch.float32, device="cpu")
    random = random.to(x).expand(len(x), -1, -1)
    gradient = linear.reduce(linear.cost_gradient).flatten(1)
    directions = torch.cat((gradient[:, :, None], random), dim=2)
    Q = torch.linalg.qr(_finite(directions.double())).Q.to(x.dtype)
    HQ = torch.stack([linear.product(q.view_as(x)).flatten(1) for q in Q.unbind(2)], dim=2).double()
    core = Q.mT.double() @ HQ
    values, vectors = torch.linalg.eigh(_finite((core + core.mT) / 2))
    # H is nearly HQ core^-1 (HQ)^T; directions in which Q saw no curvature are left out of the inverse. Of |core|: along
    # negative curvature, of a cost that is maximised or near a saddle, steps are to be as short as along positive
    values = values.abs()
    usable = values > RANK_FLOOR * values.amax(1, keepdim=True)
    root = HQ @ (vectors * torch.where(usable, values.rsqrt(), 0.0)[:, None])
    found, size, _ = torch.linalg.svd(_finite(root), full_matrices=False)
    return size.square().to(x.dtype), found.to(x.dtype), torch.linalg.vector_norm(gradient, dim=1)


def _finite(matrix: Tensor) -> Tensor:
    """0 in place of what a decomposition would fail at: such a sample's state shows that it is not finite."""
    return matrix.nan_to_num(0.0, 0.0, 0.0)


def gauss_newton(problem: Problem, z: Tree, x: Tensor, *, work: Work | None = None) -> Tensor:
    """The Gauss-Newton matrices of `response`, (batch, d, d)."""
    return response(problem, z, x, work=work)[1]


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


def curvature(
    problem: Problem, z: Tree, x: Tensor, *, steps: int = 4, tol: float = LINEAR_TOL, work: Work | None = None
) -> Tensor:
    """Largest Gauss-Newton curvature of each sample's reduced problem, (batch,), by power iteration from its gradient.

    A lower estimate: power iteration approaches the largest eigenvalue from below. 0 where the gradient vanishes.
    tol: relative residual of the tangents and adjoints in it.
    """
    return curvature_and_slope(problem, z, x, steps=steps, tol=tol, work=work if work is not None else Work())[0]


def curvature_and_slope(
    problem: Problem, z: Tree, x: Tensor, *, steps: int = 4, tol: float = LINEAR_TOL, work: Work
) -> tuple[Tensor, Tensor]:
    """`curvature` and the norm of the gradient of x -> cost(z*(x), x), each (batch,)."""
    linear = Linearization(problem, z, x, work=work, tol=tol)
    direction = linear.reduce(linear.cost_gradient)
    slope, value = tree.norm(direction), x.new_zeros(len(x))
    for _ in range(steps):
        size = tree.norm(direction).clamp_min(torch.finfo(x.dtype).tiny)
        direction = direction / tree.wide(size, x)
        direction = linear.product(direction)
        value = torch.maximum(value, tree.norm(direction))
    return value, slope
