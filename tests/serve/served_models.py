"""Tiny run folders to serve, and servers in threads. Their texts hold characters of one to four
bytes; weights are random, so that any token may come."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from tiny_experiments import config, experiment

from lm import checkpoint, data, model, trees
from lm.data import CHAT_SYMBOLS, SentencePiece
from lm.folders import write_facts
from lm.serve.app import Limits
from lm.serve.router import Source
from lm.serve.server import Server, Settings
from lm.serve.variants import Reading

TEXT = 'the cat sat on the mat 猫は座る。日本語の文 🙂🚀👩‍👩‍👧 é ß ☃ {"a": [1, 2]}\n'
CONTEXT = 256
# Lists tools, as the templates of Hermes and Qwen do, and calls of them.
TOOL_TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>"
    "{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}"
    "</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(template: str | None = None) -> data.Tokenizer:
    """With CHAT_SYMBOLS, so that it can chat; `template` instead of the default one."""
    made = SentencePiece(vocab=420, symbols=CHAT_SYMBOLS).train([TEXT] * 40)
    if template is not None:
        made.extra_files["chat_template.jinja"] = template.encode()
    return made


def write_run(
    folder: Path, tokenizer: data.Tokenizer, seed: int, adapter: model.Adapter | None = None
) -> Path:
    """A run folder with random weights of a seed. The weights beside an adapter are those of the
    run without it."""
    plain = config(vocab=tokenizer.vocab, embed_std=1.0)
    declared = experiment(
        name=folder.name,
        model=dataclasses.replace(plain, adapter=adapter),
        tokenizer=SentencePiece(vocab=tokenizer.vocab, symbols=CHAT_SYMBOLS),
        batch=data.BatchShape(sequences=4, length=CONTEXT),
    )
    initialize = jax.jit(model.init, static_argnums=0)
    params = trees.flatten(initialize(plain, jax.random.key(seed)))
    saved = {"checkpoints": params}
    if adapter is not None:
        own = trees.flatten(initialize(declared.model, jax.random.key(seed + 1)))
        # A LoRA begins with zeros, and would change nothing.
        own = {path: x + 0.3 for path, x in own.items() if path.startswith("adapter/")}
        saved = {"checkpoints": own, "frozen": params}
    for part, weights in saved.items():
        with checkpoint.Store(folder / part, checkpoint.Save(every=1)) as store:
            store.save(1, {"params": trees.unflatten(weights)})
    tokenizer.save(folder)
    write_facts(folder, declared, {"data": {"fingerprint": None, "counts": {}}})
    return folder


@contextlib.contextmanager
def serving(
    *sources: Source,
    adapters: tuple[Source, ...] = (),
    reading: Reading | None = None,
    grace: float = 30.0,
    say=lambda line: None,
    **limits,
) -> Iterator[Server]:
    """A server in a thread, ready; it is stopped at the end, and must end without an error."""
    server = Server(
        Settings(
            sources=list(sources),
            adapters=list(adapters),
            port=0,
            grace=grace,
            reading=reading or Reading(),
            limits=Limits(**limits),
        ),
        say,
    )
    failed = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert server.is_ready.wait(120)
    if failed:
        raise failed[0]
    try:
        yield server
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive() and not failed, failed


def wait_until_idle(server: Server, seconds: float = 30) -> None:
    """Until no sequence is left; checks that no page is."""
    done = threading.Event()
    for _ in range(int(seconds * 50)):
        stats = server.worker.stats.values()
        if not server.worker.waiting and not any(s.running + s.waiting for s in stats):
            break
        done.wait(0.02)
    assert server.worker.waiting == 0
    for stats in server.worker.stats.values():
        assert (stats.running, stats.waiting, stats.used) == (0, 0, 0)
