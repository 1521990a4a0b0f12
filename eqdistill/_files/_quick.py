"""The command `distill`: it runs the program that `--show-code` prints."""

import argparse
import string
from pathlib import Path
from typing import Any

from .._checks import check_at_least, needs


_PROGRAM = string.Template("""\
from functools import partial
from pathlib import Path

import jax.random as jr
import optax

import eqdistill as eqd


$load
standardisation = eqd.datasets.Standardisation.fit(train)
train, test = train.map(standardisation), test.map(standardisation)
c, key = train.num_classes, jr.key($seed)
start = eqd.DistilledSet.from_real(train, $ipc * c, l2=1e-3, key=key)
network = partial(eqd.nn.$network, train.shape, c$settings)
rate = optax.cosine_decay_schedule(0.03, $steps)
result = eqd.distill(
    start.with_targets(c),
    eqd.Pool(network),
    eqd.Batches(train, 128),
    optimiser=eqd.averaged(optax.adam(rate), decay=0.99),
    learn=lambda start: start,  # images, targets and ridge
    steps=$steps,
    key=key,
    callbacks=[eqd.ProgressBar()],
).average()
recipe = eqd.recipes.feature_regression(network)
evaluation = eqd.evaluate(result.distilled, recipe, test, key=key, progress=True)
print(f"test accuracy   {evaluation}")
output = Path($output)
output.mkdir(parents=True, exist_ok=True)
eqd.save(
    output / "distilled.safetensors",
    result,
    evaluation,
    preprocessing=standardisation,
    dataset=$dataset,
    seed=$seed,
)
eqd.plot.images(result.distilled).savefig(output / "distilled.png")
""")
_FROM_FOLDER = """\
train = eqd.datasets.from_folder({0!r}{2})
test = eqd.datasets.from_folder({1!r}{2}, class_names=train.class_names)"""
# These settings keep a run short on a CPU.
_NETWORKS = {"ConvNet": ", widths=(16, 32, 64)", "LeNet": "", "MLP": ""}


def add_distill(commands: Any) -> None:
    parser = commands.add_parser(
        "distill",
        help="distil a dataset into a few images per class",
        description="Distils a dataset into a few images per class, for networks that "
        "are trained from scratch. Prints the test accuracy of five fresh networks "
        "that are trained only on these images, and writes distilled.png and "
        "distilled.safetensors.",
    )
    parser.set_defaults(run=_distill, error=parser.error)
    add = parser.add_argument
    data = (
        "a name that eqdistill.datasets.load accepts, such as mnist; or a folder with "
        "subfolders train and test, each with one folder of pictures per class"
    )
    add("data", metavar="DATASET", help=data)
    images = "images per class (default: 10)"
    add("--ipc", type=int, default=10, metavar="N", help=images)
    steps = "outer steps (default: 1000)"
    add("--steps", type=int, default=1000, metavar="N", help=steps)
    networks = "the network to distil for (default: ConvNet)"
    add("--network", choices=_NETWORKS, default="ConvNet", help=networks)
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    size = "resize the pictures of a folder to N x N pixels"
    add("--size", type=int, metavar="N", help=size)
    data_dir = "the folder with the files of the dataset"
    add("--data-dir", metavar="DIR", help=data_dir)
    output = "the folder to write to (default: output)"
    add("--output", default="output", metavar="DIR", help=output)
    code = "only print the equivalent Python program"
    add("--show-code", action="store_true", help=code)


def _distill(args: argparse.Namespace) -> int:
    check_at_least(1, ipc=args.ipc, steps=args.steps)
    is_folder = Path(args.data).is_dir()
    for name, value, is_meant in (
        ("--size", args.size, is_folder),
        ("--data-dir", args.data_dir, not is_folder),
    ):
        if value is not None and not is_meant:
            args.error(f"{name} does not apply to '{args.data}': see --help.")
    program = _program(args)
    if args.show_code:
        print(program, end="")
        return 0
    with needs("This command", "Matplotlib", "examples"):  # Before the long run.
        import matplotlib  # noqa: F401
    network = f"{args.network}s"
    print(
        f"Distilling {args.data} into {args.ipc} images per class: {args.steps:,} "
        f"steps with a pool of {network}.\nFive fresh {network} are then trained on "
        "these images, and their test accuracy is measured.",
        flush=True,
    )
    exec(program, {"__name__": "distill"})
    file = Path(args.output, "distilled.safetensors")
    print(f"files           {file}, {file.with_suffix('.png')}")
    return 0


def _program(args: argparse.Namespace) -> str:
    folder = Path(args.data)
    if folder.is_dir():
        parts = str(folder / "train"), str(folder / "test")
        size = f", size=({args.size}, {args.size})" if args.size else ""
        load, dataset = _FROM_FOLDER.format(*parts, size), None
    else:
        where = f", {args.data_dir!r}" if args.data_dir else ""
        load, dataset = f"eqd.datasets.load({args.data!r}{where})", args.data
        load = f"train, test = {load}"
    values = vars(args) | {"output": repr(args.output), "dataset": repr(dataset)}
    return _PROGRAM.substitute(values, load=load, settings=_NETWORKS[args.network])
