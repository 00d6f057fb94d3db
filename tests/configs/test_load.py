"""Config files: values, errors, inheritance, overrides and writing back to YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.load import load_config, parse_config, to_yaml
from configs.schema import Config, all_settings
from configs.utils import warnings
from configs.utils.errors import UserError
from helpers.config_files import Write, load_error, writer

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAL = "data: {path: data/x}\nmodel: {name: lenet}\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a config file of the required settings and more text."""
    return writer(tmp_path, MINIMAL)


# Values


def test_only_data_path_and_model_name_are_required(write: Write) -> None:
    assert load_config(write()) == Config.model_validate(
        {"data": {"path": "data/x"}, "model": {"name": "lenet"}, "name": "run"}
    )


@pytest.mark.parametrize(("text", "lr"), [("3e-4", 3e-4), ("1e-3", 1e-3), ("1E2", 100.0), (".5", 0.5), ("1", 1.0)])
def test_numbers_in_scientific_notation_are_floats(write: Write, text: str, lr: float) -> None:
    config = load_config(write(f"train: {{lr: {text}}}"))
    assert config.train.lr == lr
    assert isinstance(config.train.lr, float)


@pytest.mark.parametrize("text", ["(0.9, 0.95)", "[0.9, 0.95]", "( 9e-1,0.95 )"])
def test_pair_accepts_parentheses_and_brackets(write: Write, text: str) -> None:
    assert load_config(write(f"train:\n  optimizer:\n    betas: {text}")).train.optimizer.betas == (0.9, 0.95)
    assert load_config(write(), [f"train.optimizer.betas={text}"]).train.optimizer.betas == (0.9, 0.95)


def test_off_is_text_not_boolean(write: Write) -> None:
    assert load_config(write("train: {amp: off, compile: off}")).train.amp == "off"


def test_one_color_jitter_number_sets_brightness_contrast_and_saturation(write: Write) -> None:
    jitter = load_config(write("aug: {color_jitter: 0.4}")).aug.color_jitter
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.4, 0.4, 0.4, 0.0)


def test_hue_extends_single_color_jitter_number(write: Write) -> None:
    jitter = load_config(write("aug: {color_jitter: 0.4}"), ["aug.color_jitter.hue=0.1"]).aug.color_jitter
    assert (jitter.brightness, jitter.hue) == (0.4, 0.1)


def test_name_defaults_to_file_stem(write: Write) -> None:
    assert load_config(write(name="my.run.yaml")).name == "my.run"
    assert load_config(write("name: other")).name == "other"


def test_config_is_frozen(write: Write) -> None:
    config = load_config(write())
    with pytest.raises(ValidationError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.train.optimizer.eps = 1.0  # type: ignore[misc]


# Errors


def test_missing_field_error_names_field_and_meaning(write: Write) -> None:
    message = load_error(write("data: {batch_size: 2}\nmodel: {name: lenet}", head=""))
    assert re.search(r"run\.yaml:1: data\.path is missing: Folder of the converted", message)


def test_unknown_key_error_names_line_and_allowed_keys(write: Write) -> None:
    message = load_error(write("train:\n  lr: 0.1\n  epoch: 5"))
    assert re.search(
        r"run\.yaml:5: train\.epoch=5 is unknown; did you mean train\.epochs or train\.first_epoch\? allowed in ",
        message,
    )
    assert all(key in message for key in ("warmup_lr", "accumulation_steps"))


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("lr", "train.lr"),
        ("train.optimizer.lr", "train.lr"),
        ("train.batch_size", "data.batch_size"),
        ("Train", "train"),
    ],
)
def test_misplaced_key_error_suggests_correct_key(write: Write, key: str, known: str) -> None:
    assert f"did you mean {known}" in load_error(write(), f"{key}=3")


def test_misspelt_required_key_is_reported_before_missing_one(write: Write) -> None:
    message = load_error(write("data: {pth: x}\nmodel: {name: y}", head=""))
    assert "data.pth" in message
    assert message.endswith("(and 1 more error)")


def test_several_errors_become_one_line_with_a_count(write: Write) -> None:
    assert load_error(write("train: {epochs: 0, lr: -1, amp: fast}")).endswith("(and 2 more errors)")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_config_loads_with_one_epoch(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warnings.warn.cache_clear()
    long = load_config(path)
    assert load_config(path, ["train.epochs=1"]).train.warmup_epochs == min(1, long.train.warmup_epochs)
    cut = f"train.warmup_epochs={long.train.warmup_epochs:g} is longer than the run and is cut to 1"
    assert (cut in capsys.readouterr().err) == (long.train.warmup_epochs > 1)


def test_warm_up_longer_than_run_is_cut_with_warning(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("train: {epochs: 3, warmup_epochs: 3.5}")
    assert load_config(path).train.warmup_epochs == 3
    assert f"{path}:3: train.warmup_epochs=3.5 is longer than the run and is cut to 3" in capsys.readouterr().err
    assert load_config(path, ["train.epochs=4"]).train.warmup_epochs == 3.5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("override", "requirement"),
    [
        ("train.epochs=0", "greater than or equal to 1"),
        ("train.epochs=5.0", "a valid integer"),
        ("train.epochs=true", "a valid integer"),
        ("train.epochs={a: 1}", "a valid integer"),
        ("train.channels_last=1", "a valid boolean"),
        ("train.lr=fast", "a valid number"),
        ("train.lr=1e999", "a finite number"),
        ("train.clip_grad_norm=0", "greater than 0 or null"),
        ("train.amp=fp8", "must be 'auto', 'bf16', 'fp16' or 'off'"),
        ("train.min_lr=1", "must not exceed train.lr=0.001"),
        ("train.warmup_lr=1", "must not exceed train.lr=0.001"),
        ("train.optimizer.betas=[0.9]", "two numbers"),
        ("train.optimizer.betas=[0.9, 1]", "below 1"),
        ("train.optimizer={name: sgd, momentum: 0}", "above 0 with nesterov"),
        ("train=5", "must be a section; allowed in train: epochs, "),
        ("train.optimizer=adam", "must be a section; write train.optimizer.name=adam; allowed in train.optimizer: "),
        ("data.prefetch=17", "less than or equal to 16"),
        ("data.path=null", "a valid string"),
        ("data.image_size=big", "a valid integer or null"),
        ("aug.scale=[0.5, 0.2]", "ascending order"),
        ("aug.scale=[0, 1]", "positive"),
        ("aug.scale=[0.5, 1.5]", "must not exceed 1"),
        ("aug.ratio=[2, 1]", "ascending order"),
        ("aug.color_jitter=strong", "one number or a section"),
        ("aug.color_jitter=-0.1", "greater than or equal to 0"),
        ("aug.color_jitter.hue=0.6", "less than or equal to 0.5"),
        ("model.drop_rate=1", "less than 1"),
        ("eval.crop_fraction=0", "greater than 0"),
        ("log.wandb.tags=a", "a list"),
        ("name=a/b", "plain file name"),
        ("name=..", "plain file name"),
        ("name=5", 'quote it: "5"'),
    ],
)
def test_out_of_range_error_names_key_value_and_limits(write: Write, override: str, requirement: str) -> None:
    message = load_error(write(), override)
    assert message.startswith("--opts: " + re.split("[={]", override)[0])
    assert requirement in message


def test_bad_value_error_names_its_layer(write: Write) -> None:
    write("train:\n  epochs: 0", "base.yaml", head="")
    child = write("base: base.yaml\nseed: 1")
    assert "base.yaml:2: train.epochs=0" in load_error(child)
    assert load_error(child, "train.epochs=-1").startswith("--opts: train.epochs=-1")
    assert load_error(child, train={"epochs": -2}).startswith("argument: train.epochs=-2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  lr: 1\n  lr: 2", ":3: key train.lr is given twice (first in line 2)"),
        ("{a: 1, a: 2}", ":1: key a is given twice"),
        ("seed: &x 1\nname: *x", ":2: aliases are not supported"),
        ("seed: !!python/object/apply:os.getcwd []", ":1: tag tag:yaml.org,2002:python/object/apply:os.getcwd is not"),
        ("name: !!binary aGk=", ":1: tag tag:yaml.org,2002:binary is not allowed"),
        ("1: a", ":1: key 1 must be text"),
        ("[a]: b", ':1: key ["a"] must be text'),
        ("seed: 1\nname: [1", ":2: while parsing a flow sequence"),
        ("seed: 1\n--- 2", ":2: expected a single document"),
        ("seed: 1\nname: \x01", ":2: character U+0001 is not allowed"),
        ('name: "\\U99999999"', " is not valid YAML"),
        ("[" * 5000, ":1: nested too deeply"),
        ("- 1", " contains [1], but a config is a mapping"),
        ("train.epochs: 5", ":1: train.epochs=5 is unknown; in a file, nest sections"),
    ],
)
def test_malformed_file_error_names_line(write: Write, text: str, expected: str) -> None:
    assert f"run.yaml{expected}" in load_error(write(text, head=""))


def test_unreadable_file_error_names_file(tmp_path: Path) -> None:
    assert "none.yaml cannot be read (No such file" in load_error(tmp_path / "none.yaml")
    assert "cannot be read (Is a directory)" in load_error(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    assert "latin.yaml is not a UTF-8 text file" in load_error(tmp_path / "latin.yaml")


# Inheritance


def test_bases_are_merged_deeply_and_later_ones_win(write: Write) -> None:
    write("train: {lr: 0.1, epochs: 1, optimizer: {eps: 1e-6}}", "one.yaml")
    write("train: {lr: 0.2, optimizer: {betas: [0.8, 0.9]}}", "two.yaml", head="")
    config = load_config(write("base: [one.yaml, two.yaml]\ntrain: {epochs: 3}", head=""))
    assert (config.train.lr, config.train.epochs) == (0.2, 3)
    assert (config.train.optimizer.eps, config.train.optimizer.betas) == (1e-6, (0.8, 0.9))


def test_base_is_relative_to_file_and_may_be_nested(write: Write) -> None:
    write("seed: 7", "root.yaml")
    write("base: ../root.yaml", "folder/middle.yaml", head="")
    assert load_config(write("base: folder/middle.yaml", head="")).seed == 7


def test_two_bases_may_share_a_base(write: Write) -> None:
    write("seed: 7", "root.yaml")
    write("base: root.yaml", "one.yaml", head="")
    write("base: root.yaml", "two.yaml", head="")
    assert load_config(write("base: [one.yaml, two.yaml]", head="")).seed == 7


def test_cycle_of_bases_error_shows_path(write: Write) -> None:
    write("base: run.yaml", "other.yaml")
    assert re.search(
        r"is a cycle \(.*run\.yaml -> .*other\.yaml -> .*run\.yaml\)", load_error(write("base: other.yaml"))
    )
    assert "is a cycle" in load_error(write("base: self.yaml", "self.yaml"))


def test_base_must_be_near_config_or_project(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("seed: 5", "other/base.yaml", head="")
    own = write("base: ../other/base.yaml", "mine/own.yaml")
    with pytest.raises(UserError, match=r"own\.yaml: base .*base\.yaml is outside .*mine and .*copy the file there"):
        load_config(own)
    monkeypatch.chdir(tmp_path)
    assert load_config(own).seed == 5
    projects = Path(__file__).parents[2] / "configs" / "digits_lenet.yaml"
    assert load_config(write(f"base: {projects}", "mine/own.yaml", head="")).model.name == "lenet"


def test_base_may_be_in_folder_above_config(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("seed: 5", "common.yaml", head="")
    (tmp_path / "elsewhere").mkdir()
    for folder in ("mine", "elsewhere"):
        own = write("base: ../common.yaml", "mine/own.yaml")
        monkeypatch.chdir(tmp_path / folder)
        assert load_config(own).seed == 5
        assert load_config(write("base: ../../common.yaml", "mine/deep/own.yaml")).seed == 5
    write("seed: 6", "other/secret.yaml", head="")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "other" / "secret.yaml")
    with pytest.raises(UserError, match="is outside /"):
        load_config(write("base: ../link.yaml", "mine/own.yaml"))


def test_base_must_be_plain_file_named_like_config(write: Write, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("password: secret")
    error = load_error(write("base: notes.txt"))
    assert "is not named like a config" in error
    assert "secret" not in error
    (tmp_path / "folder.yaml").mkdir()
    assert "is not a plain file" in load_error(write("base: folder.yaml"))


def test_nested_bases_are_limited(write: Write) -> None:
    for number in range(10):
        write(f"base: [many{number + 1}.yaml, many{number + 1}.yaml]", f"many{number}.yaml", head="")
    write("seed: 1", "many10.yaml", head="")
    assert "is one file too many: a config may have up to 63 bases" in load_error(write("base: many0.yaml"))


def test_missing_base_error_names_both_files(write: Write) -> None:
    assert re.search(r"run\.yaml: base .*none\.yaml cannot be read", load_error(write("base: none.yaml")))


def test_base_of_wrong_type_is_an_error(write: Write) -> None:
    assert "run.yaml:3: base=5 must be a file name or a list" in load_error(write("base: 5"))


# Overrides


def test_overrides_mix_both_forms_and_last_wins(write: Write) -> None:
    overrides = ["train.epochs=5", "train.lr", "3e-4", "data.path", "a=b", "train.epochs", "6", "log.wandb.tags=[a, b]"]
    config = load_config(write("train: {epochs: 4}"), overrides)
    assert (config.train.epochs, config.train.lr, config.data.path) == (6, 3e-4, "a=b")
    assert config.log.wandb.tags == ("a", "b")


@pytest.mark.parametrize("null", ["null", "None", "~"])
def test_null_and_none_reset_optional_fields(null: str, write: Write) -> None:
    path = write(f"train: {{epochs: 4, clip_grad_norm: {null}}}")
    config = load_config(path, ["data.image_size=9", f"data.image_size={null}", f"name={null}"])
    assert (config.data.image_size, config.train.clip_grad_norm, config.name) == (None, None, "run")
    assert load_config(path, ["name='None'"]).name == "None"
    assert "must be a valid string" in load_error(path, f"data.path={null}")


@pytest.mark.parametrize(
    "override", [["train.clip_grad_norm="], ["train.clip_grad_norm", ""], ["name=  "], ["MODEL.RESUME="]]
)
def test_empty_override_error_suggests_null(override: list[str], write: Write) -> None:
    assert "has an empty value; write null for none, or '\"\"' for an empty text" in load_error(write(), *override)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("try #2", "try #2"),
        ("#2", "#2"),
        (" it's #1", "it's #1"),
        ('"try #2"', "try #2"),
        ("a#b", "a#b"),
        ("None #2", "None #2"),
        ("---", "---"),
        ("&x y", "&x y"),
    ],
)
def test_override_value_keeps_special_characters(text: str, value: str, write: Write) -> None:
    for override in ([f"name={text}"], ["name", text]):
        config = load_config(write(), override)
        assert config.name == value
        assert parse_config(to_yaml(config), "config.yaml") == config


def test_trailing_text_after_value_is_an_error(write: Write) -> None:
    assert 'train.epochs="5 #6" must be a valid integer' in load_error(write(), "train.epochs=5 #6")
    for text in ("[a, b #c]", "[a] #b", '"a" #b', "[a, #b\n]"):
        assert "# does not start a comment here; put the text that contains it in quotes" in load_error(
            write(), f"log.wandb.tags={text}"
        )
    assert load_config(write(), ["log.wandb.tags=[a, 'b #c']"]).log.wandb.tags == ("a", "b #c")


def test_tilde_is_home_folder_in_path_settings(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["data.path=~/a", "output=~/b", "resume=~/c", "model.finetune=~/d", "model.pretrained=~/e"]
    (tmp_path / "base.yaml").write_text("seed: 5")
    write("base: ~/base.yaml")
    for config in (
        load_config("~/run.yaml", paths),
        load_config(write("base: base.yaml"), paths[1:], **{"data.path": "~/a"}),
    ):
        found = (config.data.path, config.output, config.resume, config.model.finetune, config.model.pretrained)
        assert found == tuple(f"{tmp_path}/{letter}" for letter in "abcde")
        assert config.seed == 5
    assert load_config("~/run.yaml", ["resume=auto", "output=a~b"]).output == "a~b"
    assert load_config(write("output: ~/runs")).output == f"{tmp_path}/runs"
    for override in paths:
        unknown = override.replace("~", "~nobody-of-this-name")
        assert "starts with ~, but there is no such user; write ./~" in load_error(write(), unknown)
    assert "'~nobody-of-this-name/x.yaml' starts with ~" in load_error("~nobody-of-this-name/x.yaml")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.epochs"], "--opts: 'train.epochs' lacks a value"),
        (["=5"], "--opts: '=5' lacks a key"),
        (["train.lr=[1"], "--opts: train.lr=[1: while parsing"),
        (["train.epoch", "5"], "--opts: train.epoch=5 is unknown; did you mean train.epochs or train.first_epoch?"),
        (["base=x.yaml"], "--opts: base="),
    ],
)
def test_malformed_override_is_an_error(write: Write, overrides: list[str], expected: str) -> None:
    assert load_error(write(), *overrides).startswith(expected)


def test_replacements_win_and_none_is_ignored(write: Write) -> None:
    flags: dict[str, Any] = {"data.batch_size": 8, "output": None, "train": {"epochs": 3}}
    config = load_config(write("output: runs"), ["data.batch_size=4", "train.lr=0.5"], **flags)
    assert (config.data.batch_size, config.output, config.train.epochs, config.train.lr) == (8, "runs", 3, 0.5)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_loaded_config_takes_overrides_like_its_file(path: Path) -> None:
    overrides = ["seed=7", "train.lr=0.5"]
    assert load_config(load_config(path), overrides) == load_config(path, overrides)
    with pytest.raises(UserError, match=r"did you mean train\.lr"):
        load_config(load_config(path), ["train.lrr=1"])


# YAML out


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_loads_and_survives_to_yaml(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    text=st.one_of(
        st.text(min_size=1),
        st.sampled_from(["1e3", "08", "off", "null", "~", "(1, 2)", "1:30", "2024-01-01", ".5", "- a", "a: b", " x "]),
    ),
    number=st.floats(min_value=5e-324, allow_infinity=False),
)
def test_any_text_and_number_survive_to_yaml(
    text: str, number: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = Config.model_validate(
        {"data": {"path": text}, "model": {"name": "m"}, "train": {"lr": number}, "name": "n"}
    )
    path = tmp_path_factory.getbasetemp() / "any_value.yaml"
    path.write_bytes(to_yaml(config).encode())
    assert load_config(path) == config


YAML_PIECES = st.sampled_from(
    [*"[]{}:,-?&*!|>%@`'\"#~()\n\t \\0123456789.e+", "\n  ", ": ", "- ", "---", "<<", "!!", "\\U9", "\x85", "\ufeff"]
    + [key.rsplit(".", 1)[-1] for key, _ in all_settings()]
    + ["base", "1e3", "true", "null", "(1, 2)"]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.one_of(st.text(), st.lists(YAML_PIECES, max_size=30).map("".join)))
def test_random_text_raises_only_user_errors(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "random.yaml").write_bytes(text.encode())
    (folder / "valid.yaml").write_text(MINIMAL)
    for name, overrides in (("random.yaml", []), ("valid.yaml", [f"train.lr={text}"]), ("valid.yaml", [text, text])):
        try:
            load_config(folder / name, overrides)
        except UserError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017 (one line is the claim)
