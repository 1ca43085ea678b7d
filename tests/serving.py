"""What the tests of serving share: a server on loopback in a thread, bundles that are made in a second, raw requests."""

from __future__ import annotations

import contextlib
import csv
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from multistep import serve

INFO = {"model": "m", "labels": ["a"]}
ROUTES = ("/predict", "/v1/completions", "/v1/chat/completions")


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The application behind a real server; its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def serve_folder(folder: Path, token: str = "", **settings: Any) -> Any:
    """The application of a bundle, as `multistep serve` makes it."""
    from multistep.bundle import load_bundle
    from multistep.serve.server import _app, _as_tuned, about

    bundle = load_bundle(folder)
    tuned = _as_tuned(serve.Settings(**settings), bundle.info.get("engine") or {})
    return _app(folder, bundle, about(folder, bundle.info), tuned, token)


def chat_bundle(
    folder: Path, kind: str = "chat", context: int = 256, template: str | None = None, model: Any = None, **decoding: Any
) -> Path:  # fmt: skip
    """A Llama of one layer with random weights (or `model`), a token a byte, in a bundle that takes turns (or goes on with a text)."""
    from multistep import dialogue
    from multistep.codec import Codec
    from multistep.data.shapes import Layout
    from multistep.language_bundle import write_language_bundle
    from multistep.models.decoder import new_decoder
    from multistep.predictors.decoding import Beam, Greedy, Sample
    from multistep.subwords import train_bytes
    from multistep.tasks.writing import Writing
    from multistep.writing import Neural

    made = folder / "tokenizer"
    made.mkdir(parents=True)
    train_bytes(["a b"], 259, made / "tokenizer.json")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    (made / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    codec = Codec.load(made)
    if kind == "chat":
        codec.tokenizer.chat_template = template
        dialogue.ensure_template(codec.tokenizer)
    ids = {"pad": codec.pad, "bos": codec.bos, "eos": codec.eos}
    model = new_decoder(len(codec.tokenizer), 32, 1, context, ids, 0) if model is None else model
    members = {"beams": Beam, "temperature": Sample}
    member = next((m for key, m in members.items() if key in decoding), Greedy)
    how = member(**{"max_new_tokens": 16, **decoding})
    task = Writing(kind=kind)  # pyright: ignore[reportArgumentType]
    neural = Neural(model, codec, task, "prompts" if kind == "chat" else "stream", context, how)
    layout = Layout(task=kind, form="messages" if kind == "chat" else "text", source=("text",))
    standing = {"kind": "model", "decoding": how.model_dump(mode="json")}
    extra = {"metric": "bits_per_byte", "stream": kind == "lm"}
    write_language_bundle(folder / "talk" / "model", task, layout, neural, standing, extra)
    return folder / "talk"


def label_bundle(folder: Path) -> Path:
    """A linear model of three labels, fitted in a second, with its journal."""
    from runs import LABELS, run, write_rows

    from multistep.config import FitConfig

    data = write_rows(folder / "rows.csv")
    settings = {"data": str(data), "out": str(folder / "winds"), "model": "none", "budget": "40 updates"}
    run(FitConfig.parse(settings))
    assert set(LABELS) == {row["label"] for row in csv.DictReader(open(data, encoding="utf-8"))}  # noqa: SIM115
    return folder / "winds"


def raw(address: str, sent: bytes, seconds: float = 5.0) -> bytes:
    """What comes back for these bytes, until the connection is closed or nothing more comes for `seconds`."""
    host, port = address.removeprefix("http://").split(":")
    found = b""
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(sent)
        try:
            while part := connection.recv(65536):
                found += part
        except TimeoutError:
            pass
    return found


def numbers(address: str, **options: Any) -> dict[str, float]:
    """What /metrics says, by name and labels."""
    text = httpx.get(f"{address}/metrics", **options).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            shown = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{shown}}}" if shown else sample.name] = sample.value
    return found
