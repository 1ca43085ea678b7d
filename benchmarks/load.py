"""A served classifier under load, on loopback: ours against transformers' pipeline behind FastAPI (peer_serve.py).

One server is measured at a time; it and this generator share the cores. Closed loop: so many clients, each asks again when it is
answered; the systems take turns, a round is a seed. Open loop: requests come at 80 % of ours' best rate at random times (a Poisson
process), whether or not the last were answered; a latency counts from when a request was due. Overload: far more clients than the
queue has room for, who wait as long as a refusal says; then how soon a lone request is answered again. Fuzz: bodies of noise and of
broken JSON; the memory before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _common import ROOT, Results, Row, load, load_average, markdown, mean_sd, parser, select, values

BENCH = "load"
CLIENTS = (1, 8, 32, 64)
WARM_S = 1.0
SHARE = 0.8  # of the best rate, for the open loop
PROBES, PROBE_S = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4), 15.0  # of the best closed rate; seconds each
OVERLOAD = 700  # clients
OPEN_CLIENTS = 300  # connections of the open loop
FUZZED = 1000


# ---------------------------------------------------------------------------------------------- servers


class Server:
    def __init__(self, process: subprocess.Popen[str], address: str):
        self.process, self.port = process, int(address.rsplit(":", 1)[1])

    def memory_mb(self) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@contextlib.contextmanager
def started(system: str, run: Path, labels: int) -> Iterator[Server]:
    command = [sys.executable, "-m", "multistep", "serve", str(run), "--port", "0", "--json"]
    if system == "peer":
        command = [sys.executable, str(ROOT / "benchmarks" / "peer_serve.py"), str(labels)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        yield Server(process, json.loads(process.stdout.readline())["address"])
    finally:
        process.terminate()
        process.wait(60)


# ---------------------------------------------------------------------------------------------- requests


def request(body: bytes) -> bytes:
    head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def requests(texts: Sequence[str]) -> list[bytes]:
    return [request(json.dumps({"text": text}).encode()) for text in texts]


class Client:
    """One connection that is kept."""

    def __init__(self, port: int):
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self.after_s = 1.0  # what the last refusal asked to wait

    async def ask(self, sent: bytes) -> int:
        """The status of the answer; 0 where the connection broke."""
        try:
            if self._reader is None:
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
            self._writer.write(sent)
            head = await self._reader.readuntil(b"\r\n\r\n")
            lower = head.lower()
            at = lower.index(b"content-length:") + 15
            await self._reader.readexactly(int(lower[at : lower.index(b"\r\n", at)]))
            if b"retry-after: " in lower:
                self.after_s = float(lower.split(b"retry-after: ")[1].split(b"\r\n")[0])
            if b"connection: close" in lower:
                self.close()
            return int(head[9:12])
        except (OSError, asyncio.IncompleteReadError, ValueError):
            self.close()
            return 0

    def close(self) -> None:
        if self._reader is not None:
            self._writer.close()
            self._reader = None


class Seen:
    """Latencies in seconds of what was answered with 200, and how often each status came."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.statuses: Counter[int] = Counter()

    def note(self, status: int, seconds: float) -> None:
        self.statuses[status] += 1
        if status == 200:
            self.latencies.append(seconds)

    def row(self, seconds: float) -> Row:
        found = sorted(self.latencies)
        at = lambda q: round(1000 * found[min(len(found) - 1, int(q * len(found)))], 2) if found else None  # noqa: E731
        errors = sum(n for status, n in self.statuses.items() if status not in (200, 429))
        row: Row = {"ok": bool(found), "requests_per_s": round(len(found) / seconds, 1), "answered": len(found)}
        row |= {"p50_ms": at(0.5), "p95_ms": at(0.95), "p99_ms": at(0.99), "errors": errors}
        return row | {"refused": self.statuses[429], "statuses": {str(k): n for k, n in sorted(self.statuses.items())}}


async def closed(
    port: int, sent: Sequence[bytes], clients: int, seconds: float, seed: int, warm_s: float = WARM_S
) -> Seen:
    """So many clients, each asks again when it is answered. The first `warm_s` are not counted."""
    seen, begun = Seen(), time.perf_counter()

    async def one(number: int) -> None:
        rng, client = random.Random(seed * 1000 + number), Client(port)
        while (start := time.perf_counter()) < begun + warm_s + seconds:
            status = await client.ask(rng.choice(sent))
            end = time.perf_counter()
            if begun + warm_s <= end < begun + warm_s + seconds:
                seen.note(status, end - start)
            if status in (0, 429):
                await asyncio.sleep(client.after_s)
        client.close()

    await asyncio.gather(*(one(n) for n in range(clients)))
    return seen


async def opened(port: int, sent: Sequence[bytes], rate: float, seconds: float, seed: int) -> Seen:
    """Requests that come at random times, `rate` a second."""
    seen, rng, due = Seen(), random.Random(seed), asyncio.Queue[float | None]()
    free = [Client(port) for _ in range(OPEN_CLIENTS)]

    async def one(client: Client, number: int) -> None:
        mine = random.Random(seed * 1000 + number)
        while (at := await due.get()) is not None:
            seen.note(await client.ask(mine.choice(sent)), time.perf_counter() - at)
        client.close()

    workers = [asyncio.create_task(one(c, n)) for n, c in enumerate(free)]
    begun = at = time.perf_counter()
    while at < begun + seconds:
        at += rng.expovariate(rate)
        if (wait := at - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        due.put_nowait(at)
    for _ in workers:
        due.put_nowait(None)
    await asyncio.gather(*workers)
    return seen


def sustained(run: Path, labels: int, sent: Sequence[bytes], best: float) -> float:
    """The largest of some rates of random arrivals at which nothing is refused for PROBE_S. Closed loops wait for their answers, so
    what they reach is more than what a server keeps up with when requests come as they like."""
    for share in PROBES:
        with started("ours", run, labels) as server:
            asyncio.run(closed(server.port, sent, 32, 1.0, 0))
            seen = asyncio.run(opened(server.port, sent, share * best, PROBE_S, 0))
        if not seen.row(PROBE_S)["refused"]:
            return share * best
    raise SystemExit(f"load: something is refused at {PROBES[-1]:.0%} of the best closed rate already")


async def overloaded(port: int, sent: Sequence[bytes], seconds: float, seed: int) -> tuple[Seen, float]:
    """What far too many clients see; and after how many seconds a lone request is answered with 200 within a second."""
    seen = await closed(port, sent, OVERLOAD, seconds, seed, 0.0)
    begun = time.perf_counter()
    while True:
        client, start = Client(port), time.perf_counter()
        status = await client.ask(sent[0])
        client.close()
        if status == 200 and time.perf_counter() - start < 1:
            return seen, time.perf_counter() - begun
        await asyncio.sleep(0.02)


def fuzzed(rng: random.Random) -> bytes:
    """Noise, a large body, or a good body with some bytes changed."""
    kind = rng.randrange(3)
    if kind == 0:
        return rng.randbytes(rng.randint(0, 5000))
    if kind == 1:
        return json.dumps(
            {"text": [rng.choice(["x" * 5000, None, 3, {"a": []}]) for _ in range(rng.randint(0, 300))]}
        ).encode()
    body = bytearray(json.dumps({"text": "what is my balance"}).encode())
    for _ in range(rng.randint(1, 5)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return bytes(body)


async def fuzz(port: int, seed: int) -> Counter[int]:
    rng, client = random.Random(seed), Client(port)
    return Counter([await client.ask(request(fuzzed(rng))) for _ in range(FUZZED)])


# ---------------------------------------------------------------------------------------------- the table


def table(rows: list[Row]) -> str:
    parts = []
    peers = {
        c: statistics.fmean(v)
        for c in CLIENTS
        if (v := values(select(rows, system=f"peer closed {c}"), "requests_per_s"))
    }
    body = []
    for system in ("ours", "peer"):
        for c in CLIENTS:
            some = select(rows, system=f"{system} closed {c}")
            if some:
                rates = values(some, "requests_per_s")
                times = f"{statistics.fmean(rates) / peers[c]:.2f}" if c in peers else "-"
                cells = [mean_sd(values(some, k), 1) for k in ("p50_ms", "p95_ms", "p99_ms")]
                body.append([system, c, len(rates), mean_sd(rates, 0), times, *cells, int(sum(values(some, "errors")))])
    head = ["system", "clients", "rounds", "requests/s", "times peer", "p50 ms", "p95 ms", "p99 ms", "errors"]
    parts.append("Closed loop.\n\n" + markdown(head, body))
    for row in [r for r in rows if " open" in r["system"]]:
        parts.append(
            f"Open loop, {row['system'].split()[0]}: {row['rate']:.0f} requests/s due for {row['seconds']:g} s: p50 {row['p50_ms']} ms, "
            f"p95 {row['p95_ms']} ms, p99 {row['p99_ms']} ms, {row['answered']} answered, {row['refused']} refused, {row['errors']} errors."
        )
    for row in select(rows, system="ours overload"):
        parts.append(
            f"Overload, {OVERLOAD} clients: {row['answered']} answered, {row['refused']} refused with 429, {row['errors']} errors; "
            f"a lone request was answered {row['recovery_s']} s after."
        )
    for row in select(rows, system="ours fuzz"):
        parts.append(
            f"Fuzz, {row['statuses']} (status: bodies); memory {row['memory_mb'][0]:.0f} MB before, then "
            f"{', '.join(f'{m:.0f}' for m in row['memory_mb'][1:])} MB after each {FUZZED}."
        )
    return "\n\n".join(parts)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--run", type=Path, required=True, help="a run of a classifier on --dataset")
    options.add_argument("--dataset", default="banking77", help="whose test texts are asked")
    options.add_argument("--seconds", type=float, default=20.0, help="of each closed loop")
    options.add_argument("--open-seconds", type=float, default=600.0, help="of the open loop")
    options.add_argument("--overload-seconds", type=float, default=10.0)
    given = options.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    results = Results(BENCH, given.out, table)
    texts, _ = load(given.dataset, "test")
    sent, labels = requests(texts), len(set(load(given.dataset, "train")[1]))
    budget = f"{given.seconds:g}s"

    def measured(system: str, seed: int, found: Row, before: float) -> None:
        results.add(given.dataset, budget, system, seed, found, before)

    for seed in given.seeds:
        for system in ("ours", "peer"):
            wanted = [c for c in CLIENTS if not results.has(given.dataset, budget, f"{system} closed {c}", seed)]
            if not wanted:
                continue
            with started(system, given.run, labels) as server:
                for clients in wanted:
                    before = load_average()
                    seen = asyncio.run(closed(server.port, sent, clients, given.seconds, seed))
                    measured(f"{system} closed {clients}", seed, seen.row(given.seconds), before)
    best = max(values([r for r in results.rows if r["ok"] and r["system"].startswith("ours closed")], "requests_per_s"))
    if not results.has(given.dataset, budget, "ours open", 0):
        with started("ours", given.run, labels) as server:
            asyncio.run(closed(server.port, sent, 32, 1.0, 0))  # warm
            memory, before = server.memory_mb(), load_average()
            seen = asyncio.run(opened(server.port, sent, SHARE * best, given.open_seconds, 0))
            row = seen.row(given.open_seconds) | {"rate": round(SHARE * best, 1), "seconds": given.open_seconds}
            measured("ours open", 0, row | {"memory_mb": [round(memory, 1), round(server.memory_mb(), 1)]}, before)
    if not results.has(given.dataset, budget, "ours open at a sustained rate", 0):
        rate = sustained(given.run, labels, sent, best)
        with started("ours", given.run, labels) as server:
            asyncio.run(closed(server.port, sent, 32, 1.0, 0))  # warm
            memory, before = server.memory_mb(), load_average()
            seen = asyncio.run(opened(server.port, sent, SHARE * rate, given.open_seconds, 0))
            row = seen.row(given.open_seconds) | {"rate": round(SHARE * rate, 1), "seconds": given.open_seconds}
            found = row | {"sustained": round(rate, 1), "memory_mb": [round(memory, 1), round(server.memory_mb(), 1)]}
            measured("ours open at a sustained rate", 0, found, before)
    if not results.has(given.dataset, budget, "ours overload", 0):
        with started("ours", given.run, labels) as server:
            before = load_average()
            seen, recovery_s = asyncio.run(overloaded(server.port, sent, given.overload_seconds, 0))
            measured(
                "ours overload", 0, seen.row(given.overload_seconds) | {"recovery_s": round(recovery_s, 3)}, before
            )
    if not results.has(given.dataset, budget, "ours fuzz", 0):
        with started("ours", given.run, labels) as server:
            asyncio.run(closed(server.port, sent, 8, 1.0, 0))
            memory, statuses, before = [server.memory_mb()], Counter[int](), load_average()
            for seed in range(5):
                statuses += asyncio.run(fuzz(server.port, seed))
                memory.append(server.memory_mb())
            bad = sum(n for status, n in statuses.items() if status >= 500 or status == 0)
            found: dict[str, Any] = {"ok": bad == 0, "statuses": {str(k): n for k, n in sorted(statuses.items())}}
            measured("ours fuzz", 0, found | {"memory_mb": [round(m, 1) for m in memory], "errors": bad}, before)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
