"""The configuration: file, options and overrides, in this order; errors name the key and the mend; rerunning repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from multistep.config import FitConfig, resolve, save_config
from multistep.schedules import Constant, Linear
from multistep.types import UserError


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def test_data_alone_is_enough() -> None:
    config = resolve("reviews.csv", {}, [])
    assert config == FitConfig(data="reviews.csv", out="runs/reviews") and config.budget == "300s"


def test_overrides_win_over_options_and_these_over_the_file(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        "data: a.csv\nseed: 1\nbudget: 10m\nbatch_size: 8\noptimizer:\n  lr: 1e-4\n  weight_decay: 0.1\nlayers: 2\n",
    )
    options = {"seed": 2, "budget": "20m", "metric": None, "text": (), "label": "y"}
    config = resolve(source, options, ["seed=3", "optimizer.lr=2e-4"])
    assert (config.seed, config.budget, config.batch_size, config.layers) == (3, "1200s", 8, 2)
    assert config.optimizer.lr == 2e-4 and config.optimizer.weight_decay == 0.1
    assert config.label == "y" and config.metric is None and config.text == ()
    assert resolve(source, {}, []).optimizer.lr == 1e-4, "YAML 1.1 reads 1e-4 as text"


@pytest.mark.parametrize(
    "override, path, value",
    [
        ("optimizer.lr=1e-4", ("optimizer", "lr"), 1e-4),
        ("optimizer.lr=0.001", ("optimizer", "lr"), 1e-3),
        ("layers=3", ("layers",), 3),
        ("seed=1e3", ("seed",), 1000),
        ("budget=5000 updates", ("budget",), "5000 updates"),
        ("budget=2e6 tokens", ("budget",), "2000000 tokens"),
        ("budget=300", ("budget",), "300s"),
        ("text=body", ("text",), ("body",)),
        ("text=[title, body]", ("text",), ("title", "body")),
        ("label=a=b", ("label",), "a=b"),
        ("model=none", ("model",), "none"),
        ("schedule.warmup=0.1", ("schedule",), Linear(warmup=0.1)),
        ("schedule.kind=constant", ("schedule",), Constant()),
        ("max_length=null", ("max_length",), None),
        ("out=here", ("out",), "here"),
    ],
)
def test_values_of_overrides(override: str, path: tuple[str, ...], value: Any) -> None:
    found: Any = resolve("x.csv", {}, [override])
    for key in path:
        found = getattr(found, key)
    assert found == value and type(found) is type(value)


def test_two_overrides_of_one_section() -> None:
    config = resolve(
        "x.csv", {}, ["schedule.kind=constant", "schedule.warmup=0.2", "optimizer.beta1=0.8", "optimizer.beta2=0.9"]
    )
    assert config.schedule == Constant(warmup=0.2)
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.8, 0.9)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["sed=1"], r"unknown key 'sed'\. Did you mean 'seed'\?"),
        (["optimzer.lr=1"], r"unknown key 'optimzer\.lr'\. Did you mean 'optimizer'\?"),
        (["optimizer.lrr=1"], r"unknown key 'optimizer\.lrr'\. Did you mean 'lr'\?"),
        (["schedule.warmpu=0.1"], r"unknown key 'schedule\.linear\.warmpu'\. Did you mean 'warmup'\?"),
        (["zzzzz=1"], r"unknown key 'zzzzz'\. Known: adapter, augment, batch_growth"),
        (["seed.x=1"], r"'seed': .*integer"),
        (["seed=1", "seed.x=1"], r"override 'seed\.x=1': 'seed' has no keys below it\."),
        (["seed"], r"override 'seed' is not key=value\. Write e\.g\. optimizer\.lr=1e-4\."),
        (["=1"], r"override '=1' is not key=value"),
        (["batch_size=many"], r"'batch_size': .*integer.*\(got 'many'\)"),
        (["batch_size=1.5"], r"'batch_size': .*\(got 1\.5\)"),
        (["batch_size=0"], r"'batch_size': .*greater than or equal to 1"),
        (["optimizer.lr=fast"], r"'optimizer\.lr': .*number.*\(got 'fast'\)"),
        (["optimizer=adam"], r"'optimizer'"),
        (["controller=magic"], r"'controller': .*'staged'.*\(got 'magic'\)"),
        (["precision=fp16"], r"'precision'"),
        (["budget=soon"], r"budget: 'soon' is not a budget\. Write 30s"),
        (["budget=0s"], r"budget: '0s' must be above zero"),
        (["seed=-1"], r"'seed': .*greater than or equal to 0"),
        (["dropout=1"], r"'dropout': .*less than 1"),
        (["data="], r"'data'"),
        (["width=64"], r"width: read by tasks that write \(lm, .*\) alone, not by labels\. Leave it out\."),
        (["task=regress", "batch_tokens=64"], r"batch_tokens: .* not by labels\. Write batch_size\."),
        (["task=lm", "batch_size=8"], r"batch_size: read by tasks with labels alone, not by lm\. Write batch_tokens\."),
        (["task=translate", "augment.swap=0.1"], r"augment: .* not by translate\."),
        (["task=chat", "skip=refit"], r"skip: chat has no stage 'refit'\. It may skip race, average and predict\."),
    ],
)
def test_errors_name_the_key(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve("x.csv", {}, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("data: a.csv\nsed: 1\n", r"unknown key 'sed'\. Did you mean 'seed'\?"),
        ("data: a.csv\noptimizer:\n  lrr: 1\n", r"unknown key 'optimizer\.lrr'\. Did you mean 'lr'\?"),
        ("data: a.csv\noptimizer: 3\n", r"'optimizer'"),
        ("data: [a.csv\n", r"run\.yaml: cannot be read as YAML \("),
        ("data: a.csv\n\tseed: 1\n", r"run\.yaml: cannot be read as YAML"),
        ("- a\n- b\n", r"run\.yaml: a configuration is 'key: value' lines, this is list\."),
        ("", r"run\.yaml: a configuration is 'key: value' lines"),
        ("seed: 1\n", r"run\.yaml: the key 'data' is missing"),
        ("data: 3\n", r"'data': .*string.*\(got 3\)"),
        ("data: a.csv\n3: 4\n", r"'?3'?"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(write(tmp_path, text), {}, [])
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file\."):
        resolve(str(tmp_path / "nowhere.yaml"), {}, [])
    (tmp_path / "folder.yml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"data: \xff\xfe\n")
    for name in ("folder.yml", "bytes.yaml"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as YAML"):
            resolve(str(tmp_path / name), {}, [])


@pytest.mark.parametrize(
    "source, out",
    [
        ("reviews.csv", "runs/reviews"),
        ("a/b/reviews.jsonl.gz", "runs/reviews"),
        ("folder/", "runs/folder"),
        ("org/name", "runs/name"),
        ("v1.2.parquet", "runs/v1.2"),
        ("...csv", "runs/run"),
        (".csv", "runs/run"),
    ],
)
def test_where_the_run_goes(source: str, out: str) -> None:
    assert resolve(source, {}, []).out == out
    assert resolve(source, {"out": "there"}, []).out == "there"


def test_a_folder_by_dots_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs/..` would be the current folder."""
    (tmp_path / "reviews" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "reviews" / "inner")
    for source, out in (
        (".", "runs/inner"),
        ("..", "runs/reviews"),
        ("../", "runs/reviews"),
        ("x/..", "runs/inner"),
        ("/", "runs/run"),
    ):
        assert resolve(source, {}, []).out == out, source


def test_data_may_lie_beside_its_configuration(tmp_path: Path) -> None:
    source = write(tmp_path, "data: here.csv\n")
    assert resolve(source, {}, []).data == "here.csv"
    (tmp_path / "here.csv").write_text("text,label\n")
    assert resolve(source, {}, []).data == str(tmp_path / "here.csv")


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    overrides = ["optimizer.lr=1e-5", "schedule.kind=constant", "text=[a, b]", "seed=7", "label=ü", "budget=0.1s"]
    config = resolve("x.csv", {"budget": "1h"}, overrides)
    save_config(config, tmp_path / "config.yaml")
    again = resolve(str(tmp_path / "config.yaml"), {}, [])
    assert again == config
    save_config(again, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "config.yaml").read_bytes()
