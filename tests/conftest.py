"""What many tests share: a tiny random encoder, random rows for it, and the folder of public data."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from multistep.evaluate import Rows
    from multistep.models.encoder import Encoder
    from multistep.strategy import FineTune

VOCABULARY, WIDTH, PAD = 100, 32, 0


@pytest.fixture(scope="session")
def shared() -> Path:
    """The public datasets that lie beside the repository."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data").is_dir():
        pytest.skip(f"{path / 'data'} is not there: this test reads the public datasets beside the repository")
    return path


@pytest.fixture
def torch_seeded() -> Iterator[None]:
    """The same random numbers in every test; one thread, so that sums are added in one order."""
    import torch

    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_encoder(torch_seeded: None) -> Callable[..., Encoder]:
    """`make_encoder(layers=2, n_outputs=3)`: a random BERT of width 32 whose head is not zero."""
    import torch

    from multistep.models.encoder import Encoder, new_backbone

    def make(layers: int = 2, n_outputs: int = 3) -> Encoder:
        model = Encoder(new_backbone(VOCABULARY, PAD, WIDTH, layers, max_length=64, seed=1), n_outputs)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            model.head.weight.copy_(0.1 * torch.randn(model.head.weight.shape, generator=generator))
        return model

    return make


@pytest.fixture
def make_rows() -> Callable[..., Rows]:
    """`make_rows(n, n_outputs=3, seed=0)`: texts as random ids; the class is in the first id, so it can be learned."""
    import torch

    from multistep.evaluate import Rows

    def make(n: int = 48, n_outputs: int = 3, seed: int = 0) -> Rows:
        rng = np.random.default_rng(seed)
        targets = rng.integers(0, n_outputs, n)
        ids = [rng.integers(10, VOCABULARY, rng.integers(3, 13)).astype(np.int32) for _ in range(n)]
        for row, target in zip(ids, targets, strict=True):
            row[:2] = 1 + target
        return Rows(ids, PAD, "cpu", torch.from_numpy(targets))

    return make


@pytest.fixture
def make_strategy() -> Callable[..., FineTune]:
    """`make_strategy(lr=..., **fields)`: fine-tuning in batches of 8, all parameters by default."""
    from multistep.optimizers import AdamW
    from multistep.strategy import FineTune

    def make(lr: float = 1e-3, weight_decay: float = 0.01, **fields: Any) -> FineTune:
        return FineTune(
            optimizer=AdamW(lr=lr, weight_decay=weight_decay), **{"trains": "all", "batch_size": 8, **fields}
        )

    return make


_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window; the test is skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api")
    found = next((path for name in _CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium on PATH (looked for {', '.join(_CHROMIUM)}): the page is not opened")
    with api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()
