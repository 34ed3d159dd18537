"""Run the arms of the paper's claims, two at a time, and keep their results.

    python -m experiments.run lambda gamma        the arms of two claims; experiments/claims.py has the names
    python -m experiments.run all                 everything

What has a result is not run again, and what was interrupted begins anew, so the same command goes on where it was stopped.
Every arm first takes the best of the same three learning rates, in runs of half the length on a seed used for nothing else,
and then runs with each of the seeds.
A run leaves its folder under runs/experiments and an entry in experiments/results/ARM.json: what held-out responses were
like before and after, and curves over the steps.
"""

import argparse
import json
import math
import multiprocessing
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

HERE = Path(__file__).parent

import data
import ppo
import rollout
import train
from config import Config, parse
from critic import load_critic
from experiments.claims import ARMS, CLAIMS, RATES, SEEDS, SWEEP_SEED
from packing import MicroBatch, forward_all_tokens
from preflight import prepare
from reports import log
from rollout import Rollout
from toy import tiny

MODEL, RUNS, RESULTS = "tiny-long", Path("runs/experiments"), HERE / "results"
FIRST = {"anneal": "default", "anneal-hard": "default"}  # arms that begin where another ended
HELDOUT = ("length", "format", "reflection", "correct_reflection_length", "truncated")
CURVES = ("reward", *HELDOUT, "entropy", "explained_variance")


def run(arm: str, seed: int, rate: str) -> dict[str, Any]:
    """One run of an arm, in this process; returns its entry in results/ARM.json."""
    started, name = time.perf_counter(), folder_name(arm, seed, rate)
    log.RunLog.draw = lambda self: None  # a hundred runs' figures that nobody looks at
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / f"{name}.log").open("w") as file, redirect_stdout(file), redirect_stderr(file):
        flags = f"--model {MODEL} --seed {seed} --policy-lr {rate} {ARMS[arm]}"
        cfg = parse(f"{flags} --runs {RUNS} --name {name} --overwrite --checkpoint-every 0".split())
        cfg = replace(cfg, **PREPARATIONS[arm](cfg)) if arm in PREPARATIONS else cfg
        cfg = replace(cfg, steps=math.ceil(cfg.steps / 2)) if seed == SWEEP_SEED else cfg
        with CHANGES.get(arm, nullcontext)():
            folder = train.train(cfg, prepare(cfg))
        entry = measured(folder, cfg)
        if arm == "default":
            entry["after"] |= devaluation(folder, cfg)
    return {"seed": seed, "rate": rate, "seconds": round(time.perf_counter() - started), **entry}


def folder_name(arm: str, seed: int, rate: str) -> str:
    """Of a run's folder; those of the sweep have the rate in it."""
    return f"{arm}-{rate}" if seed == SWEEP_SEED else f"{arm}-{seed}"


def measured(folder: Path, cfg: Config) -> dict[str, Any]:
    """What a finished run's files say: held-out responses before and after, and the curves."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    evaluations = {e["step"]: e for e in map(json.loads, (folder / "evaluations.jsonl").open())}
    before, after = (
        [json.loads(line) for line in (folder / f"heldout-{s}.jsonl").open()]
        for s in (0, cfg.steps)
    )
    held_out = [
        {"accuracy": fmean(r["reward"] >= 1 for r in responses)}
        | {k: evaluations[s][k] for k in HELDOUT if k in evaluations[s]}
        for s, responses in ((0, before), (cfg.steps, after))
    ]
    excess = [
        r["correct_reflection_length"] - r["length"]
        for r in rows
        if "correct_reflection_length" in r
    ]
    if excess:
        held_out[1]["reflection_excess"] = fmean(excess)
    if cfg.eval_samples > 1:
        hard = hard_problems(before)
        held_out[1] |= {
            "hard_accuracy": fmean(r["reward"] for r in after if r["problem"] in hard),
            "hard_problems": len(hard),
        }
    curves = {
        name: [rounded(row[name]) if name in row else None for row in rows] for name in CURVES
    }
    return {
        "before": {k: rounded(v) for k, v in held_out[0].items()},
        "after": {k: rounded(v) for k, v in held_out[1].items()},
        "curves": {
            name: curve for name, curve in curves.items() if any(v is not None for v in curve)
        },
    }


def rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")


def hard_problems(responses: Sequence[dict[str, Any]]) -> set[str]:
    """Problems with at most one right response."""
    right: Counter[str] = Counter()
    for r in responses:
        right[r["problem"]] += r["reward"]
    return {problem for problem, count in right.items() if count <= 1}


# ── what an arm needs for its seed, as changes of its Config ─────────────────────────────────────────────────────────


def few_problems(count: int, cfg: Config) -> dict[str, Any]:
    """Train on the first `count` problems."""
    rows = json.loads((tiny.ensure(cfg.seed, name=MODEL) / "train.json").read_text())
    file = RUNS / f"problems-{count}-{cfg.seed}.json"
    file.write_text(json.dumps(rows[:count]))
    return {"data": str(file)}


def trained_critic(cfg: Config) -> dict[str, Any]:
    """A critic trained for five iterations while the policy stands still."""
    alone = replace(
        cfg,
        name=f"{cfg.name}-alone",
        steps=5,
        policy_lr=1e-12,
        eval_data=(few_problems(16, cfg)["data"],),
    )
    return {"init_critic": str(train.train(alone, prepare(alone)) / "critic")}


def annealing(hard: bool, cfg: Config) -> dict[str, Any]:
    """Ten more steps from where the default ended, at a falling rate; on problems it finds hard, or on fresh ones."""
    base, before = tiny.ensure(cfg.seed, name=MODEL), RUNS / f"default-{cfg.seed}"
    rows = json.loads((base / "train.json").read_text())[
        -2_000:
    ]  # the default stopped long before these
    pool, mined = RUNS / f"{cfg.name}-pool.json", RUNS / f"{cfg.name}-hard.jsonl"
    pool.write_text(json.dumps(rows))
    if hard:
        answers = RUNS / f"{cfg.name}-answers"
        four = f"--samples 4 --prompt-tokens {cfg.prompt_tokens} --response-tokens {cfg.response_tokens}"
        command(
            f"evaluate.py --model {before}/policy --benchmarks pool={pool} {four} --threads 1 --overwrite --out {answers}"
        )
        (responses,) = answers.rglob("pool.jsonl")
        keep = "--no-choice --no-proof --no-language --no-gold --no-exact --no-ngram"
        command(
            f"-m curation.curate {pool} --rollouts {responses} --hard 2 --hard-of 4 {keep} --out {mined}"
        )
    return {
        "model": str(before / "policy"), "init_critic": str(before / "critic"), "data": str(mined if hard else pool),
        "eval_data": (str(base / "heldout.json"),), "eval_samples": 4, "steps": 10, "policy_lr_warmup": 1, "critic_lr_warmup": 1,
        "anneal_steps": 10, "anneal_to": cfg.policy_lr * 0.3,
    }  # fmt: skip


def command(arguments: str) -> None:
    """A program of this project, as a user would call it."""
    subprocess.run(
        [sys.executable, *arguments.split()],
        cwd=HERE.parent,
        check=True,
        stdout=sys.stdout,
        stderr=sys.stderr,
    )


PREPARATIONS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "problems-16": partial(few_problems, 16),
    "problems-64": partial(few_problems, 64),
    "problems-512": partial(few_problems, 512),
    "critic-first": trained_critic,
    "anneal": partial(annealing, False),
    "anneal-hard": partial(annealing, True),
}


# ── changes of the program that no flag makes ────────────────────────────────────────────────────────────────────────


@contextmanager
def means_per_pack() -> Iterator[None]:
    """Every loss is the mean over packs of their means over tokens, as in the authors' code."""
    micro_batches, policy_loss, value_loss, weight = (
        train.micro_batches,
        ppo.policy_loss,
        ppo.value_loss,
        1.0,
    )

    def packs(*args: Any) -> Iterator[MicroBatch]:
        nonlocal weight
        all_packs = list(micro_batches(*args))
        tokens = sum(len(pack.flat) for pack in all_packs)
        for pack in all_packs:
            weight = tokens / len(all_packs) / len(pack.flat)
            yield pack

    def weighted_policy_loss(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, clipped = policy_loss(*args)
        return weight * loss, clipped

    train.micro_batches, ppo.policy_loss = packs, weighted_policy_loss
    ppo.value_loss = lambda *args: weight * value_loss(*args)
    try:
        yield
    finally:
        train.micro_batches, ppo.policy_loss, ppo.value_loss = (
            micro_batches,
            policy_loss,
            value_loss,
        )


@contextmanager
def retokenised() -> Iterator[None]:
    """Responses are decoded and encoded again before training; prints how many come out otherwise than they were sampled."""
    score, tokenizer, other, seen = train.score, tiny.tokenizer(tiny.LONG), 0, 0

    def encode_again(mine: list[Rollout], *args: Any) -> list[Rollout]:
        nonlocal other, seen
        for r in score(mine, *args):
            ids = tokenizer.encode(r.text)
            other, seen = other + (ids != r.token_ids), seen + 1
            if ids != r.token_ids:
                r.token_ids, r.logprobs = ids, [0.0] * len(ids)
        return mine

    train.score = encode_again
    try:
        yield
    finally:
        train.score = score
        print(f"{other} of {seen} responses came out otherwise")


CHANGES: dict[str, Callable[[], Any]] = {"per-pack": means_per_pack, "retokenised": retokenised}


def devaluation(folder: Path, cfg: Config, times: int = 5, count: int = 200) -> dict[str, float]:
    """What the trained critic thinks of repetition: right held-out responses are cut after half of their steps, and the last
    step is said `times` times more. The mean of V at the cut − V after the repetition, and of V as many tokens on in the
    response itself − V after the repetition."""
    tokenizer, critic = (
        AutoTokenizer.from_pretrained(folder / "critic"),
        load_critic(str(folder / "critic")),
    )
    rows = data.load(tiny.ensure(cfg.seed, name=MODEL) / "heldout.json")
    problems = data.tokenize(rows, tokenizer, cfg.prompt_tokens, data.TEMPLATE)
    responses = zip(
        problems,
        rollout.load_rollouts(folder / f"heldout-{cfg.steps}.jsonl", ids=False),
        strict=True,
    )
    chosen = [
        (problem, r.text) for problem, r in responses if r.reward == 1 and r.text.count(",") >= 8
    ][:count]
    whole, repeated, cuts, gone = [], [], [], []
    for problem, text in chosen:
        pieces = text.split(",")
        half = len(pieces) // 4 * 2  # a step has two commas
        before, step = (",".join(part) + "," for part in (pieces[:half], pieces[half - 2 : half]))
        cut, ids, again = (
            len(tokenizer.encode(before)),
            tokenizer.encode(text),
            tokenizer.encode(before + step * times),
        )
        whole.append(Rollout(problem, ids, [], "stop", ""))
        repeated.append(Rollout(problem, [*again, ids[-1]], [], "stop", ""))
        cuts.append(cut)
        gone.append(len(again) - cut)
    V, V_repeated = (
        forward_all_tokens(critic, kept, cfg.micro_tokens, "cpu").split(
            [len(r.token_ids) for r in kept]
        )
        for kept in (whole, repeated)
    )
    at_cut = [float(v[cut]) for v, cut in zip(V, cuts, strict=True)]
    after = [float(v[cut + n]) for v, cut, n in zip(V_repeated, cuts, gone, strict=True)]
    on = [float(v[min(cut + n, len(v) - 1)]) for v, cut, n in zip(V, cuts, gone, strict=True)]
    return {
        "value_lost_by_repetition": rounded(fmean(at_cut) - fmean(after)),
        "value_lost_against_going_on": rounded(fmean(on) - fmean(after)),
    }


# ── all of them ──────────────────────────────────────────────────────────────────────────────────────────────────────


def stored(arm: str) -> dict[str, Any]:
    """What results/ARM.json holds."""
    file = RESULTS / f"{arm}.json"
    return (
        json.loads(file.read_text())
        if file.exists()
        else {"arm": arm, "flags": ARMS[arm], "sweep": {}, "runs": {}}
    )


def keep(arm: str, entry: dict[str, Any]) -> None:
    """Add a run to results/ARM.json; written beside and renamed."""
    results = stored(arm)
    results |= {"revision": log.revision(), "versions": log.versions()}
    if entry["seed"] == SWEEP_SEED:
        results["sweep"][entry["rate"]] = entry["after"]["accuracy"]
    else:
        results["runs"][f"{entry['seed']}"] = entry
    RESULTS.mkdir(exist_ok=True)
    beside = RESULTS / f".{arm}.tmp"
    beside.write_text(as_text(results))
    beside.replace(RESULTS / f"{arm}.json")


def as_text(results: dict[str, Any]) -> str:
    """JSON with one line a curve, so that changes can be read."""
    text = json.dumps(results, indent=1, sort_keys=True)
    return re.sub(r"\[[^\]]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text) + "\n"


Job = tuple[str, int, str]  # arm, seed, rate


def open_jobs(arms: Sequence[str]) -> list[Job]:
    """What is still to be run and can be: of each arm the sweep first, then the seeds with the best rate."""
    jobs = []
    for arm in arms:
        swept = stored(FIRST.get(arm, arm))[
            "sweep"
        ]  # an arm that goes on from another keeps its rate
        if len(swept) < len(RATES):
            jobs += [
                (arm, SWEEP_SEED, rate) for rate in RATES if rate not in swept and arm not in FIRST
            ]
            continue
        best = max(RATES, key=lambda rate: swept[rate])
        ready = stored(FIRST[arm])["runs"] if arm in FIRST else map(str, SEEDS)
        jobs += [(arm, int(seed), best) for seed in ready if seed not in stored(arm)["runs"]]
    return jobs


def run_all(arms: Sequence[str], workers: int) -> None:
    """Run what is open, an arm after the other; keep each result as it comes, and say how long the rest will take."""
    done, running = 0, {}
    runs = len(SEEDS) * len(arms) + len(RATES) * sum(arm not in FIRST for arm in arms)
    left = runs - sum(len(stored(arm)["sweep"]) + len(stored(arm)["runs"]) for arm in arms)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(tiny.ensure, name=MODEL), (SWEEP_SEED, *SEEDS)))
        started = time.perf_counter()
        while True:
            waiting = [job for job in open_jobs(arms) if job not in running.values()]
            running |= {pool.submit(run, *job): job for job in waiting[: workers - len(running)]}
            if not running:
                return
            finished = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            arm, seed, rate = running.pop(finished)
            try:
                entry = finished.result()
            except Exception as error:
                name = folder_name(arm, seed, rate)
                raise RuntimeError(
                    f"{name}: {error!r}; its output is in {RUNS / name}.log"
                ) from error
            keep(arm, entry)
            done, left = done + 1, left - 1
            minutes, after = (time.perf_counter() - started) / done * left / 60, entry["after"]
            what = f"{arm:18s} {'sweep ' if seed == SWEEP_SEED else f'seed {seed}'}, rate {rate:6s}"
            how = f"accuracy {after['accuracy']:.3f}, length {after['length']:3.0f}, {entry['seconds']} s"
            print(f"{what}: {how}; {left} runs left, about {minutes:.0f} min", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "claims",
        nargs="+",
        choices=[*CLAIMS, "all"],
        metavar="CLAIM",
        help=f"all, or of {', '.join(CLAIMS)}",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="runs at a time; each takes one core"
    )
    args = parser.parse_args()
    claims = list(CLAIMS) if "all" in args.claims else args.claims
    arms = [
        arm for primary in (True, False) for name in claims for arm in CLAIMS[name].arms(primary)
    ]
    run_all(
        list(dict.fromkeys([*(FIRST[arm] for arm in arms if arm in FIRST), *arms])), args.workers
    )


if __name__ == "__main__":
    main()
