"""The command line: ``python -m nblib list | train | sample | data``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from nblib.errors import DataError, NblibError, unknown

__all__ = ["main"]

COMMANDS = ("list", "train", "sample", "data")
EXAMPLES = """examples:
  python -m nblib list
  python -m nblib train vae-digits
  python -m nblib train vae-fashion --set latent=16 --set std=log-variance --seed 1
  python -m nblib sample vae-fashion --n 64 --out samples.png
  python -m nblib data fashion-mnist --out look.png
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"invalid choice: '(.*?)'", message):
            message = unknown("command", choice[1], COMMANDS)
        self.exit(2, f"{self.prog}: {message.rstrip('.')}. Try {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    about = "Train, sample and inspect."
    parser = _Parser(prog="python -m nblib", description=about, epilog=EXAMPLES, formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    commands.add_parser("list", help="the recipes and the trained models")

    about = "Train a recipe. A stopped run goes on when the same line is run again."
    train = commands.add_parser("train", help="train a recipe; writes weights and a card", description=about)
    train.add_argument("recipe", metavar="RECIPE", help="see: python -m nblib list")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
                       help="replace a setting; may be given several times; --set help lists them")  # fmt: skip
    train.add_argument("--profile", default="cpu", help="smoke, cpu or gpu: how long (default: cpu)")
    train.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (default: 0)")
    train.add_argument("--out", type=Path, help="where to write (default: runs/RECIPE-SEED.safetensors)")
    train.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    train.add_argument("--part", default="auto", help="of the data: auto, whole or bundled (default: auto)")

    sample = commands.add_parser("sample", help="draw samples of a trained model into a PNG")
    sample.add_argument("name", metavar="NAME", help="an entry of the zoo, or a .safetensors file written by train")
    sample.add_argument("--n", type=int, default=64, help="how many (default: 64)")
    sample.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    sample.add_argument("--out", type=Path, default=Path("samples.png"), help="the picture (default: samples.png)")

    data = commands.add_parser("data", help="find or download a data set and describe it")
    data.add_argument("name", metavar="NAME", help="fashion-mnist, mnist or digits")
    data.add_argument("--part", default="auto", help="auto, whole or bundled (default: auto)")
    data.add_argument("--out", type=Path, help="also draw the first images into this PNG")
    return parser


def _settings(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise DataError(f"--set takes KEY=VALUE, got {pair!r}.")
        found[name.strip()] = value.strip()
    return found


def _list(_: argparse.Namespace) -> None:
    from nblib import recipes, zoo

    print("recipes (python -m nblib train NAME):")
    for recipe in recipes.RECIPES.values():
        print(f"  {recipe.name:18s} {recipe.data:14s} {recipe.about}")
    print("trained models (nblib.zoo.load(NAME), python -m nblib sample NAME):")
    for name in zoo.names():
        card = zoo.card(name)
        print(f"  {name:18s} {card['data']}; test loss {card['metrics']['loss']:.2f}; {card['hardware']}")


def _train(args: argparse.Namespace) -> None:
    from nblib import recipes, zoo

    recipe = recipes.get(args.recipe)
    if "help" in args.settings:
        for name, value in recipe.resolve(args.profile).items():
            print(f"  {name} = {value!r}")
        return
    overrides = _settings(args.settings)
    out = args.out or Path("runs") / f"{args.recipe}-{args.seed}.safetensors"
    _, card = zoo.train(
        args.recipe,
        profile=args.profile,
        overrides=overrides,
        seed=args.seed,
        out=out,
        device=args.device,
        part=args.part,
    )
    metrics = ", ".join(f"{k} {v:.2f}" for k, v in card["metrics"].items() if isinstance(v, float))
    print(f"{card['steps']:,} steps in {card['seconds']:.0f} s on {card['hardware']}; test: {metrics}")
    print(f"weights: {out.with_suffix('.safetensors')}  card: {out.with_suffix('.json')}")


def _check_png(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise DataError(f"--out is a picture and must end in .png, got {str(out)!r}.")


def _picture(images: object, out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from nblib import viz

    viz.image_grid(images, columns=8)  # type: ignore[arg-type]
    out.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(out, dpi=150, bbox_inches="tight")
    print(f"wrote {out}")


def _sample(args: argparse.Namespace) -> None:
    import torch

    from nblib import zoo

    if args.n < 1:
        raise DataError(f"--n must be at least 1, got {args.n}.")
    _check_png(args.out)
    model = zoo.load(args.name)
    _picture(model.sample(args.n, generator=torch.Generator().manual_seed(args.seed)), args.out)  # type: ignore[operator]


def _data(args: argparse.Namespace) -> None:
    from nblib.data import load

    if args.out:
        _check_png(args.out)
    train = load(args.name, part=args.part)
    load(args.name, "test", part=args.part)
    print("classes:", ", ".join(train.classes))
    if args.out:
        _picture(train.images[:64], args.out)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends in one line and status 2, not in a traceback."""
    args = _parser().parse_args(argv)
    try:
        {"list": _list, "train": _train, "sample": _sample, "data": _data}[args.command](args)
    except NblibError as error:
        print(f"python -m nblib {args.command}: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, RuntimeError) as error:
        print(f"python -m nblib {args.command}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nStopped. The same line goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
