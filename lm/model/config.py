"""The declaration of a transformer: sizes, and the parts of its layers. `transformer.py` builds
it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from lm.errors import UserError, check_name, check_positive, check_size
from lm.model.adapters.adapter import Adapter
from lm.model.attention import AttentionConfig
from lm.model.ffn import FeedForwardConfig
from lm.model.initializers import He, Normal, ScaledNormal, TruncatedNormal, Xavier
from lm.model.norm import NormConfig, RMSNormConfig
from lm.quant import Quantizer

PLACEMENTS = ("pre", "post", "output", "sandwich")
MAX_LAYERS = 9_999


@dataclass(frozen=True, kw_only=True)
class Block:
    """One layer of a pattern: its attention and feed-forward; None: those of the model."""

    attention: AttentionConfig | None = None
    ffn: FeedForwardConfig | None = None


class Layout(NamedTuple):
    """The layers in order: `prefix`, then `pattern` repeated `repeats` times, then `suffix`. No
    field of a block is None."""

    prefix: tuple[Block, ...]
    pattern: tuple[Block, ...]
    repeats: int
    suffix: tuple[Block, ...]

    @property
    def parts(self) -> dict[str, tuple[Block, ...]]:
        """The blocks by the first part of their parameters' paths."""
        return {"prefix": self.prefix, "blocks": self.pattern, "suffix": self.suffix}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One per layer."""
        return self.prefix + self.pattern * self.repeats + self.suffix


@dataclass(frozen=True, kw_only=True)
class Config:
    """A decoder-only transformer.

    Args:
      vocab, dim, layers: size of the vocabulary, width of the residual stream, number of layers.
      attention, ffn: of every layer that `pattern` and `prefix` do not specify.
      norm: normalization of the residual stream.
      placement: of the norm around each sublayer f: 'pre' x + f(norm x) (GPT-2, Llama); 'post'
        norm(x + f(x)) (Vaswani et al.; no final norm); 'output' x + norm(f(x)) (OLMo 2); 'sandwich'
        x + norm(f(norm x)) (Gemma 2).
      pattern: blocks repeated through the layers, such as one local and one global attention;
        empty: one block. If the layers are not a multiple of it, the last layers repeat its
        beginning.
      prefix: the first layers, such as the dense ones of an MoE.
      tied: use the embedding as output matrix.
      embed_scale: factor on embeddings; Gemma's is dim ** 0.5.
      logit_softcap: logits become softcap * tanh(logits / softcap).
      dropout: dropout rate of the embeddings and of each sublayer's output, in training.
      head: 'vocab' gives logits, 'scalar' one number per token instead (a reward model).
      adapter: small weights that are trained in place of the others: LoRA, Prefix, Bottleneck.
      quant: storage of the matrices of the layers, which are then frozen: NF4.
      init: initializer of matrices.
      embed_std: standard deviation of the initial embeddings.
    """

    vocab: int
    dim: int
    layers: int
    attention: AttentionConfig | None = None
    ffn: FeedForwardConfig | None = None
    norm: NormConfig = field(default_factory=RMSNormConfig)
    placement: str = "pre"
    pattern: tuple[Block, ...] = ()
    prefix: tuple[Block, ...] = ()
    tied: bool = False
    embed_scale: float | None = None
    logit_softcap: float | None = None
    dropout: float = 0.0
    head: str = "vocab"
    adapter: Adapter | None = None
    quant: Quantizer | None = None
    init: Normal | TruncatedNormal | ScaledNormal | Xavier | He = field(default_factory=Normal)
    embed_std: float = 0.02

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("vocab", "dim", "layers")}
        check_size(**{f"model.{name}": value for name, value in sizes.items()})
        if self.layers > MAX_LAYERS:
            raise UserError(f"model.layers={self.layers} must be at most {MAX_LAYERS:,}.")
        sizes = {"embed_std": self.embed_std}
        optional = {name: getattr(self, name) for name in ("embed_scale", "logit_softcap")}
        sizes |= {name: value for name, value in optional.items() if value is not None}
        check_positive(**{f"model.{name}": value for name, value in sizes.items()})
        check_name("model.placement", self.placement, PLACEMENTS)
        check_name("model.head", self.head, ("vocab", "scalar"))
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout!r} must be at least 0 and below 1.")
        if len(self.prefix) > self.layers:
            raise UserError(
                f"model.prefix has {len(self.prefix)} blocks but model.layers={self.layers}; "
                "give more layers or a shorter prefix."
            )
        for part in ("attention", "ffn"):
            self._check_part(part)
        try:
            hash(self)
        except TypeError as error:
            raise UserError(
                f"model holds a value that is not hashable ({error}); use tuples in its configs."
            ) from None

    def _check_part(self, part: str) -> None:
        blocks = self.prefix + (self.pattern or (Block(),))
        missing = [block for block in blocks if getattr(block, part) is None]
        if missing and getattr(self, part) is None:
            raise UserError(
                f"model.{part}=None, and a block has none of its own; "
                f"set model.{part}, or the {part} of every block."
            )
        if not missing and getattr(self, part) is not None:
            raise UserError(
                f"model.{part}={getattr(self, part)} is never used, since every block of "
                f"model.pattern and model.prefix has its own; set model.{part}=None."
            )

    @property
    def layout(self) -> Layout:
        """The layers, each with its attention and feed-forward."""
        prefix, pattern = self._filled(self.prefix), self._filled(self.pattern or (Block(),))
        repeats, rest = divmod(self.layers - len(prefix), len(pattern))
        return Layout(prefix, pattern, repeats, pattern[:rest])

    def _filled(self, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        return tuple(
            Block(attention=block.attention or self.attention, ffn=block.ffn or self.ffn)
            for block in blocks
        )
