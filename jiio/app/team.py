"""The processes of a training: what each computes of a step, and what they tell each other."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from jiio.app.run_folder import UserError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")


class Team:
    """One process that is alone; `Processes` are several. All hold the same weights and the same state of the training.

    A step's batch is split over the processes, and a process's share into `accumulate` parts, computed one after the other
    and added up: a batch that is too large for the memory gives the gradient that it would give at once.

    >>> [part.tolist() for part in Team(accumulate=2).parts(4)]
    [[0, 1], [2, 3]]
    """

    rank, size = 0, 1

    def __init__(self, device: str | torch.device = "cpu", *, accumulate: int = 1):
        if accumulate < 1:
            raise UserError(f"--accumulate must be at least 1, got {accumulate}")
        self.device, self.accumulate = torch.device(device), accumulate

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and talks to the user."""
        return self.rank == 0

    def parts(self, batch: int) -> list[Tensor]:
        """The places in a batch that this process computes, in equal parts; `UserError` where it can't be split so."""
        count = self.size * self.accumulate
        if batch % count:
            raise UserError(
                f"a step's batch of {batch} is not a multiple of {count}: {self.size} processes times {self.accumulate} "
                "accumulated parts"
            )
        return list(self.share(torch.arange(batch)).chunk(self.accumulate))

    def share(self, rows: Tensor) -> Tensor:
        """This process's share of some rows, whose number is a multiple of the processes."""
        return rows.chunk(self.size)[self.rank]

    def gather(self, rows: Tensor) -> Tensor:
        """The shares of all processes, put together again."""
        return rows

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the mean of the processes' gradients."""

    def any(self, here: bool) -> bool:
        """Whether a thing is so in any process."""
        return here

    def first(self, action: Callable[[], T]) -> T:
        """Do something in the leading process alone; what it returns, in all of them, and as a `UserError` what went
        wrong with it for the user."""
        return action()


class Processes(Team):
    """The processes that `torchrun` or `fabric run` started; Lightning Fabric finds their devices and joins them.

    Gradients are averaged by one call after the last part's backward pass. A wrapper around the model, as of torch's DDP,
    would send them earlier, but it has to see every use of the model, and solves use its parts; and what is sent is small
    (1 MB for an MNIST generator, whose step takes a second).
    """

    def __init__(self, fabric: Fabric, *, accumulate: int = 1):
        super().__init__(fabric.device, accumulate=accumulate)
        self.fabric, self.rank, self.size = fabric, fabric.global_rank, fabric.world_size

    def gather(self, rows: Tensor) -> Tensor:
        mine = rows.to(self.device).contiguous()
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(everyone, mine)
        return torch.cat(everyone).to(rows.device)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        packed = torch.cat([gradient.flatten() for gradient in gradients]) / self.size
        distributed.all_reduce(packed)
        for gradient, part in zip(gradients, packed.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def any(self, here: bool) -> bool:
        flag = torch.tensor(float(here), device=self.device)
        distributed.all_reduce(flag)
        return bool(flag > 0)

    def first(self, action: Callable[[], T]) -> T:
        result: Any = None
        sentence: str | None = None
        if self.leads:
            try:
                result = action()
            except UserError as error:
                sentence = str(error)
            except OSError as error:
                sentence = f"{error.filename or 'a file'}: {error.strerror or error}"
        result, sentence = self.fabric.broadcast((result, sentence))
        if sentence is not None:
            raise UserError(sentence)
        return result


def leave() -> None:
    """Close the connections to the other processes, if there are any: left to the interpreter's end, where some are gone
    already, that may abort a process whose work is done."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def launched() -> int:
    """How many processes a launcher started for this command, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process is the first of all."""
    return os.environ.get("RANK", "0") == "0"


def speaks() -> bool:
    """Whether this process is the one of its machine that shows errors."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def cpu_share() -> int:
    """CPU threads for each process of this machine: threads that outnumber the cores are several times slower."""
    return max(1, min(os.cpu_count() or 1, 8) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def assemble(device: str, *, accumulate: int = 1) -> Team:
    """The team of this command: alone, or with the other processes of its launcher.

    Fabric is imported for several processes only: it takes longer than all else at the start of a command.
    """
    if "LT_PRECISION" in os.environ:
        raise UserError("`fabric run` took --precision for itself: write -- before `train`")
    if launched() == 1:
        return Team(device, accumulate=accumulate)
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces every process
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    fabric = Fabric(accelerator=torch.device(device).type, devices=local, num_nodes=launched() // local, strategy="ddp")
    if not int(os.environ.get("LT_CLI_USED", "0")):  # `fabric run` has launched already
        fabric.launch()
    return Processes(fabric, accumulate=accumulate)
