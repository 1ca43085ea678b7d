"""`multistep.keras.optimize`: the tutorials' program, fast layers that are Keras's, words of the compiled model, other backends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("keras", reason='keras is not installed: pip install "multistep[keras]"')
import keras
import torch

import multistep
from multistep import objectives
from multistep.objectives import CrossEntropy, Penalized
from multistep.types import Interrupted, UserError

if keras.backend.backend() != "torch":
    pytest.skip("these tests run Keras on torch: KERAS_BACKEND says otherwise", allow_module_level=True)

from multistep.keras_compiled import WRAPPERS, goal_of, targets_of, updates_of
from multistep.keras_module import KerasModule, as_function
from multistep.models.recurrence import has_bf16

Arrays = tuple[np.ndarray, np.ndarray]


def marked(n: int, seed: int, words: int = 30, steps: int = 10) -> Arrays:
    """Rows of tokens; 1 where token 7 or 9 occurs."""
    x = np.random.default_rng(seed).integers(1, words, (n, steps))
    return x, np.isin(x, (7, 9)).any(1).astype("float32")


def tutorial(**lstm: Any) -> Any:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential([layers.Embedding(30, 8), layers.LSTM(8, **lstm), layers.Dense(1, activation="sigmoid")])
    model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy", metrics=["accuracy"])
    return model


def run(model: Any, **more: Any) -> Any:
    given: dict[str, Any] = {"validation_data": marked(200, 1), "budget": "4 epochs", "verbose": 0}
    return multistep.keras.optimize(model, *marked(600, 0), **{**given, **more})


def test_a_sum_over_the_batch_is_not_taken_for_a_mean() -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", keras.losses.MeanSquaredError(reduction="sum"))
    with pytest.raises(UserError, match="reduction='sum' has no counterpart"):
        goal_of(model, None)
    model.compile("sgd", keras.losses.MeanSquaredError())
    assert goal_of(model, None)[0]["kind"] == "mse"


def test_the_tutorial_trains_in_place_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, (u, v) = tutorial(), marked(200, 1)
    result = run(model, verbose=1)
    loss, accuracy = model.evaluate(u, v, verbose=0)
    assert result.model is model and model.layers[-1].activation is keras.activations.sigmoid
    assert result.best.value == pytest.approx(loss, abs=1e-5)
    assert result.validation["accuracy"].value == pytest.approx(accuracy) and accuracy > 0.9
    shown = capsys.readouterr().err
    assert all(f"epoch {n}: training loss" in shown and "validation loss" in shown for n in (1, 2, 3, 4))
    assert "the learning rate was given: 0.02" in shown and "adam was given" in result.explain()
    result.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(again.predict(u, verbose=0), model.predict(u, verbose=0), atol=1e-6)


def test_repeats_to_the_last_bit_and_resumes_a_finished_run(tmp_path: Path) -> None:
    one, two = tutorial(), tutorial()
    run(one, out=tmp_path / "r", budget="2 epochs")
    run(two, budget="2 epochs")
    three = tutorial()
    run(three, out=tmp_path / "r", budget="2 epochs")
    for other in (two, three):
        assert all(np.array_equal(a, b) for a, b in zip(one.get_weights(), other.get_weights(), strict=True))


def test_overfitting_ends_the_training_and_is_named() -> None:
    x, _ = marked(80, 0, steps=6)
    u, v = marked(300, 1, steps=6)
    y = np.random.default_rng(5).integers(0, 2, 80)
    model = tutorial()
    result = multistep.keras.optimize(model, x, y, validation_data=(u, v), budget="60 epochs", batch_size=16, verbose=0)
    (said,) = [r for r in result.records() if r["kind"] == "Diagnosed" and r.get("at") != "end"]
    assert said["name"] == "overfitting"
    assert said["numbers"]["now"]["validation_loss"] > said["numbers"]["best"]["validation_loss"]
    looks = [r["facts"] for r in result.records() if r["kind"] == "Noted" and r["what"] == "looked"]
    assert [f["epoch"] for f in looks] == list(range(1, len(looks) + 1)) and len(looks) < 60
    assert "overfitting" in result.explain()


@pytest.mark.parametrize(
    "settings",
    [{}, {"return_sequences": True}, {"go_backwards": True}, {"use_bias": False}, {"dropout": 0.5}, {"stateful": True}],
)
def test_fast_layers_are_those_of_keras(settings: dict[str, Any]) -> None:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((7, 5), batch_size=20)
    model = keras.Model(inputs, keras.layers.LSTM(6, **settings)(inputs))
    x = torch.randn(20, 7, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for fast in (False, True):
        module = KerasModule(model, "identity")
        if fast:
            with as_function(model, "identity"):
                assert "inner_loop" in model.layers[-1].__dict__
                outputs = module(x)
        else:
            outputs = module(x)
        assert "inner_loop" not in model.layers[-1].__dict__
        found.append([outputs, *torch.autograd.grad(outputs.square().sum(), list(module.parameters()))])
        for layer in model.layers:  # the same dropout, the same start
            if isinstance(layer, keras.layers.LSTM):
                layer.cell.seed_generator.state.assign(np.array([1, 0], dtype="int32"))
                if layer.stateful:
                    layer.reset_states()
        if settings.get("dropout"):
            module.eval()
            found[-1][1:] = []
            with as_function(model, "identity"):
                found[-1][0] = module(x)
    for slow, quick in zip(*found, strict=True):
        torch.testing.assert_close(quick, slow, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_tutorials_model_is_asked_as_keras_asks_it(bf16: bool) -> None:
    """Stacked, on its own path past Keras's layers: values and gradients, in bf16 within its rounding, and only in training."""
    if bf16 and not has_bf16():
        pytest.skip("no fast bf16 here")
    keras.utils.set_random_seed(1)
    layers = keras.layers
    stack = [layers.LSTM(6, return_sequences=True), layers.LSTM(5, use_bias=False), layers.Dense(4, activation="tanh")]
    model = keras.Sequential([layers.Embedding(30, 8), *stack, layers.Dense(1, activation="sigmoid")])
    x = torch.randint(0, 30, (20, 7), generator=torch.Generator().manual_seed(0))
    model(x)
    found = []
    for fast in (False, True):
        with as_function(model, "sigmoid", bf16) if fast else nullcontext("sigmoid") as link:
            assert ("stateless_call" in model.__dict__) == fast
            module = KerasModule(model, link).train()
            logits = module(x)
            found.append([logits, *torch.autograd.grad(logits.sum(), list(module.parameters()))])
            judged = module.eval()(x)
    assert "stateless_call" not in model.__dict__
    torch.testing.assert_close(judged, found[0][0], rtol=2e-5, atol=2e-5)
    for slow, quick in zip(*found, strict=True):
        if bf16:
            assert (quick - slow).norm() <= 0.02 * slow.norm()
        else:
            torch.testing.assert_close(quick, slow, rtol=2e-4, atol=2e-5)


def test_masks_and_other_cells_stay_with_keras() -> None:
    layers = keras.layers
    model = keras.Sequential([layers.Embedding(30, 4, mask_zero=True), layers.LSTM(4), layers.Dense(1)])
    other = keras.Sequential([layers.LSTM(4, recurrent_activation="hard_sigmoid")])
    x = torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]])
    before = model(x)
    other(torch.zeros(1, 2, 3))
    with as_function(model, "identity"), as_function(other, "identity"):
        torch.testing.assert_close(model(x), before)
        assert "inner_loop" not in other.layers[0].__dict__


def test_running_statistics_and_dropout_move_and_repeat() -> None:
    def build() -> Any:
        keras.utils.set_random_seed(0)
        layers = keras.layers
        model = keras.Sequential(
            [layers.Dense(8), layers.BatchNormalization(), layers.Dropout(0.3), layers.Dense(3, activation="softmax")]
        )
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "sparse_categorical_crossentropy")
        return model

    rng = np.random.default_rng(0)
    x = rng.normal(3, 1, (300, 4))
    y = x[:, :3].argmax(1)
    results = [multistep.keras.optimize(build(), x, y, budget="20 epochs", verbose=0) for _ in range(2)]
    means = [np.asarray(r.model.layers[1].moving_mean.value) for r in results]
    assert np.abs(means[0]).sum() > 0 and np.array_equal(*means)
    assert results[0].validation["accuracy"].value > 0.7
    assert results[0].model.predict(x[:2], verbose=0).sum(1) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "loss, kind, link",
    [
        ("binary_crossentropy", {"kind": "binary_cross_entropy"}, "sigmoid"),
        (keras.losses.BinaryCrossentropy(from_logits=True), {"kind": "binary_cross_entropy"}, "identity"),
        (
            keras.losses.CategoricalCrossentropy(label_smoothing=0.125),
            {"kind": "cross_entropy", "label_smoothing": 0.125},
            "softmax",
        ),
        (keras.losses.sparse_categorical_crossentropy, {"kind": "cross_entropy"}, "softmax"),
        ("mse", {"kind": "mse"}, "identity"),
        ("mae", {"kind": "mae"}, "identity"),
        (keras.losses.Huber(delta=2.0), {"kind": "huber", "delta": 2.0}, "identity"),
    ],
)
def test_losses_in_our_words(loss: Any, kind: dict[str, Any], link: str) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("adam", loss)
    assert goal_of(model, None)[:2] == (kind, link)


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "penalized", "inner": {"kind": "cross_entropy"}},
        {"kind": "penalized", "inner": CrossEntropy(label_smoothing=0.1)},
        {"kind": "r_drop", "inner": {"kind": "penalized"}},
        "r_drop",
        Penalized(l2=0.01),
    ],
    ids=str,
)
def test_wrappers_around_cross_entropy_read_classes(objective: Any) -> None:
    model = keras.Sequential(
        [keras.layers.Dense(8), keras.layers.Dropout(0.1), keras.layers.Dense(3, activation="softmax")]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    x = np.random.default_rng(0).normal(0, 1, (200, 3)).astype("float32")
    result = multistep.keras.optimize(model, x, x.argmax(1), objective=objective, budget="8 epochs", verbose=0)
    assert np.isfinite(result.best.value) and "accuracy" in result.validation


def test_what_wraps_is_told_by_its_core() -> None:
    assert {m.model_fields["kind"].default for m in objectives.WRAPPERS} == set(WRAPPERS)
    y = np.array([0.0, 1.0, 2.0])
    for objective, kind in (
        ("fgm", "i"),
        ({"kind": "fgm", "inner": "mse"}, "f"),
        ({"kind": "penalized", "inner": {"kind": "huber"}}, "f"),
    ):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, activation="sigmoid")])
        goal = goal_of(model, objective)
        assert targets_of(y, goal, "y").dtype.kind == kind and goal.link == ("sigmoid" if kind == "i" else "identity")


@pytest.mark.parametrize(
    "optimizer, found",
    [
        (keras.optimizers.Adam(0.002), {"kind": "adam", "lr": 0.002, "eps": 1e-7, "beta2": 0.999}),
        (keras.optimizers.AdamW(0.002), {"kind": "adamw", "lr": 0.002, "weight_decay": 0.004}),
        (keras.optimizers.SGD(0.1), {"kind": "sgd", "lr": 0.1}),
        (keras.optimizers.SGD(0.1, momentum=0.8, nesterov=True), {"kind": "nesterov", "momentum": 0.8}),
        (keras.optimizers.RMSprop(0.001), {"kind": "rmsprop", "alpha": 0.9}),
        (keras.optimizers.Lion(0.001), {"kind": "lion", "beta1": 0.9}),
    ],
)
def test_optimizers_in_our_words(optimizer: Any, found: dict[str, Any]) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    said = updates_of(model, None).optimizer
    assert {k: pytest.approx(v) if isinstance(v, float) else v for k, v in found.items()} == {k: said[k] for k in found}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"loss": "cosine_similarity"}, ("loss", "cosine_similarity")),
        ({"optimizer": keras.optimizers.Ftrl()}, ("optimizer", "Ftrl")),
        ({"budget": "3 aeons"}, ("budget", "aeons")),
        ({"metric": "f3"}, ("metric", "f3")),
        ({"precision": "bf61"}, ("precision", "bf61")),
        ({"y": np.array(["good"] * 600)}, ("y", "numbers")),
        ({"x": np.array(["a text"] * 600)}, ("x", "numbers")),
        ({"regularizer": "l2"}, ("regularizers",)),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], words: tuple[str, ...]) -> None:
    model = keras.Sequential(
        [
            keras.layers.Embedding(30, 4),
            keras.layers.LSTM(4),
            keras.layers.Dense(1, kernel_regularizer=change.get("regularizer")),
        ]
    )
    model.compile(change.get("optimizer", "adam"), change.get("loss", "mse"))
    x, y = marked(600, 0)
    more = {k: change[k] for k in ("budget", "metric", "precision") if k in change}
    with pytest.raises(UserError) as caught:
        multistep.keras.optimize(model, change.get("x", x), change.get("y", y), **more)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_importing_multistep_does_not_import_keras() -> None:
    code = "import sys, multistep; assert 'keras' not in sys.modules; multistep.keras; assert 'keras' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "KERAS_BACKEND": "torch"})


# ---------------------------------------------------------------------------------------------- in a process of its own


def test_another_process_trains_to_the_same_weights(tmp_path: Path) -> None:
    """What a Keras on TensorFlow or JAX gets: files there and back."""
    from multistep import keras as front

    here, there = tutorial(), tutorial()
    run(here, budget="2 epochs")
    asked = front._here
    front_here, front._here = asked, front._elsewhere
    try:
        run(there, budget="2 epochs")
        with pytest.raises(UserError, match="metric: 'f3'"):
            run(tutorial(), metric="f3")
    finally:
        front._here = front_here
    for one, two in zip(here.get_weights(), there.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


TENSORFLOW = textwrap.dedent("""
    import sys, numpy as np, keras, multistep
    assert keras.backend.backend() == "tensorflow"
    x = np.random.default_rng(0).integers(1, 30, (300, 10))
    y = np.isin(x, (7, 9)).any(1).astype("float32")
    saved = keras.saving.load_model(sys.argv[1])
    assert np.abs(saved.predict(x[:64], verbose=0) - np.load(sys.argv[2])).max() < 1e-4
    before = saved.evaluate(x, y, verbose=0)[0]
    result = multistep.keras.optimize(saved, x, y, validation_data=(x, y), budget="2 epochs", verbose=0)
    assert abs(saved.evaluate(x, y, verbose=0)[0] - result.best.value) < 1e-4 and result.best.value < before
""")


def test_on_tensorflow_the_file_predicts_the_same_and_the_call_works(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="tensorflow is not installed")
    model = tutorial()
    result = run(model, budget="2 epochs")
    result.save(tmp_path / "m.keras")
    x = np.random.default_rng(0).integers(1, 30, (300, 10))
    np.save(tmp_path / "p.npy", model.predict(x[:64], verbose=0))
    command = [sys.executable, "-c", TENSORFLOW, str(tmp_path / "m.keras"), str(tmp_path / "p.npy")]
    subprocess.run(command, check=True, env={**os.environ, "KERAS_BACKEND": "tensorflow"})


def test_a_signal_to_the_parent_reaches_the_worker_which_saves(tmp_path: Path) -> None:
    import signal
    import threading
    import time

    from multistep import keras as front

    book = tmp_path / "r" / "journal.jsonl"

    def strike() -> None:
        while not (book.exists() and '"Measured"' in book.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    front_here, front._here = front._here, front._elsewhere
    threading.Thread(target=strike, daemon=True).start()
    try:
        with pytest.raises(Interrupted):
            run(tutorial(), budget="10000 epochs", out=tmp_path / "r")
    finally:
        front._here = front_here
    assert '"Interrupted"' in book.read_text() and list((tmp_path / "r" / "states").glob("*.live.*"))
