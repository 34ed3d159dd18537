r"""Grade hostile answers: they must not crash the grader, earn a reward or slow ordinary answers.

    [ORZ_DATA=folder] python -m benchmarks.grader_fuzz [--hostile 10000] [--ordinary 10000]

Grades ordinary pairs of gold and answer alone, then the same pairs shuffled among hostile ones.
Prints, for each repeat, the rate of the ordinary pairs in both cases, counted until the last of
them has its verdict; the number of their verdicts that changed (it must be 0); and the time of all
pairs. Then prints the hostile answers, timeouts and rewards of each kind, and the peak memory of a
worker. The environment variable ORZ_DATA names the folder that holds `orz_train/`, whose golds the
ordinary pairs use; without it the golds are fractions.

| kind | examples |
|---|---|
| tower, factorial | `9^{9^{9^9}}`, `((10!)!)!` |
| huge | `7777…`, `10^{10^{12}} - 1`, `1e999999999` |
| deep, unclosed | `\frac{1}{\frac{1}{…`, `\left(\left(…` |
| long, bytes_ | a megabyte of `1`, NUL bytes, lone surrogates |
| calculus, expansion | `\int_0^1 \sin(x^{x^x}) dx`, `(x+y+z)^{700}` |
| many | a set of 200, 30 equations, a 9 × 9 matrix, `\begin{cases}` |
| regex | input that makes a careless pattern backtrack: `\text{\text{…`, `1 1 1 1…` |
| mutated | an ordinary gold with pieces of the others inserted |
"""

import os
import random
import re
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data
from benchmarks import flags
from config import Count, Processes, Seed
from grading.pool import Grade, Grader, Pair


@dataclass(frozen=True)
class Settings:
    hostile: Count = 10_000
    """Number of hostile answers."""
    ordinary: Count = 10_000
    """Number of ordinary answers."""
    repeats: Count = 3
    """Number of repeats; the rates printed last are medians."""
    workers: Processes = 2
    """Number of the grader's worker processes."""
    seed: Seed = 0
    """Seed of the answers and of their order."""


PIECES = "^{9^9} ! { } \\frac \x00 \\int ( \\sum_{k=1}^{99} ^ | \\begin{cases}".split()
GOLDS = [
    "1/4",
    "7",
    "-\\frac{3}{5}",
    "2\\sqrt{3}",
    "(1, 2)",
    "[0, 1)",
    "x^2 + 1",
    "\\{1, 2, 3\\}",
    "12.5",
    "90^\\circ",
    "C",
]
NESTINGS = [
    ("(", ")"),
    ("[", "]"),
    ("{", "}"),
    ("\\{", "\\}"),
    ("\\left(", "\\right)"),
    ("\\frac{1}{", "}"),
    ("\\sqrt{", "}"),
    ("\\sin(", ")"),
    ("|", "|"),
    ("2^{", "}"),
    ("x_{", "}"),
    ("(1, ", ")"),
    ("\\text{", "}"),
    ("-", ""),
]
OPENINGS = "\\frac{ \\left( \\right. { \\begin{pmatrix} \\sqrt[ $ \\( \\boxed{ } 1 x ^ _ &".split()
REPEATED = [
    "1 ",
    "1,",
    "\\text{",
    "\\text{a",
    "a ",
    "1\\",
    "\\sqrt (",
    "\\! ",
    "0.1\\overline{",
    "st ",
    "A.",
    "or ",
    "x=",
]


# ── hostile answers, one function per kind ────────────────────────────────────────────────────────


def tower(rng: random.Random) -> str:
    answer = str(rng.randint(2, 99))
    for _ in range(rng.randint(2, 7)):
        answer = f"{rng.randint(2, 99)}^{{{answer}}}"
    forms = [
        "{}",
        "{} + 1",
        "\\sqrt{{{}}}",
        "\\frac{{1}}{{{}}}",
        "\\sin({})",
        "x^{{{}}}",
        "\\log({})",
    ]
    return rng.choice(forms).format(answer)


def factorial(rng: random.Random) -> str:
    answer = f"{rng.randint(5, 10 ** rng.randint(1, 12))}!"
    for _ in range(rng.randint(0, 4)):
        answer = f"({answer})!"
    forms = ["{}", "{} - 1", "\\frac{{{}}}{{3!}}", "\\binom{{10^{{9}}}}{{7}} + {}"]
    return rng.choice(forms).format(answer)


def huge(rng: random.Random) -> str:
    digits = str(rng.randint(1, 9)) * rng.randint(100, 1900)
    power = f"10^{{{rng.randint(10**6, 10**15)}}}"
    scientific = f"1e{rng.randint(10**4, 10**9)}"
    answers = [
        digits,
        digits + "^{99}",
        f"{power} - 1",
        f"7 \\cdot {power}",
        scientific,
        f"0.{digits}",
    ]
    return rng.choice(answers)


def deep(rng: random.Random) -> str:
    opening, closing = rng.choice(NESTINGS)
    depth = rng.randint(5, 300)
    return opening * depth + str(rng.randint(1, 9)) + closing * depth


def unclosed(rng: random.Random) -> str:
    return "".join(rng.choices(OPENINGS, k=rng.randint(2, 60)))


def long(rng: random.Random) -> str:
    unit = rng.choice(["1", "(", "x+", "\\frac{", " ", "the ", "1,", "\\", "é", "<answer>"])
    return unit * (10 ** rng.randint(4, 6) // len(unit))


def bytes_(rng: random.Random) -> str:
    characters = "\x00\x07\ud800\udfff\u202e\ufeff１²½∞\n\t 1x+{"
    return "".join(rng.choice(characters) for _ in range(rng.randint(1, 80)))


def calculus(rng: random.Random) -> str:
    bodies = [
        "\\sin(x^{x^x})",
        "e^{x^2} \\cos(x^3)",
        "\\frac{1}{x^5+x+1}",
        "\\sqrt{\\tan x}",
        "x^x",
    ]
    body = rng.choice(bodies)
    bound = 10 ** rng.randint(3, 15)
    answers = [
        f"\\int_0^1 {body} dx",
        f"\\frac{{d}}{{dx}} {body}",
        f"\\sum_{{x=1}}^{{{bound}}} {body}",
        f"\\prod_{{x=1}}^{{{bound}}} {body}",
        f"\\lim_{{x \\to 0}} {body}",
        f"\\int_0^\\infty\\int_0^x {body} dy dx",
        f"\\binom{{{bound}}}{{{bound // 2}}}",
        f"\\sin({body}) + \\cos({body})",
        f"\\gcd({bound}^{{{bound}}}, 3)",
        f"{bound}^{{{bound}}} \\mod 7",
    ]
    return rng.choice(answers)


def expansion(rng: random.Random) -> str:
    terms = "+".join("abcdwxyz"[: rng.randint(2, 8)])
    roots = "+".join(f"\\sqrt{{{p}}}" for p in (2, 3, 5, 7, 11)[: rng.randint(2, 5)])
    return f"({rng.choice([terms, roots])})^{{{rng.randint(10, 3000)}}}"


def many(rng: random.Random) -> str:
    count = rng.randint(5, 250)
    numbers = [str(rng.randint(-99, 99)) for _ in range(count)]
    matrix = " \\\\ ".join(" & ".join(rng.choices(numbers, k=9)) for _ in range(9))
    cases = " \\\\ ".join(f"x_{i}^2 + x_{i + 1} = {i}" for i in range(count % 20 + 2))
    answers = [
        "\\{" + ",".join(numbers) + "\\}",
        " \\cup ".join(f"({i}, {i}.5]" for i in range(count // 5 + 1)),
        "+".join(numbers),
        "=".join(numbers),
        "<".join(f"x_{{{i}}}" for i in range(count % 40 + 2)),
        f"\\begin{{pmatrix}} {matrix} \\end{{pmatrix}}^{{{count}}}",
        f"\\begin{{cases}} {cases} \\end{{cases}}",
        ", ".join(f"x_{i} + y^{i} = {i}" for i in range(count % 30 + 2)),
    ]
    return rng.choice(answers)


def regex(rng: random.Random) -> str:
    unit = rng.choice(REPEATED)
    ending = ["", "!", "}", " or", "th", "="]
    return unit * rng.randint(20, 480 // len(unit)) + rng.choice(ending)


def mutated(rng: random.Random) -> str:
    answer = rng.choice(GOLDS)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(answer))
        answer = answer[:at] + rng.choice(PIECES) + answer[at + rng.randint(0, 1) :]
    return answer


KINDS: list[Callable[[random.Random], str]] = [
    tower,
    factorial,
    huge,
    deep,
    unclosed,
    long,
    bytes_,
    calculus,
    expansion,
    many,
    regex,
    mutated,
]


def hostile(count: int, seed: int) -> list[Pair]:
    """`count` pairs (gold, answer), one of each kind in turn; the seed decides them. No answer is
    right.

    >>> [len(answer) for _, answer in hostile(3, 0)] == [len(answer) for _, answer in hostile(3, 0)]
    True
    """
    rng = random.Random(seed)
    return [(rng.choice(GOLDS), KINDS[i % len(KINDS)](rng)) for i in range(count)]


def ordinary(count: int, seed: int) -> list[Pair]:
    """`count` pairs (gold, answer): the gold, written in some form, or with another last digit.

    The golds are those of ORZ_DATA's orz_train, or fractions if ORZ_DATA is not set."""
    rng = random.Random(seed)
    golds = [f"\\frac{{{rng.randint(1, 999)}}}{{{rng.randint(2, 99)}}}" for _ in range(count)]
    if os.environ.get("ORZ_DATA"):
        files = sorted(Path(os.environ["ORZ_DATA"], "orz_train").glob("*.json"))
        golds = [problem.answer for file in files for problem in data.load(file)]
    pairs = []
    for _ in range(count):
        gold = rng.choice(golds)
        wrong = re.sub(r"\d(?!.*\d)", lambda digit: str((int(digit[0]) + 1) % 10), gold, flags=re.S)
        forms = [gold, f"$ {gold} $.", f"x = {gold}", gold.replace("\\frac", "\\dfrac"), wrong]
        pairs.append((gold, rng.choice(forms)))
    return pairs


# ── measurements ──────────────────────────────────────────────────────────────────────────────────


def timed_grades(
    pairs: list[Pair], watched: set[Pair], workers: int
) -> tuple[dict[Pair, Grade], float, float]:
    """The grade of each pair, the seconds until the workers have decided the last of the `watched`
    pairs, and the seconds of all pairs.

    The grader is new, so it remembers nothing; the clock starts when its workers have imported.
    """
    undecided = set(watched)
    last_verdict = 0.0

    def note(pair: Pair, verdict: bool | None) -> None:
        nonlocal last_verdict
        if pair in undecided:
            undecided.remove(pair)
            last_verdict = time.perf_counter()

    responses = [f"<answer>{answer}</answer>" for _, answer in pairs]
    golds = [gold for gold, _ in pairs]
    with Grader(workers) as grader, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the share of timeouts, which is printed
        grader.are_gradable([f"{i}/7" for i in range(20 * workers)])
        grader.on_verdict = note
        start = time.perf_counter()
        grades = grader.grade(responses, golds)
        seconds = time.perf_counter() - start
        grader.close(kill=False)  # so that `peak_memory` includes its workers
    return dict(zip(pairs, grades, strict=True)), last_verdict - start, seconds


def peak_memory() -> float:
    """MiB of the largest child process that has ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10


def measure(cfg: Settings, attack: list[Pair], plain: list[Pair]) -> dict[Pair, Grade]:
    """Grade the plain pairs alone and among the attack, and print both rates; returns the grades of
    the last repeat."""
    mixed = random.Random(cfg.seed).sample(attack + plain, len(attack) + len(plain))
    watched = {(gold.strip(), answer.strip()) for gold, answer in plain}
    rates_alone, rates_among = [], []
    for repeat in range(cfg.repeats):
        alone, seconds, _ = timed_grades(plain, watched, cfg.workers)
        rates_alone.append(len(plain) / seconds)
        graded, seconds, total = timed_grades(mixed, watched, cfg.workers)
        rates_among.append(len(plain) / seconds)
        changed = sum(graded[pair] != alone[pair] for pair in plain)
        print(
            f"{repeat}: ordinary answers/s {rates_alone[-1]:.0f} alone, {rates_among[-1]:.0f} "
            f"among; {changed} verdicts changed; all {len(mixed)} in {total:.0f} s",
            flush=True,
        )
    alone, among = statistics.median(rates_alone), statistics.median(rates_among)
    print(f"medians {alone:.0f} and {among:.0f}: {100 * (among / alone - 1):+.1f} %")
    print(f"peak memory of a worker: {peak_memory():.0f} MiB")
    return graded


def print_kinds(attack: list[Pair], graded: dict[Pair, Grade]) -> None:
    print(f"{'hostile':<14}{'answers':>8}{'different':>10}{'timeouts':>9}{'paid':>6}")
    for i, kind in enumerate(KINDS):
        pairs = attack[i :: len(KINDS)]
        grades = [graded[pair] for pair in pairs]
        late = sum(grade.timeout for grade in grades)
        paid = sum(grade.reward for grade in grades)
        print(f"{kind.__name__:<14}{len(pairs):>8}{len(set(pairs)):>10}{late:>9}{paid:>6.0f}")


def main() -> None:
    cfg = flags.parse(Settings, "grader_fuzz", __doc__)
    attack = hostile(cfg.hostile, cfg.seed)
    taken = set(attack)
    plain = [pair for pair in ordinary(cfg.ordinary, cfg.seed) if pair not in taken]
    graded = measure(cfg, attack, plain)
    print_kinds(attack, graded)


if __name__ == "__main__":
    main()
