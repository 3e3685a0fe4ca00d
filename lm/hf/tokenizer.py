"""Writes a SentencePiece model as the tokenizer files of Hugging Face, with the same ids.

Ids differ for text that contains the space mark U+2581 itself, which Hugging Face reads as a space,
and, in a unigram model that lacks a piece for one of their letters, for '<pad>' and the like.
"""

import base64
import json
from typing import Any

from lm.data.tokenizer import Tokenizer
from lm.data.tokenizer_json import JsonTokenizer
from lm.data.unicode import replace_surrogates
from lm.errors import UserError

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _SYMBOL, _BYTE = 1, 2, 3, 4, 6  # types of SentencePiece's pieces

# Texts whose ids are compared before an export: letters, marks and signs of many scripts, blanks.
SAMPLES = (
    "The quick brown fox, 1,234.56 times; it's 7°C — “so!”",
    " two  spaces\tand\ttabs\nlines \n\n\tdef f(x):\n        return x**2  # end ",
    "Žluťoučký kůň, garçon, Straße, Ünïcödé é e\u0301 ﬁ Ⅷ ½ ｆｕｌｌ",
    "Съешь ещё этих мягких булок · Ξεσκεπάζω τὴν ψυχοφθόρα · עברית נקיה · نص حكيم له سر",
    "天地玄黄，宇宙洪荒。いろはにほへと ちりぬるを 한국어 맞춤법 ไทย हिन्दी বাংলা தமிழ் ქართული አማርኛ",
    "🙂👩‍👩‍👧 𝔘𝔫𝔦 \u200b\u00ad\ufeff \x00\x7f <|user|> a<|end|>b",
    "",
    " ",
    "   ",
)


def export_files(tokenizer: Tokenizer, length: int) -> dict[str, bytes]:
    """The tokenizer files of Hugging Face by name: an imported tokenizer's own files, or files made
    from the SentencePiece model.

    `length` is the model's maximum sequence length. Raises UserError for a SentencePiece model
    whose ids would differ.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.files
    tokenizer_json = _tokenizer_json(tokenizer)
    special = {
        f"{role}_token": tokenizer.piece(piece)
        for role, piece in zip(
            ("bos", "eos", "unk", "pad"),
            (tokenizer.bos, tokenizer.eos, tokenizer.unk, tokenizer.pad),
        )
        if piece >= 0
    }
    template = tokenizer.chat_template
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": bool(tokenizer.prefix),
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        # "<s>" in a text is text, as in training; in a chat template it is the token.
        "split_special_tokens": template is None,
    }
    if template is not None:
        config["chat_template"] = template
    files = {
        **{n: d for n, d in tokenizer.files.items() if n != "generation_config.json"},
        "tokenizer.json": _json(tokenizer_json),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
    }
    _check_ids(tokenizer, files)
    return files


def _json(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, indent=1)
    return (replace_surrogates(text) + "\n").encode()


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    kind = proto.trainer_spec.model_type  # 1 unigram, 2 BPE, 3 words, 4 characters
    if kind not in (1, 2, 4):
        raise UserError("A SentencePiece model of type word cannot be exported as tokenizer.json.")
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    special = [
        _added(i, text, type_ != _SYMBOL)
        for i, (text, _, type_) in enumerate(pieces)
        if type_ in (_UNKNOWN, _CONTROL, _SYMBOL)
    ]
    model = _unigram(pieces) if kind == 1 else _bpe(pieces, merging=kind == 2)
    begin = tokenizer.piece(tokenizer.bos)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": _normalizer(proto.normalizer_spec),
        "pre_tokenizer": None,
        "post_processor": _template(begin, tokenizer.bos) if tokenizer.prefix else None,
        "decoder": _decoder(proto.normalizer_spec.add_dummy_prefix),
        "model": model,
    }


def _added(i: int, text: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **flags, "special": special}


Piece = tuple[str, float, int]


def _bpe(pieces: list[Piece], merging: bool) -> dict[str, Any]:
    """One merge for each way to compose a piece of two others, highest score first."""
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    normal = {text: score for text, score, type_ in pieces if type_ == _NORMAL}
    merges = []
    for text, score in normal.items() if merging else ():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                merges.append((-score, ids[left], ids[right]))
    texts = [text for text, _, _ in pieces]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(text for text, _, type_ in pieces if type_ == _UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": any(type_ == _BYTE for _, _, type_ in pieces),
        "ignore_merges": False,
        "vocab": ids,
        "merges": [[texts[left], texts[right]] for _, left, right in sorted(merges)],
    }


def _unigram(pieces: list[Piece]) -> dict[str, Any]:
    """Text that is spelled like a control or byte piece must not become it, so these pieces get a
    score below that of any segmentation into characters."""
    lowest = min((score for _, score, type_ in pieces if type_ == _NORMAL), default=0.0)
    longest = max(len(text) for text, _, type_ in pieces if type_ != _NORMAL)
    unreachable = lowest * longest - 1
    return {
        "type": "Unigram",
        "unk_id": next(i for i, (_, _, type_) in enumerate(pieces) if type_ == _UNKNOWN),
        "vocab": [
            [text, score if type_ == _NORMAL else unreachable] for text, score, type_ in pieces
        ],
        "byte_fallback": any(type_ == _BYTE for _, _, type_ in pieces),
    }


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(dummy_prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _template(begin: str, i: int) -> dict[str, Any]:
    """Puts the begin token before a text or a pair of texts."""
    first = {"SpecialToken": {"id": begin, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            first,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {begin: {"id": begin, "ids": [i], "tokens": [begin]}},
    }


def _check_ids(tokenizer: Tokenizer, files: dict[str, bytes]) -> None:
    import tokenizers

    exported = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    config = json.loads(files["tokenizer_config.json"])
    exported.encode_special_tokens = config["split_special_tokens"]
    controls = " ".join(map(tokenizer.piece, (tokenizer.bos, tokenizer.eos, tokenizer.pad)))
    for text in (
        *SAMPLES,
        controls if config["split_special_tokens"] else "",
        *(f"a{symbol}b {symbol}{symbol}\n" for symbol in tokenizer.symbols),
    ):
        ids = tokenizer.encode(text)
        exported_ids = exported.encode(text, add_special_tokens=False).ids
        if ids != exported_ids:
            raise UserError(
                f"This kind of SentencePiece model cannot be exported: for {text!r} tokenizer.json "
                f"would give the ids {exported_ids[:8]}..., tokenizer.model gives {ids[:8]}..."
            )
