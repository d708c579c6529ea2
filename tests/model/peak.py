"""`python -m tests.model.peak TRIAL_JSON VOCABULARY SEQUENCES`: resident memory that training adds to a ready process.

Ready means: libraries loaded, kernels compiled, thread pools up, by training a tiny model of the same kind first. The
figure is the peak of resident memory over two optimizer steps, less what was resident before; Linux only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from ablate.config import Trial
from ablate.model.transformer import Transformer
from ablate.training.optimizer import TreeAdamW

TINY = {"d_model": 64, "heads": 2, "blocks": 1, "context": 64}


def resident(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def train(trial: Trial, vocabulary: int, sequences: int, steps: int) -> None:
    """Optimizer steps as in training, on random ids."""
    torch.manual_seed(0)
    model = Transformer(trial, vocabulary).train()
    optimizer = TreeAdamW(model, trial.train)
    tokens = torch.randint(vocabulary, (sequences, trial.model.context + 1))
    for _ in range(steps):
        for _ in range(min(2, trial.train.accumulate)):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.reshape(-1, vocabulary).float(), tokens[:, 1:].reshape(-1))
            del logits
            torch.autograd.backward(loss)
            del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), trial.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    trial = Trial.model_validate_json(sys.argv[1])
    train(trial.model_copy(update={"model": trial.model.model_copy(update=TINY)}), 64, 1, 2)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    train(trial, int(sys.argv[2]), int(sys.argv[3]), 2)
    print(resident("VmHWM") - before)
