"""The LightningModule: the task's loss, the optimizer, and what happens around every optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ablate.config import Trial
from ablate.distributed import sum_over_ranks, world_size
from ablate.tasks.task import TrialTask
from ablate.training.optimizer import TreeAdamW
from ablate.training.schedule import learning_rate
from ablate.training.sharding import shard


class TrialModule(pl.LightningModule):
    """The model of a trial's task, trained on batches of one entry, the inputs."""

    loss_sum: Tensor
    finite: Tensor

    def __init__(self, trial: Trial, task: TrialTask) -> None:
        super().__init__()
        self.trial, self.task = trial, task
        self.model = task.model()
        for tree in self.model.trees():
            tree.region_leak, tree.load_loss = trial.train.region_leak, trial.train.load_loss > 0
        for mixture in self.model.mixtures():
            mixture.load_loss = trial.train.load_loss > 0
        # Sum of training losses and their number since the last evaluation.
        self.register_buffer("loss_sum", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("finite", torch.ones((), dtype=torch.bool), persistent=False)

    @property
    def sharded(self) -> bool:
        """Whether the processes of this trial share its weights."""
        return self.trial.train.strategy == "fsdp" and self.trial.train.devices > 1

    def configure_model(self) -> None:
        """Shard the model, once, where the trial asks for that."""
        if self.sharded and not isinstance(self.model, FSDPModule):
            mesh = self.device_mesh
            assert mesh is not None
            shard(self.model, mesh["data_parallel"])

    def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
        """The task's mean loss on a micro-batch, plus the load loss of the reference arm that has one."""
        (inputs,) = batch.values()
        loss = self.task.loss(self.model, inputs)
        with torch.no_grad():
            self.loss_sum += torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
            self.finite &= torch.isfinite(loss)
        found = [t.last_load_loss for t in self.model.trees()] + [m.last_load_loss for m in self.model.mixtures()]
        losses = [load_loss for load_loss in found if load_loss is not None]
        return loss + self.trial.train.load_loss * torch.stack(losses).mean() if losses else loss

    def take_train_loss(self) -> float | None:
        """Mean training loss of all ranks since the last call; None when no step was taken."""
        total, steps = self._losses().tolist()
        self.loss_sum.zero_()
        return total / steps if steps else None

    def _losses(self) -> Tensor:
        """`loss_sum` over all ranks."""
        losses = self.loss_sum.clone()
        sum_over_ranks(losses)
        return losses

    def configure_optimizers(self) -> Any:
        """TreeAdamW with the schedule stepped once per optimizer step."""
        train = self.trial.train
        optimizer = TreeAdamW(self.model, train)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(train, step) / train.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient's global norm (here, since Lightning refuses to clip for fused optimizers)."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.trial.train.grad_clip)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """The update, then once per update the trees' own: thresholds, running means, a frozen router that still follows."""
        step = self.trainer.global_step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        rate = learning_rate(self.trial.train, step) / self.trial.train.lr
        for tree in self.model.trees():
            tree.finish_step(rate)
            if step < self.trial.train.router_steps:
                tree.follow_nodes(self.trial.train.router_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random states, so that a resumed run draws what an uninterrupted one would."""
        checkpoint["state_dict"]["loss_sum"] = self._losses()
        checkpoint["ranks"] = world_size()
        checkpoint["rng_cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            checkpoint["rng_cuda"] = torch.cuda.get_rng_state_all()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the random states back; rank 0 goes on with the losses of all.

        With another number of processes a step adds another number of losses, so the sums so far are scaled to it.
        """
        share = world_size() / checkpoint.get("ranks", world_size())
        losses = checkpoint["state_dict"]["loss_sum"]
        if self.global_rank == 0:
            losses.mul_(share)
        else:
            losses.zero_()
        torch.set_rng_state(checkpoint["rng_cpu"].cpu())
        if torch.cuda.is_available() and "rng_cuda" in checkpoint:
            torch.cuda.set_rng_state_all([state.cpu() for state in checkpoint["rng_cuda"]])
