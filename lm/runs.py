"""Trained models, opened from run folders and Hugging Face folders."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from lm import data, evals, generate, model
from lm.errors import UserError, check_size
from lm.experiment import Experiment
from lm.folders import NO_TEXT, RunFolder
from lm.model import Model, Transformer
from lm.parallel import sharding
from lm.parallel.mesh import Mesh
from lm.prepared import check_token, prepare
from lm.program import use_compilation_cache


@dataclasses.dataclass(kw_only=True)
class Run:
    """A trained model with its tokenizer.

    folder      of the run
    experiment  its declaration
    tokenizer   text to ids and back; None for a Hugging Face folder without one
    params      nested dict of weights
    step        number of updates of `params`
    stopped     the signal that ended training early, if any
    mesh        the jax mesh that `params` are sharded over; None for one device
    """

    folder: epath.Path
    experiment: Experiment
    tokenizer: data.Tokenizer | None
    params: dict[str, Any]
    step: int
    stopped: str | None = None
    mesh: jax.sharding.Mesh | None = None
    _engine: tuple | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def model(self) -> Transformer:
        """The Flax module, with weights in the dtype of arithmetic."""
        return self.apply.module()

    @property
    def apply(self) -> Model:
        """Config, weights, mesh and precision as one value."""
        e = self.experiment
        return Model(e.model, self.params, self.mesh, e.precision)

    def logits(self, tokens_bt: Any) -> jax.Array:
        """[B, T] token ids -> [B, T, V] float32 logits of the next token at each position."""
        return self._computed(_logits, tokens_bt)

    def _computed(self, function: Callable[..., jax.Array], tokens_bt: Any) -> jax.Array:
        tokens_bt, vocab = np.asarray(tokens_bt), self.experiment.model.vocab
        is_matrix = tokens_bt.ndim == 2 and tokens_bt.size and tokens_bt.dtype.kind in "iu"
        if not is_matrix or tokens_bt.min() < 0 or tokens_bt.max() >= vocab:
            raise UserError(
                f"Tokens must be a [B, T] array of ids from 0 to {vocab - 1}, not shape "
                f"{tokens_bt.shape} of {tokens_bt.dtype}."
            )
        tokens_bt = tokens_bt.astype(np.int32)
        ways = 1 if self.mesh is None else sharding.batch_ways(self.mesh)
        padding = ((0, -len(tokens_bt) % ways), (0, 0))
        return function(self.apply.cast(), np.pad(tokens_bt, padding))[: len(tokens_bt)]

    def values(self, tokens_bt: Any) -> jax.Array:
        """[B, T] token ids -> [B, T] float32 values of a reward model, which reads a conversation's
        reward at its last token."""
        return self._computed(_values, tokens_bt)

    def engine(self, *, context: int | None = None, **options: Any) -> generate.Engine:
        """The generation engine of the model, with other options than the defaults if given (see
        generate.Engine). It is kept, with its KV cache, for the next call with the same ones.

        Args:
            context: most tokens of prompt and continuation; None: the sequence length of training.
        """
        length = self.experiment.batch.length if context is None else context
        asked = self.experiment, length, options
        kept = self._engine
        if kept is None or kept[0] is not self.params or kept[1] != asked:
            self._engine = None  # before the next one, since each has a cache
            engine = generate.Engine(self.apply.cast(), context=length, **options)
            self._engine = self.params, asked, engine
        return self._engine[2]

    def chat(
        self,
        *,
        system: str | None = None,
        context: int | None = None,
        temperature: float = 0.8,
        sampling: generate.Sampling | None = None,
        seed: int = 0,
    ) -> generate.Conversation:
        """A conversation with the model: call `say`. Its KV cache is kept between turns.

        Args:
            system: its first message.
            context: most tokens of the conversation; None: the sequence length of training.
            temperature: 0 is greedy; `sampling` instead has all options.

        Raises UserError for a model without a chat template.
        """
        return generate.Conversation(
            self.engine(context=context),
            self._tokenizer(),
            system=system,
            sampling=sampling or generate.Sampling(temperature=temperature),
            seed=seed,
        )

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_tokens: int = 64,
        context: int | None = None,
        temperature: float = 0.8,
        sampling: generate.Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        stream: Callable[[int, str], None] | None = None,
        guide: generate.Guide | None = None,
    ) -> Any:
        """Continues each prompt: a string for a string, a list for a list.

        Args:
            context: most tokens of prompt and continuation; None: the sequence length of training.
            temperature: 0 is greedy; `sampling` instead has all options.
            stop: strings that end a continuation; they are not part of it.
            stream: called with (row, piece of text) as text is generated.
            guide: what each continuation must be like (see generate.Guides).

        Raises UserError for a prompt longer than `context`.
        """
        texts = generate.generate_text(
            self.engine(context=context),
            self._tokenizer(),
            [prompts] if isinstance(prompts, str) else list(prompts),
            max_tokens=max_tokens,
            sampling=sampling or generate.Sampling(temperature=temperature),
            stop=stop,
            seed=seed,
            stream=stream,
            guide=guide,
        )
        return texts[0].text if isinstance(prompts, str) else [text.text for text in texts]

    def evaluate(self, source: Any = None, *, context: int | None = None) -> list[evals.Result]:
        """Loss, perplexity and bits per byte with their standard errors.

        Args:
            source: a path or glob of files (see `data.of_path`), or a source of lm.data; None: the
                held-out text of the run's own data.
            context: tokens of a sequence; None: the sequence length of training, at most 4,096.
        """
        e = self.experiment
        length = min(e.batch.length, 4096) if context is None else context
        check_size(context=length)
        sequences = e.batch.sequences_at(0)
        if source is None and e.data == NO_TEXT:
            raise UserError(f"{self.folder} came without text; name some, as in --data FILE.")
        if source is None:
            prepared = prepare(e, self.folder.parent)
            RunFolder(self.folder).check_same_text(prepared)
            texts = [prepared.evaluation(name, length, sequences) for name in prepared.held_out]
        else:
            source = data.of_path(str(source)) if isinstance(source, str | Path) else source
            evaluation = data.evaluation(source, self._tokenizer(), length, sequences)
            check_token(evaluation.largest_token, e.model)
            texts = [evaluation]
        return [
            result
            for text in texts
            for result in evals.perplexity(self.apply, text, step=self.step)
        ]

    def _tokenizer(self) -> data.Tokenizer:
        if self.tokenizer is None:
            raise UserError(f"{self.folder} has neither tokenizer.json nor tokenizer.model.")
        return self.tokenizer


@jax.jit
def _logits(apply: Model, tokens_bt: jax.Array) -> jax.Array:
    with apply.on_mesh(sharding.UNSPLIT_SEQUENCE):
        return apply.logits(apply(tokens_bt).hidden_btd)


@jax.jit
def _values(apply: Model, tokens_bt: jax.Array) -> jax.Array:
    with apply.on_mesh(sharding.UNSPLIT_SEQUENCE):
        return apply.values(apply(tokens_bt).hidden_btd)


def load(
    folder: str | os.PathLike,
    *,
    step: int | None = None,
    mesh: Mesh | None = None,
    compute: str | None = None,
) -> Run:
    """Opens a run folder or a Hugging Face folder, on one device or a mesh.

    Args:
        step: of the checkpoint; None: the newest. A Hugging Face folder has only step 0.
        compute: "float32" or "bfloat16", the dtype of arithmetic; None: that of the declaration,
            which for a Hugging Face folder is float32. The weights keep their stored dtype.

    Raises UserError if there is neither, no such checkpoint, or a damaged one.
    """
    opened = RunFolder.existing(folder)
    experiment = opened.experiment
    if compute is not None:
        precision = dataclasses.replace(experiment.precision, compute=compute, loss_scale=None)
        experiment = dataclasses.replace(experiment, precision=precision)
    use_compilation_cache()
    built = mesh.build() if mesh else None
    axes, shapes = model.axes(experiment.model), model.shapes(experiment.model)
    shardings = sharding.weight_shardings(axes, shapes, built) if built else None
    step, params = opened.params(step, shardings)
    return Run(
        folder=opened.path,
        experiment=experiment,
        tokenizer=opened.tokenizer(),
        params=params,
        step=step,
        mesh=built,
    )


def load_declaration(folder: str | os.PathLike) -> Experiment:
    """The experiment of a run folder; of a Hugging Face folder, one that starts from it."""
    return RunFolder.existing(folder).experiment
