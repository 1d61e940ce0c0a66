"""The snippets of README.md and docs/extending.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from jiio import DEQ, Picard, Problem, fixed_point, implicit, solve, spectral_radius

ROOT = Path(__file__).parent.parent


def executed(file: str, word: str) -> dict[str, Any]:
    """What the one Python block of `file` that holds `word` defines."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    names: dict[str, Any] = {"__name__": "snippet"}
    torch.manual_seed(0)
    exec(compile(block, file, "exec", dont_inherit=True), names)  # this file's __future__ is not the reader's
    return names


@pytest.fixture(scope="module")
def readme() -> dict[str, Any]:
    return executed("README.md", "solve(")


def test_the_first_example_converges_and_its_loss_is_differentiated(readme: dict[str, Any]) -> None:
    """Against differences of the optimal cost along a direction, within what tolerances of 1e-2 leave of the gradient."""
    assert bool(readme["solution"].converged.all())
    W, U, target = readme["W"], readme["U"].double(), readme["target"].double()
    direction = torch.randn(20, 20, generator=torch.Generator().manual_seed(1))

    def optimal(W: torch.Tensor) -> float:
        problem = Problem(lambda z, x, y: torch.tanh(z @ W + x @ U.T), readme["cost"], context=(target,))
        start = problem.start(x=target.new_zeros(8, 5), z=target.new_zeros(8, 20))
        return float(solve(problem, start, tol=1e-8, max_steps=2000).cost.mean())

    ahead, back = (optimal((W.detach() + step * direction).double()) for step in (1e-3, -1e-3))
    error = float((W.grad * direction).sum()) - (ahead - back) / 2e-3
    assert abs(error) < 0.1 * float(W.grad.norm())


def test_the_calls_that_the_texts_name_take_the_first_example(readme: dict[str, Any]) -> None:
    f, target, solution = readme["f"], readme["target"], readme["solution"]
    z = DEQ(f)(solution.value.x, torch.zeros(8, 20), target)
    assert torch.allclose(z, solution.value.z, atol=1e-2)
    assert float(spectral_radius(lambda z: f(z, solution.value.x, target), z.detach()).max()) < 1
    state = implicit(solution)
    (gradient,) = torch.autograd.grad(state.x.square().sum(), readme["W"])
    assert bool(gradient.isfinite().all()) and float(gradient.norm()) > 0


def test_the_example_of_a_solver_converges(readme: dict[str, Any]) -> None:
    names = executed("docs/extending.md", "def init(self, s)")
    found, solver = names["solution"], names["Averaged"]()
    assert bool(found.converged.all())
    assert float((found.value - 0.7390851).abs().max()) < 1e-4
    assert int(found.steps.max()) < int(fixed_point(torch.cos, torch.ones(2, 1), solver=Picard()).steps.max())
    problem = readme["problem"]
    joint = solve(problem, problem.start(x=torch.zeros(8, 5), z=torch.zeros(8, 20)), solver=solver)
    assert bool(joint.converged.all())
    assert torch.allclose(joint.cost, readme["solution"].cost, rtol=1e-2)


class Inception(torch.nn.Module):
    """Takes what the TorchScript file of that name takes, and gives features only when asked."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.size(1) == 3
        means = ((img - 128) / 128).mean((2, 3))
        return means if return_features else means.softmax(1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated.*:DeprecationWarning")
def test_the_inception_network_is_given_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.jit.script(Inception()).save(str(tmp_path / "inception-2015-12-05.pt"))
    monkeypatch.chdir(tmp_path)
    features = executed("docs/extending.md", "return_features")["features"]
    assert features(torch.ones(2, 1, 4, 4)).tolist() == [[127 / 128] * 3] * 2
    assert features(torch.zeros(2, 3, 4, 4)).tolist() == [[-1.0] * 3] * 2
