"""What tables and views share."""

from __future__ import annotations

RUN_STUDY = "run `ablate study run studies/{name}.yaml`, then `ablate collect {name}`"
