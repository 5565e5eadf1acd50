"""Recipes and trained models: settings and their types, round trips, cards, and the entries that are shipped."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nblib as nb
from nblib import recipes, zoo
from nblib.data import sets
from nblib.errors import CheckFailed, CheckpointError, DataError
from nblib.field import FieldModel
from nblib.vae import VAE

TINY = {"hidden": (8,), "latent": 3, "batch_size": 200}


def train(out: Path | None = None, **settings: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    return zoo.train("vae-digits", **{"profile": "smoke", "overrides": TINY, "out": out, **settings})


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- recipes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", nb.page.PROFILES)
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_resolves_in_every_profile_to_a_model_and_a_run(name: str, profile: str) -> None:
    recipe = recipes.get(name)
    settings = recipe.resolve(profile)
    assert settings["epochs"] == recipe.epochs[profile]
    data = nb.data.load(recipe.data, "test", part="bundled", quiet=True)
    model = recipe.model(settings, data)
    assert isinstance(model, VAE | FieldModel)
    assert model.shape == tuple(data.x.shape[1:])
    assert set(recipe.fit_settings(settings)) == set(recipes.FIT)
    assert json.loads(json.dumps(settings)) == {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_what_it_says(name: str) -> None:
    recipe = recipes.get(name)
    assert recipe.name == name
    assert recipe.data in nb.data.NAMES
    assert set(recipe.epochs) == set(nb.page.PROFILES)
    assert recipe.epochs["smoke"] <= recipe.epochs["cpu"] <= recipe.epochs["gpu"]


@pytest.mark.parametrize("name", ["vae-fashion", "ddpm-fashion"])
def test_a_recipe_has_the_parameters_that_it_names(name: str) -> None:
    recipe = recipes.get(name)
    model = recipe.model(recipe.resolve(), nb.data.load("fashion-mnist", "test", part="bundled", quiet=True))
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in recipe.about


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("latent", "16", 16), ("latent", 16, 16), ("latent", 16.0, 16), ("lr", "1e-4", 1e-4), ("lr", 1, 1.0),
        ("std", "log-variance", "log-variance"), ("hidden", "64,32", (64, 32)), ("hidden", [64, 32], (64, 32)),
        ("compile", "True", True), ("compile", "false", False), ("compile", True, True), ("clip", "0.5", 0.5),
        ("clip", "none", None), ("clip", None, None), ("ema", 0.9, 0.9), ("epochs", "0.5", 0.5), ("epochs", 3, 3.0),
    ],
)  # fmt: skip
def test_a_value_takes_the_type_of_its_default(name: str, value: Any, expected: Any) -> None:
    got = recipes.get("vae-digits").resolve(overrides={name: value})[name]
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latent", "x"), ("latent", 2.5), ("latent", None), ("lr", None), ("hidden", 64), ("hidden", "a,b"),
        ("hidden", None), ("compile", 1), ("compile", "on"), ("clip", "much"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"{name} must be .*, like its default .*; got {value!r}"):
        recipes.get("vae-digits").resolve(overrides={name: value})


def test_resolving_leaves_the_recipe_alone() -> None:
    recipe = recipes.get("vae-digits")
    before = dict(recipe.settings)
    recipe.resolve("smoke", {"latent": 99})["hidden"] = None
    assert recipe.settings == before


def test_unknown_names_are_named_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"recipe 'vae-mnst'. Did you mean 'vae-mnist'\?"):
        recipes.get("vae-mnst")
    with pytest.raises(DataError, match=r"parameter of vae-digits 'betta'. Did you mean 'beta'\?"):
        recipes.get("vae-digits").resolve(overrides={"betta": 1})
    with pytest.raises(DataError, match=r"profile 'cpus'. Did you mean 'cpu'\?"):
        recipes.get("vae-digits").resolve("cpus")


# --- train and load ------------------------------------------------------------------------------------


def test_a_model_comes_back_with_the_same_outputs(tmp_path: Path) -> None:
    model, _ = train(tmp_path / "m.safetensors")
    again = zoo.load(str(tmp_path / "m.safetensors"))
    assert isinstance(model, VAE)
    assert isinstance(again, VAE)
    assert not again.training
    assert same(model.state_dict(), again.state_dict())
    images = nb.data.load("digits", "test", quiet=True).images[:20]
    assert torch.equal(model.reconstruct(images), again.reconstruct(images))
    one, two = (m.sample(5, generator=torch.Generator().manual_seed(1)) for m in (model, again))
    assert torch.equal(one, two)


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    states = []
    for state, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(state)  # does not matter
        states.append(train(seed=seed)[0].state_dict())
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_the_seed_sets_the_initial_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(model: torch.nn.Module, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt(model.state_dict())

    def initial(seed: int) -> dict[str, Tensor]:
        with pytest.raises(KeyboardInterrupt) as caught:
            train(seed=seed)
        return caught.value.args[0]  # type: ignore[no-any-return]

    monkeypatch.setattr(zoo, "fit", untrained)
    torch.manual_seed(1)
    one = initial(5)
    torch.manual_seed(2)
    assert same(one, initial(5))
    assert not same(one, initial(6))


def test_training_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    train()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_moving_average_is_what_is_kept(tmp_path: Path) -> None:
    model, _ = train(tmp_path / "m", overrides={**TINY, "ema": 0.9})
    plain, _ = train()
    assert not same(model.state_dict(), plain.state_dict())
    assert same(zoo.load(str(tmp_path / "m.safetensors")).state_dict(), model.state_dict())


def test_settings_other_than_the_defaults_come_back(tmp_path: Path) -> None:
    overrides = {**TINY, "likelihood": "logistic", "std": "bounded", "bound": 3.0, "activation": "gelu", "k": 2}
    train(tmp_path / "m", overrides=overrides)
    again = zoo.load(str(tmp_path / "m.safetensors"))
    assert isinstance(again, VAE)
    assert (again.std_kind, again.bound_std, again.k, again.likelihood.outputs) == ("bounded", 3.0, 2, 2)
    assert again.likelihood.levels == 17


def test_the_card_says_how_the_model_was_made(tmp_path: Path) -> None:
    model, card = train(tmp_path / "m", seed=4)
    assert json.loads((tmp_path / "m.json").read_text()) == json.loads(json.dumps(card))
    expected = {
        "recipe": "vae-digits",
        "seed": 4,
        "profile": "smoke",
        "torch": torch.__version__,
        "nblib": nb.__version__,
    }
    assert {name: card[name] for name in expected} == expected
    assert card["settings"]["latent"] == 3
    assert card["data"] == "digits train (all 1,437 images)"
    assert card["steps"] == math.ceil(3 * 1437 / 200)
    assert card["seconds"] >= 0
    for name in ("hardware", "commit", "date"):
        assert card[name]
    assert card["sha256"] == hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()
    assert [row["step"] for row in card["path"]][-1] == card["steps"]
    metrics = card["metrics"]
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(metrics["kl_per_dim"]) == 3
    nb.check("the KL of the dimensions adds up", sum(metrics["kl_per_dim"]), metrics["kl"], atol=1e-3)
    nb.check("loss", metrics["loss"], metrics["reconstruction"] + metrics["kl"], atol=1e-3)


def test_a_card_without_a_checkout_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert train()[1]["commit"] == "not from a checkout"


def test_without_a_place_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, card = train()
    assert list(tmp_path.iterdir()) == []
    assert "sha256" not in card


def test_a_stopped_recipe_goes_on_from_the_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    overrides = {**TINY, "epochs": 15}
    whole, _ = train(tmp_path / "whole", overrides=overrides)
    with monkeypatch.context() as patch:
        patch.setattr(zoo, "save_checkpoint", stop)  # the weights of the finished model cannot be written
        with pytest.raises(Stop):
            train(tmp_path / "m", overrides=overrides)
    assert (tmp_path / "m.resume").is_file()
    again, card = train(tmp_path / "m", overrides=overrides)
    assert same(whole.state_dict(), again.state_dict())
    assert card["steps"] == math.ceil(15 * 1437 / 200)
    assert sorted(p.name for p in tmp_path.iterdir() if p.stem == "m") == ["m.json", "m.safetensors"]


def test_an_unknown_entry_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_folder", lambda: tmp_path)
    train(tmp_path / "digits-tiny")
    assert zoo.names() == ["digits-tiny"]
    for call in (zoo.load, zoo.card):
        with pytest.raises(DataError, match=r"zoo entry 'digits-tine'. Did you mean 'digits-tiny'\?.*safetensors"):
            call("digits-tine")
    assert isinstance(zoo.load("digits-tiny"), VAE)
    assert zoo.card("digits-tiny")["recipe"] == "vae-digits"


def test_cards_are_those_of_the_runs_and_of_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "bundled_folder", lambda: tmp_path)
    for name in ("runs/vae-a", "runs/vae-b", "zoo/vae-c", "zoo/gan-d"):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"name": name}))
    assert zoo.cards() == {Path(n).name: {"name": n} for n in ("runs/vae-a", "runs/vae-b", "zoo/gan-d", "zoo/vae-c")}
    assert list(zoo.cards("vae-*")) == ["vae-a", "vae-b", "vae-c"]


def test_a_file_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    nb.fit(VAE((1, 4, 4), 2, hidden=(4,)), torch.rand(8, 1, 4, 4), steps=1, batch_size=4, checkpoint=path)
    with pytest.raises(CheckpointError, match="a run in progress"):
        zoo.load(str(path))


# --- the entries that are shipped ----------------------------------------------------------------------


def check_entry(name: str) -> None:
    """The weights are those of the card, and their loss on the test set is the one that the card states."""
    card, model = zoo.card(name), zoo.load(name)
    assert card["sha256"] == hashlib.sha256(zoo._file(name, ".safetensors").read_bytes()).hexdigest()
    assert sum(p.numel() for p in model.parameters()) == card["metrics"]["parameters"]
    recipe = recipes.get(card["recipe"])
    found = sets._find_whole(recipe.data, must=False) if recipe.data != "digits" else None
    test = nb.data.load(recipe.data, "test", part="whole" if found else "bundled", quiet=True)
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, VAE):
        assert card["settings"]["beta"] == 1
        with torch.no_grad():
            losses = torch.cat([-model.bound(part, generator=generator) for part in test.images.split(1000)])
        whole = not test.is_subset
    else:
        losses, whole = field_losses(recipe, model, test, card, generator), False
    # Of a subset the mean may differ by chance as well.
    chance = 0.0 if whole else 4 * float(losses.std()) / math.sqrt(len(losses))
    nb.check(name, losses.mean(), card["metrics"]["loss"], atol=chance, rtol=0.01)


@torch.no_grad()
def field_losses(
    recipe: recipes.Recipe, model: torch.nn.Module, test: sets.Split, card: dict[str, Any], generator: torch.Generator
) -> Tensor:
    """The losses of ten batches of fifty, of new pairs for a student."""
    settings = recipe.resolve(overrides=card["settings"]) | {"pairs": 20 * 500}
    rows = recipe.examples(test, settings, 7, "cpu")
    assert isinstance(rows, Tensor)
    parts = rows[torch.randperm(len(rows), generator=generator)[:500]].split(50)
    batches = [recipe.transform(part, generator) if recipe.transform else part for part in parts]
    return torch.stack([model(batch, generator=generator).loss for batch in batches])


def test_every_shipped_model_has_the_weights_and_the_loss_of_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> Path:
        raise DataError(f"{name} is not downloaded for a test.")

    monkeypatch.setattr(sets, "_download", offline)
    for name in zoo.names():
        check_entry(name)


def test_a_card_with_another_loss_or_checksum_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_folder", lambda: tmp_path)
    _, card = train(tmp_path / "digits-tiny")
    check_entry("digits-tiny")
    path = tmp_path / "digits-tiny.json"
    path.write_text(json.dumps({**card, "metrics": {**card["metrics"], "loss": card["metrics"]["loss"] * 1.03}}))
    with pytest.raises(CheckFailed):
        check_entry("digits-tiny")
    path.write_text(json.dumps({**card, "sha256": "0" * 64}))
    with pytest.raises(AssertionError):
        check_entry("digits-tiny")


def test_the_smallest_entry_can_be_retrained_to_its_card() -> None:
    card = zoo.card("vae-digits")
    _, again = zoo.train("vae-digits", seed=card["seed"], device="cpu")
    assert again["steps"] == card["steps"]
    assert again["metrics"]["loss"] == pytest.approx(card["metrics"]["loss"], abs=0.1)
    worse = zoo.train("vae-digits", overrides={"epochs": 5}, seed=card["seed"], device="cpu")[1]
    assert worse["metrics"]["loss"] > card["metrics"]["loss"] + 0.1


# --- diffusion and flow matching -----------------------------------------------------------------------


def _images(n: int = 24) -> sets.Split:
    data = nb.data.load("fashion-mnist", "test", part="bundled", quiet=True)
    return sets.Split(data.name, data.split, data.x[:n], data.y[:n], data.classes, data.levels, data.whole, data.source)


def test_images_and_labels_are_dequantized_anew_and_come_back() -> None:
    data, recipe = _images(), recipes.get("flow-fashion")
    rows = recipe.examples(data, {}, 0, None)
    assert isinstance(rows, Tensor)
    assert rows.dtype == torch.uint8
    assert recipe.transform is not None
    one, two = (recipe.transform(rows, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(one, two)
    for batch in (one, two):
        assert torch.equal((256 * batch[:, :-1]).floor().to(torch.uint8), data.x.flatten(1))
        assert torch.equal(batch[:, -1].long(), data.y)
    u = 256 * one[:, :-1] - rows[:, :-1]
    assert abs(float(u.mean()) - 0.5) < 4 * 12**-0.5 / u.numel() ** 0.5


@pytest.mark.parametrize("name", ["reflow-fashion", "distill-fashion"])
def test_pairs_are_the_teachers_and_say_which_label_made_them(name: str) -> None:
    recipe, data = recipes.get(name), _images()
    settings = recipe.resolve("smoke", {"pairs": 24 * 20, "pair_steps": 2})
    rows = recipe.examples(data, settings, 3, "cpu")
    again = recipe.examples(data, settings, 3, "cpu")
    other = recipe.examples(data, settings, 4, "cpu")
    assert isinstance(rows, Tensor)
    assert isinstance(again, Tensor)
    assert isinstance(other, Tensor)
    assert torch.equal(rows, again)
    assert not torch.equal(rows, other)
    assert recipe.teacher is not None
    teacher = zoo.load(recipe.teacher)
    assert isinstance(teacher, FieldModel)
    noise, images = rows[:, :-1].unflatten(1, (2, 1, 28, 28)).unbind(1)
    labels = rows[:, -1].long()
    assert labels.tolist() == 2 * [*range(10), -1, -1]
    made = teacher.transport(noise, condition=labels, steps=2)
    assert torch.allclose(made, images, atol=1e-4)
    student = recipe.model(settings, data)
    assert isinstance(student, FieldModel)
    student.check(rows)


def test_a_student_starts_from_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(model: torch.nn.Module, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt(model.state_dict())

    monkeypatch.setattr(zoo, "fit", untrained)
    with pytest.raises(KeyboardInterrupt) as caught:
        zoo.train("distill-fashion", profile="smoke", overrides={"pairs": 40, "pair_steps": 1})
    assert same(caught.value.args[0], zoo.load("reflow-fashion").state_dict())
