"""Training from a source that is larger than the disk: documents are streamed, tokenized and packed on the way.

The tokenizer and the held-out slice come from a prepared sample of the same source (`corpus.max_documents`), so they
are fixed. A stream's position is plain data (which document, which token in it, how far through a shuffled block of
windows): it goes into checkpoints, and from it the stream goes on with exactly the windows an uninterrupted one gives.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ablate.config import ConfigError, Corpus, Section, digest, reason
from ablate.data import corpora
from ablate.data.codec import Codec, content_hash
from ablate.data.local_files import find_files, kind_of, text_of
from ablate.data.module import TokenData
from ablate.data.tokens import Prepared, split_of
from ablate.data.windows import Batch
from ablate.distributed import gather

ENCODED_AT_ONCE = 64
"""Documents tokenized in one call."""
KEPT_POSITIONS = 16
"""Positions remembered behind the newest one: a trainer fetches batches ahead of the steps that use them."""

READER = 2
"""Raised when positions in local files are counted in another way, so that an old checkpoint's are refused."""


class Position(Section):
    """The position of one rank's stream; it alone decides the windows that follow."""

    key: str
    """Digest of what must not change: source, tokenizer, context, seed, shuffling, ranks."""
    epoch: int = 0
    source: dict[str, Any] | None = None
    """State of the data set before the document that the block of windows begins in; None at an epoch's start."""
    skip: int = 0
    """Tokens of that document that earlier blocks used."""
    block: int = 0
    """Blocks given so far."""
    given: int = 0
    """Windows of this block that were given."""


def open_stream(corpus: Corpus, cache: Path) -> Any:
    """A corpus as a `datasets.IterableDataset` whose state can be saved; nothing is kept on disk.

    Sources: the Hub, and local .jsonl or .parquet files (each is a shard), read as `prepare` reads them.

    Raises:
        ConfigError: for other sources, which are small enough to be prepared; for what is missing or unreachable.
    """
    from datasets import load_dataset  # type: ignore[import-untyped]

    if corpus.source == "stdlib":
        raise ConfigError("corpus.source is 'stdlib': streaming takes 'hub', or 'files' of .jsonl or .parquet")
    with corpora.private_datasets(cache):
        if corpus.source == "files":
            files = find_files(corpus)
            kinds = {str(kind_of(path)) for _, path in files}
            if not kinds <= {".jsonl", ".parquet"}:
                raise ConfigError(
                    f"corpus.path is {corpus.path!r}: streaming takes .jsonl or .parquet, not {sorted(kinds)}"
                )
            return corpora.local_rows(files, corpus.text_field)
        if corpus.preset and not corpus.name and corpora.HUB_PRESETS[corpus.preset].articles:
            raise ConfigError(f"corpus.preset is {corpus.preset!r}: its rows are lines of articles; prepare it instead")
        try:
            return load_dataset(**{**corpora.hub_arguments(corpus, cache), "streaming": True})
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"corpus cannot be streamed: {reason(error)}") from None


class TokenStream:
    """Endless windows of context + 1 tokens for one of several ranks, in blocks shuffled by the seed.

    Ranks share the source's shards where their number divides them, else each takes every world_size-th document. Empty
    documents and those whose content puts them in validation or test are left out (as in a prepared corpus; duplicates
    are not looked for: that would take memory that grows with the corpus). Raises ConfigError where a whole pass over
    the source gives no document, or a document without text.
    """

    def __init__(
        self,
        corpus: Corpus,
        codec: Codec,
        cache: Path,
        *,
        context: int,
        seed: int,
        shuffle: int = 256,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        from datasets.distributed import split_dataset_by_node  # type: ignore[import-untyped]

        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}: of world_size {world_size} ranks, 0 to {world_size - 1} are possible")
        if shuffle < 1:
            raise ConfigError(f"shuffle is {shuffle}: a block has at least one window")
        self.corpus, self.codec, self.context, self.shuffle = corpus, codec, context, shuffle
        self.seed, self.rank = seed, rank
        source = open_stream(corpus, cache)
        self._source = split_dataset_by_node(source, rank=rank, world_size=world_size)
        settings = corpus.model_dump(mode="json", exclude={"path", "tokenizer_file"})
        reader = READER if corpus.source == "files" else 1
        self.key = digest([reader, settings, content_hash(codec), context, seed, shuffle, rank, world_size])

    def start(self) -> Position:
        """The position before the first window."""
        return Position(key=self.key)

    def windows(self, position: Position) -> Iterator[tuple[npt.NDArray[np.int64], Position]]:
        """Windows int64 [context + 1] from a position on, each with the position after it.

        Raises ConfigError where the position belongs to other settings, or other ranks.
        """
        if position.key != self.key:
            raise ConfigError(
                "the position in the checkpoint is of another stream: corpus, tokenizer, context, seed, shuffling and "
                "the number of ranks must be those it was saved with"
            )
        packed = self._packed(position)
        while True:
            block, after = [], position
            for _ in range(self.shuffle):
                window, after = next(packed)
                block.append(window)
            bits = np.random.PCG64(np.random.SeedSequence((self.seed, self.rank, position.block)))
            order = np.argsort(bits.random_raw(self.shuffle), kind="stable")
            following = after.model_copy(update={"block": position.block + 1, "given": 0})
            for given in range(position.given, self.shuffle):
                last = given + 1 == self.shuffle
                yield block[order[given]], following if last else position.model_copy(update={"given": given + 1})
            position = following

    def _packed(self, position: Position) -> Iterator[tuple[npt.NDArray[np.int64], Position]]:
        """Windows in the order of the text, each with the position of the token after its inputs."""
        held = np.empty(0, np.int64)
        # Documents with tokens in `held`: the position before each, and how many of its tokens are left.
        documents: deque[tuple[Position, int]] = deque()
        for ids, before in self._encoded(position):
            used = before.skip
            held = np.concatenate([held, ids[used:]])
            documents.append((before, len(ids) - used))
            while len(held) > self.context:
                window, held = held[: self.context + 1], held[self.context :]
                gone = self.context
                while gone >= documents[0][1]:
                    gone -= documents.popleft()[1]
                first, left = documents[0]
                first = first.model_copy(update={"skip": first.skip + gone})
                documents[0] = (first, left - gone)
                yield window, first

    def _encoded(self, position: Position) -> Iterator[tuple[npt.NDArray[np.int64], Position]]:
        """Ids of each training document with its end mark, and the position before it; `skip` is the first one's."""
        epoch, state, skip = position.epoch, position.source, position.skip
        texts: list[str] = []
        before: list[Position] = []
        while True:
            self._source.set_epoch(epoch)
            self._source.load_state_dict(state)  # None: from the epoch's start
            found = state is not None
            rows = iter(self._source)
            while True:
                here = Position(key=self.key, epoch=epoch, source=state, skip=skip)
                row = next(rows, None)
                if row is None:
                    break
                state = json.loads(json.dumps(self._source.state_dict()))
                text = self._text(row)
                if not self._wanted(text):
                    continue
                found, skip = True, 0
                texts.append(text)
                before.append(here)
                if len(texts) == ENCODED_AT_ONCE:
                    yield from self._with_ends(texts, before)
                    texts, before = [], []
            if not found:
                raise ConfigError("corpus: a whole pass over its stream gave no training document")
            yield from self._with_ends(texts, before)
            texts, before = [], []
            epoch, state, skip = epoch + 1, None, 0

    def _text(self, row: dict[str, Any]) -> str:
        if self.corpus.source == "files":  # the reader's rows have no other fields
            return str(row["text"])
        return text_of(row, self.corpus.text_field, "corpus: a row of the stream")

    def _wanted(self, text: str) -> bool:
        """Whether a text is a training document."""
        return bool(text.strip()) and split_of(hashlib.sha256(text.encode()).digest(), self.corpus) == "train"

    def _with_ends(self, texts: list[str], before: list[Position]) -> Iterator[tuple[npt.NDArray[np.int64], Position]]:
        for ids, position in zip(self.codec.encode_batch(texts), before, strict=True):
            yield np.append(ids.astype(np.int64), self.codec.end_id), position


class StreamData(TokenData):
    """`TokenData` whose training batches come from a stream; the evaluation slice is the prepared sample's.

    Arguments as there, and the corpus, the folder for what `datasets` keeps, and the windows of a shuffled block. The
    state, which Lightning puts into checkpoints, holds every rank's position at the optimizer step of the checkpoint;
    `start_step` counts the micro-steps done by then. Raises ConfigError where a state was saved by another stream.
    """

    def __init__(
        self, prepared: Prepared, corpus: Corpus, cache: Path, *, shuffle: int = 256, **arguments: Any
    ) -> None:
        super().__init__(prepared, **arguments)
        self.corpus, self.cache, self.shuffle = corpus, cache, shuffle
        self.seed = self.order.seed
        self._positions: dict[int, Position] = {}
        self._loaded: list[dict[str, Any]] | None = None

    def stream(self) -> TokenStream:
        """This process's stream."""
        rank, world_size = self._place()
        return TokenStream(
            self.corpus,
            self.prepared.codec,
            self.cache,
            context=self.context,
            seed=self.seed,
            shuffle=self.shuffle,
            rank=rank,
            world_size=world_size,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of micro-steps start_step … steps - 1 of this process, from the loaded position."""
        return DataLoader(_StreamBatches(self), batch_size=None, generator=torch.Generator())

    def position(self, micro_step: int) -> Position:
        """This process's position after so many micro-steps of the run; the newest few are remembered."""
        if micro_step in self._positions:
            return self._positions[micro_step]
        first, last = min(self._positions, default=0), max(self._positions, default=0)
        raise ConfigError(f"the stream's position after micro-step {micro_step} is not known: {first} to {last} are")

    def state_dict(self) -> dict[str, Any]:
        """Positions of all ranks, as text, so that checkpoints load with weights_only."""
        trainer = self.trainer
        step = self.start_step if trainer is None else trainer.global_step * trainer.accumulate_grad_batches
        return {"positions": json.dumps(gather(self.position(step).model_dump(mode="json")))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._loaded = json.loads(state_dict["positions"])

    def begin(self, stream: TokenStream) -> Position:
        """The position that training starts from, at micro-step `start_step`."""
        rank, world_size = self._place()
        if self._loaded is None and self.start_step:
            raise ConfigError(f"start_step is {self.start_step}: a stream goes on from a checkpoint's position only")
        if self._loaded is not None and len(self._loaded) != world_size:
            raise ConfigError(f"the checkpoint has positions of {len(self._loaded)} ranks: this run has {world_size}")
        begin = stream.start() if self._loaded is None else Position.model_validate(self._loaded[rank])
        self._positions = {self.start_step: begin}
        return begin

    def note(self, micro_step: int, position: Position) -> None:
        """Remember the position after a micro-step."""
        self._positions[micro_step] = position
        self._positions.pop(micro_step - KEPT_POSITIONS, None)


class _StreamBatches(IterableDataset[Batch]):
    def __init__(self, data: StreamData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        data = self.data
        stream = data.stream()
        windows = stream.windows(data.begin(stream))
        for step in range(data.start_step, data.steps):
            taken: list[Tensor] = []
            for _ in range(data.batch_size):
                window, position = next(windows)
                taken.append(torch.from_numpy(window))
            data.note(step + 1, position)
            yield {"tokens": torch.stack(taken)}
