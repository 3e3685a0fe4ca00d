"""Text in, batches of token ids out: sources, tokenizers, token shards, packing, loading.

batch               Batch, the arrays that every later stage reads
progress            interface of progress bars
identity            names and digests of the classes in a recipe
json_files          JSON files of other programs
unicode             half surrogate pairs, names of encodings
compression         decompression by extension
files               finding, opening and decoding files, local or at a URL
folder              atomic reads and writes in a folder, local or at a URL
tokenizer           SentencePiece models: encoding and decoding
tokenizer_json      tokenizer.json files of Hugging Face
tokenizer_training  SentencePiece: trains a tokenizer
tokenizer_files     TokenizerFile: loading an existing tokenizer of either kind
sources             base class Source; Documents, StandardLibrary, Shards
file_sources        Text, Jsonl, Csv, Parquet
chat_template       renders conversations with Jinja, finds the assistant's parts
conversation        conversations, pairs and labelled answers in JSON records
chat                Chat: conversations, with the loss on the assistant's messages
preferences         Preferences: chosen and rejected answers; Feedback: labelled ones
tfds                Tfds: datasets prepared by TensorFlow Datasets; records: their record files
split               which text is trained on and which is held out
stream              random access to the tokens of one source and split
shards              token shards on disk: format, writing, reading
mixture             weights of sources
packing             documents packed into sequences
loader              batch(step): training batches
evaluation          the held-out documents as batches
prepare             the whole pipeline: a declaration and a folder in, Prepared out

README.md describes formats, mixtures, tokenizers, resuming and how to write a source. Imports run
down this list.
"""

from lm.data.batch import Batch
from lm.data.chat import (
    Answers,
    Chat,
    Conversations,
    chat_template,
    encode_prompt,
    encode_spans,
    end_of_turn,
)
from lm.data.evaluation import Evaluation, evaluation
from lm.data.file_sources import Csv, FileSource, Jsonl, Parquet, Text, of_path
from lm.data.folder import check_can_be_made
from lm.data.loader import BatchShape, Loader, prefetch
from lm.data.mixture import Mixture, sources_of
from lm.data.packing import BestFit, Concatenate, Packing, Pairs
from lm.data.preferences import Feedback, Preferences
from lm.data.prepare import Counts, Prepared, prepare, recipe
from lm.data.progress import Progress
from lm.data.sources import Documents, Encoded, Shards, Source, StandardLibrary
from lm.data.tfds import Tfds
from lm.data.tokenizer import CHAT_SYMBOLS, Tokenizer, TokenizerConfig
from lm.data.tokenizer_files import TokenizerFile, has_tokenizer, load_tokenizer
from lm.data.tokenizer_training import SentencePiece
from lm.data.unicode import replace_surrogates

__all__ = [
    "CHAT_SYMBOLS",
    "Answers",
    "Batch",
    "BatchShape",
    "BestFit",
    "Chat",
    "Concatenate",
    "Conversations",
    "Counts",
    "Csv",
    "Documents",
    "Encoded",
    "Evaluation",
    "Feedback",
    "FileSource",
    "Jsonl",
    "Loader",
    "Mixture",
    "Packing",
    "Pairs",
    "Parquet",
    "Preferences",
    "Prepared",
    "Progress",
    "SentencePiece",
    "Shards",
    "Source",
    "StandardLibrary",
    "Text",
    "Tfds",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerFile",
    "chat_template",
    "check_can_be_made",
    "encode_prompt",
    "encode_spans",
    "end_of_turn",
    "evaluation",
    "has_tokenizer",
    "load_tokenizer",
    "of_path",
    "prefetch",
    "prepare",
    "recipe",
    "replace_surrogates",
    "sources_of",
]
