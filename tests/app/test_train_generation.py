from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from jiio.app.main import main
from jiio.app.run_folder import RunFolder, UserError
from jiio.app.train_generation import Trainer, Training, default_config
from jiio.app.training import chosen, run_training
from jiio.models import generator
from jiio.tasks.image_rule import refit_tangent
from tests.app.runs import CONFIG, tiny_trainer, trained, whole_and_resumed


@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_training_gives_the_same_weights_to_the_bit(tmp_path: Path, stop: int) -> None:
    whole, resumed = whole_and_resumed(tiny_trainer, tmp_path, stop=stop)
    assert torch.equal(whole.latents, resumed.latents)
    logged = [json.loads(line) for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, 13))


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    trainer = tiny_trainer(steps=30)
    losses = [now["loss"] for now in run_training(RunFolder(tmp_path), trainer)]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert (tmp_path / "weights.safetensors").exists()


def test_the_tangent_of_z_follows_the_weights() -> None:
    """A training carries z along with the latents (docs/experiments.md) by what it has measured lately."""
    trainer = tiny_trainer()
    for _ in range(8):
        trainer.advance()
    followed = torch.cat([part.flatten() for part in trainer.model.tangent_of_z()])
    refit_tangent(trainer.model, trainer.recent)
    measured = torch.cat([part.flatten() for part in trainer.model.tangent_of_z()])
    assert float((followed - measured).norm()) < 0.7 * float(measured.norm())


def test_every_epoch_meets_every_image_once_in_another_order() -> None:
    trainer, seen = tiny_trainer(), []
    for trainer.step in range(8):
        seen.append(trainer.rows())
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert first.sort().values.tolist() == list(range(64)) == second.sort().values.tolist()
    assert not torch.equal(first, second)


def test_a_loss_that_is_not_finite_ends_the_training_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer()
    part = trainer.part

    def spoiled(rows: Tensor, places: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, values = part(rows, places)
        return loss * torch.nan, values

    monkeypatch.setattr(trainer, "part", spoiled)
    with pytest.raises(UserError, match="lower --learning-rate"):
        trained(tmp_path, trainer)


@pytest.mark.filterwarnings("ignore::jiio.ConvergenceWarning")
def test_a_learning_rate_that_no_decomposition_survives_ends_the_training_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not finite after [12] steps: lower"):
        trained(tmp_path, tiny_trainer(learning_rate=1e38))


def test_a_checkpoint_of_another_optimiser_is_refused() -> None:
    trainer = tiny_trainer()
    earlier = torch.optim.Adam(trainer.model.parameters()).state_dict()
    with pytest.raises(UserError, match=r"earlier version.*--overwrite"):
        trainer.resume(trainer.checkpoint() | {"optimizer": earlier})


def test_fewer_images_than_a_batch_are_refused() -> None:
    trainer = tiny_trainer()
    with pytest.raises(UserError, match="8 training images are fewer than a batch of 16"):
        Trainer(trainer.images, trainer.model.config, replace(trainer.training, images=8))


@pytest.mark.parametrize("channels, mirror, count", [(1, None, 20), (3, None, 40), (3, False, 20), (1, True, 40)])
def test_images_with_colours_are_used_left_to_right_as_well(channels: int, mirror: bool | None, count: int) -> None:
    images = torch.rand(30, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    found = chosen(images, 20, batch=16, seed=0, mirror=mirror)
    assert len(found) == count
    assert torch.equal(found[:20], chosen(images, 20, batch=16, seed=0))
    assert torch.equal(found[20:], found[: count - 20].flip(-1))
    trainer = Trainer(
        images, replace(CONFIG, image_shape=(channels, 8, 8)), Training(images=20, batch=16, mirror=mirror)
    )
    assert torch.equal(trainer.images, found)


@pytest.mark.parametrize("command", ["generation", "vae"])
def test_the_command_line_says_whether_images_are_mirrored(command: str, tmp_path: Path) -> None:
    small = ["--steps", "1", "--images", "16", "--batch", "32", "--latent", "4", "--threads", "1"]
    assert main(["train", command, "--mirror", "True", *small, "--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "config.json").read_text())["training"]["mirror"] is True


def test_a_refusal_counts_the_images_there_are_and_the_mirrored_ones_apart() -> None:
    with pytest.raises(UserError, match="5 training images, 10 with the mirrored ones, are fewer than a batch of 16"):
        chosen(torch.rand(5, 3, 8, 8), 0, batch=16, seed=0, mirror=None)


def test_grey_images_of_three_channels_have_no_colours() -> None:
    grey = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 3, 1, 1)
    assert len(chosen(grey, 0, batch=16, seed=0, mirror=None)) == 30
    grey[0, 2, 3, 4] += 0.1
    assert len(chosen(grey, 0, batch=16, seed=0, mirror=None)) == 60


@pytest.mark.parametrize("shape, latent", [((1, 8, 8), 16), ((1, 28, 28), 32), ((3, 32, 32), 64)])
def test_defaults_fit_the_images(shape: tuple[int, int, int], latent: int) -> None:
    config = default_config(shape)
    assert config.latent == latent
    assert config.patch == (1 if shape[1] < 16 else 2)


@pytest.mark.parametrize("cell", ["well_posed", "mdeq"])
@pytest.mark.parametrize("side", [32, 64])
def test_the_full_preset_has_four_scales_from_32_down_to_4(side: int, cell: str) -> None:
    config = default_config((3, side, side), cell=cell, preset="full")
    assert config.shapes == ((32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4))
    assert config.cell == cell


@pytest.mark.parametrize("cell", ["well_posed", "mdeq"])
def test_every_weight_of_four_scales_has_its_share_in_an_image(cell: str) -> None:
    torch.manual_seed(0)
    model = generator(default_config((3, 32, 32), cell=cell, preset="full"))
    x = torch.randn(1, model.config.latent)
    f, z = model.cell(), model.start(x)
    for _ in range(4):  # from the coarsest scale to the finest
        z = f(z, x)
    image = model.readout(z)
    image.square().sum().backward()
    assert image.shape == (1, 3, 32, 32)
    assert all(weight.grad is not None and weight.grad.norm() > 0 for weight in model.parameters())


def test_the_precision_of_the_command_line_is_that_of_the_cell(tmp_path: Path) -> None:
    small = ["--steps", "1", "--images", "16", "--batch", "16", "--latent", "4", "--joint-steps", "2", "--threads", "1"]
    losses = []
    for precision in ("32", "bf16"):
        output = tmp_path / precision
        assert main(["train", "generation", *small, "--precision", precision, "--output", str(output)]) == 0
        losses.append(json.loads((output / "metrics.jsonl").read_text())["loss"])
        assert load_file(output / "weights.safetensors")["weight"].dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


def test_the_full_preset_refuses_sides_that_four_scales_do_not_divide() -> None:
    with pytest.raises(ValueError, match="divide by 8, the images are 28x28: use --preset small"):
        default_config((1, 28, 28), preset="full")


def test_an_interrupted_training_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    small = ["--steps", "100000", "--images", "32", "--batch", "8", "--latent", "4", "--joint-steps", "2"]
    command = [
        sys.executable,
        "-m",
        "jiio.app.main",
        "train",
        "generation",
        "--threads",
        "1",
        "--output",
        str(tmp_path),
    ]
    process = subprocess.Popen([*command, *small], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message.startswith("jiio: interrupted after") and "--resume" in message and message.count("\n") == 1
    assert list((tmp_path / "checkpoints").glob("*.safetensors"))
