"""Every setting, as frozen pydantic models: a study file is checked here, before anything is trained or overwritten."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A setting that cannot be used; its message is one line that names the key, echoes the value, says what is allowed."""


class Section(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


S = TypeVar("S", bound=Section)

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Corpus(Section):
    """Where text comes from and how it becomes tokens."""

    source: Literal["stdlib", "files", "hub"] = "stdlib"
    path: str | None = None
    """files: a directory, file or glob of .txt, .md, .py, .jsonl, .parquet."""
    preset: Literal["wikitext-2", "wikitext-103", "tinystories", "openwebtext", "fineweb-edu"] | None = None
    """hub: fills name, configuration and text_field."""
    name: str | None = None
    """hub: the data set's name."""
    configuration: str | None = None
    split: str = "train"
    text_field: str = "text"
    streaming: bool = False
    """hub: read the source as a stream while the corpus is prepared, instead of downloading it first."""
    stream: bool = False
    """hub, or files of .jsonl or .parquet: train from the source itself, which is never stored. The corpus that is prepared
    (the first max_documents) gives the tokenizer and the held-out slice."""
    max_documents: Positive | None = None
    tokenizer: Literal["bpe", "bytes", "file"] = "bpe"
    tokenizer_file: str | None = None
    vocab_size: Annotated[int, Field(ge=257, le=2**31 - 1)] = 2048
    """bpe: entries, the 256 bytes and the end-of-document mark included."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    test_share: Annotated[float, Field(ge=0, lt=0.5)] = 0.02

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == "files" and not self.path:
            raise ValueError("path is missing: source 'files' needs a directory, file or glob")
        if self.source == "hub" and not (self.preset or self.name):
            raise ValueError("name is missing: source 'hub' needs a preset or a data set's name")
        if self.stream and (self.source == "stdlib" or self.max_documents is None):
            raise ValueError(
                "stream is true: it needs source 'hub' or 'files', and max_documents for the prepared sample"
            )
        if (self.tokenizer == "file") != bool(self.tokenizer_file):
            raise ValueError(
                f"tokenizer_file is {self.tokenizer_file!r}: it is given with tokenizer 'file', and only then"
            )
        return self


class Tree(Section):
    """The tree feed-forward layer (design: one layer covers the published fast feed-forward layouts)."""

    trees: Positive = 4
    """K."""
    depth: Annotated[int, Field(ge=0, le=14)] = 6
    """D; each tree has 2^D leaves."""
    leaf_width: Positive = 4
    """W, units in one leaf."""
    node_output: bool = True
    """Whether nodes on the path contribute to the output (UltraFastBERT) or only route."""
    bias: bool = True
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "tanh"] = "gelu"
    mirror: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """s in phi(z) = f(z) + s·f(-z): 0 the base, -1 odd (identity for GELU, ReLU, SiLU), +1 even."""
    node_mirror: Annotated[float, Field(ge=-1, le=1)] | None = None
    """s of node units apart from leaves; the mirror where not given."""
    gain: Literal["raw", "unit"] = "raw"
    placement: Literal["unit", "tree", "sum"] = "unit"
    routing: Literal["sign", "centred"] = "sign"
    router_input: Literal["raw", "centred"] = "raw"
    router: Literal["tied", "frozen"] = "tied"
    node_backward: Literal["own", "flat", "flip", "base"] = "own"
    """Slope in the gradients of node w_in and b only: phi'(z), its mean with phi'(-z), phi'(-z), or f'(z) whatever the mirror."""
    init: Literal["uniform", "zero_bias", "orthogonal", "median_split"] = "uniform"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        mirrors = {self.mirror, self.mirror if self.node_mirror is None else self.node_mirror}
        if self.activation == "tanh" and mirrors != {0.0}:
            raise ValueError(f"mirror is {self.mirror}: activation 'tanh' takes mirror 0 only")
        if self.placement != "unit" and self.node_mirror not in (None, self.mirror):
            raise ValueError(f"node_mirror is {self.node_mirror}: apart from mirror it needs placement 'unit'")
        if self.node_backward != "own" and (self.placement != "unit" or not self.node_output):
            raise ValueError(f"node_backward is {self.node_backward!r}: it needs placement 'unit' and node_output on")
        if self.init in {"zero_bias", "median_split"} and not self.bias:
            raise ValueError(f"init is {self.init!r}: it needs bias on")
        return self

    @property
    def leaves(self) -> int:
        """L = 2^D."""
        return 1 << self.depth

    @property
    def total_units(self) -> int:
        """U = K(M + L·W)."""
        return self.trees * (self.leaves - 1 + self.leaves * self.leaf_width)

    @property
    def active_units(self) -> int:
        """A = K(D·node_output + W), units one token activates."""
        return self.trees * (self.depth * self.node_output + self.leaf_width)


class Dense(Section):
    """The dense feed-forward, for controls: one hidden layer."""

    width: Positive | None = None
    """Hidden units; 4 d_model where not given."""
    bias: bool = True
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "tanh"] = "gelu"
    mirror: Annotated[float, Field(ge=-1, le=1)] = 0.0
    gain: Literal["raw", "unit"] = "raw"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.activation == "tanh" and self.mirror != 0:
            raise ValueError(f"mirror is {self.mirror}: activation 'tanh' takes mirror 0 only")
        return self


class Mixture(Dense):
    """The top-1 mixture of experts, an outside reference: `width` and activation are each expert's."""

    experts: Annotated[int, Field(ge=2)] = 8


class Model(Section):
    """A decoder-only transformer: pre-norm RMSNorm, rotary positions, tied embeddings."""

    d_model: Positive = 128
    blocks: Positive = 4
    heads: Positive = 4
    context: Annotated[int, Field(ge=2)] = 256
    """Tokens a sequence."""
    feedforward: Literal["tree", "dense", "none", "moe"] = "tree"

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.d_model % (2 * self.heads):
            raise ValueError(f"d_model is {self.d_model}: it must be a multiple of 2 x heads = {2 * self.heads}")
        return self


class Train(Section):
    """One training run."""

    steps: Positive = 300
    batch_size: Positive = 8
    """Sequences an optimizer step, over all micro-batches and devices."""
    accumulate: Positive = 1
    """Micro-batches an optimizer step is split into."""
    lr: Annotated[float, Field(gt=0, le=10)] = 3e-3
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    warmup: Fraction = 0.05
    """Share of the steps that warm up; a trapezoid also decays over the last 0.2."""
    final_lr: Fraction = 0.1
    """Share of lr left at the end."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Never on biases, norms and thresholds."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    node_lr_scale: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Learning rate of node rows, as a multiple of lr."""
    tree_decay: Annotated[float, Field(ge=0, le=10)] | None = None
    """Weight decay of tree weights; weight_decay where not given."""
    decay_rows: Literal["all", "active"] = "all"
    """active: rows that got no gradient in a step are not shrunk in it."""
    region_leak: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Reference arm: chance that a node's decision is turned round in training (fastfeedforward's region leak)."""
    load_loss: Annotated[float, Field(ge=0)] = 0.0
    """Reference arm: weight of a Switch-style load loss, on soft path probabilities of trees or a mixture's router."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    backend: Literal["auto", "reference"] = "auto"
    """How tree layers are computed; reference is the plain PyTorch definition."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, about a third slower."""
    eval_every: Positive = 50
    """Steps between evaluations; step 0 and the last step are always evaluated."""
    eval_tokens: Positive = 65536
    """Held-out tokens of an evaluation, always the same ones."""
    checkpoint_every: Positive = 100
    motion: bool = False
    """Record at every evaluation how far router and representation moved each node's response (motion.parquet)."""
    keep_checkpoint: bool = False
    """Keep the final weights (not the optimizer's state)."""
    devices: Positive = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"

    @model_validator(mode="after")
    def _divides(self) -> Self:
        parts = self.accumulate * self.devices
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size is {self.batch_size}: it must be a multiple of accumulate x devices = {parts}"
            )
        return self


class Questions(Section):
    """Question answering at the end of a trial; its scores are kept with the trial's result. Needs the extra qa."""

    tasks: tuple[str, ...] = ()
    """heldout_continuation, heldout_cloze, or any task of lm-eval's; none is asked where this is empty."""
    shots: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """Examples shown before a question; each number is a run over all questions."""
    limit: Positive | None = None
    """Only so many questions of each task."""


class Trial(Section):
    """Everything that determines one training run."""

    corpus: Corpus = Corpus()
    model: Model = Model()
    tree: Tree = Tree()
    dense: Dense = Dense()
    moe: Mixture = Mixture()
    train: Train = Train()
    questions: Questions = Questions()
    init_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Initialisation only."""
    data_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Order of the training data only."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        leaves, probe = self.tree.leaves, self.train.eval_tokens
        if self.model.feedforward == "tree" and probe < 64 * leaves:
            raise ValueError(
                f"train.eval_tokens is {probe}: depth {self.tree.depth} needs at least 64 x leaves = {64 * leaves}"
            )
        return self

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.train.steps * self.train.batch_size * self.model.context

    def hash(self) -> str:
        """Short content hash of the whole configuration."""
        return digest(self.model_dump(mode="json"))


_BILLION = {
    "batch_size": 512,
    "accumulate": 64,
    "lr": 2e-4,
    "steps": 25000,
    "eval_every": 1000,
    "eval_tokens": 262144,
    "activation_checkpointing": True,
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "nano": {
        "model": {"d_model": 128, "blocks": 4, "heads": 4, "context": 256},
        "tree": {"trees": 4, "depth": 6, "leaf_width": 4},
    },
    "small": {
        "model": {"d_model": 384, "blocks": 6, "heads": 6, "context": 512},
        "tree": {"trees": 4, "depth": 7, "leaf_width": 2},
        "train": {"batch_size": 32, "lr": 1e-3, "steps": 5000, "eval_every": 500, "eval_tokens": 131072},
    },
    "gpt2-small": {
        "model": {"d_model": 768, "blocks": 12, "heads": 12, "context": 1024},
        "tree": {"trees": 4, "depth": 8, "leaf_width": 2},
        "train": {
            "batch_size": 512,
            "accumulate": 16,
            "lr": 6e-4,
            "steps": 19000,
            "eval_every": 1000,
            "eval_tokens": 262144,
        },
        "corpus": {"vocab_size": 50257},
    },
    # Blocks, width, heads, context and vocabulary of OPT-1.3B and of GPT-3 XL; in a micro-batch of 8, a million tokens a step.
    "opt-1.3b": {
        "model": {"d_model": 2048, "blocks": 24, "heads": 32, "context": 2048},
        "tree": {"trees": 8, "depth": 8, "leaf_width": 3, "activation": "relu"},
        "dense": {"activation": "relu"},
        "train": _BILLION,
        "corpus": {"vocab_size": 50272},
    },
    "gpt-1.3b": {
        "model": {"d_model": 2048, "blocks": 24, "heads": 16, "context": 2048},
        "tree": {"trees": 8, "depth": 8, "leaf_width": 3},
        "train": _BILLION,
        "corpus": {"vocab_size": 50257},
    },
}


class Levels(Section):
    """A factor given as a range, for a search."""

    low: Finite
    high: Finite
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low}: it must be under high = {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}: a log range needs it above 0")
        return self


Scalar = bool | int | float | str | None


class Factor(Section):
    """One choice under study: a field of Tree, Model, Dense or Train, with its levels or range."""

    levels: Annotated[list[Scalar], Field(min_length=1)] | None = None
    range: Levels | None = None
    when: dict[str, Scalar] = {}
    """The factor exists only where these other factors have these levels; elsewhere the base's value stands."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.levels is None) == (self.range is None):
            raise ValueError("levels is missing: a factor has either levels or a range")
        if self.levels is not None and len({repr(v) for v in self.levels}) < len(self.levels):
            raise ValueError(f"levels is {self.levels}: a level stands in it twice")
        return self


class Contrast(Section):
    """A comparison named before the first trial: an arm against the reference arm, one endpoint."""

    arm: str
    reference: str = "reference"
    endpoint: str = "bpb"
    claim: Literal["lower", "higher", "matches"]
    margin: Annotated[float, Field(gt=0)]


class Tune(Section):
    """Learning rates tried per arm, on seeds kept apart from the evaluation seeds."""

    lr: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2)]
    seeds: Annotated[list[int], Field(min_length=1)]


class Budget(Section):
    """When a search ends; the first limit that is reached counts. Enumerated designs take `trials` as an upper check."""

    trials: Positive | None = None
    tokens: Positive | None = None
    hours: Annotated[float, Field(gt=0)] | None = None


class Study(Section):
    """One study file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    title: str = ""
    notes: str = ""
    design: Literal["search", "factorial", "one_at_a_time", "confirm"] = "factorial"
    preset: Literal["nano", "small", "gpt2-small", "opt-1.3b", "gpt-1.3b"] = "nano"
    base: dict[str, Any] = {}
    """Sections of a trial (corpus, model, tree, dense, moe, train, questions), over the preset."""
    factors: dict[str, Factor] = {}
    """Dotted field (tree.mirror) to its levels; a plain list of levels is enough."""
    fraction: list[str] = []
    """Two-level fractional factorial: generators such as 'tree.gain = tree.mirror * tree.placement'."""
    arms: dict[str, dict[str, Scalar]] = {}
    """Named arms, as changes of the base; in `confirm` and beside the grid of a factorial."""
    contrasts: list[Contrast] = []
    """`confirm` only."""
    controls: list[Literal["total", "active", "none", "moe"]] = []
    """Beside the arms: dense models of equal total or equal active units, each in the dense section's activation and in
    every other one that an arm has; no feed-forward at all; a top-1 mixture of experts (which has a load loss)."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0, 1, 2]
    match: Literal["total_units", "active_units", "none"] = "none"
    tune: Tune | None = None
    objectives: Annotated[list[Literal["bpb", "n_eff_frac", "dead_frac", "bits_lost"]], Field(min_length=1)] = ["bpb"]
    pruner: Literal["halving", "median"] | None = None
    budget: Budget = Budget()
    margin: Annotated[float, Field(gt=0)] = 0.01
    """bpb within which two arms are held to be equal."""
    min_effect_n_eff: Annotated[float, Field(gt=0)] = 0.05
    """n_eff_frac within which two arms are held to be equally balanced."""

    @model_validator(mode="before")
    @classmethod
    def _short_factors(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("factors"), dict):
            short = {k: {"levels": v} if isinstance(v, list) else v for k, v in data["factors"].items()}
            data = {**data, "factors": short}
        return data

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.pruner and len(self.objectives) > 1:
            raise ValueError(
                f"pruner is {self.pruner!r}: with {len(self.objectives)} objectives no trial can be pruned; drop one"
            )
        if self.pruner and self.design != "search":
            raise ValueError(f"pruner is {self.pruner!r}: only design 'search' prunes")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}: a seed stands in it twice")
        if self.tune and set(self.tune.seeds) & set(self.seeds):
            raise ValueError(f"tune.seeds is {self.tune.seeds}: they must differ from seeds = {self.seeds}")
        if self.design == "search" and not (self.budget.trials or self.budget.tokens or self.budget.hours):
            raise ValueError("budget is missing: design 'search' needs budget.trials, budget.tokens or budget.hours")
        if self.design in {"search", "factorial", "one_at_a_time"} and not self.factors:
            raise ValueError(f"factors is missing: design {self.design!r} needs at least one")
        if self.design != "search":
            for key, factor in self.factors.items():
                if factor.range is not None:
                    raise ValueError(f"factors.{key}.range: design {self.design!r} needs levels")
        if self.design == "confirm" and not (self.arms and self.contrasts):
            raise ValueError("contrasts is missing: design 'confirm' needs arms and contrasts")
        if self.contrasts and self.design != "confirm":
            raise ValueError(f"contrasts: only design 'confirm' has them, not {self.design!r}")
        for key in [*self.factors, *(k for a in self.arms.values() for k in a)]:
            _field(key)
        self.trial({})
        return self

    def trial(self, changes: dict[str, Any], *, seed: int = 0) -> Trial:
        """The complete configuration of the base with dotted changes; both seeds are `seed`. Raises ConfigError."""
        merged: dict[str, Any] = {k: dict(v) for k, v in PRESETS[self.preset].items()}
        for name, section in self.base.items():
            if not isinstance(section, dict):
                raise ConfigError(f"base.{name} is {section!r}: a section with its settings is expected")
            merged[name] = {**merged.get(name, {}), **section}
        for key, value in changes.items():
            section, field = _field(key)
            merged.setdefault(section, {})[field] = value
        return parse(Trial, {**merged, "init_seed": seed, "data_seed": seed}, where="base")


def _field(key: str) -> tuple[str, str]:
    """Section and field of a dotted factor name; raises ConfigError with the names that exist."""
    section, _, field = key.partition(".")
    sections: dict[str, type[Section]] = {"tree": Tree, "model": Model, "dense": Dense, "moe": Mixture, "train": Train}
    if section not in sections:
        raise ConfigError(f"factor {key!r} is unknown: it starts with one of {', '.join(s + '.' for s in sections)}")
    if field not in sections[section].model_fields:
        raise ConfigError(f"factor {key!r} is unknown: {section} has {', '.join(sections[section].model_fields)}")
    return section, field


def parse(kind: type[S], data: Any, *, where: str = "") -> S:
    """Validate plain data; the first problem becomes a one-line ConfigError with its key, value and what is allowed."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_one_line(error, kind, where)) from None


def _one_line(error: ValidationError, kind: type[Section], where: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in ((where,) if where else ()) + first["loc"])
    value = repr(first["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown setting; allowed here: {', '.join(_allowed(kind, first['loc'][:-1]))}"
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        return f"{key}: {text}" if key else text
    return f"{key} is {value}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _allowed(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        field = kind.model_fields.get(str(part))
        inner = field.annotation if field else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            kind = inner
        elif kind is Study and part == "factors":
            kind = Factor
    return list(kind.model_fields)


def load_study(path: Path) -> Study:
    """Read and check a study file; raises ConfigError for a file that is missing, binary, empty or not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none there"
        raise ConfigError(f"study file {str(path)!r} does not exist; studies beside it: {known}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"study file {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"study file {str(path)!r} is not text: a YAML file is expected") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"study file {str(path)!r} is not YAML{line}: {getattr(error, 'problem', None) or 'not readable'}"
        ) from None
    if not isinstance(data, dict):
        what = "empty" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"study file {str(path)!r} is {what}: a mapping with name, factors, … is expected")
    return parse(Study, {"name": path.stem, **data})


def digest(data: Any) -> str:
    """Twelve hex digits of SHA-256 over canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def learning_rate(train: Train, step: int) -> float:
    """The schedule at an optimizer step (0-based): linear warm-up, then cosine or a trapezoid's flat top and decay."""
    warm = max(1, round(train.warmup * train.steps))
    if step < warm:
        return train.lr * (step + 1) / warm
    left = (train.steps - step) / max(1, train.steps - warm)
    if train.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    else:
        share = min(1.0, (train.steps - step) / max(1.0, 0.2 * train.steps))
    return train.lr * (train.final_lr + (1 - train.final_lr) * share)
