"""On a GPU: the same answers as on a CPU, commands included, and CUDA graphs. Skipped where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jiio import Matrix, Problem, Status, Step, gauss_newton, implicit, inverse_of, load, solve, tree
from jiio.app.evaluate import evaluate_reconstruction
from jiio.app.main import main
from jiio.cuda_graph import captured
from jiio.data import load_images, load_labels
from jiio.joint import JointMap
from jiio.tasks.attack import JointAttack, attack
from jiio.tasks.generation import GenerationLoss, reconstruct, reconstruction, reconstruction_step
from jiio.tasks.latent_model import solve_equilibrium, start
from jiio.tasks.measurement import damage, measure
from jiio.tasks.restoration import DamagedLoss, restore
from jiio.tasks.threat import Threat
from tests.app.runs import tiny_run, tiny_trainer
from tests.problems import linear_quadratic

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Convolutions in float32, not TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def digits(count: int = 64) -> torch.Tensor:
    return load_images("digits", "test")[:count]


def test_reconstruction_is_that_of_the_cpu() -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model = load("digits-generator", device=device)
        found[device], solution = reconstruct(model, digits().to(device))
        assert bool(solution.converged.all())
    assert float((found["cpu"] - found["cuda"].cpu()).square().mean().sqrt()) < 5e-3


@pytest.mark.parametrize("name", ["hole", "noise-0.2", "pixels", "blur", "superresolution"])
def test_restoration_works_there(name: str) -> None:
    errors = {}
    operator, sigma = damage(name)
    for device in ("cpu", "cuda"):
        model = load("digits-generator", device=device)
        measurement = measure(operator, digits(), sigma=sigma, seed=0).to(device)
        image, solution = restore(model, measurement, on_failure="ignore")
        assert float(solution.converged.float().mean()) > 0.95
        errors[device] = float((image.cpu() - digits()).square().mean())
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.1)


def test_gradients_of_trainings_agree() -> None:
    for loss_of in (
        lambda model, images: GenerationLoss(model, joint_steps=200)(images)[0],
        lambda model, images: DamagedLoss(model, joint_steps=200)(images, hole(images))[0],
    ):
        found = {}
        for device in ("cpu", "cuda"):
            model = load("digits-generator", device=device).requires_grad_()
            loss_of(model, digits(16).to(device)).backward()
            found[device] = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
        cosine = torch.nn.functional.cosine_similarity(found["cpu"], found["cuda"], dim=0)
        assert float(cosine) > 0.99


def hole(images: torch.Tensor) -> Any:
    operator, sigma = damage("hole")
    return measure(operator, images.cpu(), sigma=sigma, seed=0).to(images.device)


def test_implicit_gradient_is_exact_there() -> None:
    family = linear_quadratic()
    on_gpu = replace(family, **{name: getattr(family, name).cuda() for name in ("A", "B", "c", "C", "y")})
    found = []
    for given in (family, on_gpu):
        c = given.c.clone().requires_grad_()
        problem = given.problem(c)
        with torch.no_grad():
            values = Problem(problem.f, problem.cost, context=problem.context)
        x = given.start().x
        matrix = inverse_of(gauss_newton(values, given.start().z, x))
        solution = solve(problem, given.start(), step=Step(Matrix(matrix, 0.5)), tol=1e-10, max_steps=2000)
        state = implicit(solution, tol=1e-10)
        (gradient,) = torch.autograd.grad(state.x.square().sum() + tree.inner(state.z, state.z).sum(), c)
        found.append(gradient.cpu())
    assert torch.allclose(*found, rtol=1e-6, atol=1e-9)


def test_an_attack_is_as_strong_there() -> None:
    images, labels, losses = digits(), load_labels("digits", "test")[:64], {}
    for device in ("cpu", "cuda"):
        model = load("digits-classifier", device=device)
        found = attack(model, images.to(device), labels.to(device), Threat("l2", 0.7), JointAttack(restarts=2))
        assert bool(found.resolved.all())
        assert float((found.images.cpu() - images).flatten(1).norm(dim=1).max()) <= 0.7 + 1e-6
        losses[device] = float(found.loss.mean())
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-3)


def test_a_captured_solve_is_the_plain_one() -> None:
    model = load("digits-generator", device="cuda")
    with torch.no_grad():
        problem, step = reconstruction(model, digits().cuda()), reconstruction_step(model, 64)
        first = start(model, 64)
        plain, graphs = (solve(some, first, step=step) for some in (problem, captured(problem)))
    assert bool(plain.converged.all()) and bool(graphs.converged.all())
    assert float((plain.value.x - graphs.value.x).abs().max()) < 2e-2
    assert (plain.steps - graphs.steps).abs().max() <= 4
    assert float((plain.cost - graphs.cost).abs().max()) < 1e-3


def test_captured_solves_leave_no_memory_behind() -> None:
    model, sizes = load("digits-generator", device="cuda"), []
    for _ in range(12):
        reconstruct(model, digits().cuda())
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_reserved())
    assert sizes[-1] <= sizes[3]


def test_what_cannot_be_recorded_is_solved_all_the_same() -> None:
    family = linear_quadratic()
    y = family.y.cuda()

    def f(z: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 0.5 * z + x.sum(1, keepdim=True) * (1.0 if float(x.detach().sum()) > 0 else 0.5)

    problem = Problem(f, lambda z, x, y: (z - y[:, :1]).square().sum(1), context=(y,))
    first = problem.start(y.new_zeros(4, 3), y.new_zeros(4, 6))
    plain = solve(problem, first, step=Step(0.05), max_steps=20, on_failure="ignore")
    with pytest.warns(UserWarning, match="can't be captured"):
        found = solve(captured(problem), first, step=Step(0.05), max_steps=20, on_failure="ignore")
    assert torch.allclose(plain.value.x, found.value.x)
    test_a_captured_solve_is_the_plain_one()  # a refusal leaves nothing behind that spoils the next recording


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_training_step_in_either_precision(precision: torch.dtype | None) -> None:
    model = load("digits-generator", device="cuda").requires_grad_()
    loss, solution = GenerationLoss(model, joint_steps=30, compute_dtype=precision)(digits().cuda())
    loss.backward()
    assert bool(loss.isfinite()) and (solution.status != Status.DIVERGED).all()


def test_evaluation_takes_the_map_of_a_captured_solve() -> None:
    """A solution keeps its map; diagnostics and linear solves take gradients with graph from it."""
    model = load("digits-generator", device="cuda")
    solution = reconstruct(model, digits(8).cuda())[1]
    assert isinstance(solution.map, JointMap)
    residual = solution.map.residual(solution.value)
    assert float(tree.norm(residual).detach().max()) < 0.1
    assert solve_equilibrium(model, solution.value.x)[0].is_cuda


def test_a_packaged_model_is_evaluated_there() -> None:
    model = load("digits-generator", device="cuda")
    assert evaluate_reconstruction(model, load_images("digits", "test"), max_steps=300)["psnr"] > 24


@pytest.mark.parametrize(
    "command",
    [
        ["train", "generation", "--steps", "12", "--images", "256", "--samples-every", "6"],
        ["train", "vae", "--steps", "6", "--images", "256"],
        ["train", "adversarial", "--steps", "6", "--clean", "0.5"],
        ["train", "adversarial", "--steps", "3", "--attack", "pgd"],
        ["train", "meta", "--data", "digits", "--steps", "3"],
    ],
    ids=lambda command: "-".join(command[1:2] + command[-1:]),
)
def test_trainings_run_and_are_evaluated(command: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*command, "--device", "cuda", "--threads", "1", "--output", str(run)]) == 0
    more = ["--tasks", "4"] if "meta" in command else ["--images", "16"]
    more += ["--draws", "1"] if command[1] in ("generation",) else []
    assert main(["evaluate", str(run), "--device", "cuda", *more]) == 0


def test_a_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    arguments = ["train", "generation", "--device", "cuda", "--images", "128", "--output", str(tmp_path / "run")]
    assert main([*arguments, "--steps", "6", "--checkpoint-every", "3"]) == 0
    assert main([*arguments, "--steps", "6", "--checkpoint-every", "3", "--resume"]) == 0


@pytest.mark.parametrize(
    "command",
    [
        ["diagnose", "digits-generator", "--images", "8"],
        ["audit", "digits-classifier", "--images", "16"],
        ["sample", "digits-generator"],
        ["bench", "digits-generator", "digits-classifier", "digits-5way1shot", "--only", "joint", "--repeats", "1"],
    ],
    ids=lambda command: command[0],
)
def test_other_commands_run(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--device", "cuda", "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())


def test_a_run_restores_files_there(tmp_path: Path) -> None:
    from PIL import Image

    tiny_run(tmp_path / "run")
    Image.fromarray((digits(1)[0, 0] * 255).byte().numpy()).save(tmp_path / "one.png")
    arguments = ["restore", str(tmp_path / "run"), str(tmp_path / "one.png"), "--damage", "hole", "--device", "cuda"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0


def test_the_state_of_a_training_lies_on_the_cpu() -> None:
    assert tiny_trainer().latents.device.type == "cpu"
