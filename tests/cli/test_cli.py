"""The command line: what it does, and that every mistake ends in one line with a remedy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nblib as nb
from nblib import cli, recipes
from nblib.errors import DataError
from nblib.train import read_checkpoint, save_checkpoint


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that the command line trained."""
    out = tmp_path_factory.mktemp("trained") / "digits.safetensors"
    cli.main(["train", "vae-digits", "--profile", "smoke", "--seed", "3", "--out", str(out)])
    return out


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# --- what it does --------------------------------------------------------------------------------------


def test_list_names_every_recipe_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["list"])
    out = capsys.readouterr().out
    for name in [*recipes.RECIPES, *nb.zoo.names()]:
        assert re.search(rf"^  {re.escape(name)} ", out, re.MULTILINE), name


def test_the_module_runs_as_a_program(workplace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nblib", "list"], capture_output=True, text=True, timeout=120, cwd=workplace
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "vae-digits" in done.stdout


def test_data_describes_a_set_and_draws_it(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["data", "digits", "--out", "deep/look.png"])
    out = capsys.readouterr().out
    assert "digits train (all 1,437 images), 1x8x8" in out
    assert "digits test (all 360 images)" in out
    assert "classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in out
    assert "wrote deep/look.png" in out
    assert is_png(workplace / "deep" / "look.png")


def test_data_says_when_it_is_the_bundled_subset(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["data", "fashion-mnist", "--part", "bundled"])
    assert capsys.readouterr().out.count("bundled subset") == 4  # in the name and in the source of two splits


def test_train_writes_weights_and_a_card(trained: Path) -> None:
    assert sorted(path.name for path in trained.parent.iterdir()) == ["digits.json", "digits.safetensors"]
    card = json.loads(trained.with_suffix(".json").read_text())
    assert card["seed"] == 3
    assert card["profile"] == "smoke"
    assert read_checkpoint(trained)[1]["recipe"] == "vae-digits"


def test_train_writes_below_runs_by_default_and_says_where(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "vae-digits", "--profile", "smoke", "--set", "hidden=8", "--set", "latent = 3"])
    out = capsys.readouterr().out
    assert "weights: runs/vae-digits-0.safetensors  card: runs/vae-digits-0.json" in out
    assert re.search(r"\d+ steps in \d+ s on .*; test: loss \d+\.\d\d", out)
    card = json.loads((workplace / "runs" / "vae-digits-0.json").read_text())
    assert card["settings"]["hidden"] == [8]
    assert card["settings"]["latent"] == 3


def test_train_set_help_lists_the_settings(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "vae-digits", "--set", "help"])
    out = capsys.readouterr().out
    for name in recipes.get("vae-digits").resolve():
        assert f"  {name} = " in out
    assert list(workplace.iterdir()) == []


def test_sample_draws_a_trained_file(trained: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["sample", str(trained), "--n", "5"])
    assert capsys.readouterr().out == "wrote samples.png\n"
    assert is_png(workplace / "samples.png")
    first = (workplace / "samples.png").read_bytes()
    cli.main(["sample", str(trained), "--n", "5", "--out", "again.png"])
    cli.main(["sample", str(trained), "--n", "5", "--out", "other.PNG", "--seed", "1"])
    assert (workplace / "again.png").read_bytes() == first
    assert (workplace / "other.PNG").read_bytes() != first


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_every_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: python -m nblib{' ' * bool(command)}{command}")
    assert err == ""
    if not command:
        assert all(f"python -m nblib {name}" in out for name in cli.COMMANDS)


# --- what the user gets wrong --------------------------------------------------------------------------


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The only line that a mistake leaves on standard error."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("python -m nblib")
    assert "Traceback" not in err
    return err


MISTAKES = {
    "no command": ("", "the following arguments are required: COMMAND"),
    "command": ("trian vae-digits", "Unknown command 'trian'. Did you mean 'train'?"),
    "option": ("train vae-digits --sed 1", "unrecognized arguments: --sed 1"),
    "no recipe": ("train", "the following arguments are required: RECIPE"),
    "recipe": ("train vae-digit", "Unknown recipe 'vae-digit'. Did you mean 'vae-digits'?"),
    "setting": ("train vae-digits --set latnet=3", "parameter of vae-digits 'latnet'. Did you mean 'latent'?"),
    "no equals sign": ("train vae-digits --set latent", "--set takes KEY=VALUE, got 'latent'"),
    "no key": ("train vae-digits --set =3", "--set takes KEY=VALUE, got '=3'"),
    "int": ("train vae-digits --set latent=two", "latent must be of type int, like its default 8; got 'two'"),
    "fraction": ("train vae-digits --set latent=2.5", "latent must be of type int, like its default 8; got '2.5'"),
    "float": ("train vae-digits --set lr=fast", "lr must be of type float, like its default 0.001; got 'fast'"),
    "bool": ("train vae-digits --set compile=yes", "compile must be of type bool, like its default False; got 'yes'"),
    "tuple": ("train vae-digits --set hidden=64;32", "hidden must be of type tuple, like its default (128,)"),
    "number or none": ("train vae-digits --set clip=a", "clip must be a number, like its default None; got 'a'"),
    "profile": ("train vae-digits --profile smok", "Unknown profile 'smok'. Did you mean 'smoke'?"),
    "profile for help": ("train vae-digits --set help --profile GPU", "Did you mean 'gpu'?"),
    "seed": ("train vae-digits --seed x", "argument --seed: invalid int value: 'x'"),
    "part": ("train vae-digits --part hole", "Unknown part 'hole'. Did you mean 'whole'?"),
    "device": ("train vae-digits --profile smoke --device gpu", "device='gpu' cannot be used here"),
    "optimizer": ("train vae-digits --set optimizer=adan", "Unknown optimizer 'adan'. Did you mean 'adam'?"),
    "activation": ("train vae-digits --set activation=rellu", "'rellu'. Did you mean 'relu'?"),
    "batch size": ("train vae-digits --set batch_size=0", "examples, 1,437; got 0"),
    "large batch": ("train vae-digits --set batch_size=9999", "examples, 1,437; got 9,999"),
    "no epochs": ("train vae-digits --set epochs=0", "epochs must be a positive number, got 0"),
    "epochs": ("train vae-digits --set epochs=nan", "epochs must be a positive number, got nan"),
    "no hidden units": ("train vae-digits --set hidden=0", "got [64, 0, 16]"),
    "weight decay": ("train vae-digits --set weight_decay=-1", "weight_decay >= 0, got -1.0"),
    "zoo name": ("sample vae-digitz", "Unknown zoo entry 'vae-digitz'."),
    "zoo file": ("sample none.safetensors", "Unknown zoo entry 'none.safetensors'."),
    "none": ("sample vae-digits --n 0", "--n must be at least 1, got 0"),
    "n": ("sample vae-digits --n many", "argument --n: invalid int value: 'many'"),
    "picture": ("sample vae-digits --out samples.txt", "must end in .png, got 'samples.txt'"),
    "data": ("data fashion", "Unknown data set 'fashion'. Did you mean 'fashion-mnist'?"),
    "data part": ("data digits --part al", "Unknown part 'al'."),
    "data picture": ("data digits --out look", "must end in .png, got 'look'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_gives_one_line_and_status_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    line, said = MISTAKES[name]
    assert said in complaint(line.split(), capsys)


def test_a_checkpoint_of_a_run_in_progress_is_no_model(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint("c.safetensors", {"a": torch.zeros(2)}, {"history": {}})
    said = complaint(["sample", "c.safetensors"], capsys)
    assert "checkpoint of a run in progress: continue it with fit(checkpoint=...)" in said


def test_a_damaged_file_is_one_line_too(trained: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "cut.safetensors").write_bytes(trained.read_bytes()[:-10])
    assert "truncated or damaged" in complaint(["sample", "cut.safetensors"], capsys)


def test_a_place_that_cannot_be_written_gives_one_line(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "file").write_text("in the way")
    assert "file" in complaint(["data", "digits", "--out", "file/look.png"], capsys, status=1)


def test_an_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nb.zoo, "train", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "vae-digits"])
    assert caught.value.code == 130
    assert "The same line goes on from the last checkpoint" in capsys.readouterr().err


def test_an_error_that_is_nobodys_mistake_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(nb.zoo, "names", broken)
    with pytest.raises(KeyError):
        cli.main(["list"])


@pytest.mark.parametrize("pairs", [["a=1", "b = x=y "], ["a=1", "a=2"]], ids=str)
def test_pairs_are_split_at_the_first_sign_and_the_last_one_wins(pairs: list[str]) -> None:
    expected = {"a": "1", "b": "x=y"} if "b" in pairs[1] else {"a": "2"}
    assert cli._settings(pairs) == expected


def test_a_pair_without_a_sign_is_refused() -> None:
    with pytest.raises(DataError, match="got 'a'"):
        cli._settings(["a"])
