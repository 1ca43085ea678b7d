"""The plain way to serve a classifier: transformers' text-classification pipeline behind FastAPI, one request at a time.

The encoder is the one that ours has (all-MiniLM), with a head of as many labels; its numbers are random, which costs the same time.
Prints its address as JSON once it listens.
"""

from __future__ import annotations

import json
import socket
import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import peer_trainer


class Asked(BaseModel):
    text: str


def application(labels: int) -> FastAPI:
    folder = peer_trainer.encoder_folder()
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder), device=-1)
    app = FastAPI()

    @app.post("/predict")
    async def predict(asked: Asked) -> dict[str, str | float]:
        return classify(asked.text, truncation=True)[0]

    return app


def main() -> None:
    app = application(int(sys.argv[1]))
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(json.dumps({"address": f"http://127.0.0.1:{listening.getsockname()[1]}"}), flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    main()
