"""Train a classifier, dense or pruned by REPrune on the way, from the command line.

    python -m reprune_triton.train --data digits --model resnet20 --sparsity 0.5 --out runs/digits

DIR/log.jsonl gets one line per epoch, DIR/last.safetensors the state after it, and DIR/slim.safetensors the final,
compact model. Ctrl-C or SIGTERM stops cleanly. --resume goes on and gives the result of an uninterrupted run: bit for
bit on the CPU, and on a GPU as far as PyTorch's kernels are deterministic.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from reprune_triton.errors import RepruneError
from reprune_triton.training.loop import train
from reprune_triton.training.options import AMP, PARADIGMS, RECIPES, Options, recipe
from reprune_triton.training.run import Stopped


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reprune_triton.train", description=(__doc__ or "").split("\n")[0],
        argument_default=argparse.SUPPRESS,  # an option that is not given comes from the recipe
    )  # fmt: skip
    add = parser.add_argument
    add("--model", help="resnet8, 20, 32, 44, 56 or 110, or a name of torchvision or timm (default resnet20)")
    add("--data", default="digits", help="digits, fashion-mnist, cifar10 or imagenet (default digits)")
    add("--data-dir", help="folder of the data set")
    add("--recipe", choices=RECIPES, help="defaults for all that follows; by itself the one that fits the data")
    add("--epochs", type=int)
    add("--batch", type=int)
    add("--lr", type=float, help="peak learning rate")
    add("--momentum", type=float)
    add("--weight-decay", type=float)
    add("--decay-norms", action=argparse.BooleanOptionalAction, help="weight decay on BatchNorm and biases too")
    add("--warmup", type=int, help="epochs of linear warm-up")
    add("--smoothing", type=float, help="label smoothing")
    add("--mixup", type=float, help="mixup's alpha; 0 is off")
    add("--size", type=int, help="side of the crops, for imagenet (default 224)")
    add("--seed", type=int)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--sparsity", type=float, help="share of the prunable channels to prune; without it: dense")
    target.add_argument("--flops", type=float, help="instead: share of the FLOPs to keep")
    add("--paradigm", choices=PARADIGMS, help="prune while training (default), after it and go on, or before it")
    add("--every", type=int, help="epochs between pruning events (default 2)")
    add("--until", type=int, help="epoch of the last event (default 72%% of the epochs; cifar: 60%%)")
    add("--regrow", type=float, help="how much denser the network is at the start (default 0.3)")
    add("--regrow-by", help="which filters come back: by residual, coverage or at random (default residual)")
    add("--linkage", help="ward, single, complete or average (default ward)")
    add("--select", help="which filters are kept: coverage, l1, gamma or random (default coverage)")
    add("--tie", help="random, index, norm or gamma (default random)")
    add("--prune-seed", type=int, help="of the pruner's random choices alone (default: --seed)")
    add("--round-to", type=int, help="kept channels are a multiple of this (default 16 on CUDA, else 1)")
    add("--ignore", nargs="+", help="convs to leave alone, by name or pattern")
    add("--device", help="default: cuda where there is one")
    add("--amp", choices=AMP, help="mixed precision")
    add("--channels-last", action=argparse.BooleanOptionalAction)
    add("--fuse", action=argparse.BooleanOptionalAction, help="BatchNorm, addition and activation in one operation")
    add("--graph", action=argparse.BooleanOptionalAction,
        help="replay each step from a CUDA graph (default: on CUDA, but with fp16)")  # fmt: skip
    add("--workers", type=int, help="processes that decode images, for imagenet (default 4)")
    add("--threads", type=int, help="CPU threads")
    add("--out", help="folder of the run (default runs/DATA-MODEL)")
    add("--resume", action="store_true", help="go on with the run in --out")
    given = vars(parser.parse_args(argv))
    if "ignore" in given:
        given["ignore"] = tuple(given["ignore"])
    given.setdefault("out", f"runs/{given['data']}-{given.get('model', Options.model).replace(':', '-')}")
    try:
        options = recipe(given.pop("data"), given.pop("recipe", None), **given)
        result = train(options)
    except RepruneError as error:
        parser.exit(2, f"error: {error}\n")
    except Stopped:
        words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        command = shlex.join(["python", "-m", "reprune_triton.train", *words, "--resume"])
        print(f"stopped; {given['out']} holds every whole epoch. To go on: {command}", file=sys.stderr)
        raise
    line = f"{options.model} on {options.data}: accuracy {result.accuracy:.2%}"
    if result.flops < 1:
        line += f" at {result.flops:.1%} of the FLOPs"
    if result.pruner and result.pruner.history:
        line += f" ({result.pruner.history[-1].sparsity:.1%} of the prunable channels pruned)"
    print(f"{line}; {result.seconds:.1f} s of training, {result.event_seconds:.1f} s of pruning; see {options.out}")


if __name__ == "__main__":
    main()
