"""`jiio diagnose RUN`: does the inner solve converge on this model, if not why, and how exact is the outer gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jiio import tree
from jiio.app.figure import curves
from jiio.curvature import gauss_newton
from jiio.models import Generator
from jiio.problem import Problem, State
from jiio.regularize import spectral_radius
from jiio.solution import Solution, Status
from jiio.solve import solve
from jiio.step import Step
from jiio.tasks.generation import SOLVER, reconstruction, reconstruction_step
from jiio.tasks.latent_model import density, solve_equilibrium, start
from jiio.tasks.measurement import damage, measure
from jiio.tasks.restoration import DamagedLoss

OVERSHOOT = 20.0  # curvature after preconditioning that the safeguards of a step no longer make up for
ALIGNED = 0.95  # cosine below which the first-order outer gradient is called off
DRAWN = 1000  # latents whose energies say what is usual
CURVED = 16  # samples whose curvatures are looked at
DELAYED = 0.9  # spectral radius above which z and mu answer so slowly that they set the pace


def diagnose(
    model: Generator, images: Tensor, *, prior: float, seed: int = 0, picture: Path | None = None
) -> dict[str, Any]:
    """Contraction, curvature, residual traces, status counts, how the latents lie, gradient error; `advice` says what to
    change."""
    with torch.no_grad():
        f = model.cell()
        problem = reconstruction(model, images, prior=prior)
        step = reconstruction_step(model, len(images), prior=prior)
        first = start(model, len(images), latent=model.guess(images))
        # as `reconstruct` does
        solution = solve(problem, first, step=step, solver=SOLVER, on_failure="ignore", trace=True)
    x = solution.value.x
    drawn = torch.Generator(x.device).manual_seed(seed)
    radius = spectral_radius(lambda z: f(z, x), solve_equilibrium(model, x, cell=f), steps=40, generator=drawn)
    if picture is not None:
        draw_residuals(solution, picture)
    result: dict[str, Any] = {
        "samples": len(images),
        "status": {status.name: int((solution.status == status).sum()) for status in Status},
        "steps": {"median": float(solution.steps.double().median()), "most": int(solution.steps.max())},
        "residual": {name: float(solution.residual[:, i].max()) for i, name in enumerate(solution.blocks)},
        "lag": lag(solution),
        "spectral_radius": {"median": float(radius.median()), "largest": float(radius.max())},
        **curvatures(problem, step, solution),
        "latents": latents(model, x, seed=seed),
        "gradient": gradient_error(model, images[:8]),
        "report": solution.report(),
    }
    result["advice"] = advice(result)
    return result


def draw_residuals(solution: Solution[State], picture: Path) -> None:
    """The residual of each block along a traced solve."""
    steps = [point.step for point in solution.trace]
    medians = {
        name: [float(point.residual[:, i].nanmedian()) for point in solution.trace]
        for i, name in enumerate(solution.blocks)
    }
    shown = {name: (steps, column) for name, column in medians.items()}
    curves(shown, picture, labels=("joint step", "relative residual"), title="Median of the samples not yet done")


def curvatures(problem: Problem, step: Step, solution: Solution[State]) -> dict[str, dict[str, float]]:
    """Eigenvalues of the Gauss-Newton matrices of some of the samples where they were solved, and of what the step's P leaves
    of these."""
    few = torch.arange(min(CURVED, len(solution.status)), device=solution.status.device)
    z, x = tree.select(solution.value.z, few), solution.value.x[few]
    matrix = gauss_newton(problem.select(few), z, x)
    values = torch.linalg.eigvalsh(matrix)
    rule = step.select(few).rule.refresh(z, x, 0, solution.residual[few, 0])
    seen = torch.linalg.eigvals(torch.stack([rule.direction(column) for column in matrix.unbind(-1)], dim=-1)).real
    return {
        "curvature": {"least": float(values.min()), "largest": float(values.max())},
        "preconditioned": {
            "least": float(seen.amin(1).median()),
            "largest": float(seen.amax(1).median()),
            "worst": float(seen.max()),
        },
    }


def lag(solution: Solution[State]) -> dict[str, float]:
    """The larger residual of z and mu along the solve, over all samples while they take part."""
    values = torch.stack([point.residual[:, :2].amax(1) for point in solution.trace])
    values = values[values.isfinite()]
    return {"median": float(values.median()), "largest": float(values.max())}


def latents(model: Generator, x: Tensor, *, seed: int) -> dict[str, Any]:
    """Over how many directions the latents of the training images spread (the participation ratio of their variances), and
    -log p, up to a number, of the latents `x` and of draws from that density: it covers images whose energies are alike."""
    fitted = density(model)
    variances = torch.linalg.eigvalsh(torch.linalg.inv(fitted.gaussian().precision[0]).double())
    drawn = fitted.sample(DRAWN, torch.Generator().manual_seed(seed))
    return {
        "size": len(variances),
        "directions": float(variances.sum() ** 2 / variances.square().sum()),
        "energy": {"images": float(fitted.energy(x).mean()), "drawn": float(fitted.energy(drawn).mean())},
    }


def gradient_error(model: Generator, images: Tensor) -> dict[str, float]:
    """Cosine and relative error of the first-order outer gradient of an inpainting loss against the exact one."""
    operator, sigma = damage("hole")
    measurement = measure(operator, images, sigma=sigma)
    flat = {}
    parameters = [parameter.requires_grad_() for parameter in model.parameters()]
    for kind in ("exact", "first_order"):
        loss, _ = DamagedLoss(model, gradient=kind, joint_steps=300)(images, measurement)
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        flat[kind] = torch.cat([part.flatten() for part in found])
    model.requires_grad_(False)
    exact, first = flat["exact"], flat["first_order"]
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(exact, first, dim=0)),
        "relative_error": float((first - exact).norm() / exact.norm()),
    }


def advice(result: dict[str, Any]) -> list[str]:
    """What to change, most important first; a healthy model gets one line that says so."""
    lines = []
    failed = result["samples"] - result["status"]["CONVERGED"]
    if result["spectral_radius"]["largest"] >= 1:
        lines.append("f is no contraction at some solutions: use a WellPosedCell, or train with --jacobian.")
    elif result["spectral_radius"]["median"] > DELAYED:
        lines.append(f"z and mu answer slowly (spectral radius above {DELAYED}): lower the cell's contraction.")
    if result["preconditioned"]["worst"] > OVERSHOOT:
        lines.append(
            f"input steps overshoot: the curvature they meet is up to {result['preconditioned']['worst']:.0f} times what the "
            "model's `tangent` and `spread` say. Fit them again (jiio.tasks.latent_fit.fit_latents), or lower the rate."
        )
    if failed and result["status"]["BUDGET"] == failed:
        lines.append("the samples that failed only ran out of steps: raise max_steps.")
    elif failed:
        lines.append("some samples stalled: lower the input rate, or look for a kink (a ReLU cell).")
    if result["gradient"]["cosine"] < ALIGNED:
        lines.append(
            f"the first-order outer gradient is off (cosine {result['gradient']['cosine']:.2f}): use gradient='exact'."
        )
    return lines or ["nothing to change: the inner solve converges and the gradients agree."]


def describe(result: dict[str, Any]) -> list[str]:
    """The result of `diagnose` for a person."""
    seen, curvature, lying = result["preconditioned"], result["curvature"], result["latents"]
    return [
        result["report"],
        f"steps to converge: median {result['steps']['median']:.0f}, most {result['steps']['most']}",
        f"spectral radius of f: median {result['spectral_radius']['median']:.2f}, "
        f"largest {result['spectral_radius']['largest']:.2f}",
        f"lag of z and mu while x moves: median {result['lag']['median']:.1e}, largest {result['lag']['largest']:.1e}",
        f"curvature of the latents: {curvature['least']:.3g} to {curvature['largest']:.3g}; after preconditioning "
        f"{seen['least']:.2f} to {seen['largest']:.2f} (medians; 1 is ideal), at worst {seen['worst']:.1f}",
        f"latents: spread over {lying['directions']:.1f} of {lying['size']} directions; energy under the density that samples "
        f"are drawn from: these images {lying['energy']['images']:.1f}, samples {lying['energy']['drawn']:.1f}",
        f"first-order outer gradient: cosine {result['gradient']['cosine']:.3f}, relative error "
        f"{result['gradient']['relative_error']:.2f} against the exact one",
        *(f"- {line}" for line in result["advice"]),
    ]
