"""Trains SentencePiece tokenizers (arXiv:1808.06226) on a sample of the text."""

import io
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from lm import terminal
from lm.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer, TokenizerConfig
from lm.data.unicode import replace_surrogates
from lm.errors import UserError, check_name, check_positive, check_seed

KINDS = ("bpe", "unigram", "char")
# Training threads. The number changes the result: unigram training sums in thread order.
_THREADS = 2
_SPACE, _UNKNOWN = "\u2581", "\u2585"  # SentencePiece leaves out training text with the second
_CONTROLS = ("<pad>", "<s>", "</s>", "<unk>")
_NOT_IN_SYMBOLS = {" ", "\0", _SPACE, _UNKNOWN}
_SENTENCE = 4_000  # characters per training sentence


@dataclass(frozen=True, kw_only=True)
class SentencePiece(TokenizerConfig):
    """Trains a tokenizer on the training documents.

    vocab          number of ids
    kind           'bpe', 'unigram' or 'char'
    byte_fallback  encode characters outside the vocabulary as bytes instead of unknown
    split_digits   one piece per digit
    split_scripts  keep letters and punctuation in different pieces. Without it text takes fewer
                   tokens (by 8 % on Python source, 2 to 11 % on prose, at 4,096 pieces)
    coverage       fraction of characters with a piece of their own
    symbols        strings that are always one piece, such as CHAT_SYMBOLS
    sample_bytes   training text at most
    seed           draws that text
    """

    vocab: int
    kind: str = "bpe"
    byte_fallback: bool = True
    split_digits: bool = True
    split_scripts: bool = True
    coverage: float = 0.9999
    symbols: tuple[str, ...] = ()
    sample_bytes: int = 1 << 25
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(**{"tokenizer.sample_bytes": self.sample_bytes})
        check_seed(**{"tokenizer.seed": self.seed})
        check_name("tokenizer.kind", self.kind, KINDS)
        if not 0.98 <= self.coverage <= 1:  # SentencePiece takes no other
            raise UserError(
                f"tokenizer.coverage={self.coverage!r} must be between 0.98 and 1; rarer "
                "characters become bytes."
            )
        fixed = 4 + 256 * self.byte_fallback + len(self.symbols)
        if type(self.vocab) is not int or self.vocab >= 2**31:
            raise UserError(f"tokenizer.vocab={self.vocab!r} must be a whole number below 2**31.")
        if self.vocab <= fixed:
            raise UserError(
                f"tokenizer.vocab={self.vocab} must be above {fixed}, the number of fixed pieces "
                "(4 controls, 256 bytes with byte_fallback, the symbols)."
            )
        if "" in self.symbols or len(set(self.symbols)) < len(self.symbols):
            raise UserError(f"tokenizer.symbols={self.symbols!r} must be different and not empty.")
        for symbol in self.symbols:
            if symbol in _CONTROLS or re.fullmatch("<0x[0-9A-F]{2}>", symbol):
                raise UserError(
                    f"tokenizer.symbols has {symbol!r}, which SentencePiece uses itself; choose "
                    "another spelling."
                )
            if set(symbol) & _NOT_IN_SYMBOLS or symbol != replace_surrogates(symbol):
                raise UserError(
                    f"tokenizer.symbols has {symbol!r}; a symbol must not contain spaces, U+2581, "
                    "U+2585, NUL or half a surrogate pair."
                )
        for a, b in itertools.product(self.symbols, repeat=2):
            if any(a.endswith(b[:size]) for size in range(1, min(len(a), len(b)))):
                raise UserError(
                    f"tokenizer.symbols has {a!r}, whose end may begin {b!r}; choose spellings "
                    "that cannot overlap in a text."
                )

    def build(self, texts: Iterable[str]) -> "Tokenizer":
        return self.train_on(texts)

    def train(self, documents: Iterable[str]) -> "Tokenizer":
        """Trains on a sample of these documents. The same documents give the same bytes."""
        sample = Sample(self.sample_bytes, self.seed)
        for document in documents:
            sample.add(document)
        return self.train_on(sample.texts())

    def train_on(self, texts: Iterable[str]) -> "Tokenizer":
        """Trains on all of these texts, of at most a few thousand characters each."""
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_without_reserved(texts),
                model_writer=model,
                model_type=self.kind,
                vocab_size=self.vocab,
                hard_vocab_limit=False,
                byte_fallback=self.byte_fallback,
                split_digits=self.split_digits,
                split_by_unicode_script=self.split_scripts,
                character_coverage=self.coverage,
                user_defined_symbols=list(self.symbols),
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=4 * _SENTENCE,
                pad_id=PAD,
                bos_id=BOS,
                eos_id=EOS,
                unk_id=UNK,
                pad_piece="<pad>",
                num_threads=_THREADS,
                minloglevel=3,
            )
        except RuntimeError as error:
            raise UserError(_training_error(self, str(error))) from None
        trained = model.getvalue()
        tokenizer = Tokenizer(_exact(trained) if self.kind == "unigram" else trained)
        self._check_symbols(tokenizer)
        if tokenizer.vocab < self.vocab and self.kind != "char":
            terminal.note(
                f"The text yields only {tokenizer.vocab} of tokenizer.vocab={self.vocab} pieces; "
                "the other ids stay unused."
            )
        return tokenizer

    def _check_symbols(self, tokenizer: "Tokenizer") -> None:
        """Raises UserError for a symbol that is not one piece of its own in every text."""
        for symbol in self.symbols:
            first, *_, last = tokenizer.encode(f"{symbol}a{symbol}")
            if first != last or first <= UNK or tokenizer.decode([first]) != symbol:
                raise UserError(
                    f"tokenizer.symbols has {symbol!r}, which the trained tokenizer does not keep "
                    "as one piece; choose another spelling."
                )


class Sample:
    """A sample of a stream of documents, of at most `budget` bytes. It depends on the content of
    the documents and not on their order.

    Documents are cut into parts. A part is kept if its checksum lies below a threshold, which is
    halved whenever the kept parts exceed the budget.
    """

    def __init__(self, budget: int, seed: int):
        self._budget = budget
        self._seed = seed
        self._threshold = 1 << 32
        self._kept: list[tuple[int, int, int, str]] = []  # checksum, bytes, owner, text
        self._size = 0

    def add(self, document: str, owner: int = 0) -> None:
        """Adds a document. `texts` can exclude it again by the number `owner`."""
        for text in cut(document, _SENTENCE):
            data = replace_surrogates(text).encode()
            checksum = zlib.crc32(data, self._seed)
            if checksum < self._threshold:
                self._kept.append((checksum, len(data), owner, text))
                self._size += len(data)
            while self._size > self._budget:
                self._threshold //= 2
                self._kept = [part for part in self._kept if part[0] < self._threshold]
                self._size = sum(part[1] for part in self._kept)

    def texts(self, without: int | None = None) -> Iterator[str]:
        """The kept parts in order, except those of the owner `without`."""
        return (text for _, _, owner, text in self._kept if owner != without)


def cut(text: str, size: int) -> Iterator[str]:
    """Consecutive parts of at most `size` characters, cut before a line end, else before a space,
    else anywhere."""
    start = 0
    while len(text) - start > size:
        window = (start + 1, start + size + 1)
        end = text.rfind("\n", *window)
        end = text.rfind(" ", *window) if end < 0 else end
        end = start + size if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


def _without_reserved(texts: Iterable[str]) -> Iterator[str]:
    """Texts without U+2585 and half surrogate pairs."""
    for text in texts:
        yield from filter(None, replace_surrogates(text).split(_UNKNOWN))


def _exact(model: bytes) -> bytes:
    """The unigram model with scores rounded to 64ths of a nat, whose sums are exact in float32.
    Then float32 search, here, and float64 search, by readers of tokenizer.json, find the same
    segmentation."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        piece.score = round(64 * piece.score) / 64
    return proto.SerializeToString()


def _training_error(config: SentencePiece, message: str) -> str:
    if "sentences_.empty()" in message:
        return "There is no text to train the tokenizer on; is the corpus empty?"
    if sizes := re.search(r"(\d+) vs (\d+)", message):
        return (
            f"tokenizer.vocab={config.vocab} is too small: characters of the text and fixed pieces "
            f"need {sizes[2]}. Raise it, or lower tokenizer.coverage."
        )
    return f"tokenizer: SentencePiece could not train {config}: {message.strip()}"
