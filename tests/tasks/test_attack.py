"""Attacks: feasible, as strong as the baseline, independent of the batch, deterministic, exact gradients behind them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from jiio import load
from jiio.data.digits import digits_images, digits_labels
from jiio.joint import equilibrium
from jiio.models import Classifier, ClassifierConfig, classifier
from jiio.schedule import Constant
from jiio.solution import Status
from jiio.tasks.adversarial import AdversarialLoss
from jiio.tasks.attack import JointAttack, PGDAttack, attack
from jiio.tasks.attack_problem import attack_problem
from jiio.tasks.threat import Threat


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Classifier:
    torch.manual_seed(seed)
    config = ClassifierConfig(image_shape=(1, 8, 8), classes=4, channels=(4, 8), patch=1, contraction=0.8)
    made = classifier(config).to(dtype)
    with torch.no_grad():
        made.head.weight.mul_(10)  # sharp enough for attacks to matter
    return made


def images(count: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 8, 8, generator=generator, dtype=dtype)
    return x, model(dtype=dtype)(x).argmax(1)


@pytest.mark.parametrize("norm, radius", [("l2", 0.8), ("linf", 0.1)])
@pytest.mark.parametrize("method", [JointAttack(restarts=3, mirror=0.0), PGDAttack(), PGDAttack(warm=True)])
def test_no_attacked_image_leaves_ball_or_box(norm, radius: float, method) -> None:
    x, labels = images()
    x[0] = x[0].round()  # on the box's edge
    found = attack(model(), x, labels, Threat(norm, radius), method)
    offset = (found.images - x).flatten(1)
    size = offset.norm(dim=1) if norm == "l2" else offset.abs().amax(1)
    assert float(size.max()) <= radius + 1e-6
    assert float(found.images.min()) >= 0
    assert float(found.images.max()) <= 1
    assert bool(found.resolved.all())


@pytest.mark.parametrize("norm, radius", [("l2", 0.8), ("linf", 0.1)])
def test_the_joint_attack_is_as_strong_as_many_steps_of_pgd(norm, radius: float) -> None:
    x, labels = images(16)
    threat = Threat(norm, radius)
    joint = attack(model(), x, labels, threat, JointAttack(steps=60))
    pgd = attack(model(), x, labels, threat, PGDAttack(steps=100, rate=3.0 if norm == "l2" else 0.2))
    clean = attack(model(), x, labels, Threat(norm, 1e-6), JointAttack(steps=1))
    assert float(joint.loss.mean()) > 0.99 * float(pgd.loss.mean())
    assert float(joint.loss.mean()) > float(clean.loss.mean()) + 0.1
    assert joint.work.vjp < pgd.work.vjp / 3


def test_the_joint_attack_is_as_strong_as_pgd_in_a_ball_several_times_as_wide_as_that_of_the_training() -> None:
    """Where the image has far to go, steps extrapolated without end swing and hardly come any higher."""
    net, threat = load("digits-classifier"), Threat("l2", 2.8)
    x, labels = digits_images("test")[:60], digits_labels("test")[:60]
    joint, pgd = (attack(net, x, labels, threat, method) for method in (JointAttack(), PGDAttack()))
    assert float(joint.loss.mean()) > float(pgd.loss.mean())
    assert joint.work.vjp < pgd.work.vjp / 2


@pytest.mark.parametrize("method", [JointAttack(), PGDAttack()])
def test_sign_steps_that_grow_shorter_come_higher(method, monkeypatch: pytest.MonkeyPatch) -> None:
    net, threat = load("digits-classifier"), Threat("linf", 0.4)
    x, labels = digits_images("test")[:60], digits_labels("test")[:60]
    shrinking = attack(net, x, labels, threat, method)
    monkeypatch.setattr("jiio.tasks.attack.SHRINKING", Constant())
    constant = attack(net, x, labels, threat, method)
    assert float(shrinking.loss.mean()) > 1.01 * float(constant.loss.mean())


def test_a_targeted_attack_raises_the_target() -> None:
    x, labels = images(8)
    target = (labels + 1) % 4
    threat = Threat("l2", 1.5)
    found = attack(model(), x, labels, threat, JointAttack(steps=40), target=target)
    before, after = (
        torch.log_softmax(model()(images), dim=1).gather(1, target[:, None]) for images in (x, found.images)
    )
    assert bool((after > before).all())
    assert bool((found.robust == (found.prediction != target)).all())


def test_attacks_with_restarts_do_not_depend_on_the_batch() -> None:
    x, labels = images(5)
    threat, method = Threat("l2", 0.8), JointAttack(restarts=3, steps=60, mirror=0.5)
    together = attack(model(), x, labels, threat, method)
    for i in range(len(x)):
        alone = attack(model(), x[i : i + 1], labels[i : i + 1], threat, method)
        assert float((alone.images[0] - together.images[i]).abs().max()) < 1e-5
        assert float((alone.loss[0] - together.loss[i]).abs()) < 1e-5


def test_of_starts_that_end_at_the_same_maximum_the_first_is_reported_whatever_the_batch() -> None:
    """Their losses differ in rounding alone. These images came out by up to 4e-3 apart in a pixel when that decided."""
    net, rows = load("digits-classifier"), [100, 184, 206, 224, 241, 250, 286, 300]
    x, labels = digits_images("test"), digits_labels("test")
    threat, method = Threat("linf", 0.1), JointAttack(restarts=3, mirror=0.5)
    together = attack(net, x[:320], labels[:320], threat, method)
    for i in rows:
        alone = attack(net, x[i : i + 1], labels[i : i + 1], threat, method)
        assert float((alone.images[0] - together.images[i]).abs().max()) < 1e-5


@pytest.mark.parametrize("threat", [Threat("l2", 0.7), Threat("linf", 0.15)])
def test_rivals_fool_images_that_the_best_other_class_alone_does_not(threat: Threat) -> None:
    net, x, labels = load("digits-classifier"), digits_images("test")[:120], digits_labels("test")[:120]
    method = JointAttack(loss="margin", mirror=math.inf)
    once, against = (attack(net, x, labels, threat, replace(method, rivals=rivals)) for rivals in (0, 3))
    assert bool((against.loss >= once.loss).all())
    assert not bool((against.robust & ~once.robust).any())
    assert int((once.robust & ~against.robust).sum()) >= 3
    # the strongest margin is a wrong answer wherever any was found
    assert torch.equal(against.prediction == labels, against.robust)
    # a model of ten classes has nine others; more are as many as there are
    assert torch.equal(*(attack(net, x[:4], labels[:4], threat, replace(method, rivals=n)).images for n in (9, 20)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_random_starts_are_drawn_for_images_of_any_float_type(dtype: torch.dtype) -> None:
    x = images(2)[0].to(dtype)
    for threat in (Threat("l2", 0.5), Threat("linf", 0.1)):
        found = threat.random(x, 1)
        assert found.dtype == dtype
        assert torch.equal(found, threat.random(x, 1)) and not torch.equal(found, threat.random(x, 2))
        assert bool((threat.constraint(x.double()).contains(found.double(), 1e-2)).all())


def test_restarts_never_weaken_an_attack() -> None:
    x, labels = images(8)
    threat = Threat("l2", 0.8)
    one, five = (attack(model(), x, labels, threat, JointAttack(restarts=n)) for n in (1, 5))
    assert bool((five.loss >= one.loss - 1e-6).all())


def test_the_opposite_side_of_the_ball_is_tried_where_the_loss_is_high() -> None:
    net, rows = load("digits-classifier"), slice(0, 60)
    x, labels = digits_images("test")[rows], digits_labels("test")[rows]
    threat = Threat("l2", 0.7)
    once, twice = (attack(net, x, labels, threat, JointAttack(mirror=bound)) for bound in (math.inf, 1.0))
    high = once.loss > 1.0
    assert bool((twice.loss >= once.loss).all())
    assert torch.equal(twice.images[~high], once.images[~high])
    assert float((twice.loss - once.loss)[high].mean()) > 0.01
    # only the images above the bound are paid for
    assert once.work.f < twice.work.f < 2 * once.work.f


def test_the_training_gradient_is_that_of_the_loss_at_the_attacked_images() -> None:
    """Against the exact gradient through the equilibrium at the images that the attack found."""
    net, (x, labels) = model(dtype=torch.float64), images(4, torch.float64)
    method = JointAttack(steps=200, tol=1e-2)
    loss, solution = AdversarialLoss(net, Threat("l2", 0.5), method=method)(x, labels)
    net.tol = 1e-10
    reference = torch.nn.functional.cross_entropy(net(solution.value.x), labels)
    parameters = list(net.parameters())
    found, expected = (torch.autograd.grad(value, parameters) for value in (loss, reference))
    assert loss.item() == pytest.approx(reference.item(), rel=1e-2)
    scale = max(float(g.norm()) for g in expected)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) < 2e-2 * scale


def test_a_share_of_the_clean_loss() -> None:
    net, (x, labels) = model(), images(4)
    clean = torch.nn.functional.cross_entropy(net(x), labels)
    adversarial, _ = AdversarialLoss(net, Threat("l2", 0.5))(x, labels)
    mixed, _ = AdversarialLoss(net, Threat("l2", 0.5), clean=0.25)(x, labels)
    assert mixed.item() == pytest.approx(0.75 * adversarial.item() + 0.25 * clean.item(), rel=1e-4)


@pytest.mark.parametrize("tiny", [Threat("l2", 1e-9), Threat("linf", 1e-9)])
def test_at_radius_0_the_attack_finds_the_clean_image(tiny: Threat) -> None:
    x, labels = images(4)
    found = attack(model(), x, labels, tiny, JointAttack(steps=5))
    assert float((found.images - x).abs().max()) < 1e-6
    assert bool(found.robust.all())


def test_bad_input_is_refused() -> None:
    x, labels = images(4)
    with pytest.raises(ValueError, match=r"must lie in \[0.0, 1.0\]"):
        attack(model(), x * 2 + 0.1, labels, Threat())
    with pytest.raises(ValueError, match="radius"):
        Threat("l2", 0.0)
    with pytest.raises(ValueError, match="norm"):
        Threat("l1", 1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="restarts"):
        JointAttack(restarts=0)
    with pytest.raises(ValueError, match="rivals must be"):
        JointAttack(rivals=-1)
    for method in (JointAttack, PGDAttack):
        for name in ("steps", "restarts", "rivals"):
            with pytest.raises(ValueError, match=f"{name} .*a whole number"):
                method(**{name: 1.5})
    with pytest.raises(ValueError, match="a target or rivals"):
        attack(model(), x, labels, Threat(), JointAttack(rivals=1), target=labels)
    with pytest.raises(ValueError, match="mirror"):
        JointAttack(mirror=math.nan)
    for method in (JointAttack, PGDAttack):
        with pytest.raises(ValueError, match="rate"):
            method(rate=math.inf)
    for lookahead in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="lookahead"):
            JointAttack(lookahead=lookahead)
    with pytest.raises(ValueError, match="loss must be"):
        attack_problem(model(), x, labels, Threat(), loss="hinge")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="clean"):
        AdversarialLoss(model(), Threat(), clean=1.0)


@pytest.mark.parametrize("name", ["labels", "targets"])
@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda y: y[:2], r"of shape \(2,\) do not fit images of shape \(4, 1, 8, 8\)"),
        (lambda y: y[:, None], r"of shape \(4, 1\) do not fit"),
        (lambda y: torch.full_like(y, -100), "of 4 classes lie between 0 and 3, got -100 to -100"),
        (lambda y: torch.arange(1, 5), "of 4 classes lie between 0 and 3, got 1 to 4"),
        (lambda y: y.float(), "must be integers, got torch.float32"),
        (lambda y: y > 1, "must be integers, got torch.bool"),
        (lambda y: 2, r"must be an integer tensor of shape \(4,\), one entry an image; got int"),
    ],
)
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_labels_and_targets_that_are_no_classes_are_refused(name: str, wrong, words: str, loss) -> None:
    x, labels = images(4)
    given = (labels, wrong(labels)) if name == "targets" else (wrong(labels), None)
    with pytest.raises(ValueError, match=f"{name} {words}"):
        attack(model(), x, given[0], Threat(), JointAttack(steps=1, loss=loss), target=given[1])


def test_labels_of_other_integer_types_are_taken() -> None:
    x, labels = images(4)
    short = labels.to(torch.int32)
    method = JointAttack(steps=2)
    expected, found = (attack(model(), x, y, Threat("l2", 0.5), method, target=y) for y in (labels, short))
    assert torch.equal(found.loss, expected.loss)
    loss, _ = AdversarialLoss(model(), Threat("l2", 0.5), method=method, clean=0.5)(x, short)
    assert bool(loss.isfinite())


@pytest.mark.parametrize("failing", range(3))
def test_an_attack_is_resolved_only_if_everything_tried_is(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`robust` rests on the clean image, on the first solve and on the restart, whichever of them wins."""
    calls = []

    def solved(*arguments, **options):
        found = equilibrium(*arguments, **options)
        calls.append(found)
        return (
            replace(found, status=torch.full_like(found.status, Status.BUDGET)) if len(calls) == failing + 1 else found
        )

    monkeypatch.setattr("jiio.tasks.attack.equilibrium", solved)
    x, labels = images(4)
    found = attack(model(), x, labels, Threat("l2", 0.8), JointAttack(restarts=2, mirror=math.inf))
    assert len(calls) == 3
    assert not bool(found.resolved.any())


@pytest.mark.parametrize("scale", [1e19, 1e30, 1e38, math.inf])
@pytest.mark.parametrize("method", [JointAttack(loss="margin"), PGDAttack(steps=3, loss="margin")])
def test_images_whose_losses_leave_the_range_of_floats_are_not_called_resolved(scale: float, method) -> None:
    """Their gradients' norms did, so no step was taken, and the images were called robust."""
    x, labels = images()
    made = model()
    with torch.no_grad():
        made.head.weight.mul_(scale)
    found = attack(made, x, labels, Threat("l2", 0.8), method)
    assert not bool(found.resolved.any())


def test_gradients_exist_in_eval_mode() -> None:
    net, (x, _) = model().eval(), images(3)
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).square().sum(), x)
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
