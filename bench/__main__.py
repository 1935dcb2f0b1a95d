"""python -m reprune_triton.bench COMMAND: each command is a module of a room beside this one."""

from __future__ import annotations

import argparse
import importlib
import sys

from reprune_triton.errors import RepruneError

COMMANDS = {
    "measure.demo": "train a network dense and pruned, and compare the two",
    "study.ablate": "answer a question of the method by training, arm by arm and seed by seed",
    "study.report": "make tables, pictures and text of all results, and renew the README's tables",
    "measure.event": "time one pruning event against SciPy and fastcluster",
    "measure.scaling": "time clustering against the size and the number of problems",
    "estimate.cost": "estimate an event's time on an H100 from the machine code",
    "measure.step": "time a training step, dense and narrow, against the roofline",
    "measure.host": "time what the host does in a training step, with nothing left for a device to do",
    "estimate.hours": "add up a whole training from measured steps and events",
    "estimate.roofline": "estimate the least time of a training step from bytes and FLOPs",
    "measure.dispatch": "compare dispatch's choices with times of CUDA graphs",
    "measure.smoke": "check every kernel on the shapes of a network",
    "gpu": "run the tests, sanitizers and benchmarks that need a GPU, one after the other",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reprune_triton.bench", description="Benchmarks of reprune_triton.")
    parser.add_argument(
        "--wait", action="store_true", help="import all that is needed, and begin when a line is read"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    given = sys.argv[1:] if arguments is None else arguments
    wanted = next((word for word in given if not word.startswith("-")), None)
    for module, summary in COMMANDS.items():
        name = module.rpartition(".")[2]
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == wanted:  # the others are not even imported: each has its own optional dependencies
            found = importlib.import_module(f"reprune_triton.bench.{module}")
            found.add_arguments(command)
            command.set_defaults(run=found.run)
    parsed = parser.parse_args(given)
    if parsed.wait and not sys.stdin.readline():
        return 1  # who asked for it is gone
    try:
        parsed.run(parsed)
    except RepruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
