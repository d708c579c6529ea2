"""Tracking: every study and every trial as a run in MLflow."""

import os

# Read by MLflow when it is imported or first used.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A server that is away must not hold a trial up; what could not be sent is sent again later.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
# With a server MLflow prints a run's address when it ends, in the midst of `--json`.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
