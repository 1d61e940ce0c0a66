"""Meta-learning by differentiating through the adaptation itself, step by step: the baseline of MAML."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jiio import tree
from jiio.problem import State
from jiio.solution import Solution
from jiio.solve import solve
from jiio.tasks.meta import PRIOR, RATE, ContextModel, Episode, Query, adaptation, start, step


class UnrolledLoss(nn.Module):
    """forward(episode) -> (loss, query logits, solution): `steps` plain gradient steps on the task vector, each from
    `iterations` of f, all kept in the graph (MAML, Finn et al. 2017, with the adaptation restricted to the task vector).

    The gradient is exact for what was computed and needs no convergence; memory grows with steps times iterations.
    Every step starts at the last one's equilibrium.
    """

    def __init__(
        self, model: ContextModel, *, prior: float = PRIOR, steps: int = 5, iterations: int = 8, rate: float = RATE
    ):
        super().__init__()
        if min(steps, iterations) < 1:
            raise ValueError(f"steps and iterations must be at least 1, got {steps} and {iterations}")
        self.model: ContextModel = model
        self.prior, self.steps, self.iterations, self.rate = prior, steps, iterations, rate
        self.query = Query(model)

    def forward(self, episode: Episode) -> tuple[Tensor, Tensor, Solution[State]]:
        """The mean cross-entropy of the query images; the solution measures what the steps have reached."""
        problem = adaptation(self.model, episode.support, episode.support_labels, episode.ways, prior=self.prior)
        first = start(self.model, episode.support, episode.ways)
        z, x = first.z, first.x.requires_grad_()
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            for k in range(self.steps + 1):
                for _ in range(self.iterations):
                    z = problem.evaluate(z, x)
                if k == self.steps:
                    break
                cost = problem.cost(z, x, *problem.context)
                (gradient,) = torch.autograd.grad(cost.sum(), x, create_graph=keep)
                x = x - self.rate / float(self.model.curvature) * gradient
                if not keep:
                    z, x = tree.apply(torch.detach, z), x.detach().requires_grad_()
        logits = self.query(State(z, first.mu, x), episode.support_labels, episode.query, episode.ways)
        loss = F.cross_entropy(logits.flatten(0, 1), episode.query_labels.flatten())
        reached = State(tree.apply(torch.detach, z), first.mu, x.detach())
        return loss, logits, solve(problem, reached, step=step(self.model), max_steps=1, on_failure="ignore")
