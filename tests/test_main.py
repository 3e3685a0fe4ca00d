"""Command line (`lm.main.main` and `lm.main.lm_main`): output, error messages and exit codes."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_experiments import STEPS, experiment, losses, write_texts

from lm import data, run, runs
from lm import main as lm_module
from lm.commands import flags
from lm.main import lm_main, main

SLOW = pytest.mark.slow


@pytest.fixture
def cli(tiny, tmp_path, capsys):
    """Function that runs a command in an empty --workdir: cli("show", "--json") returns (exit code,
    stdout, stderr). Arguments that begin with "lm" run `python -m lm`."""

    def call(*arguments: str, declare=tiny.declare, workdir: Path = tmp_path / "runs"):
        capsys.readouterr()
        code = 0
        try:
            if arguments[:1] == ("lm",):
                lm_main(arguments[1:])
            else:
                main(declare, [*arguments, "--workdir", str(workdir)])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def check_user_error(result: tuple[int, str, str], *parts: str) -> None:
    """Checks for exit code 2, empty stdout, and a last line on stderr that contains all parts."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    sentence = err.splitlines()[-1]
    assert sentence.startswith("python -m "), err
    for part in parts:
        assert part in sentence, err


# ---- Training


def test_training_prints_progress_results_and_next_commands(tiny):
    for step in (1, 2, 4, 8):
        assert f"step {step}/8" in tiny.err
    for word in ("reading", "tokenizer", "tokenizing", "loss", "bits/byte", "lr", "grad", "MFU"):
        assert word in tiny.err, word
    assert "Trained tiny to step 8" in tiny.out
    assert "bits per byte" in tiny.out and "by xz -9" in tiny.out
    assert str(tiny.folder / "plots/loss.png") in tiny.out
    assert str(tiny.folder / "checkpoints/8") in tiny.out
    commands = tiny.out.split("Next\n")[1].splitlines()
    assert len(commands) == 3
    assert commands[0].strip().startswith(f"python -m lm generate {tiny.folder} --prompt")
    assert commands[1].strip().startswith(f"python -m lm eval {tiny.folder}")
    assert "--set schedule.steps=16" in commands[2]


def test_training_a_complete_run_prints_next_commands(tiny, cli):
    code, out, _ = cli(workdir=tiny.home / "runs")
    assert code == 0
    assert f"{tiny.folder} is complete at step 8 of 8" in out
    assert "python -m lm generate" in out and "--set schedule.steps=16" in out and "delete" in out


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=SLOW)],
    ids=["SIGTERM", "SIGINT"],
)
def test_signal_saves_checkpoint_and_same_command_resumes(
    tiny, cli, tmp_path, monkeypatch, number, code
):
    folder = tmp_path / "runs/tiny"
    prefetch = data.prefetch

    def interrupted(function, start, stop):
        def at_step(step):
            if step == 2:  # prefetched before the training loop reaches this step
                os.kill(os.getpid(), number)
            return function(step)

        return prefetch(at_step, start, stop)

    monkeypatch.setattr(data, "prefetch", interrupted)
    given, out, err = cli()
    monkeypatch.undo()
    assert given == code
    steps = len(losses(folder))
    assert 0 < steps < STEPS
    assert f"Stopped and saved at step {steps}: {folder}. The same command resumes it" in err
    assert "Traceback" not in err and "Trained" not in out
    assert (folder / "checkpoints" / str(steps)).is_dir()

    given, out, err = cli()
    assert given == 0
    assert f"Resuming {folder} from step {steps} of {STEPS}" in err
    assert f"Trained tiny to step {STEPS}" in out
    assert losses(folder) == losses(tiny.folder)  # bitwise equal to the uninterrupted run
    assert (folder / "eval.jsonl").read_text() == (tiny.folder / "eval.jsonl").read_text()


def test_set_options_become_part_of_the_run_name(cli, tmp_path):
    code, _, err = cli("--set", "schedule.steps=1", "--set", "model.layers=1")
    assert code == 0, err
    assert [p.name for p in (tmp_path / "runs").iterdir() if p.name != "data"] == [
        "tiny+model.layers=1+schedule.steps=1"
    ]


# ---- Errors before training


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--set", "model.layer=2"), ("model.layer", "Did you mean 'model.layers'?")),
        (("--set", "schedule.stepps=2"), ("Did you mean 'schedule.steps'?",)),
        (("--set", "model.layers=two"), ("model.layers=two", "whole number")),
        (("--set", "model.layers"), ("--set model.layers needs a value",)),
        (("--set", "model.attention.kv_heads=3"), ("kv_heads=3", "heads=2")),
        (("--set", "optimizer=AdamWW()"), ("AdamWW", "Did you mean 'AdamW'?")),
        (("--set", "batch.sequences=0"), ("batch.sequences=0 must be above zero",)),
        (("--set", "data.path=nowhere/*.txt"), ("nowhere/*.txt", "matches no file")),
        (("--set", "data.path=nowhere.txt"), ("There is no file 'nowhere.txt'",)),
        (("--set", "tokenizer.vocab=400"), ("tokenizer.vocab=400", "set model.vocab=400")),
        (("--mesh", "data=4"), ("needs 4 devices", "smaller mesh")),
        (("--mesh", "data=3"), ("batch.sequences=4 must be a multiple of 3",)),
        (("--mesh", "datta=2"), ("Did you mean 'data'?",)),
        (("--mesh", "data"), ("needs a whole number",)),
        (("--on", "v5p-64"), ("--on='v5p-64' is not known",)),
        (("--stepps", "3"), ("unknown option '--stepps'",)),
        (("--sett", "a=1"), ("unknown option '--sett'", "Did you mean '--set'?")),
        (("tran",), ("unknown verb 'tran'", "Did you mean 'train'?")),
        (("show", "--price", "3"), ("unknown option '--price'",)),
        (("--set", "seed=1", "show"), ("unexpected argument 'show'", "the verb comes first")),
        (("--set", "optimizer.lr=3e-4"), ("optimizer.lr is not known", "--set schedule.peak=3e-4")),
        (("--set", "batch_size=8"), ("that setting is batch.sequences",)),
        (("--set", "seed=4294967296"), ("seed=4294967296 must be a whole number",)),
        (("--set", "schedule.peak=nan"), ("schedule.peak=nan",)),
        (
            ("--set", "schedule.peak=inf"),
            ("schedule.peak=inf must be above zero and finite in float32",),
        ),
        (("--set", "optimizer.b1=nan"), ("optimizer.b1=nan",)),
        (("--set", "optimizer.weight_decay=nan"), ("optimizer.weight_decay=nan",)),
        (("--set", "objective.z_loss=nan"), ("objective.z_loss=nan",)),
        (("--set", "model.embed_scale=nan"), ("embed_scale=nan",)),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith(("-", "tran")) else "",
)
def test_invalid_experiment_arguments_print_one_line_error(cli, arguments, parts):
    check_user_error(cli(*arguments), *parts)


def test_setting_name_of_other_frameworks_is_translated_in_a_stage():
    error = "optimizer.lr is not known. Known: optimizer.b1."
    assert flags._with_synonym(error, ["seed=1", "sft.optimizer.lr=1e-4"]) == (
        "sft.optimizer.lr is not known; that setting is sft.schedule.peak, "
        "as in --set sft.schedule.peak=1e-4."
    )
    assert flags._with_synonym(error, ["optimizer.b3=1"]) == error


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ("no text", "text")),
        (b"caf\xe9 in the night\n" * 40, ("0.txt", "byte 3 (0xe9) is not utf-8", "encoding")),
        (None, ("0.txt is a folder; name its files",)),
    ],
    ids=["empty", "latin-1", "folder"],
)
def test_unusable_text_prints_error(cli, tmp_path, content, parts):
    path = tmp_path / "0.txt"
    path.mkdir() if content is None else path.write_bytes(content)
    check_user_error(cli("--set", f"data.path={path}"), *parts)


def test_missing_text_file_error_suggests_similar_file_name(cli, tmp_path):
    write_texts(tmp_path / "books", count=1)
    check_user_error(
        cli("--set", f"data.path={tmp_path}/books/00.txt"), "There is no file", "'000.txt'"
    )


@pytest.mark.parametrize("below", ["", "runs/today"])
def test_workdir_that_is_a_file_prints_error(cli, tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    parts = (f"{tmp_path}/file is a file", "name a folder")
    check_user_error(cli(workdir=tmp_path / "file" / below), "--workdir=", *parts)


def test_workdir_without_write_permission_prints_error(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root ignores permissions
    check_user_error(cli(), "--workdir=", f"{tmp_path} is not writable", "you may write to")


# ---- Out of memory


OUT_OF_MEMORY = {
    "Out of memory allocating 2000000000000 bytes.": "an array needs 2 TB, ",
    "Out of memory while trying to allocate 71.50GiB.": "an array needs 71.50GiB, ",
    "Failed to allocate request for 5.2GiB (5600000000B)": "an array needs 5.2GiB, ",
    "Ran out of memory. Used 21.31G of 15.75G hbm. Exceeded": "needs 21.31G of 15.75G hbm.",
}


def test_out_of_memory_prints_error_and_leaves_no_run_folder(cli, tmp_path, monkeypatch):
    for message, part in OUT_OF_MEMORY.items():

        def allocate(*_, message=message):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

        monkeypatch.setattr(run, "_play", allocate)
        result = cli()
        check_user_error(result, "out of memory", part, "remat", "batch.length")
        assert "--set places.cpu.microbatches=8" in result[2]
        assert (" of memory are free." in result[2]) == ("hbm" not in message)
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["data"]
    monkeypatch.undo()
    assert cli("--set", "schedule.steps=1", "--set", "name=tiny")[0] == 0


def test_out_of_memory_keeps_existing_checkpoints(tiny, cli, tmp_path, monkeypatch):
    runs = tiny.copy(tmp_path / "trained")
    shutil.rmtree(runs / "tiny/checkpoints/8")

    def allocate(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(run, "_play", allocate)
    check_user_error(cli(workdir=runs), "an array needs 9 B")
    assert len(losses(runs / "tiny")) == STEPS
    assert (runs / "tiny/checkpoints/4").is_dir()


# ---- Damaged files


def damage(path: Path) -> None:
    """Inverts eight bytes in the middle of a file."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
    path.write_bytes(content)


def test_damaged_token_shard_prints_error_with_remedy(tiny, cli, tmp_path):
    runs = tiny.copy(tmp_path / "damaged")
    shutil.rmtree(runs / "tiny")
    shard = next(runs.glob("data/*/*/train-*.tokens"))
    damage(shard)
    check_user_error(cli(workdir=runs), str(shard), "damaged", "Delete it")
    shard.unlink()
    assert cli("--set", "schedule.steps=1", workdir=runs)[0] == 0


def truncate_largest(checkpoint: Path) -> None:
    path = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_arrays(checkpoint: Path) -> None:
    for path in checkpoint.rglob("d/*"):
        path.write_bytes(bytes(len(path.read_bytes())))


def empty_files(checkpoint: Path) -> None:
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def flip_bits(checkpoint: Path) -> None:
    """Flips bits of parameter values, which the file format itself does not detect."""
    path = max(checkpoint.rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    for place in range(2_000, len(content) - 2_000, 500):
        content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "corrupt",
    [
        flip_bits,
        *(pytest.param(x, marks=SLOW) for x in (truncate_largest, damage_arrays, empty_files)),
    ],
)
def test_damaged_checkpoint_error_names_previous_checkpoint(tiny, cli, tmp_path, corrupt):
    runs = tiny.copy(tmp_path / "damaged")
    checkpoint = runs / "tiny/checkpoints/8"
    corrupt(checkpoint)
    parts = (f"{checkpoint} cannot be read", "resume from step 4, the previous", "Delete")
    check_user_error(cli("lm", "generate", str(runs / "tiny"), "--json"), *parts)
    # Judging by the names of the checkpoint folders, the run is complete.
    check_user_error(cli(workdir=runs), *parts)
    shutil.rmtree(checkpoint)
    code, _, err = cli(workdir=runs)
    assert code == 0, err
    assert losses(runs / "tiny") == losses(tiny.folder)


def test_damaged_only_checkpoint_prints_error_on_resume(tiny, cli, tmp_path):
    runs = tiny.copy(tmp_path / "damaged")
    shutil.rmtree(runs / "tiny/checkpoints/8")
    truncate_largest(runs / "tiny/checkpoints/4")
    check_user_error(cli(workdir=runs), "checkpoints/4 cannot be read", "no earlier checkpoint")
    assert len(losses(runs / "tiny")) == STEPS  # no metrics are lost


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "is damaged"),
        ("", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ('{"experiment": {}, "data": {}, "format": 2}', "not an experiment"),
        ('{"experiment": 3, "data": {}, "format": 2}', "not an experiment"),
        ('{"experiment": {"type": "lm.experiment.Experiment"}, "data": {}, "format": 2}', "name"),
        (
            '{"experiment": {"type": "lm.experiment.Experimint"}, "data": {}, "format": 2}',
            "Experimint",
        ),
        ('{"experiment": {}, "data": {}}', "format 1, this one reads 2"),
        (
            '{"experiment": {"type": "lm.model.Config", "layer": 1}, "data": {}, "format": 2}',
            "'layers'?",
        ),
    ],
)
def test_damaged_experiment_json_prints_error(tiny, cli, tmp_path, content, part):
    runs = tiny.copy(tmp_path / "damaged")
    (runs / "tiny/experiment.json").write_text(content)
    check_user_error(cli("lm", "generate", str(runs / "tiny")), "tiny/experiment.json", part)
    check_user_error(cli(workdir=runs), "tiny/experiment.json", part)


def test_damaged_or_missing_tokenizer_prints_error(tiny, cli, tmp_path):
    folder = tiny.copy(tmp_path / "damaged") / "tiny"
    (folder / "tokenizer.model").write_bytes(b"no model")
    check_user_error(cli("lm", "generate", str(folder)), "tokenizer.model")
    (folder / "tokenizer.model").unlink()
    check_user_error(cli("lm", "generate", str(folder)), "tokenizer.model")


def test_different_experiment_in_same_folder_prints_error(tiny, cli):
    declared = dataclasses.replace(tiny.declare(), seed=1)
    result = cli(declare=lambda: declared, workdir=tiny.home / "runs")
    check_user_error(result, "begun with another declaration (seed: 0 -> 1)", "--set name=NAME")


# ---- Commands on a trained run


def test_generate_prints_prompt_and_continuation(tiny, cli):
    arguments = ("--prompt", "the tree", "--max-tokens", "6", "--temperature", "0")
    code, out, _ = cli("lm", "generate", str(tiny.folder), *arguments)
    assert code == 0
    assert out.startswith("the tree")
    code, printed, _ = cli("lm", "generate", str(tiny.folder), *arguments, "--json")
    assert code == 0
    (sample,) = json.loads(printed)["samples"]
    assert sample["prompt"] == "the tree"
    assert out == f"the tree{sample['text']}\n"


def test_generate_accepts_several_prompts(tiny, cli):
    prompts = ("--prompt", "the tree", "--prompt", "a stone in its river", "--max-tokens", "4")
    code, out, _ = cli("lm", "generate", str(tiny.folder), *prompts, "--json", "--seed", "1")
    assert code == 0
    found = json.loads(out)
    assert found["step"] == STEPS
    assert [s["prompt"] for s in found["samples"]] == ["the tree", "a stone in its river"]
    assert cli("lm", "generate", str(tiny.folder), *prompts, "--json", "--seed", "1")[1] == out


def test_eval_prints_table_or_json(tiny, cli, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("a stone in its river\n" * 9)
    code, out, _ = cli("lm", "eval", str(tiny.folder), "--data", str(text), "--json")
    assert code == 0
    results = json.loads(out)["results"]
    assert [r["name"] for r in results] == ["text/loss", "text/perplexity", "text/bits_per_byte"]
    assert all({"value", "stderr", "count", "step"} <= r.keys() for r in results)
    code, table, _ = cli("lm", "eval", str(tiny.folder), "--data", str(text))
    assert code == 0
    assert "standard error" in table
    assert all(f"{r['value']:.4f}" in table for r in results)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("generate", "RUN", "--prompt", "the tree " * 40), ("82 tokens", "context=32")),
        (("generate", "RUN", "--step", "5"), ("no checkpoint of step 5", "only of 4, 8")),
        (("generate", "RUN", "--temperature", "-1"), ("temperature=-1",)),
        (("generate", "RUN", "--top-p", "2"), ("top_p=2",)),
        (("generate", "RUN", "--max-tokens", "0"), ("max",)),
        (("generate", "RUN", "--max-tokens", "many"), ("many",)),
        (("generate", "RUN", "--context", "0"), ("--context: '0' must be a whole number",)),
        (("generate", "RUN", "--context", "-1"), ("--context: '-1' must be a whole number",)),
        (("generate", "RUN", "--seed", str(2**70)), ("--seed", "must be a whole number, 0 and")),
        (("generate", "RUN", "--temperature", "1e300"), ("temperature=1e+300",)),
        (("generate", "RUN", "--repetition-penalty", "1e-46"), ("repetition_penalty=1e-46",)),
        (("eval", "RUN", "--context", "0"), ("--context: '0' must be a whole number",)),
        (("eval", "RUN", "--context", "-1"), ("--context: '-1' must be a whole number",)),
        (("eval", "RUN", "--step", "-1"), ("--step: '-1' must be a whole number, 0 or above",)),
        (("export", "RUN", "out", "--shard-gb", "nan"), ("--shard-gb: 'nan' must be a number",)),
        (("export", "RUN", "out", "--shard-gb", "inf"), ("--shard-gb: 'inf' must be a number",)),
        (("bench", "step", "RUN", "--steps", "0"), ("--steps: '0' must be a whole number",)),
        (("generate", "nowhere"), ("nowhere is neither a run folder (it has no experiment.json)",)),
        (("eval", "nowhere"), ("neither config.json nor adapter_config.json)",)),
        (("eval", "RUN", "--data", "nowhere.txt"), ("There is no file 'nowhere.txt'",)),
        (("eval", "RUN", "--date", "x"), ("unknown option '--date'", "Did you mean '--data'?")),
        (("bench", "step", "nowhere"), ("'nowhere' is neither a run folder nor a module",)),
        (("bench", "step", "lm.errors"), ("lm.errors declares no experiment()",)),
        (("bench", "stepp", "RUN"), ("stepp",)),
        (("generat", "RUN"), ("unknown verb 'generat'", "Did you mean 'generate'?")),
        (("--prompt", "x"), ("VERB first",)),
        ((), ("VERB",)),
        (("generate",), ("run",)),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_invalid_lm_arguments_print_one_line_error(tiny, cli, arguments, parts):
    arguments = [str(tiny.folder) if a == "RUN" else a for a in arguments]
    check_user_error(cli("lm", *arguments), *parts)


@pytest.mark.parametrize("temperature", ["1e-38", "1e-300", "1e-5"])
def test_generate_at_extreme_temperatures_is_greedy(tiny, cli, temperature):
    arguments = ("lm", "generate", str(tiny.folder), "--prompt", "the", "--max-tokens", "4")
    assert cli(*arguments, "--temperature", temperature) == cli(*arguments, "--temperature", "0")


def test_generate_from_a_prompt_that_is_not_utf8(tiny, cli):
    prompt = os.fsdecode(b"caf\xe9")
    code, out, _ = cli("lm", "generate", str(tiny.folder), "--prompt", prompt, "--max-tokens", "2")
    assert code == 0 and out.startswith("caf\ufffd")


def test_eval_reads_files_by_their_extension(tiny, cli, tmp_path):
    losses = []
    for name, content in (
        ("a.txt", "the tree of light"),
        ("a.jsonl", '{"text": "the tree of light"}\n'),
        ("a.tsv", "id\ttext\n1\tthe tree of light\n"),
    ):
        (tmp_path / name).write_text(content)
        code, out, _ = cli("lm", "eval", str(tiny.folder), "--data", str(tmp_path / name), "--json")
        assert code == 0
        losses.append([result["value"] for result in json.loads(out)["results"]])
    assert losses[0] == losses[1] == losses[2]


def test_chat_answers_each_line_of_stdin(tiny, cli, monkeypatch):
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    loaded = runs.load(tiny.folder)
    loaded.tokenizer.extra_files["chat_template.jinja"] = template.encode()
    monkeypatch.setattr(runs, "load", lambda *_, **__: loaded)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n/new\nthe\n\nnot read\n"))
    options = ("--temperature", "0", "--max-tokens", "3")
    code, out, err = cli("lm", "chat", str(tiny.folder), *options)
    assert code == 0, err
    first, second = out.splitlines()
    assert first == second != ""
    monkeypatch.setattr(sys, "stdin", io.StringIO("the tree " * 40))
    check_user_error(cli("lm", "chat", str(tiny.folder)), "the context ends at 32")


def test_run_without_checkpoint_prints_error(tiny, cli, tmp_path):
    folder = tiny.copy(tmp_path / "early") / "tiny"
    shutil.rmtree(folder / "checkpoints")
    check_user_error(cli("lm", "generate", str(folder)), "has no checkpoint yet")


def test_help_lists_verbs_and_options(cli):
    code, out, _ = cli("lm", "--help")
    assert code == 0
    for verb in ("generate", "eval", "import", "export", "bench"):
        assert f"  {verb}" in out
    assert "Continue a prompt with a trained model." in out
    code, out, _ = cli("--help")
    assert code == 0
    for part in ("Train, or resume", "  show ", "  plan ", "--set PATH=VALUE", "--workdir"):
        assert part in out


@pytest.mark.parametrize("verbs", [lm_module.EXPERIMENT_VERBS, lm_module.RESULT_VERBS])
def test_every_verb_and_option_has_help_text(verbs):
    for verb in verbs.values():
        assert verb.HELP.endswith(".") and not verb.OUT_OF_MEMORY.endswith(".")
        parser = lm_module.Parser()
        verb.add_arguments(parser)
        assert [action.dest for action in parser._actions if not action.help] == []


def test_argument_errors_are_reported_before_importing_jax():
    program = "import sys; from lm.main import lm_main; lm_main(['generat'])"
    program = f"import atexit, sys; atexit.register(lambda: print('jax' in sys.modules)); {program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr


def test_unexpected_exception_is_not_caught(monkeypatch, cli):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(run, "train", broken)
    with pytest.raises(ZeroDivisionError):
        cli()


def test_constructing_experiment_writes_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment()
    assert not list(tmp_path.iterdir())
