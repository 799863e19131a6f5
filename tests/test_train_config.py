"""Settings: text as it is typed, values in range, every setting explained, and calibrations honoured or refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from d2it.data import Calibration
from d2it.errors import UserError
from d2it.training import config as configuration
from d2it.training.config import Config, describe, load, to_yaml
from d2it.training.dvae import build_vae

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "configs" / "demo.yaml"


def value_of(config: Config, key: str) -> object:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        *(
            (f"run.dir={text}", text)
            for text in ("007", "on", "1_000", "1e3", "12:30", "no", "a b", "[x]", "a=b", "{y}")
        ),
        ("run.dir=null", "null"),
        ("run.dir=${oc.env:HOME}", "${oc.env:HOME}"),
        ("run.dir=2024-01-01", "2024-01-01"),
        ("data.path=/data/im #1", "/data/im #1"),
        ("data.path=x: y", "x: y"),
        ("run.wandb=0x10", "0x10"),
        ("run.wandb=null", None),
        ("cache.path=~", str(Path.home())),
        ("cache.path=~/latents", str(Path.home() / "latents")),
        ("data.path=~/images", str(Path.home() / "images")),
        ("run.dir=~/run", str(Path.home() / "run")),
        ("dvae.calibration=~/c.json", str(Path.home() / "c.json")),
        ("dvae.loss.lpips_path=~/w", str(Path.home() / "w")),
        ("data.class_names=[no,yes,on,off,1e3,007,null,~]", ["no", "yes", "on", "off", "1e3", "007", "null", "~"]),
        ("data.class_names=null", None),
        ("run.stages=[dvae]", ["dvae"]),
    ],
)
def test_text_settings_take_the_text_as_it_is_typed(typed: str, value: object, tmp_path: Path) -> None:
    key = typed.partition("=")[0]
    config = load(DEMO, [typed])
    assert value_of(config, key) == value
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config  # the record of a run gives the run


@pytest.mark.parametrize("typed", ["007", "on", "1e3", "2024-01-01", "no"])
def test_text_settings_of_a_file_are_taken_as_they_stand_there(typed: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        f"run:\n  dir: {typed}\ndata:\n  path: demo\n  num_classes: 2\n  class_names: [{typed}, b]\n"
    )
    config = load(tmp_path / "c.yaml")
    assert config.run.dir == typed
    assert config.data.class_names == [typed, "b"]


STAGE_ERRORS = [
    ("steps=0", "at least 1"),
    ("steps=-5", "at least 1"),
    ("steps=1.5", "could not be converted to Integer"),
    ("batch_size=99999999999999999999999", "below 2^63"),
    ("accumulate=0", "at least 1"),
    ("lr=nan", "finite"),
    ("lr=inf", "finite"),
    ("lr=0", "positive"),
    ("lr=-1", "positive"),
    ("betas=[0.9]", "two values"),
    ("betas=[0.9,1]", "two values"),
    ("betas=[0.9,nan]", "finite"),
    ("weight_decay=-1", "0 or more"),
    ("warmup=-1", "0 or more"),
    ("schedule=linear", "constant or cosine"),
    ("clip=0", "positive"),
    ("ema=1", "in [0, 1)"),
    ("precision=fp8", "auto or bf16 or fp32"),
    ("parallel=tp", "ddp"),
]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        *((f"{stage}.{override}", said) for stage in ("dvae", "content") for override, said in STAGE_ERRORS),
        ("run.seed=-1", "in 0 ..."),
        ("run.keep=0", "at least 1"),
        ("run.keep=null", "run.keep"),
        ("run.save_every=0", "at least 1"),
        ("run.publish_every=-1", "0 or more"),
        ("run.device=tpu", "auto or cpu or cuda"),
        ("run.stages=dvae", "must be a list of texts"),
        ("run.stages=[train]", "among dvae"),
        ("run.dir=", "must be Unicode text that is not empty"),
        ("data.path=", "must be Unicode text that is not empty"),
        ("run.dir=a\udcffb", "must be Unicode text"),  # bytes that are no UTF-8
        ("run.dir=~nobody-of-this-name/x", "no home folder ~nobody-of-this-name"),
        ("data.path=~nobody-of-this-name", "no home folder"),
        ("data.image_size=100000000", "16,384 at most"),
        ("data.image_size=[1,2,3]", "a side or [height, width]"),
        ("data.image_size={a: 1}", "a side or [height, width]"),
        ("data.image_size=true", "a side or [height, width]"),
        ("data.image_size=1.5", "a side or [height, width]"),
        ("data.num_classes=0", "null or at least 1"),
        ("data.workers=-1", "null or in"),
        ("data.crop=left", "center or random"),
        ("data.class_names={a: b}", "must be a list of texts"),
        ("data.class_names=[a,[b]]", "must be a list of texts"),
        ("dvae.disc_lr=-1", "positive"),
        ("dvae.fine_ratios=[2]", "shares in [0, 1]"),
        ("dvae.fine_ratios=[[1]]", "a list without lists in it"),
        ("dvae.betas=[[1],[2]]", "a list without lists in it"),
        ("dvae.loss.kl_weight=nan", "finite"),
        ("dvae.loss.disc_weight=-1", "0 or more"),
        ("dvae.loss.disc_start=-1", "at least 0"),
        ("dvae.overrides.sigma=.nan", "finite"),
        ("dvae.overrides=5", "dvae.overrides"),
        ("dvae=5", "configuration"),
        ("content.capacity_step=0", "in (0, 1]"),
        ("cache.unit_size=0", "at least 1"),
        ("sample.guidance=-1", "0 or more"),
        ("sample.steps=1001", "in 1 ... 1000"),
        ("sample.images=0", "at least 1"),
        ("=5", "write section.key=value"),
        ("run.dir.x=5", "run"),
        ("run.diir=5", "did you mean dir?"),
        ("dvae.overrides.x=[", "configuration"),
        ("dvae.overrides.x=" + "[" * 100_000, "nested more than 32 levels deep"),
        ("data.class_names=" + "[" * 100_000, "nested more than 32 levels deep"),
        ("dvae.lr=" + "{a: " * 100_000, "nested more than 32 levels deep"),
        ("dvae.overrides.x=${nothing}", "not found"),
        ("dvae.overrides.x=!!python/object/apply:os.system [true]", "constructor"),
    ],
)
def test_a_value_out_of_range_is_one_line_with_its_name(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load(DEMO, [override])
    line = str(caught.value)
    assert said in line
    assert "\n" not in line
    assert override.partition("=")[0].split(".")[0] in line


@pytest.mark.parametrize(
    "text",
    [
        "extends: 5\n",
        "extends: [a]\n",
        "extends: c.yaml\n",
        "- a\n",
        "5\n",
        "a: [\n",
        "run: 5\n",
        "dvae: text\n",
        "run: {dir: [a]}\n",
        "run: {dir: {a: b}}\n",
        "data: {path: null}\n",
        "run: {seed: !!python/name:os.system }\n",
        "[" * 5000,
        "[" * 100_000,  # a reader in C would overflow the stack and end the process
        "run: " + "{a: " * 50_000,
        "run:\n" + "".join(f"{' ' * i}a:\n" for i in range(1, 1000)),
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{c}: &{c} [{','.join(9 * ['*' + b])}]\n" for b, c in zip("abcdefgh", "bcdefghi")),
        "a: &a [*a]\n",
        "\x00",
        "\udcff",
    ],
)
def test_a_damaged_configuration_file_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        load(tmp_path / "c.yaml", ["data.path=demo"] if "path" not in text else [])
    assert "\n" not in str(caught.value)


def test_a_key_that_is_there_twice_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run:\n  dir: x\n  dir: y\n")
    with pytest.raises(UserError, match=r"c\.yaml: not a YAML configuration: found duplicate key dir in line 3$"):
        load(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ('dvae.betas=["${x}",0.9]', "dvae.betas[0]"),
        ('content.overrides={a: {b: ["${no}"]}}', "content.overrides.a.b[0]"),
        ("content.overrides=${x}", "content.overrides"),
        ("run.seed=${oc.env:NO_SUCH_VARIABLE}", "run.seed"),
        ("dvae=${grain}", "dvae"),
        ("dvae.loss=${grain}", "dvae.loss"),
    ],
)
def test_an_interpolation_that_fails_is_named_with_its_key(override: str, key: str) -> None:
    with pytest.raises(UserError) as caught:
        load(DEMO, [override])
    assert str(caught.value).startswith(f"configuration: {key}: ")


def test_a_file_starts_from_one_beside_it_or_from_one_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: imagenet256_xl\nrun: {seed: 5}\n")
    own = load(tmp_path / "mine.yaml", ["data.path=x"])
    assert (own.run.seed, own.content.preset, own.run.keep) == (5, "D2iT-XL", 3)
    (tmp_path / "imagenet256_xl").write_text("run: {seed: 6, keep: 7}\n")
    own = load(tmp_path / "mine.yaml", ["data.path=x"])
    assert (own.run.seed, own.run.keep) == (5, 7)


@pytest.mark.parametrize("name", ["imagenet256_b", "imagenet256_l"])
def test_the_command_of_a_configuration_that_shares_latents_loads(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    command = path.read_text().split("train.py ")[1].split("extends:")[0].replace("\\\n#", " ").split()
    assert command[:2] == ["--config", f"configs/{name}.yaml"]
    config = load(path, command[2:])
    assert config.run.stages == ["content"]
    assert config.cache.path == "runs/imagenet256_xl/cache"


def test_every_setting_is_listed_with_its_default_and_a_line() -> None:
    lines = describe().splitlines()[1:]
    keys = configuration.setting_names()
    assert [line.split("=")[0].strip() for line in lines] == keys
    assert len(keys) > 70
    assert all(len(line.split(maxsplit=1)[1]) > 3 for line in lines)
    assert "run.seed=0 " in describe()
    assert "dvae.betas=[0.5,0.9] " in describe()


def test_every_class_of_settings_explains_all_its_fields() -> None:
    for kind in (Config, *(type(getattr(Config(), field.name)) for field in dataclasses.fields(Config))):
        first = (kind.__doc__ or "").split("\n")[0]
        assert first.endswith(".")
        for field in dataclasses.fields(kind):
            assert len(configuration._meaning(kind, field.name)) > 3


# ---- calibrations


def calibration(folder: Path, **changed: object) -> str:
    own = dataclasses.replace(
        Calibration.load(), **{"image_size": (64, 64), "region_size": 8, "num_bins": 64, **changed}
    )
    own.save(folder / "c.json")
    return f"dvae.calibration={folder / 'c.json'}"


def test_a_calibration_gives_the_thresholds(tmp_path: Path) -> None:
    given = [calibration(tmp_path), "dvae.overrides.thresholds=null", "dvae.fine_ratios=[0.3]"]
    own = Calibration.load(tmp_path / "c.json")
    vae = build_vae(load(DEMO, given))
    torch.testing.assert_close(vae.thresholds, torch.tensor(own.thresholds([0.3])))


@pytest.mark.parametrize(
    ("changed", "overrides", "said"),
    [
        ({}, [], "has no effect beside dvae.overrides.thresholds"),
        (
            {"image_size": (128, 128)},
            ["dvae.overrides.thresholds=null"],
            "image_size=(128, 128), asked for is (64, 64)",
        ),
        ({"image_size": (64, 128)}, ["dvae.overrides.thresholds=null"], "image_size"),
        ({"region_size": 16}, ["dvae.overrides.thresholds=null"], "region_size=16"),
        ({"num_bins": 256}, ["dvae.overrides.thresholds=null"], "num_bins"),
        ({"sigma": 0.02}, ["dvae.overrides.thresholds=null"], "sigma"),
        ({"normalize": False}, ["dvae.overrides.thresholds=null"], "normalize"),
        ({}, ["dvae.overrides.thresholds=null", "dvae.fine_ratios=[0.7,0.3]"], "dvae.fine_ratios must have 1 values"),
        (
            {},
            ["dvae.overrides={downsampling: [4], encoder_mult: [1, 1, 2], decoder_mult: [1, 1, 2], thresholds: null}"],
            "has no effect",
        ),
    ],
)
def test_a_calibration_is_honoured_or_refused(changed: dict, overrides: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        build_vae(load(DEMO, [calibration(tmp_path, **changed), *overrides]))
    assert said in str(caught.value)


def test_the_shipped_calibration_is_for_its_own_image_size(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"dvae.calibration=null \(the one shipped\).*--image-size 64 64 --region-size 8"
    ):
        build_vae(load(DEMO, ["dvae.overrides.thresholds=null"]))


@pytest.mark.parametrize("thresholds", ["[nan]", "[a]", "5", "[2,1]", "[]", "[[1]]", "{a: 1}", "text"])
def test_thresholds_that_are_none_are_one_line(thresholds: str) -> None:
    with pytest.raises(UserError, match="thresholds"):
        build_vae(load(DEMO, [f"dvae.overrides.thresholds={thresholds}"]))


@pytest.mark.parametrize("value_range", ["[0]", "[0,1,2]", "[1,0]", "5", "[a,b]", "null"])
def test_a_value_range_that_is_none_is_named(value_range: str) -> None:
    with pytest.raises(UserError, match="configuration: dvae: value_range"):
        build_vae(load(DEMO, [f"dvae.overrides.value_range={value_range}"]))


def test_old_records_of_runs_are_read(tmp_path: Path) -> None:
    """As OmegaConf wrote them: a side for image_size."""
    plain = dataclasses.asdict(load(DEMO, []))
    plain["data"]["image_size"] = 64
    (tmp_path / "c.yaml").write_text(json.dumps(plain))
    assert load(tmp_path / "c.yaml") == load(DEMO, [])


def test_a_configuration_that_cannot_be_read_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "pipe.yaml"
    os.mkfifo(path)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: not a regular file"
