"""Names of tags and metrics in MLflow."""

from __future__ import annotations

# Tags of MLflow runs. `mlflow.*` are MLflow's own.
PARENT_RUN = "mlflow.parentRunId"
NOTE = "mlflow.note.content"
SOURCE, SOURCE_TYPE, COMMIT, USER = (
    "mlflow.source.name",
    "mlflow.source.type",
    "mlflow.source.git.commit",
    "mlflow.user",
)
# Of an experiment: without it MLflow 3 opens its pages for prompts and traces.
EXPERIMENT_KIND, MODEL_TRAINING = "mlflow.experimentKind", "custom_model_development"
STUDY = "ablate.study"
SPACE = "ablate.space"
CHECKOUT = "ablate.checkout"  # which checkout of the project made the run
ROLE = "ablate.role"  # study or trial
TRIAL = "ablate.trial"  # the trial's hash
ARM = "ablate.arm"
KIND = "ablate.kind"
SEED = "ablate.seed"
STATUS = "ablate.status"  # finished, diverged, pruned, killed or failed: more than MLflow's own states say
MESSAGE = "ablate.message"
PLAN_HASH = "ablate.plan_hash"
DESIGN = "ablate.design"
GIT_COMMIT = "ablate.git_commit"
GIT_DIRTY = "ablate.git_dirty"
DATA_HASH = "ablate.data_hash"
TOKENIZER_HASH = "ablate.tokenizer_hash"
MACHINE = "ablate.machine"
DEVICE = "ablate.device"
THREADS = "ablate.threads"
VERSIONS = "ablate.versions"  # JSON: package to version

# Metrics at each evaluation, beside the balance metrics of BALANCE and `per_layer<i>/<name>`.
TRAIN_LOSS = "train_loss"
LR = "lr"
TOKENS = "tokens"
TRAIN_SECONDS = "train_seconds"
# Metrics once, at the end.
TOKENS_PER_SECOND = "tokens_per_second"
SECONDS = "seconds"


def shown(metric: str) -> str:
    """Return a metric's name in MLflow, which orders groups by name: those of single layers come after `Model metrics`."""
    return f"per_{metric}" if metric.startswith("layer") and "/" in metric else metric
