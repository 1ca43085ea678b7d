"""Examples for any module: tensors, a torch Dataset or a DataLoader, as batches in an order that a cursor can resume.

A DataLoader's own sampler and collate function are kept: its batch sampler is drawn once an epoch under a seed of
(seed, epoch), so that stopping anywhere and going on gives the same batches. Where it judges, the rows that its sampler gives are
judged, each once. Its worker processes are not used.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate
from torch.utils.data.distributed import DistributedSampler

from multistep.data.batches import Batches
from multistep.types import UserError

Split = Callable[[Any], tuple[Any, Any]]  # a batch -> its inputs and its targets
_LABELS = ("labels", "label", "target", "targets", "y")


class ModuleRows:
    """Rows by number, as `train` reads them. `split` says what of a batch are inputs: by default all but the last of a
    tuple, or all but "labels" of a dictionary."""

    def __init__(
        self, dataset: Dataset[Any], device: str, split: Split | None = None, loader: DataLoader | None = None
    ):
        self.dataset, self.device, self._loader = dataset, device, loader
        self._split = split or split_batch
        self._collate = default_collate if loader is None else loader.collate_fn
        # Rows of tensors are taken at once: putting them together one by one costs more than many a model.
        self._tensors = None
        if isinstance(dataset, TensorDataset | _Columns) and self._collate is default_collate:
            self._tensors = dataset.tensors
        self._targets = dataset.targets if isinstance(dataset, _Columns) else 0

    def __len__(self) -> int:
        return len(self.dataset)  # pyright: ignore[reportArgumentType]

    @property
    def count(self) -> int:
        """How many rows an epoch has: those that a loader's sampler gives."""
        sampler = None if self._loader is None or self._loader.batch_size is None else self._loader.sampler
        return len(sampler) if isinstance(sampler, Sized) else len(self)

    @property
    def batch_size(self) -> int | None:
        """The loader's own, where there is one."""
        return None if self._loader is None else self._loader.batch_size

    @property
    def drawn(self) -> bool:
        """Whether a loader draws the batches: they are as large as it makes them, whatever was asked for."""
        return self._loader is not None

    def order(self, batch_size: int, seed: int) -> Batches | LoaderOrder:
        """The batches of a training. Raises UserError where a loader gives none, or does not say how many."""
        if self._loader is not None and self._loader.batch_sampler is not None:
            return LoaderOrder(self._loader, seed)
        return Batches(np.zeros(len(self)), batch_size, seed)

    def load(self, rows: np.ndarray) -> tuple[Any, Any]:
        """Inputs and targets of these rows, on the device."""
        if self._tensors is not None:
            take = torch.from_numpy(np.asarray(rows))
            batch: Any = tuple(t[take] for t in self._tensors)
            if self._targets:  # as they were given: several in one tuple
                batch = (*batch[: -self._targets], batch[-self._targets :])
        else:
            batch = self._collate([self.dataset[int(r)] for r in rows])
        inputs, targets = self._split(batch)
        return _to(inputs, self.device), _to(targets, self.device)

    def outputs(self, model: Any, inputs: Any) -> Tensor:
        """What the model says: a tensor, or the logits of a transformers output."""
        if isinstance(inputs, Mapping):
            found = model(**inputs)
        else:
            found = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        if isinstance(found, Mapping):
            return found["logits"]
        return found[0] if isinstance(found, tuple) else found

    def tokens(self, rows: np.ndarray) -> int:
        """Elements of whole-number inputs such as token ids [N,T]; else the examples."""
        first = None if self._tensors is None else self._tensors[0]
        ids = first is not None and not first.is_floating_point() and first.ndim == 2
        return len(rows) * (first.shape[1] if ids and first is not None else 1)

    def parts(self, size: int) -> Iterator[np.ndarray]:
        """All rows once, in order."""
        for start in range(0, len(self), size):
            yield np.arange(start, min(len(self), start + size))

    def judged(self) -> ModuleRows:
        """The rows to judge on: all, or where a loader picks some by its sampler, these. What is shared out to several processes is judged
        whole."""
        if self._loader is None or isinstance(self._loader.sampler, DistributedSampler):
            return self
        with _seeded(self._loader, 0):
            if self._loader.batch_size is None:  # it has a batch sampler of its own
                drawn = [int(row) for batch in self._loader.batch_sampler or () for row in batch]
            else:
                drawn = [int(row) for row in self._loader.sampler]
        picked = sorted(set(drawn))
        if not picked:
            raise UserError("validation, test: the sampler of this DataLoader gives no row. Give it some.")
        return self if len(picked) == len(self) else self.subset(picked)

    def content(self) -> Iterator[bytes]:
        """What tells these rows from others: of tensors up to a thousand rows; of a Dataset, whose examples may be drawn anew each time, only
        which of its rows were picked."""
        source = self.dataset
        yield f"{len(self)} {self.count}".encode()
        while isinstance(source, Subset):
            yield np.asarray(source.indices).tobytes()
            source = source.dataset
        picked = getattr(getattr(self._loader, "sampler", None), "indices", None)
        if picked is not None:
            yield np.asarray(picked).tobytes()
        for tensor in source.tensors if isinstance(source, TensorDataset | _Columns) else ():
            most = min(len(tensor), 1000, max(2, 2**22 // max(1, tensor[0].numel())))
            take = torch.from_numpy(np.linspace(0, len(tensor) - 1, most).astype(np.int64))
            some = tensor[take].detach().cpu()
            yield f"{tuple(tensor.shape)} {tensor.dtype}".encode()
            yield (torch.view_as_real(some) if some.is_complex() else some).double().numpy().tobytes()

    def subset(self, rows: Sequence[int]) -> ModuleRows:
        """Some of the rows, without the loader's order."""
        if self._tensors is not None:
            take = torch.as_tensor(rows)
            kept = tuple(t[take] for t in self._tensors)
            data = _Columns(kept, self._targets) if self._targets else TensorDataset(*kept)
            return ModuleRows(data, self.device, self._split)
        some = ModuleRows(Subset(self.dataset, rows), self.device, self._split)
        some._collate = self._collate
        return some


class _Columns(Dataset[Any]):
    """Tensors with a row an example, of which the last `targets` are what is to be learned."""

    def __init__(self, tensors: tuple[Tensor, ...], targets: int):
        self.tensors, self.targets = tensors, targets

    def __len__(self) -> int:
        return len(self.tensors[0])


class LoaderOrder:
    """The batches of a DataLoader's batch sampler, epoch after epoch."""

    def __init__(self, loader: DataLoader, seed: int):
        self._loader, self._seed, self._epoch = loader, seed, -1
        self._plan: list[np.ndarray] = []
        try:
            self.per_epoch = len(loader)
        except TypeError:
            raise UserError("train: the sampler of this DataLoader has no length. Give it __len__.") from None
        if not self.per_epoch:
            raise UserError("train: this DataLoader gives no batch. Give it more rows, or leave drop_last out.")

    def at(self, position: int) -> np.ndarray:
        """The rows of batch `position`, counted from the start of training."""
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            self._plan, self._epoch = self._draw(epoch), epoch
        return self._plan[index]

    def _draw(self, epoch: int) -> list[np.ndarray]:
        seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
        assert self._loader.batch_sampler is not None
        with _seeded(self._loader, seed):
            return [np.asarray(batch) for batch in self._loader.batch_sampler]


@contextmanager
def _seeded(loader: DataLoader, seed: int) -> Iterator[None]:
    """Whatever the loader's samplers draw from begins at `seed`, and is afterwards as it was: torch's generators, and those of `random` and
    `numpy.random`. A `numpy.random.Generator` or `random.Random` that a sampler keeps for itself is its own affair."""
    holders = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    owned = {id(g): g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)}
    before = [(generator, generator.get_state()) for generator in owned.values()]
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        for generator, _ in before:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
            for generator, state in before:
                generator.set_state(state)


def rows_of(source: Any, name: str, device: str, split: Split | None = None) -> ModuleRows:
    """A DataLoader, a map-style Dataset, or a tuple of tensors or arrays (inputs ..., targets) as rows; targets of several parts
    are a tuple of their own.

    Raises UserError naming `name` when it is something else, or empty.
    """
    if isinstance(source, DataLoader):
        if isinstance(source.dataset, IterableDataset) or source.batch_sampler is None:
            raise UserError(
                f"{name}: this DataLoader is a stream or has no batches, so no run could come back to a row of it. "
                "Give one over a map-style dataset, with a batch size."
            )
        rows = ModuleRows(source.dataset, device, split, source)
    elif isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        rows = ModuleRows(source, device, split)
    elif isinstance(source, tuple | list) and len(source) >= 2:
        *first, last = source
        several = (
            isinstance(last, tuple) and len(last) >= 2
        )  # targets of more than one part: classes and a teacher's logits
        try:
            tensors = [torch.as_tensor(part) for part in ((*first, *last) if several else source)]
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{name}: not tensors or arrays ({error}). Give (inputs, targets) of numbers.") from None
        if any(t.ndim == 0 for t in tensors):
            raise UserError(
                f"{name}: a single number is no column of rows. Give (inputs, targets), each with a row an example."
            )
        lengths = sorted({len(t) for t in tensors})
        if len(lengths) > 1:
            raise UserError(
                f"{name}: its parts have {' and '.join(map(str, lengths))} rows. Give them the same number."
            )
        data = _Columns(tuple(tensors), len(last)) if several else TensorDataset(*tensors)
        rows = ModuleRows(data, device, split)
    else:
        raise UserError(
            f"{name}: {type(source).__name__} is not data. Give a DataLoader, a map-style Dataset or (inputs, targets)."
        )
    if not len(rows):
        raise UserError(f"{name}: there are no rows in it. Give at least a few.")
    return rows


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a batch. Raises UserError when it cannot be seen which is which."""
    if isinstance(batch, Mapping):
        for key in _LABELS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise UserError(f"batch: none of its keys ({', '.join(map(str, batch))}) is {', '.join(_LABELS)}. Give split=.")
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        return tuple(batch[:-1]), batch[-1]
    raise UserError(
        f"batch: a {type(batch).__name__} is not (inputs, targets). Give split=, a function from it to both."
    )


def _to(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_to(v, device) for v in value)
    return value
