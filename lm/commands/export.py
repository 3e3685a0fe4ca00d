"""`python -m lm export`"""

import argparse

from lm.commands import flags

HELP = "Convert a run folder to a Hugging Face folder."
OUT_OF_MEMORY = "Shard the model over more devices with --mesh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of export."""
    parser.add_argument("run", help="a run folder, as in runs/stdlib")
    parser.add_argument("target", help="the folder to write")
    parser.add_argument(
        "--step", type=flags.whole(0), help="step of the checkpoint (default: the newest)"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="write the whole model, with its adapter merged (default: an adapter alone, for PEFT)",
    )
    parser.add_argument("--dtype", help="float32 or bfloat16 (default: as the run stores weights)")
    parser.add_argument(
        "--shard-gb",
        type=flags.positive,
        default=5.0,
        help="largest safetensors file in GB (default: 5.0)",
    )
    flags.add_mesh(parser)


def run(options: argparse.Namespace) -> None:
    """Exports; export_run reads the result back and compares weights and logits."""
    from lm import exchange
    from lm.parallel import distributed

    distributed.initialize()
    exported = exchange.export_run(
        options.run,
        options.target,
        step=options.step,
        dtype=options.dtype,
        merge=options.merge,
        shard_bytes=round(min(options.shard_gb, 1e6) * 1e9),
        mesh=flags.mesh(options),
    )
    if distributed.is_main():
        print(f"Exported {options.run} to {exported}, and read it back: same weights, same logits.")
