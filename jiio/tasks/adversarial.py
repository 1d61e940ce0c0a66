"""Adversarial training of equilibrium classifiers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jiio import tree
from jiio.problem import State
from jiio.solution import Solution
from jiio.tasks.attack import GRADIENT_TOL, JointAttack, Method
from jiio.tasks.attack_problem import ImageModel, attack_problem
from jiio.tasks.threat import Threat


class AdversarialLoss(nn.Module):
    """forward(images, labels) -> (loss, solution): attack the batch, then the gradient at the attacked images.

    The attack's cost is minus the cross-entropy, so the loss is minus its Lagrangian, whose gradient in the weights at
    the solved z and mu is exact and needs no further solve (Danskin's theorem for x, the envelope theorem for z).
    method: one solve of it on the cross-entropy, without restarts, rivals or a mirrored start; its `tol` is the accuracy of the
    gradient.
    clean: share of the clean images' cross-entropy in the loss, in [0, 1), as in mixtures like TRADES (Zhang et al. 2019);
    it costs one equilibrium and one adjoint solve.
    """

    def __init__(
        self,
        model: ImageModel,
        threat: Threat,
        *,
        method: Method = JointAttack(steps=12, tol=GRADIENT_TOL),
        clean: float = 0.0,
    ):
        super().__init__()
        if not 0 <= clean < 1:
            raise ValueError(f"clean must lie in [0, 1), got {clean}")
        self.model: ImageModel = model
        self.threat, self.method, self.clean = threat, method, clean

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Solution[State]]:
        """The mean loss, and the solve behind it, whose status the training logs."""
        problem = attack_problem(self.model, images, labels, self.threat, loss="cross_entropy")
        z = self.model.start(images)
        solution = self.method.run(problem, State(z, tree.apply(torch.zeros_like, z), images), self.threat)
        loss = -problem.lagrangian(solution.value).mean()
        if self.clean:
            loss = (1 - self.clean) * loss + self.clean * F.cross_entropy(self.model(images), *problem.context)
        return loss, solution
