"""Everything that determines one training run, as frozen pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ablate.config.section import Grown, Settings, digest
from ablate.config.task import DIGIT_PATCHES, Task
from ablate.kernels.spec import TRAITS, Activation, NodeBackward, Placement

Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Size = Annotated[int, Field(ge=1, le=2**20)]
"""Of a layer: a larger one fits no machine, and building it would end this process."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Corpus(Settings):
    """Where text comes from and how it becomes tokens."""

    source: Literal["stdlib", "files", "hub"] = "stdlib"
    """The standard library of the running Python, local files, or a data set of the Hugging Face Hub."""
    path: str | None = None
    """files: a directory, file or glob of .txt, .md, .py, .jsonl, .parquet."""
    preset: Literal["wikitext-2", "wikitext-103", "tinystories", "openwebtext", "fineweb-edu"] | None = None
    """hub: fills name, configuration and text_field."""
    name: str | None = None
    """hub: the data set's name."""
    configuration: str | None = None
    """hub: the data set's configuration."""
    split: str = "train"
    """hub: which of its splits is read."""
    text_field: str = "text"
    """hub, .jsonl and .parquet: the field that holds the text."""
    streaming: bool = False
    """hub: read the source as a stream while the corpus is prepared, instead of downloading it first."""
    stream: bool = False
    """hub, or files of .jsonl or .parquet: train from the source itself, which is never stored. The corpus that is prepared
    (the first max_documents) gives the tokenizer and the held-out slice."""
    max_documents: Positive | None = None
    """Read only so many documents; all where not given."""
    tokenizer: Literal["bpe", "bytes", "file"] = "bpe"
    """bpe: trained on the corpus; bytes: no training; file: a tokenizer.json."""
    tokenizer_file: str | None = None
    """file: path of the tokenizer.json."""
    vocab_size: Annotated[int, Field(ge=257, le=2**24)] = 2048
    """bpe: entries, the 256 bytes and the end-of-document mark included."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of the documents that are held out for evaluation."""
    test_share: Annotated[float, Field(ge=0, lt=0.5)] = 0.02
    """Share of the documents kept apart from training and from validation."""

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


class Tree(Settings):
    """The tree feed-forward layer (design: one layer covers the published fast feed-forward layouts)."""

    trees: Size = 4
    """K."""
    depth: Annotated[int, Field(ge=0, le=14)] = 6
    """D; each tree has 2^D leaves."""
    leaf_width: Size = 4
    """W, units in one leaf."""
    node_output: bool = True
    """Whether nodes on the path contribute to the output (UltraFastBERT) or only route."""
    bias: bool = True
    """Whether units have a bias."""
    activation: Activation = "gelu"
    """The base function f."""
    mirror: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """s in phi(z) = f(z) + s·f(-z): 0 the base, -1 odd (identity for GELU, ReLU, SiLU), +1 even."""
    node_mirror: Annotated[float, Field(ge=-1, le=1)] | None = None
    """s of node units apart from leaves; the mirror where not given."""
    gain: Literal["raw", "unit"] = "raw"
    """unit: phi divided by the root of its mean square for z ~ N(0, 1)."""
    placement: Placement = "unit"
    """Where phi is applied: to each unit, to each tree's sum, or to the sum over trees."""
    routing: Literal["sign", "centred"] = "sign"
    """sign: thresholds stay at 0; centred: they follow each node's balance, without a loss term."""
    router_input: Literal["raw", "centred"] = "raw"
    """centred: nodes decide by x minus its running mean over tokens."""
    router: Literal["tied", "fixed", "frozen", "separate", "hash"] = "tied"
    """tied: nodes decide by their learnt input weights; fixed: the same, but these weights never learn; frozen: by a copy of their
    initial ones; separate: by weights of their own that never learn; hash: a leaf follows from a hash of the signs of x."""
    node_backward: NodeBackward = "own"
    """Slope in the gradients of node w_in and b only: phi'(z), its mean with phi'(-z), phi'(-z), or f'(z) whatever the mirror."""
    init: Literal["uniform", "zero_bias", "orthogonal", "median_split"] = "uniform"
    """Initialisation of the weights; see the glossary."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        mirrors = {self.mirror, self.mirror_of_nodes}
        if TRAITS[self.activation].odd and mirrors != {0.0}:
            raise ValueError(f"mirror is {self.mirror}: activation {self.activation!r} takes mirror 0 only")
        if self.placement != "unit" and self.node_mirror not in (None, self.mirror):
            raise ValueError(f"node_mirror is {self.node_mirror}: apart from mirror it needs placement 'unit'")
        if self.node_backward != "own" and (self.placement != "unit" or not self.node_output):
            raise ValueError(f"node_backward is {self.node_backward!r}: it needs placement 'unit' and node_output on")
        if self.init in {"zero_bias", "median_split"} and not self.bias:
            raise ValueError(f"init is {self.init!r}: it needs bias on")
        if self.router == "hash" and (self.routing, self.router_input) != ("sign", "raw"):
            raise ValueError(
                f"routing is {self.routing!r}, router_input {self.router_input!r}: router 'hash' takes 'sign' and 'raw' only"
            )
        return self

    @property
    def mirror_of_nodes(self) -> float:
        """s of node units: their own, or the mirror."""
        return self.mirror if self.node_mirror is None else self.node_mirror

    def plain(self) -> Self:
        """Return the same layer without a node_mirror that only repeats the mirror."""
        return self.model_copy(update={"node_mirror": None}) if self.node_mirror == self.mirror else self

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


class Dense(Settings):
    """The dense feed-forward, for controls: one hidden layer."""

    width: Positive | None = None
    """Hidden units; 4 d_model where not given."""
    bias: bool = True
    """Whether units have a bias."""
    activation: Activation = "gelu"
    """The base function f."""
    mirror: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """s in phi(z) = f(z) + s·f(-z)."""
    gain: Literal["raw", "unit"] = "raw"
    """unit: phi divided by the root of its mean square for z ~ N(0, 1)."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if TRAITS[self.activation].odd and self.mirror != 0:
            raise ValueError(f"mirror is {self.mirror}: activation {self.activation!r} takes mirror 0 only")
        return self


class Mixture(Dense):
    """The top-1 mixture of experts, an outside reference: `width` and activation are each expert's."""

    experts: Annotated[int, Field(ge=2, le=2**20)] = 8
    """How many experts a layer has."""


class Model(Grown):
    """A decoder-only transformer: pre-norm RMSNorm, rotary positions, tied embeddings."""

    later: ClassVar[frozenset[str]] = frozenset({"qk_norm", "embedding_norm"})

    d_model: Size = 128
    """Width: numbers in a token's vector."""
    blocks: Size = 4
    """Transformer blocks."""
    heads: Size = 4
    """Attention heads of a block."""
    context: Annotated[int, Field(ge=2, le=2**20)] = 256
    """Tokens a sequence."""
    qk_norm: bool = False
    """Scale each head's queries and keys to a root mean square of 1 before they are compared (arXiv 2010.04245)."""
    embedding_norm: bool = False
    """Scale each token's vector to a root mean square of 1 where it enters the first block."""
    feedforward: Literal["tree", "dense", "none", "moe"] = "tree"
    """Which layer replaces the transformer's MLP."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.d_model % (2 * self.heads):
            raise ValueError(f"d_model is {self.d_model}: it must be a multiple of 2 x heads = {2 * self.heads}")
        return self


class Train(Grown):
    """One training run."""

    later: ClassVar[frozenset[str]] = frozenset({"router_steps", "router_rate"})

    steps: Positive = 300
    """Optimizer steps."""
    batch_size: Positive = 8
    """Sequences an optimizer step, over all micro-batches and devices."""
    accumulate: Positive = 1
    """Micro-batches an optimizer step is split into."""
    lr: Annotated[float, Field(gt=0, le=10)] = 3e-3
    """Highest learning rate of the schedule."""
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup: Fraction = 0.05
    """Share of the steps that warm up; a trapezoid also decays over the last 0.2."""
    final_lr: Fraction = 0.1
    """Share of lr left at the end."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Never on biases, norms and thresholds."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    node_lr_scale: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Learning rate of node rows, as a multiple of lr."""
    router_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """With tree.router frozen: optimizer steps after which it still follows its nodes; then it stands still."""
    router_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the way to its nodes' weights that a frozen router goes at each of these steps; 1 copies them."""
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
    """Steps between checkpoints that an interrupted trial goes on from."""
    motion: bool = False
    """Record at every evaluation how far router and representation moved each node's response (motion.parquet)."""
    keep_checkpoint: bool = False
    """Keep the final weights (not the optimizer's state)."""
    devices: Positive = 1
    """Devices one trial trains on."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share a trial: ddp (auto), each holds the whole model; fsdp, each holds a share of every weight."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.router_rate != 1 and not self.router_steps:
            raise ValueError(f"router_rate is {self.router_rate}: it needs router_steps")
        parts = self.accumulate * self.devices
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size is {self.batch_size}: it must be a multiple of accumulate x devices = {parts}"
            )
        return self


class Questions(Settings):
    """Question answering at the end of a trial; its scores are kept with the trial's result. Needs the extra qa."""

    tasks: tuple[str, ...] = ()
    """heldout_continuation, heldout_cloze, or any task of lm-eval's; none is asked where this is empty."""
    shots: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """Examples shown before a question; each number is a run over all questions."""
    limit: Positive | None = None
    """Only so many questions of each task."""


class Trial(Grown):
    """Everything that determines one training run."""

    later: ClassVar[frozenset[str]] = frozenset({"task"})

    task: Task = Task()
    corpus: Corpus = Corpus()
    model: Model = Model()
    tree: Tree = Tree()
    dense: Dense = Dense()
    moe: Mixture = Mixture()
    train: Train = Train()
    questions: Questions = Questions()
    init_seed: Seed = 0
    """Initialisation only."""
    data_seed: Seed = 0
    """Order of the training data only."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        leaves, probe = self.tree.leaves, self.train.eval_tokens
        if self.task.kind != "language":
            self._without_text()
        if self.train.router_steps and self.tree.router != "frozen":
            raise ValueError(f"train.router_steps is {self.train.router_steps}: it needs tree.router 'frozen'")
        if self.tree.router == "hash" and self.model.feedforward == "tree":
            for name in ("region_leak", "load_loss", "motion"):
                if getattr(self.train, name):
                    raise ValueError(f"train.{name} is {getattr(self.train, name)}: tree.router 'hash' has no weights")
        if self.task.kind in ("language", "teacher") and self.model.feedforward == "tree" and probe < 64 * leaves:
            raise ValueError(
                f"train.eval_tokens is {probe}: depth {self.tree.depth} needs at least 64 x leaves = {64 * leaves}"
            )
        return self

    def _without_text(self) -> None:
        """Refuse what only language models have."""
        kind = self.task.kind
        if self.corpus != Corpus():
            raise ValueError(f"corpus: task {kind!r} reads no text; only 'language' does")
        if self.questions.tasks:
            raise ValueError(f"questions.tasks is {list(self.questions.tasks)}: task {kind!r} has no questions")
        if kind == "digits" and self.model.context < DIGIT_PATCHES:
            raise ValueError(f"model.context is {self.model.context}: task 'digits' reads {DIGIT_PATCHES} patches")
        if self.train.devices > 1:
            raise ValueError(f"train.devices is {self.train.devices}: task {kind!r} trains on one")

    @property
    def positions(self) -> int:
        """Tokens that one example of a batch gives to a feed-forward layer."""
        return {"language": self.model.context, "digits": DIGIT_PATCHES}.get(self.task.kind, 1)

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.train.steps * self.train.batch_size * self.positions

    def value(self, key: str) -> Any:
        """Return the value of a dotted field."""
        section, _, field = key.partition(".")
        return getattr(getattr(self, section), field)

    def hash(self) -> str:
        """Short content hash of the whole configuration."""
        return digest(self.model_dump(mode="json"))
