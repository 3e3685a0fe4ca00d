"""What is served: models with their tokenizers and engines, read from folders."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm import data, runs, terminal, trees
from lm.errors import UserError
from lm.generate import DraftModel, Engine, Guides, NGram, Speculation
from lm.model import Config, Model, shapes, unstacked
from lm.model.adapters.adapter import ROOT
from lm.parallel.mesh import Mesh
from lm.runs import Run
from lm.serve.errors import ApiError
from lm.serve.router import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How folders are read, and how their engines are built.

    Args:
      step, compute, mesh: as of `lm.runs.load`.
      context, cache_tokens, cache_dtype, exact: as of `Engine`; context None: the length of
        training.
      ngrams: tokens of a draft that n-grams propose; None: none do.
      draft: the folder of a draft model; None: there is none.
    """

    step: int | None = None
    compute: str | None = None
    mesh: Mesh | None = None
    context: int | None = None
    cache_tokens: int | None = None
    cache_dtype: str | None = None
    exact: bool | None = None
    ngrams: int | None = None
    draft: str | None = None

    def speculation(self) -> Speculation | None:
        """What proposes drafts, new for each engine."""
        if self.draft is not None:
            return DraftModel(_draft(self).apply.cast())
        return None if self.ngrams is None else NGram(tokens=self.ngrams)

    def run(self, folder: str) -> Run:
        """Reads a folder. Raises UserError for a model that cannot generate text."""
        run = runs.load(folder, step=self.step, mesh=self.mesh, compute=self.compute)
        if run.tokenizer is None:
            raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model.")
        if run.experiment.model.head != "vocab":
            raise UserError(f"{folder} is a reward model, which cannot generate text.")
        return run


@functools.lru_cache(maxsize=1)
def _draft(reading: Reading) -> Run:
    """The draft model; engines that are built anew share it."""
    return dataclasses.replace(reading, step=None).run(reading.draft)


class Variant:
    """A model under a name.

    name, folder, step   what was read
    tokenizer, context   of the model
    parent               name of the model that it adapts, if any
    created              when it was read, in seconds since 1970
    """

    def __init__(
        self, source: Source, run: Run, model: Model, reading: Reading, parent: str | None = None
    ):
        self.name, self.folder, self.parent = source.name, source.folder, parent
        self.tokenizer, self.step, self.created = run.tokenizer, run.step, int(time.time())
        self.context = reading.context or run.experiment.batch.length
        self.config: Config = model.config
        self._model, self._reading = model, reading
        self.engine: Engine | None = None
        self._guides: dict[tuple[int, ...], Guides] = {}

    def build(self) -> None:
        """Makes a new engine, with all of its programs compiled."""
        self.engine = None  # frees its pages first
        names = ("cache_tokens", "cache_dtype", "exact")
        options = {name: getattr(self._reading, name) for name in names}
        options["speculation"] = self._reading.speculation()
        engine = Engine(self._model, context=self.context, **options)
        engine.warm_up()
        self.engine = engine

    @functools.cached_property
    def template(self) -> Any:
        """The chat template. Raises ApiError 400 for a model without one."""
        try:
            return data.chat_template(self.tokenizer)
        except UserError as error:
            message = f"{self.name} cannot chat: {error} Or use /v1/completions."
            raise ApiError(400, message, param="model", code="no_chat_template") from None

    def guides(self, ends: tuple[int, ...]) -> Guides:
        """Compiles schemas and grammars of texts that these ids may end."""
        if ends not in self._guides:
            self._guides[ends] = Guides(self.tokenizer, ends)
        return self._guides[ends]

    @functools.cached_property
    def fingerprint(self) -> str:
        """`system_fingerprint`: differs for other weights or another format."""
        return f"lm-{self.name}-{self.step}-{self._dtype}"

    @property
    def _dtype(self) -> Any:
        return jax.tree.leaves(self._model.params, is_leaf=trees.is_leaf)[0].dtype

    def describe(self) -> str:
        """One line: what was read, its pages and memory."""
        weights, scheduler = jax.tree.leaves(self._model.params), self.engine.scheduler
        pages = sum(pool.count for pool in scheduler.pools.values())
        return (
            f"{self.name}: {self.folder}, step {self.step:,}, "
            f"{terminal.number(sum(x.size for x in weights))} parameters in {self._dtype}, "
            f"{terminal.size(sum(x.nbytes for x in weights))}; "
            f"{pages:,} pages of {scheduler.size} tokens, "
            f"{terminal.size(self.engine.cache_bytes)}; context {self.context:,}"
            + (f"; shares the weights of {self.parent}" if self.parent else "")
        )


def read(sources: Sequence[Source], adapters: Sequence[Source], reading: Reading) -> list[Variant]:
    """Reads all folders; `adapters` are those of the only source, whose arrays they share."""
    if not adapters:
        found = []
        for source in sources:
            run = reading.run(source.folder)
            found.append(Variant(source, run, run.apply.cast(), reading))
        return found
    base = reading.run(sources[0].folder)
    if base.experiment.model.adapter is not None:
        raise UserError(
            f"{sources[0].folder} has an adapter itself; give --adapter with the model without it."
        )
    stacked = base.apply.cast()
    # The engine would make a copy like this for itself, which the adapters could not share.
    served = unstacked(stacked)
    found = [Variant(sources[0], base, served, reading)]
    for source in adapters:
        run = dataclasses.replace(reading, step=None).run(source.folder)
        model = _adapted(source, run, base, stacked, served)
        found.append(Variant(source, run, model, reading, parent=sources[0].name))
    return found


def _adapted(source: Source, run: Run, base: Run, stacked: Model, served: Model) -> Model:
    """The model of a run with an adapter, with the arrays of its base model."""
    config, plain = run.experiment.model, base.experiment.model
    if config.adapter is None:
        raise UserError(f"--adapter {source.name}={source.folder} has no adapter.")
    # An adapter of a tied embedding unties it.
    if dataclasses.replace(config, adapter=None, tied=plain.tied) != plain:
        raise UserError(
            f"--adapter {source.name}={source.folder} is for a model of another architecture than "
            f"{base.folder}."
        )
    own, known = trees.flatten(run.params), trees.flatten(base.params)
    trained = {path for path in own if path.startswith(f"{ROOT}/")}
    others = {path for path in own.keys() - trained if not _same(own[path], known.get(path))}
    if others and not all(_may_differ(run, path) for path in others):
        raise UserError(
            f"--adapter {source.name}={source.folder} is for other weights than those of "
            f"{base.folder}: {min(others)} differs. Serve the model that it was trained on."
        )
    own = {path: own[path] for path in trained | others}
    own = trees.flatten(run.experiment.precision.to_compute(trees.unflatten(own)))
    if not others and (moved := _moved(config, own, plain, served)) is not None:
        return moved
    params = trees.unflatten(trees.flatten(stacked.params) | own)
    return stacked.replace(config=config, params=params)


def _may_differ(run: Run, path: str) -> bool:
    """Whether a weight outside the adapter may have been trained: PEFT's modules_to_save, or the
    head of an embedding that is no longer tied."""
    from lm.folders import RunFolder

    opened = RunFolder(run.folder)
    if opened.pretrained is None:
        return any(trees.matches(path, pattern) for pattern in run.experiment.trained)
    return path in getattr(opened.pretrained, "adapter_weights", {}) or path == "unembed/w"


def _moved(config: Config, own: dict[str, Any], plain: Config, served: Model) -> Model | None:
    """The adapter with its layers one after another, as those of `served` are; None if it does not
    adapt all layers, or if its targets name layers as they were."""
    tree = trees.unflatten(own)[ROOT]
    sizes = {part: len(blocks) for part, blocks in plain.layout.parts.items()}
    adapted = {part: len(tree.get(part, ())) for part in sizes}
    if any(adapted.values()) and adapted != sizes:
        return None
    moved = unstacked(Model(plain, tree, served.mesh)).params
    params = {**served.params, ROOT: {name: x for name, x in moved.items() if x}}
    try:
        config = dataclasses.replace(served.config, adapter=config.adapter)
        if trees.flatten(shapes(config)).keys() != trees.flatten(params).keys():
            return None
    except UserError:
        return None
    return served.replace(config=config, params=params)


def _same(x: Any, y: Any) -> bool:
    """Whether two weights are equal, bit for bit up to the sign of zero."""
    x, y = jax.tree.leaves(x), jax.tree.leaves(y)
    return len(x) == len(y) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(jnp.array_equal(a, b))
        for a, b in zip(x, y)
    )
