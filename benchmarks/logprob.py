"""Log-probabilities of sampled tokens at a real vocabulary, forward and backward: time, memory and error on a CPU.

    python -m benchmarks.logprob [--rounds 2]

`policy.TokenLogProbs` (which also gives the entropy) beside what one would write first (logits, float32, log_softmax,
gather) and `torch.nn.functional.linear_cross_entropy` in chunks of 256 tokens. Every measurement is a process of its own
with one thread; they take turns, and the table has medians. Seconds are those of a second call; GB is what its peak is
above the inputs, gradients included; error is the largest |log p − log p in float64| of 256 of the tokens, from the same
inputs. Linux.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear_cross_entropy

from benchmarks.record import record
from policy import TokenLogProbs

V = 151_936
CASES = [(2048, 256, "float32"), (4096, 256, "float32"), (2048, 256, "bfloat16")]  # n, H


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


def measure(method: str, n: int, H: int, dtype: str) -> dict[str, float]:
    """Seconds of a forward and a backward pass, GB on top of the inputs, error in nats."""
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    h, W = (torch.randn(*shape, generator=random) for shape in ((n, H), (V, H)))
    h, W = (
        (x * scale).to(getattr(torch, dtype)).requires_grad_()
        for x, scale in ((h, 1.0), (W, 2 / H**0.5))
    )
    actions = torch.multinomial(
        (h[:1].detach().float() @ W.detach().float().T).softmax(-1), n, True, generator=random
    )[0]
    g = torch.randn(n, generator=random)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    for _ in range(2):
        h.grad = W.grad = None
        start = time.perf_counter()
        logp = METHODS[method](h, W, actions)
        middle = time.perf_counter()
        logp.backward(g)
        end = time.perf_counter()
    grown = (memory("VmHWM") - before) / 1e9
    with torch.no_grad():
        logits = h[:256].double() @ W.double().T
        exact = logits.gather(-1, actions[:256, None]).squeeze(-1) - logits.logsumexp(-1)
        error = float((logp[:256] - exact).abs().max())
    return {
        "forward s": middle - start,
        "backward s": end - middle,
        "sum s": end - start,
        "GB": grown,
        "error": error,
    }


def memory(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--one", nargs=4, metavar=("METHOD", "N", "H", "DTYPE"), help="one measurement, as JSON"
    )
    args = parser.parse_args()
    if args.one:
        method, n, H, dtype = args.one
        print(json.dumps(measure(method, int(n), int(H), dtype)))
        return
    found: dict[tuple, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for case in CASES:
            for method in METHODS:
                command = [sys.executable, __file__, "--one", method, *map(str, case)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.setdefault((*case, method), []).append(json.loads(done.stdout))
                print(*case, method, done.stdout.strip(), file=sys.stderr)
    rows = []
    for (n, H, dtype, method), runs in found.items():
        median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        reference = statistics.median(run["sum s"] for run in found[n, H, dtype, "naive"])
        rows.append({"tokens × H": f"{n:,} × {H}", "inputs": dtype, "way": method, **median})
        rows[-1] |= {"times naive": median["sum s"] / reference}
    record(
        "logprob",
        f"Log-probabilities at {V:,} words",
        rows,
        [f"Medians of {args.rounds} processes; one thread."],
    )


if __name__ == "__main__":
    main()
