"""`python -m lm import`"""

import argparse

from lm.commands import flags

HELP = "Convert a Hugging Face folder to a run folder."
OUT_OF_MEMORY = "Shard the model over more devices with --mesh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of import."""
    parser.add_argument("source", help="a folder with config.json and safetensors")
    parser.add_argument("run", help="the run folder to write, as in runs/llama")
    flags.add_mesh(parser)


def run(options: argparse.Namespace) -> None:
    """Imports, and prints the commands that the run folder can be used with."""
    from lm import exchange
    from lm.parallel import distributed

    distributed.initialize()
    imported = exchange.import_run(options.source, options.run, mesh=flags.mesh(options))
    if not distributed.is_main():
        return
    print(f"Imported {options.source} as {imported.folder}.", end=" ")
    if imported.tokenizer is None:
        print("It has no tokenizer: copy tokenizer.json into it to generate and evaluate.")
        return
    print("Next:")
    print(f'  python -m lm generate {imported.folder} --prompt "The"')
    print(f"  python -m lm eval {imported.folder} --data FILE")
