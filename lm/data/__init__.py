"""Documents in, Batch out. Imports run down this list:

batch        the contract with the model
files        finding, opening and decoding files, local or at a URL
sources      declarations that yield documents; records: TFDS files at a URL
tokenizer    SentencePiece: train, encode, decode; tokenizer_json: those of tokenizer.json;
             tokenizer_files: which of the two a folder holds
division     which text is held out
shards       tokens on disk; folder, stream: writing and reading them
mixture      weights of sources
packing      documents into sequences
loader       batch(step); evaluation: the held-out documents in order
prepare      all of it: a declaration and a folder in, Prepared out
"""

from lm.data.batch import Batch
from lm.data.evaluation import Evaluation, evaluation
from lm.data.loader import BatchShape, Loader, prefetch
from lm.data.mixture import Mixture
from lm.data.packing import BestFit, Concatenate
from lm.data.prepare import Counts, Prepared, prepare, recipe
from lm.data.progress import Progress
from lm.data.sources import (
    AnySource,
    Csv,
    Documents,
    Jsonl,
    Parquet,
    Shards,
    StandardLibrary,
    Text,
    Tfds,
)
from lm.data.tokenizer import CHAT_SYMBOLS, SentencePiece, Tokenizer
from lm.data.tokenizer_files import TokenizerFile, has_tokenizer, load_tokenizer

AnyTokenizer = SentencePiece | TokenizerFile

__all__ = [
    "CHAT_SYMBOLS",
    "AnySource",
    "AnyTokenizer",
    "Batch",
    "BatchShape",
    "BestFit",
    "Concatenate",
    "Counts",
    "Csv",
    "Documents",
    "Evaluation",
    "Jsonl",
    "Loader",
    "Mixture",
    "Parquet",
    "Prepared",
    "Progress",
    "SentencePiece",
    "Shards",
    "StandardLibrary",
    "Text",
    "Tfds",
    "Tokenizer",
    "TokenizerFile",
    "evaluation",
    "has_tokenizer",
    "load_tokenizer",
    "prefetch",
    "prepare",
    "recipe",
]
