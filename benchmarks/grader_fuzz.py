r"""The grader under fire: hostile answers must not stop it, crash it, or slow the ordinary ones down.

    [ORZ_DATA=folder] python -m benchmarks.grader_fuzz [--hostile 10000] [--ordinary 10000] [--repeats 3]

Grades ordinary pairs alone, then the same shuffled among `hostile(count, seed)`, and again. Prints the rate of the ordinary
ones in both, counted until the last of them has its verdict; how many verdicts of theirs changed (none may); the time of
the whole; timeouts and hostile verdicts by kind; and the peak memory of a worker.

| kind | an example |
|---|---|
| tower, factorial | `9^{9^{9^9}}`, `((10!)!)!` |
| huge | `7777…`, `10^{10^{12}} - 1`, `1e999999999` |
| deep, unclosed | `\frac{1}{\frac{1}{…`, `\left(\left(…` |
| long, bytes | a megabyte of `1`, NUL bytes, lone surrogates |
| calculus, expansion | `\int_0^1 \sin(x^{x^x}) dx`, `(x+y+z)^{700}` |
| many | a set of 200, an interval of intervals, 30 equations, a 9 × 9 matrix, `\begin{cases}` |
| regex | what makes a careless pattern backtrack: `\text{\text{…`, `1 1 1 1…` |
| mutated | an ordinary gold with marks of the others spliced in |
"""

import argparse
import os
import random
import re
import resource
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import data
from grading.pool import Grade, Grader, Pair

SPLICES = "^{9^9} ! { } \\frac \x00 \\int ( \\sum_{k=1}^{99} ^ | \\begin{cases}".split()
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


# ── hostile answers, one function per kind ───────────────────────────────────────────────────────────────────────────


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
    return rng.choice(
        ["{}", "{} - 1", "\\frac{{{}}}{{3!}}", "\\binom{{10^{{9}}}}{{7}} + {}"]
    ).format(answer)


def huge(rng: random.Random) -> str:
    digits = str(rng.randint(1, 9)) * rng.randint(100, 1900)
    power = f"10^{{{rng.randint(10**6, 10**15)}}}"
    exponent = f"1e{rng.randint(10**4, 10**9)}"
    return rng.choice(
        [digits, digits + "^{99}", f"{power} - 1", f"7 \\cdot {power}", exponent, f"0.{digits}"]
    )


def deep(rng: random.Random) -> str:
    opening, closing = rng.choice(
        [("(", ")"), ("[", "]"), ("{", "}"), ("\\{", "\\}"), ("\\left(", "\\right)"), ("\\frac{1}{", "}"), ("\\sqrt{", "}"),
         ("\\sin(", ")"), ("|", "|"), ("2^{", "}"), ("x_{", "}"), ("(1, ", ")"), ("\\text{", "}"), ("-", "")]
    )  # fmt: skip
    depth = rng.randint(5, 300)
    return opening * depth + str(rng.randint(1, 9)) + closing * depth


def unclosed(rng: random.Random) -> str:
    pieces = (
        "\\frac{ \\left( \\right. { \\begin{pmatrix} \\sqrt[ $ \\( \\boxed{ } 1 x ^ _ &".split()
    )
    return "".join(rng.choices(pieces, k=rng.randint(2, 60)))


def long(rng: random.Random) -> str:
    unit = rng.choice(["1", "(", "x+", "\\frac{", " ", "the ", "1,", "\\", "é", "<answer>"])
    return unit * (10 ** rng.randint(4, 6) // len(unit))


def bytes_(rng: random.Random) -> str:
    return "".join(
        rng.choice("\x00\x07\ud800\udfff\u202e\ufeff１²½∞\n\t 1x+{")
        for _ in range(rng.randint(1, 80))
    )


def calculus(rng: random.Random) -> str:
    body = rng.choice(
        ["\\sin(x^{x^x})", "e^{x^2} \\cos(x^3)", "\\frac{1}{x^5+x+1}", "\\sqrt{\\tan x}", "x^x"]
    )
    n = 10 ** rng.randint(3, 15)
    return rng.choice(
        [f"\\int_0^1 {body} dx", f"\\frac{{d}}{{dx}} {body}", f"\\sum_{{x=1}}^{{{n}}} {body}",
         f"\\prod_{{x=1}}^{{{n}}} {body}", f"\\lim_{{x \\to 0}} {body}", f"\\int_0^\\infty\\int_0^x {body} dy dx",
         f"\\binom{{{n}}}{{{n // 2}}}", f"\\sin({body}) + \\cos({body})", f"\\gcd({n}^{{{n}}}, 3)", f"{n}^{{{n}}} \\mod 7"]
    )  # fmt: skip


def expansion(rng: random.Random) -> str:
    terms = "+".join("abcdwxyz"[: rng.randint(2, 8)])
    roots = "+".join(f"\\sqrt{{{p}}}" for p in (2, 3, 5, 7, 11)[: rng.randint(2, 5)])
    return f"({rng.choice([terms, roots])})^{{{rng.randint(10, 3000)}}}"


def many(rng: random.Random) -> str:
    n = rng.randint(5, 250)
    numbers = [str(rng.randint(-99, 99)) for _ in range(n)]
    matrix = " \\\\ ".join(" & ".join(rng.choices(numbers, k=9)) for _ in range(9))
    cases = " \\\\ ".join(f"x_{i}^2 + x_{i + 1} = {i}" for i in range(n % 20 + 2))
    return rng.choice(
        ["\\{" + ",".join(numbers) + "\\}", " \\cup ".join(f"({i}, {i}.5]" for i in range(n // 5 + 1)),
         "+".join(numbers), "=".join(numbers), "<".join(f"x_{{{k}}}" for k in range(n % 40 + 2)),
         f"\\begin{{pmatrix}} {matrix} \\end{{pmatrix}}^{{{n}}}", f"\\begin{{cases}} {cases} \\end{{cases}}",
         ", ".join(f"x_{i} + y^{i} = {i}" for i in range(n % 30 + 2))]
    )  # fmt: skip


def regex(rng: random.Random) -> str:
    units = [
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
    unit = rng.choice(units)
    return unit * rng.randint(20, 480 // len(unit)) + rng.choice(["", "!", "}", " or", "th", "="])


def mutated(rng: random.Random) -> str:
    answer = rng.choice(GOLDS)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(answer))
        answer = answer[:at] + rng.choice(SPLICES) + answer[at + rng.randint(0, 1) :]
    return answer


KINDS: list[Callable[[random.Random], str]] = [
    tower, factorial, huge, deep, unclosed, long, bytes_, calculus, expansion, many, regex, mutated,
]  # fmt: skip


def hostile(count: int, seed: int) -> list[Pair]:
    """`count` pairs (gold, answer), the kinds in turn, the same for the same seed. No answer is right.

    >>> [len(answer) for _, answer in hostile(3, 0)] == [len(answer) for _, answer in hostile(3, 0)]
    True
    """
    rng = random.Random(seed)
    return [(rng.choice(GOLDS), KINDS[i % len(KINDS)](rng)) for i in range(count)]


def ordinary(count: int, seed: int) -> list[Pair]:
    """Golds beside right answers in other writings, and wrong ones with another digit or letter. The golds are those of
    ORZ_DATA's orz_train, or else fractions."""
    rng = random.Random(seed)
    golds = [f"\\frac{{{rng.randint(1, 999)}}}{{{rng.randint(2, 99)}}}" for _ in range(count)]
    if folder := os.environ.get("ORZ_DATA"):
        golds = [
            p.answer
            for path in sorted(Path(folder, "orz_train").glob("*.json"))
            for p in data.load(path)
        ]
    pairs = []
    for _ in range(count):
        gold = rng.choice(golds)
        wrong = re.sub(r"\d(?!.*\d)", lambda digit: str((int(digit[0]) + 1) % 10), gold, flags=re.S)
        pairs.append(
            (
                gold,
                rng.choice(
                    [gold, f"$ {gold} $.", f"x = {gold}", gold.replace("\\frac", "\\dfrac"), wrong]
                ),
            )
        )
    return pairs


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Watched(Grader):
    """A grader that notes when the last of the pairs in `left` has its verdict."""

    left: frozenset[Pair] | set[Pair] = frozenset()
    seconds = start = 0.0

    def _turn(
        self, waiting: deque[Pair], verdicts: dict[Pair, bool | None], retried: set[Pair]
    ) -> None:
        before = len(verdicts)
        super()._turn(waiting, verdicts, retried)
        for pair in islice(reversed(verdicts), len(verdicts) - before):
            if pair in self.left:
                self.left.remove(pair)
                self.seconds = time.perf_counter() - self.start


def timed(
    pairs: list[Pair], watched: set[Pair], workers: int
) -> tuple[dict[Pair, Grade], float, float]:
    """The grade of each pair, the seconds until the last of `watched` had its own, and the seconds of all. The pool is a
    fresh one, so nothing is remembered, and ready before the clock starts."""
    with Watched(workers) as grader:
        grader.check_golds([f"{i}/7" for i in range(20 * workers)])
        responses = [f"<answer>{answer}</answer>" for _, answer in pairs]
        grader.left, grader.start = set(watched), time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the share of timeouts; it is printed below
            grades = grader.grade(responses, [gold for gold, _ in pairs])
        seconds = time.perf_counter() - grader.start
        for (
            worker
        ) in grader._workers:  # let them leave by themselves, so that their memory is known
            worker.process.stdin.close()
            worker.process.wait()
    return dict(zip(pairs, grades, strict=True)), grader.seconds, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {
        "hostile": 10_000,
        "ordinary": 10_000,
        "repeats": 3,
        "workers": 2,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    attack = hostile(args.hostile, args.seed)
    taken = set(attack)
    plain = [pair for pair in ordinary(args.ordinary, args.seed) if pair not in taken]
    mixed = random.Random(args.seed).sample(attack + plain, len(attack) + len(plain))
    watched = {(gold.strip(), answer.strip()) for gold, answer in plain}
    rates: dict[str, list[float]] = {"alone": [], "among": []}
    for repeat in range(args.repeats):
        alone, seconds, _ = timed(plain, watched, args.workers)
        rates["alone"].append(len(plain) / seconds)
        graded, seconds, total = timed(mixed, watched, args.workers)
        rates["among"].append(len(plain) / seconds)
        changed = sum(graded[pair] != alone[pair] for pair in plain)
        print(
            f"{repeat}: ordinary answers/s {rates['alone'][-1]:.0f} alone, {rates['among'][-1]:.0f} among; ",
            end="",
        )
        print(f"{changed} verdicts changed; all {len(mixed)} in {total:.0f} s", flush=True)
    alone, among = (statistics.median(rates[name]) for name in rates)
    print(f"medians {alone:.0f} and {among:.0f}: {100 * (among / alone - 1):+.1f} %")
    print(
        f"peak memory of a worker: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10:.0f} MiB"
    )
    print(f"{'hostile':<14}{'answers':>8}{'different':>10}{'timeouts':>9}{'paid':>6}")
    for i, kind in enumerate(KINDS):
        grades = [graded[pair] for pair in attack[i :: len(KINDS)]]
        late, paid = sum(grade.timeout for grade in grades), sum(grade.reward for grade in grades)
        print(
            f"{kind.__name__:<14}{len(grades):>8}{len(set(attack[i :: len(KINDS)])):>10}{late:>9}{paid:>6.0f}"
        )


if __name__ == "__main__":
    main()
