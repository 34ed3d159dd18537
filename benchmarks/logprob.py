"""Measure time, memory and error of log-probabilities at a real vocabulary, on a CPU.

    python -m benchmarks.logprob [--rounds 2]

Compares three methods, forward and backward, for sampled tokens and 151,936 words:

| method | what it does |
|---|---|
| ours | `policy.TokenLogProbs`, which also returns the entropy |
| naive | logits, float32, log_softmax, gather |
| linear_cross_entropy | `torch.nn.functional.linear_cross_entropy` in chunks of 256 tokens |

Each measurement runs in a new process with one thread. Methods take turns, and the table has
medians. Seconds are those of a second call. GB is the peak above the inputs, gradients included.
The error is the largest difference to the log-probabilities in float64 of the same inputs, over 256
of the tokens. Linux only.
"""

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear_cross_entropy

from benchmarks import flags
from benchmarks.record import Row, record
from config import Count
from policy import TokenLogProbs

V = 151_936
CHECKED = 256  # tokens whose error is measured
Figures = dict[str, float]  # column → figure


class Case(NamedTuple):
    """Sizes and type of the inputs."""

    n: int  # tokens
    H: int
    dtype: str


CASES = [Case(2048, 256, "float32"), Case(4096, 256, "float32"), Case(2048, 256, "bfloat16")]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    rounds: Count = 2
    """Number of measurements of each method."""


# ── the methods ───────────────────────────────────────────────────────────────────────────────────


def ours(h: Tensor, W: Tensor, actions: Tensor) -> Tensor:
    return TokenLogProbs.apply(h, W, actions, 1.0)[0]


def naive(h: Tensor, W: Tensor, actions: Tensor) -> Tensor:
    return (h @ W.T).float().log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)


def chunked_cross_entropy(h: Tensor, W: Tensor, actions: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)
    return -linear_cross_entropy(h, W, actions, reduction="none", options=options).float()


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "naive": naive,
    "linear_cross_entropy": chunked_cross_entropy,
}


# ── one measurement ───────────────────────────────────────────────────────────────────────────────


def measure(method: str, case: Case) -> Figures:
    """Seconds of a forward and a backward pass, GB above the inputs, error in nats."""
    torch.set_num_threads(1)
    h, W, actions, g = random_inputs(case)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = memory("VmRSS")
    for _ in range(2):
        h.grad = W.grad = None
        start = time.perf_counter()
        logp = METHODS[method](h, W, actions)
        middle = time.perf_counter()
        logp.backward(g)
        end = time.perf_counter()
    peak = memory("VmHWM")
    return {
        "forward s": middle - start,
        "backward s": end - middle,
        "sum s": end - start,
        "GB": (peak - before) / 1e9,
        "error": largest_error(logp, h, W, actions),
    }


def random_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h (n, H), W (V, H), actions (n,), and the gradient of their log-probabilities (n,)."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    h = torch.randn(case.n, case.H, generator=generator).to(dtype).requires_grad_()
    W = torch.randn(V, case.H, generator=generator) * (2 / case.H**0.5)
    W = W.to(dtype).requires_grad_()
    p = (h[:1].detach().float() @ W.detach().float().T).softmax(-1)
    actions = torch.multinomial(p, case.n, replacement=True, generator=generator)[0]
    g = torch.randn(case.n, generator=generator)
    return h, W, actions, g


@torch.no_grad()
def largest_error(logp: Tensor, h: Tensor, W: Tensor, actions: Tensor) -> float:
    """Largest |log p − log p in float64| of the first tokens."""
    logits = h[:CHECKED].double() @ W.double().T
    exact = logits.gather(-1, actions[:CHECKED, None]).squeeze(-1) - logits.logsumexp(-1)
    return float((logp[:CHECKED] - exact).abs().max())


def memory(field: str) -> int:
    """Bytes of this process: VmRSS is what it holds now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


# ── all measurements ──────────────────────────────────────────────────────────────────────────────


def measure_in_new_process(method: str, case: Case) -> Figures:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, method, case).result()


def table(found: dict[tuple[Case, str], list[Figures]]) -> list[Row]:
    """Medians, and the time as a multiple of the naive method's."""
    medians = {
        key: {column: statistics.median(one[column] for one in runs) for column in runs[0]}
        for key, runs in found.items()
    }
    rows: list[Row] = []
    for (case, method), figures in medians.items():
        labels = {"tokens × H": f"{case.n:,} × {case.H}", "inputs": case.dtype, "method": method}
        times = figures["sum s"] / medians[case, "naive"]["sum s"]
        rows.append(labels | figures | {"times naive": times})
    return rows


def main() -> None:
    cfg = flags.parse(Settings, "logprob", __doc__)
    found: dict[tuple[Case, str], list[Figures]] = {
        (case, method): [] for case in CASES for method in METHODS
    }
    for _ in range(cfg.rounds):
        for (case, method), runs in found.items():
            figures = measure_in_new_process(method, case)
            runs.append(figures)
            print(*case, method, figures, file=sys.stderr)
    note = f"Medians of {cfg.rounds} processes; one thread."
    record("logprob", f"Log-probabilities at {V:,} words", table(found), [note])


if __name__ == "__main__":
    main()
