"""The audit: silent on a healthy model, plain about a masked one, each of its checks what it says."""

from __future__ import annotations

import pytest
import torch

from jiio import load
from jiio.data.digits import digits_images, digits_labels
from jiio.tasks.masking import Audit, accuracy, audit, square_search, surrogate, transferred, unrolled_logits
from jiio.tasks.threat import Threat
from tests.tasks.test_attack import images, model


def test_an_audit_finds_nothing_on_a_plain_model_and_masking_on_a_saturated_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, labels = images(16)
    net = model()
    other = surrogate(x, labels, steps=20)
    found = audit(net, x, labels, Threat("l2", 0.5), other=other)
    assert found.bad_gradients == 0
    assert found.radius["8"] == 0
    assert list(found.radius_loss) == list(found.radius)
    assert found.radius_loss["0.25"] < found.radius_loss["1"] < found.radius_loss["8"]
    assert found.clean == 1
    assert not found.findings
    with torch.no_grad():
        net.head.weight.mul_(1e6)  # the loss underflows to 0 and takes its gradient with it
    # the search takes most of an audit's time
    monkeypatch.setattr("jiio.tasks.masking.square_search", lambda model, images, *rest: images)
    masked = " ".join(audit(net, x, labels, Threat("l2", 0.5), other=other).findings)
    assert "zero or non-finite gradient" in masked
    assert "at 8 times the radius" in masked


def test_unrolled_logits_approach_the_equilibrium() -> None:
    net, (x, labels) = model(), images(4)
    with torch.no_grad():
        assert torch.allclose(unrolled_logits(net, 60)(x), net(x), atol=1e-2)
    assert 0 <= transferred(net, unrolled_logits(net, 10), x, labels, Threat("l2", 0.5)) <= 1


@pytest.fixture(scope="module")
def audited() -> tuple[Audit, Threat]:
    """The packaged classifier of digits at the radius of its training."""
    x, labels = digits_images("test")[:40], digits_labels("test")[:40]
    other = surrogate(digits_images("train"), digits_labels("train"), steps=60)
    threat = Threat("l2", 0.7)
    return audit(load("digits-classifier"), x, labels, threat, other=other), threat


def test_the_sweeps_of_a_healthy_model_are_flat_where_they_should_be(audited) -> None:
    found, _ = audited
    assert not found.findings
    # steps of a tenth of the radius do not come far in twenty steps, those of one and three radii come equally far
    assert found.rate["0.1"] < found.rate["1"]
    assert found.rate["3"] == pytest.approx(found.rate["1"], rel=0.05)
    # an attack through solves to a tenth is as strong as through solves to a thousandth
    assert found.tolerance["0.1"] == pytest.approx(found.tolerance["0.001"], abs=0.05)
    assert found.attacked == min(found.radius["1"], *found.tolerance.values())
    # accuracy falls with the radius, to nothing
    assert list(found.radius.values()) == sorted(found.radius.values(), reverse=True)
    assert found.radius["8"] == 0


def test_attacks_that_know_less_are_weaker(audited) -> None:
    found, _ = audited
    assert found.attacked <= found.transfer <= found.clean
    assert found.attacked <= found.square <= found.clean
    assert found.attacked <= found.unrolled["30"] + 0.01


@pytest.mark.parametrize("threat", [Threat("l2", 0.7), Threat("linf", 0.2)])
def test_the_search_without_gradients_stays_feasible_and_finds_wrong_answers(threat: Threat) -> None:
    net, x, labels = load("digits-classifier"), digits_images("test")[:40], digits_labels("test")[:40]
    found = square_search(net, x, labels, threat, steps=100)
    offset = (found - x).flatten(1)
    size = offset.norm(dim=1) if threat.norm == "l2" else offset.abs().amax(1)
    assert float(size.max()) <= threat.radius + 1e-6
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert accuracy(net, found, labels) < accuracy(net, x, labels)
    assert torch.equal(found, square_search(net, x, labels, threat, steps=100))


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda y: y.float(), "labels must be integers, got torch.float32"),
        (lambda y: y + 4, "labels of 4 classes lie between 0 and 3"),
        (lambda y: y[:2], r"labels of shape \(2,\) do not fit"),
    ],
)
def test_an_audit_refuses_labels_that_are_no_classes(wrong, words: str) -> None:
    x, labels = images(4)
    with pytest.raises(ValueError, match=words):
        audit(model(), x, wrong(labels), Threat("l2", 0.5), other=model(1))


def test_an_audit_takes_labels_of_other_integer_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jiio.tasks.masking.square_search", lambda model, images, *rest: images)
    for name in ("RADII", "RATES", "TOLERANCES", "UNROLLED"):
        monkeypatch.setattr(f"jiio.tasks.masking.{name}", (1,))
    x, labels = images(4)
    found, expected = (
        audit(model(), x, y, Threat("l2", 0.5), other=model(1)) for y in (labels.to(torch.int32), labels)
    )
    assert found == expected


def test_another_model_is_seeded_and_leaves_the_global_state_as_it_is() -> None:
    x, labels = images(8)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (surrogate(x, labels, steps=2, seed=seed)(x) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)
