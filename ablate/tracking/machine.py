"""How busy the machine is while a trial runs, as MLflow's system metrics."""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

SWITCH = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"

_log = logging.getLogger(__name__)


def watched(run: str | None, uri: str) -> Any:
    """Return a started monitor of processor, memory, disk and GPU for a run; its `finish` ends it.

    None unless MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is true, and where psutil is not there.
    """
    if run is None or os.environ.get(SWITCH, "").lower() not in {"true", "1"}:
        return None
    try:
        # By name: MLflow gives it no types.
        monitors: Any = importlib.import_module("mlflow.system_metrics.system_metrics_monitor")
    except ImportError as error:
        _log.warning("no system metrics: %s", error)
        return None
    monitor = monitors.SystemMetricsMonitor(run, tracking_uri=uri, resume_logging=True)
    monitor.start()
    return monitor
