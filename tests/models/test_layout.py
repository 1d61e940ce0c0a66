"""Maps and gradients of the packaged kinds of model stay channels last: where one does not, every further operation copies."""

from collections.abc import Callable

import pytest
import torch

from jiio import tree
from jiio.models import (
    ClassifierConfig,
    ContextConfig,
    GeneratorConfig,
    classifier,
    context_classifier,
    generator,
)
from jiio.problem import Problem, State
from jiio.tasks import meta
from jiio.tasks.attack_problem import attack_problem
from jiio.tasks.generation import reconstruction
from jiio.tasks.threat import Threat


def classified(side: int, patch: int) -> tuple[Problem, State]:
    model = classifier(ClassifierConfig(image_shape=(1, side, side), patch=patch, channels=(4, 6)))
    images = torch.rand(3, 1, side, side)
    problem = attack_problem(model, images, torch.tensor([0, 1, 2]), Threat("l2", 0.5))
    return problem, problem.start(images, model.start(images))


def generated() -> tuple[Problem, State]:
    model = generator(GeneratorConfig(latent=5, image_shape=(1, 8, 8), channels=(4, 6)))
    x = torch.randn(3, 5)
    problem = reconstruction(model, torch.rand(3, 1, 8, 8), prior=0.1)
    return problem, problem.start(x, model.start(x))


def adapted() -> tuple[Problem, State]:
    model = context_classifier(ContextConfig(image_shape=(1, 8, 8), margin=0, channels=(4, 6), patch=2, width=8))
    support, labels = torch.rand(2, 6, 1, 8, 8), torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    return meta.adaptation(model, support, labels, 3), meta.start(model, support, 3)


@pytest.mark.parametrize("made", [lambda: classified(8, 1), lambda: classified(16, 2), generated, adapted])
def test_a_step_keeps_the_layout(made: Callable[[], tuple[Problem, State]]) -> None:
    with torch.no_grad():
        problem, start = made()
        f = problem.evaluate(start.z, start.x)
        now = problem.gradients(State(f, tree.apply(torch.randn_like, f), start.x))
    for part in (*tree.leaves(start.z), *tree.leaves(now.f), *tree.leaves(now.z)):
        maps = part.flatten(0, 1) if part.dim() == 5 else part
        assert tree.storage_order(maps) == [0, 2, 3, 1]
