"""Tokenizers that lose nothing: each token is a known string of bytes, so that bits per byte compare across tokenizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ablate.config import ConfigError, reason
from ablate.config.text import load_json, read_text

Ids = npt.NDArray[np.uint32]

END = "<|end|>"
"""The end-of-document mark of the tokenizers trained here."""
KNOWN_ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Marks looked for in a tokenizer file; where it has none, END is added to it."""
LARGEST_ID = 2**31 - 2
LARGEST_FILE = 256 * 1024 * 1024
"""Bytes of a tokenizer.json."""
LONGEST_WORD = 1024
"""Bytes at which a word is cut while a tokenizer is trained; a word is a run of letters, digits, signs or blanks."""


class Codec(Protocol):
    """A tokenizer: vocab_size entries, of which `end_id` marks the end of a document and has no bytes."""

    vocab_size: int
    end_id: int
    token_bytes: npt.NDArray[np.int32]
    """[vocab_size], the bytes behind each id; 0 for the end mark and for ids without bytes."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, without end marks. A mark's spelling inside a text is text, not the mark."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind ids; end marks vanish, bytes cut out of a character become U+FFFD."""

    def content(self) -> str:
        """What is saved as tokenizer.json."""


class ByteCodec:
    """Each byte of UTF-8 is a token; 256 is the end mark."""

    vocab_size = 257
    end_id = 256

    def __init__(self) -> None:
        self.token_bytes = np.append(np.ones(256, np.int32), np.int32(0))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Codec."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See Codec."""
        return bytes(i for i in ids if i != self.end_id).decode(errors="replace")

    def content(self) -> str:
        """See Codec."""
        return json.dumps({"tokenizer": "bytes", "vocab_size": self.vocab_size, "end_id": self.end_id})


class BytePairCodec:
    """A byte-level tokenizer of the `tokenizers` library. `where` names its origin in errors (ConfigError)."""

    def __init__(self, tokenizer: Tokenizer, where: str) -> None:
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        if not isinstance(tokenizer.decoder, decoders.ByteLevel) or not set(alphabet()) <= vocab.keys():
            raise ConfigError(
                f"{where} is not byte-level: bits per byte needs the bytes behind every token, "
                "so a ByteLevel decoder and all 256 bytes in its vocabulary"
            )
        if tokenizer.normalizer is not None:
            raise ConfigError(f"{where} has a normalizer, which changes text before it is counted: remove it")
        if max(vocab.values()) > LARGEST_ID:
            raise ConfigError(f"{where} has token id {max(vocab.values())}: ids up to {LARGEST_ID} fit a vocabulary")
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None  # BPE-dropout (arXiv 1910.13267) gives one text other tokens each time
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if not any(mark in vocab for mark in KNOWN_ENDS):
            tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
            vocab = tokenizer.get_vocab(with_added_tokens=True)
        # Text that spells a mark is encoded as text: a document cannot forge its own end.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.vocab_size = max(vocab.values()) + 1
        self.end_id = next(vocab[mark] for mark in KNOWN_ENDS if mark in vocab)
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        for token, i in vocab.items():
            self.token_bytes[i] = len(token)  # in the byte alphabet one character is one byte
        for i, added in tokenizer.get_added_tokens_decoder().items():
            self.token_bytes[i] = len(added.content.encode())
        self.token_bytes[self.end_id] = 0

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Codec."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """See Codec."""
        return self._tokenizer.decode([int(i) for i in ids if i != self.end_id], skip_special_tokens=False)

    def content(self) -> str:
        """See Codec."""
        return self._tokenizer.to_str(pretty=False)


def alphabet() -> list[str]:
    """The 256 characters by which byte-level tokenizers spell bytes (GPT-2's table), sorted."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def train(texts: Iterator[list[str]], vocab_size: int) -> BytePairCodec:
    """Byte-pair encoding over the given texts (BPE, Sennrich et al. 2016; byte-level as in GPT-2).

    The same texts give the same tokenizer, whatever the number of threads. A text too small for `vocab_size` entries
    (no pair left to merge) gives fewer: the codec's vocab_size is the one that counts.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Training takes time by the square of a word's length, and a file may be one word: of DNA, base64 or padding.
    cut = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{LONGEST_WORD}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, cut])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END, special=True, normalized=False)],
        initial_alphabet=alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    return BytePairCodec(tokenizer, "the trained tokenizer")


def from_file(path: Path) -> BytePairCodec:
    """A tokenizer.json of the `tokenizers` library. Raises ConfigError."""
    where = f"corpus.tokenizer_file {str(path)!r}"
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{where} cannot be read: it is no file; a tokenizer.json is expected")
        text = read_text(path, where, LARGEST_FILE)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} cannot be read: {reason(error)}; a tokenizer.json is expected") from None
    return from_content(text, where)


def from_content(text: str, where: str) -> BytePairCodec:
    """A codec from what `content` gave, or from any byte-level tokenizer.json. Raises ConfigError."""
    _check_ids(text, where)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{where} is not a tokenizer of the `tokenizers` library: {reason(error)}") from None
    return BytePairCodec(tokenizer, where)


def content_hash(codec: Codec) -> str:
    """Sixteen hex digits of SHA-256 over the saved tokenizer."""
    return hashlib.sha256(codec.content().encode()).hexdigest()[:16]


def _check_ids(text: str, where: str) -> None:
    """Ids are 32-bit in the library, where too large a one is only 'not valid': say which."""
    data = load_json(text, where)
    model = data.get("model") if isinstance(data, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = [i for i in vocab.values() if isinstance(i, int)] if isinstance(vocab, dict) else []
    if ids and max(ids) > LARGEST_ID:
        raise ConfigError(f"{where} has token id {max(ids)}: ids up to {LARGEST_ID} fit a vocabulary")
