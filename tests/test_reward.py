"""Grading: which text is the answer, which answers are equal, and workers that stop late ones."""

import json
import os
import random
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import pytest
from conftest import orz_data
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import grader_fuzz
from grading import equivalence, pool
from grading import extract as extract_module
from grading.extract import extract
from grading.pool import Grade, Grader, Pair
from reports import metrics

# Formulas that take for ever, that are refused as too large, and text that is quickly refused.
SLOW = ["\\gcd(9^{9^9}, 3)", "\\binom{10000000000000}{5000000000000}"]
REFUSED = [
    "9^{9^{9^9}}",
    "999999999!",
    "\\int_0^1 \\sin(x^{x^x}) dx",
    "2^{2^{100}} + 1",
    "(x+y+z)^{700}",
    "(" * 81,
]
QUICK = [
    "7" * 1500,
    "\\frac{" * 300 + "1",
    "(" * 900,
    "\x00",
    "\\boxed{",
    "\\left(\\right.",
    "\ud800",
    "{{}",
    "1e999999999",
]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, deadline=10.0) as grader:
        yield grader


def rows(*parts: str) -> list[dict]:
    """The rows of a file of the real data; the test is skipped where it is absent."""
    return [json.loads(line) for line in orz_data(*parts).read_text(encoding="utf-8").splitlines()]


def verdicts(grader: Grader, pairs: list[Pair]) -> dict[Pair, bool | None]:
    golds, answers = zip(*pairs, strict=True)
    return dict(zip(pairs, grader.equal(golds, answers), strict=True))


# ── the tables in the docstrings hold ─────────────────────────────────────────────────────────────


def table(docstring: str, header: str) -> list[list[str]]:
    """The cells of the table with this header, row by row."""
    lines = docstring.partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_extraction_table() -> None:
    rows = table(extract_module.__doc__, "| content | answer | example |")
    examples = [cell for *_, cell in rows]
    with_arrow = [re.findall(r"`([^`]*)`", cell) for cell in examples if "→" in cell]
    bare = [re.findall(r"`([^`]+)`", cell) for cell in examples if "→" not in cell]
    assert len(with_arrow) == 3 and len(bare) == 1
    for content, answer in with_arrow:
        assert extract(f"thinking</think> <answer>{content}</answer>") == answer
    for content in bare[0]:
        assert extract(f"thinking</think> <answer> {content} </answer>") == content


def test_comparison_table(grader: Grader) -> None:
    wanted = {}
    rows = table(equivalence.__doc__, "| rule | equal (gold, answer) | still unequal |")
    for _, equal, unequal in rows:
        for cell, verdict in ((equal, True), (unequal, False)):
            for pair in cell.split("; "):
                wanted[tuple(re.findall(r"`([^`]+)`", pair))] = verdict
    assert len(wanted) > 40 and all(len(pair) == 2 for pair in wanted)
    assert verdicts(grader, list(wanted)) == wanted


# ── extraction ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("</think><answer>\\boxed{5}</answer>", "5"),
        ("</think><answer>5</answer>", "5"),
        ("<answer>1</answer> wait, <answer>2</answer>", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer><answer>3</answer>", "3"),
        ("<answer>\\boxed{1} or rather \\boxed{2}</answer>", "2"),
        ("<answer>\\boxed{\\boxed{4}}</answer>", "4"),
        ("<answer>It is \\boxed{\\frac{1}{\\sqrt{2}}}.</answer>", "\\frac{1}{\\sqrt{2}}"),
        ("<answer>\\boxed{\\{1, 2\\}}</answer>", "\\{1, 2\\}"),
        ("<answer>\\boxed {6}</answer>", "6"),
        ("<answer>\\boxed{}</answer>", ""),
        ("<answer>\\boxed{7</answer>", ""),
        ("<answer>\\boxed</answer>", ""),
        ("\\boxed{8}</think><answer></answer>", ""),
        ("\\boxed{8}", ""),
        ("<answer>8", ""),
        ("8</answer>", ""),
        ("", ""),
    ],
)
def test_extract(response: str, answer: str) -> None:
    assert extract(response) == answer


@pytest.mark.parametrize(
    "answer",
    [
        "x = 5",
        "$x = 5$",
        "\\text{Evelyn}",
        "(C)",
        "C. salt water",
        "12 cm",
        "48 cupcakes",
        "No solution",
        "\\text{two lines}",
        "A sphere with radius 6",
        "x = 2 or x = 3",
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        "equal",
        "f(2) < f(1)",
    ],
)
def test_a_bare_answer_needs_no_box_unless_asked(answer: str) -> None:
    assert extract(f"<answer>{answer}</answer>") == answer
    assert extract(f"<answer>{answer}</answer>", require_boxed=True) == ""
    assert extract(f"<answer>\\boxed{{{answer}}}</answer>", require_boxed=True) == answer


@pytest.mark.parametrize(
    "prose",
    [
        "The answer is 5",
        "x is 5",
        "It is $5$.",
        "Therefore $5$",
        "We get 5.",
        "there are 5 apples",
        "\\text{the answer is } 5",
        "The digit in the thousandths place of this decimal number: 5",
        "\\(\\frac{3}{16}\\) as a decimal is 0.1875. So 5",
    ],
)
def test_prose_is_no_answer(grader: Grader, prose: str) -> None:
    assert grader.grade([f"</think><answer>{prose}</answer>"], ["5"]) == [Grade(0.0, "", False)]


def test_a_guess_among_words_earns_nothing(grader: Grader) -> None:
    guesses = [
        "not 5",
        "less than 5",
        "about 5 or 6",
        "5 or 6",
        "4, 5, 6",
        "5; 6",
        "answer: 5, or 6",
        "either $5$ or $6$",
    ]
    boxed = [f"<answer>\\boxed{{{guess}}}</answer>" for guess in guesses]
    bare = [f"<answer>{guess}</answer>" for guess in guesses]
    assert [grade.reward for grade in grader.grade(boxed + bare, ["5"] * 16)] == [0.0] * 16


# ── comparison ────────────────────────────────────────────────────────────────────────────────────

GOLDS = r"""
5 ; -\frac{1}{2} ; \dfrac{3}{4} ; 137\frac{1}{2} ; 0.\overline{3} ; 11\sqrt2 ; 6 + 9i ; 50\%
90^\circ ; 1,000 ; 10,\!080 ; \left( 3, \frac{\pi}{2} \right) ; (-\infty, 2) \cup (3, \infty)
[0,1) ; x \in [-2,7] ; x \le 5 ; 1,-2 ; \{1, 2, 3\} ; \begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}
\begin{bmatrix} 1 & 0 \\ 0 & 1 \end{bmatrix} ; 3 \pm 2 \sqrt{2} ; \emptyset ; A ; (C) ; \text{(D)}
E ; \text{Evelyn} ; \text{odd} ; \text{June 20} ; PHONE HOME ; 12:00 ; 2516_8 ; y = 2x + 3 ; p - q
\$18.90 ; 864 \mbox{ inches}^2 ; 114\text{ square units} ; 5 \text{ million} ; a + b + c ; \sin^2 t
f(2) < f(1) < f(4) ; (AB + BC)^2 \leq 6(AD^2 + BD^2) ; \frac{TM}{MK} = 2 ; x^2 + 2x + 1
\dfrac{2469}{20,\!000}
"""
EQUAL = r"""
\frac{3}{4} ~ 0.75 ; \frac{3}{4} ~ \dfrac34 ; 3/4 ~ 6/8 ; 2\pi ~ 2π ; 2\sqrt{3} ~ 2*sqrt(3)
\sqrt{2+\sqrt{3}} ~ √(2+√3) ; 5 ~ x = 5 ; x=5 ~ 5 ; x^2+2x+1 ~ (x+1)^2 ; 1,2 ~ x = 1 or x = 2
1,2 ~ $1$ and $2$ ; 106 ~ 128 - 24 + 2 = 106 ; 5 ~ \[5\] ; 1320\text{ km} ~ 1320 ; 18 ~ 18 cm^2
36 ~ 36 \text{ dollars} ; 18.9 ~ \$18.90 ; 5 ~ 5 m ; 10,000 ~ 10000 ; 1000 ~ 1\,000
C ~ \textbf{(C)} ; \text{(C)} ~ C ; E ~ \text{E} ; \text{two lines} ~ Two lines.
\infty ~ infinity ; (2, \infty) ~ x > 2 ; (1,2) ~ \left(1, 2\right)
3 \pm 2\sqrt{2} ~ 3 + 2\sqrt{2}, 3 - 2\sqrt{2} ; \pm 5 ~ 5, -5 ; 50 ~ 50\% ; 50\% ~ 50 percent
90^\circ ~ 90 degrees ; p=5,q=2;p=7,q=2 ~ p = 5, q = 2 \quad \text{and} \quad p = 7, q = 2
a+b+c ~ c + b + a
"""
UNEQUAL = r"""
(0,1) ~ [0,1] ; (2,\infty) ~ x \ge 2 ; (1,2) ~ (2,1) ; (1,2) ~ (1,2,3) ; 1,2 ~ 1 ; 1,2 ~ 12
2 ~ 2,-1 ; 5 ~ -5 ; 5 ~ \pm 5 ; 50 ~ 0.5 ; 0.5 ~ 50\% ; 42 ~ 4200 ; 100 ~ 1 ; 3 ~ 300
5 \text{ million} ~ 5 ; 2 ~ 2 halves ; 25 ~ 25 squared ; 2 ~ 2i ; 5 ~ 5x ; 5x ~ 5 ; x+1 ~ y+1
a + b + c ~ a + b + d ; x \le 5 ~ x \ge 5 ; x < 5 ~ x \le 5 ; 5 ~ x < 5 ; 5 ~ \ne 5 ; A ~ B
A ~ AB ; A ~ (A) or (B) ; A ~ A. B. ; \text{Evelyn} ~ Angela ; 0 ~ \text{} ; 0 ~ -
0 ~ no solution ; 12:00 ~ 1:00 ; \infty ~ -\infty ; \pi ~ 3.14 ; \sqrt{2} ~ 1.41 ; 120000 ~ 120,006
\frac{1}{0} ~ \frac{2}{0} ; x \in [-2,7] ~ [-2,7)
\begin{pmatrix} 1 \\ 2 \end{pmatrix} ~ \begin{pmatrix} 2 \\ 1 \end{pmatrix} ; 60^\circ ~ 61^\circ
"""


# What other projects' graders test: Math-Verify, MATH, PRM800K, Qwen's evaluation, MARIO, TRL.
FOREIGN_EQUAL = r"""
1/2 ~ \frac12 ; \frac{1}{2} ~ .5 ; \frac{3}{4} ~ \cfrac{3}{4} ; 2\frac{1}{3} ~ \frac{7}{3}
7/3 ~ 2 1/3 ; 1500 ~ 1.5e3 ; 1500 ~ 1.5 × 10^3 ; 0.00015 ~ 1.5 \times 10^{-4} ; 1{,}234 ~ 1234
1234567 ~ 1,234,567.00 ; \$1,234.50 ~ 1234.5 ; 12 ~ £12 ; 12 ~ 12 USD ; 3+4i ~ 3 + 4\mathrm{i}
45 ~ 45 degrees ; 25 ~ 25 percent ; 25 ~ 25 \text{ percent} ; 25\% ~ 25 ; 33\% ~ 33%
[0,1] ~ 0 \le x \le 1 ; (-\infty,3] ~ x ≤ 3 ; \pm 1 ~ ±1 ; x=\pm 1 ~ 1,-1 ; 5 ~ 5\,\text{cm}
(-\infty,1)\cup(2,\infty) ~ x<1 \text{ or } x>2 ; (0,2) ~ (0,1) ∪ [1,2) ; \emptyset ~ ∅
5 ~ 5 \mathrm{~cm} ; 5 ~ 5 sq. ft. ; 5 ~ 5apples ; 72 ~ 72 km/h ; 72 ~ 72 mph ; 5 ~ 5,
C ~ [C] ; C ~ \mathrm{(C)} ; B ~ b. ; \text{(B)} ~ (b) ; A,B ~ (A) and (B) ; A,B ~ \text{A and B}
B, C ~ b, c ; \ln 4 ~ 2\ln 2 ; e^x ~ exp(x) ; 1 ~ \sin^2 x + \cos^2 x ; \sec^2(y) ~ \tan^2(y)+1
5 million dollars ~ 5000000 ; 2 ~ cbrt(8) ; \sqrt[3]{x+1} ~ ∛(x+1) ; 73 ~ *73* ; 73 ~ `73`
(1,2) ~ **(1, 2)** ; x^2+y^2 ~ x**2 + y**2 ; 98 ~ about 98 ; 167 ~ Area ≈ 167 ; \pi ~ \pi ≈ 3.14
\frac{13}{12}\approx1.08 ~ 13/12 ; \frac{1000}{3} ~ \frac{1,000}{3} ; 2304\sqrt{2} ~ 2,304\sqrt{2}
x=1200,y=3400 ~ x = 1,200, y = 3,400 ; (1,2,3) ~ (x,y,z)=(1,2,3) ; (3,5) ~ m=3,n=5
(1,2),(3,4) ~ x=1,y=2 \text{ or } x=3,y=4 ; x = 1, y = 2, z = 3 ~ 1, 2, 3 ; 6 ~ 3! ; 3:2 ~ 3 : 2
-34x-45y+20z-100=0 ~ 34x+45y-20z+100=0 ; y=2x+3 ~ 2x-y+3=0 ; (1,4.5) ~ (1,\frac{9}{2})
\frac{63}{400} ~ 63/400 ; 2\frac58 ~ 2.625 ; .1, 4.0 ~ 0.1, 4 ; 1/3 ~ x = 5+5+1 = 1/3 \approx 11
1,2 ~ x_1 = 1 or x_2 = 2 ; 1,2 ~ x = 1 \lor x = 2 ; (1,2),(3,4) ~ (1,2) or (3,4)
x=1 or y=2 ~ y = 2 or x = 1 ; (0,2) ~ 0<x<1 or 1\le x<2 ; (-\infty,1)\cup(2,\infty) ~ x<1 ∨ x>2
15 ~ 15 sq ; 15 ~ 15 sq m ; 15 ~ 15 sq. m ; 15 ~ 15sq. m ; 15 ~ 15 sq.ft. ; 15 ~ 15 sq.cm
6\pi ~ 6\pi cm^2 ; 6\pi ~ 6π cm ; 2\sqrt{3} ~ 2\sqrt{3} cm^2 ; \frac{\pi}{2} ~ π/2 rad
\frac{5}{2} ~ 2 1/2 hours ; \frac{\pi}{2} ~ \frac{\pi}{2} radians
15 ~ 15 sq cm ; 15 ~ 15 square m ; 15 ~ 15 cu. m ; 15 ~ 15\text{ sq. m} ; 15qs ~ 15sq
"""
FOREIGN_UNEQUAL = r"""
50\% ~ \frac{1}{2} ; 0.03 ~ 3\% ; 100 ~ 1\% ; 1 ~ 100\% ; 3 ~ 300\% ; 5\text{ m} ~ 5\%
5 ~ 5\text{ trillion} ; 5 ~ 5\text{ or more} ; 5 ~ 5 tenths ; 0.3 ~ 0.3 repeating
5 ~ 5 millions ; 5 ~ 5 quintillion ; 5c ~ 5d ; 5 ~ 5d ; 5ab ~ 5bc ; 5 ~ 5thousand
A ~ A. B. C. ; A ~ (A) (B) ; A ~ A/B ; A ~ A & B
A ~ a, b ; A ~ AB ; A,B ~ A,C ; A,B ~ A,B,C ; b=d ~ b=e ; 73 ~ **7**3 ; 73 ~ 7**3 ; 98 ~ 97 ≈ 98
98 ~ 97 ≈ 98.5 ; 98 ~ ≠ 98 ; 98 ~ about 98 or 99 ; 2304 ~ 2,30,4 ; 2304 ~ x = 2,305
2304 ~ \{2,304\} ; 2304 ~ [2,304] ; (1,2) ~ y=1,x=2 ; (1,2,3) ~ z=1,y=2,x=3 ; x=1,y=2 ~ 2,1
x=1,y=2 ~ x=1 ; x=1,y=2 ~ (2,1) ; (1,2),(3,4) ~ x=1,y=2 \text{ or } x=4,y=3 ; x^2+1=0 ~ y^2+1=0
x^2+1=0 ~ x^2+1 ; x^2+1=0, y=1 ~ x^2+2=0, y=1 ; x^2+1=0 ~ x=x ; |x|=-1 ~ |x|=-2
\sin x = 2 ~ \sin x = 3 ; x^2+y^2=-1 ~ x^2+y^2=-2 ; y=2x+1 ~ x=2y+1 ; 5 ~ e^{i\pi} = 5
2 ~ ∛4 ; (1,2] ~ [0,2] \cap [1,3) ; 15 ~ 15 sq. root ; (0,2) ~ (0,1) ∪ (1,2) ; 15 ~ １６
5x - 7y + 11z + 4 = 0 ~ x + y - z + 2 = 0 ; \sin(x)=\frac{42}{59} ~ \cos(x)=\frac{42}{59}
(1,2) ~ x = 1 or y = 2 ; (1,2) ~ x=1 \text{ or } y=2 ; (1,2) ~ x = 1 \vee y = 2 ; (1,2) ~ 1 or 2
(1,2) ~ x = 1 or x = 2 ; 1,2 ~ x = 1 or y = 2 ; x=1,y=2 ~ x = 1 or y = 2 ; 15 ~ 15 sq root
6\pi ~ 5\pi cm^2 ; 6\pi ~ 6 cm^2 ; 2 ~ 2 1/2 hours ; 36 ~ 12 3 cm ; 6\pi\text{ cm} ~ 6\pi km
15 ~ 15 sq m + 1 ; 15 ~ 15 sq m or 16 sq m ; 15 ~ 15 sq mod 7 ; 15sq ~ 15 ; 15 ~ 15 cubed
(a+5)(b+2) ~ (+5)(b+2) ; x+2n+1 ~ x+1 ; 33.3 ~ \frac{100}{3} ; 1\\sqrt{19} ~ 1
"""


def items(lines: str) -> list[str]:
    return re.split(r" ; |\n", lines.strip())


def test_golds_of_the_data_equal_themselves(grader: Grader) -> None:
    golds = items(GOLDS)
    gradable = dict(zip(golds, grader.are_gradable(golds), strict=True))
    assert [gold for gold in golds if not gradable[gold]] == []
    pairs = []
    for gold in golds:
        has_words = "\\text" in gold or "PHONE" in gold
        pairs.append((gold, f" {gold} ." if has_words else gold.replace(" ", "")))
    same = verdicts(grader, pairs)
    assert [pair for pair, equal in same.items() if not equal] == []


def test_golds_that_no_answer_can_match(grader: Grader) -> None:
    assert grader.are_gradable(["", "  ", "\\frac{", "5"]) == [False, False, False, True]


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [(EQUAL, True), (UNEQUAL, False), (FOREIGN_EQUAL, True), (FOREIGN_UNEQUAL, False)],
    ids=["equal", "unequal", "foreign equal", "foreign unequal"],
)
def test_both_directions(grader: Grader, lines: str, verdict: bool) -> None:
    pairs = [tuple(pair.split(" ~ ")) for pair in items(lines)]
    assert [pair for pair, equal in verdicts(grader, pairs).items() if equal is not verdict] == []


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-(10**9), 10**9),
    st.integers(-(10**9), 10**9),
    st.sampled_from(["{}", "${}$", "{}.0", "{:,}", "x = {}"]),
)
def test_integers_are_equal_iff_they_are(grader: Grader, gold: int, other: int, form: str) -> None:
    answers = [form.format(gold), form.format(other)]
    assert grader.equal([str(gold)] * 2, answers) == [True, gold == other]


# ── time in the trainer's process ─────────────────────────────────────────────────────────────────

REPEATED = [
    " ",
    "1",
    "a",
    "A",
    "é",
    "½",
    "１",
    "{",
    "}",
    "\\",
    "<",
    "(",
    "$",
    "|",
    "\n",
    ",",
    ".",
    "^",
]
REPEATED += [
    "_",
    "=",
    "-",
    "~",
    "!",
    "*",
    "`",
    ":",
    "%",
    "1 ",
    "1,",
    "a ",
    "A.",
    "or ",
    "and ",
    "wait",
]
REPEATED += ["<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "\\text{", "\\frac{1}{2}"]


def seconds(function: Callable[[str], object], text: str) -> float:
    start = time.process_time()
    function(text)
    return time.process_time() - start


def alternating(*units: str, length: int) -> str:
    return "".join(units) * (length // sum(map(len, units)))


# Responses with a text in each place that a rule looks at.
PLACES = ["</think> <answer>{}</answer>", "{}</think> <answer>5</answer>", "{}</answer>{}"]
PLACES += ["<answer>\\boxed{{}}</answer>", "</think><answer>5</answer>{}!"]


def read(response: str) -> None:
    """What the trainer's process does with a response, besides waiting for a worker."""
    pool._without_worker("5", extract(response))


def measure(response: str) -> None:
    metrics.follows_format(response)
    metrics.reflects(response)


def test_a_megabyte_of_anything_is_read_in_linear_time() -> None:
    slow = {}
    for unit in REPEATED:
        text = alternating(unit, length=1_000_000)
        for place in PLACES:
            response = place.replace("{}", text)
            slow[unit, place] = seconds(read, response) + seconds(measure, response)
    for pair in combinations(REPEATED[::2], 2):
        text = alternating(*pair, length=1_000_000)
        slow[pair] = sum(seconds(read, place.replace("{}", text)) for place in PLACES[:2])
        # The metrics' patterns read the whole text, a tenth of a second for a megabyte.
        slow[pair] += seconds(measure, PLACES[1].replace("{}", text[:20_000]))
    assert max(slow.values()) < 2.0, max(slow, key=slow.get)


ALL_PAIRS = list(combinations(REPEATED, 2))


@pytest.mark.parametrize(
    "pairs", [ALL_PAIRS[::16], pytest.param(ALL_PAIRS, marks=pytest.mark.slow)]
)
def test_verdicts_from_texts_take_linear_time(
    pairs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limit of 500 characters out of the way, a quadratic pattern takes seconds here."""
    monkeypatch.setattr(equivalence, "MAX_CHARS", 10**9)
    monkeypatch.setattr(equivalence, "MAX_DEPTH", 10**9)
    monkeypatch.setattr(extract_module, "MAX_CHARS", 10**9)
    rules = {
        "answer": lambda text: equivalence.by_text("C", text),
        "unit": lambda text: equivalence.by_text("5\\text{ m}", "1" + text),
        "choice": lambda text: equivalence.by_text("(C)", "A)" + text),
        "bracket": lambda text: equivalence.by_text("(1,2)", "(" + text),
        "gold": lambda text: equivalence.by_text(text, "C"),
        "cost": lambda text: equivalence.cost("5", text),
        "prose": extract_module._is_prose,
        "box": lambda text: extract_module._last_box("\\boxed{" + text),
    }
    texts = [alternating(unit, length=20_000) for unit in REPEATED]
    for first, second in pairs:
        texts.append(alternating(first, second, length=20_000))
        texts.append(alternating(first, length=10_000) + alternating(second, length=10_000))
    slow = {(name, text[:20]): seconds(rules[name], text) for name in rules for text in texts}
    assert max(slow.values()) < 0.5, max(slow, key=slow.get)


# ── the pool ──────────────────────────────────────────────────────────────────────────────────────


def test_slow_answers_end_in_time_and_change_no_others() -> None:
    answers = SLOW + QUICK + ["1" * 1_000_000, "0.25"]
    responses = [f"<answer>{answer}</answer>" for answer in answers]
    warning = rf"2 of {len(answers)} answers missed the grader's deadline of 1.0 s"
    with Grader(workers=2, deadline=1.0) as grader:
        assert grader.equal(["1/2"], ["0.5"]) == [True]
        start = time.monotonic()
        with pytest.warns(UserWarning, match=warning):
            grades = grader.grade(responses, ["1/4"] * len(answers))
        assert time.monotonic() - start < 4 * len(SLOW)
        assert [grade.reward for grade in grades] == [0.0] * (len(answers) - 1) + [1.0]
        assert grades[0].timeout and not grades[-1].timeout
        assert grader.equal(["1/3"], ["2/6"]) == [True]


@pytest.mark.parametrize("answer", REFUSED)
def test_a_formula_too_large_to_evaluate_equals_itself_alone(grader: Grader, answer: str) -> None:
    start = time.monotonic()
    assert grader.equal(["1/4", answer], [answer, answer]) == [False, True]
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize("group", [True, False])
def test_a_dead_worker_is_replaced_and_costs_no_answer_its_reward(group: bool) -> None:
    with Grader(workers=1) as grader:
        assert grader.equal(["1/2"], ["0.5"]) == [True]
        (killed,) = grader.worker_pids
        kill = os.killpg if group else os.kill  # without its group, its child goes on alone
        kill(killed, signal.SIGKILL)
        assert grader.equal(["1/3"], ["2/6"]) == [True]
        assert not group or grader.worker_pids != [killed]


DYING = """
import sys
print("ready", flush=True)
sys.stdin.readline()
"""
WITHOUT_MEMORY = """
import sys
sys.path.insert(0, {root!r})
from grading import equivalence

def equal(gold, answer):
    print("a library's message")
    if gold == "1/2":
        raise MemoryError
    return True

equivalence.equal = equal
equivalence._serve(3.0)
"""


@pytest.mark.parametrize("program", [DYING, WITHOUT_MEMORY])
def test_an_answer_that_its_worker_cannot_compare_is_late_and_not_wrong(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(program.format(root=str(Path(pool.__file__).parents[1])))
    monkeypatch.setattr(pool, "WORKER", worker)
    with Grader(workers=1) as grader:
        with pytest.warns(
            UserWarning, match=r"on 1 answers.*\n?.*To see why.*'\[\"1/2\", \"3/6\"\]'"
        ):
            grades = grader.grade(["<answer>3/6</answer>"], ["1/2"])
        assert grades == [Grade(0.0, "3/6", True)]
        if program == WITHOUT_MEMORY:
            assert grader.equal(["1/3"], ["2/6"]) == [True]


def test_a_late_child_is_replaced_without_a_new_import() -> None:
    with Grader(workers=1, deadline=0.5) as grader:
        assert grader.equal(["1/2"], ["0.5"]) == [True]
        pids = grader.worker_pids
        assert grader.equal(["1"] * 3, [*SLOW, "2/2"]) == [None, None, True]
        assert grader.worker_pids == pids


def grades_of(pairs: list[Pair]) -> list[Grade]:
    """The grades that a new grader gives, without its warning about many timeouts."""
    responses = [f"<answer>{answer}</answer>" for _, answer in pairs]
    with warnings.catch_warnings(), Grader(workers=2, deadline=1.0) as grader:
        warnings.simplefilter("ignore")
        return grader.grade(responses, [gold for gold, _ in pairs])


@pytest.mark.parametrize(
    "count", [120, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_hostile_answers_change_no_verdict_and_earn_nothing(count: int) -> None:
    ordinary = grader_fuzz.ordinary(100, 0)
    hostile = grader_fuzz.hostile(count, 0)
    alone = grades_of(ordinary)
    mixed = grades_of(hostile + ordinary)
    assert mixed[count:] == alone and 0 < sum(grade.reward for grade in alone) < len(alone)
    assert len(hostile) == count and not any(grade.reward for grade in mixed[:count])
    assert sum(grade.timeout for grade in mixed[:count]) < 0.1 * count


def test_memory_of_a_worker_is_limited() -> None:
    with Grader(workers=1) as grader:
        assert grader.equal(["1/2"], ["0.5"]) == [True]
        limits = Path(f"/proc/{grader.worker_pids[0]}/limits")
        if not limits.exists():
            pytest.skip("no /proc here")
        most = equivalence.MAX_MEMORY
        assert re.search(rf"Max address space +{most} +{most}", limits.read_text())


@pytest.fixture
def decided(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> list[Pair]:
    """The pairs that the worker has decided, in this order."""
    pairs: list[Pair] = []
    monkeypatch.setattr(grader, "on_verdict", lambda pair, verdict: pairs.append(pair))
    return pairs


def test_costly_answers_come_last(grader: Grader, decided: list[Pair]) -> None:
    answers = ["\\binom{13}{9} + 2^{2^3}", "\\frac{3}{7", "\\frac{3}{8}", "\\sqrt{15}"]
    grader.equal(["\\frac{5}{7}"] * 4, answers)
    order = [answer for _, answer in decided]
    assert order == [answers[2], answers[3], answers[0], answers[1]]


def test_workers_end_with_the_grader() -> None:
    start = time.monotonic()
    grader = Grader(workers=2)
    assert time.monotonic() - start < 0.5  # it does not wait for the imports
    pids = grader.worker_pids
    assert len(pids) == 2
    grader.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_when_their_input_does() -> None:
    with Grader(workers=1) as grader:
        assert grader.equal(["1/2"], ["0.5"]) == [True]
        process = grader._workers[0].process
        start = time.monotonic()
        grader.close(kill=False)
        assert process.returncode == 0 and time.monotonic() - start < 5


def test_results_do_not_depend_on_the_number_of_workers(grader: Grader) -> None:
    pairs = [(f"\\frac{{{i}}}{{6}}", f"{i % 4}/{i % 3 + 1}") for i in range(40)]
    with Grader(workers=3) as three:
        assert verdicts(three, pairs) == verdicts(grader, pairs)
    assert 0 < sum(map(bool, verdicts(grader, pairs).values())) < 40


def test_a_thread_may_grade(grader: Grader) -> None:
    results = []

    def compare(number: int) -> None:
        results.append(grader.equal([f"{number}/2"], [f"{number / 2}"]))

    threads = [threading.Thread(target=compare, args=(number,)) for number in (1, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True]] * 3


def test_equal_pairs_are_compared_once(grader: Grader, decided: list[Pair]) -> None:
    responses = ["<answer>14/4</answer>"] * 50 + ["<answer>3.5</answer>"] * 50
    assert all(grade.reward == 1.0 for grade in grader.grade(responses + responses, ["3.5"] * 200))
    assert decided == [("3.5", "14/4")]  # and the same text needs no comparison
    assert grader.equal(["3.5"], ["14/4"]) == [True] and len(decided) == 1


def test_a_worker_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.sys, "executable", "/bin/false")
    grader = Grader(workers=1)
    with pytest.raises(RuntimeError, match="do not start; to see why, run this command"):
        grader.equal(["1/2"], ["0.5"])
    grader.close()


# ── real answers ──────────────────────────────────────────────────────────────────────────────────


def test_pairs_labeled_by_hand(grader: Grader) -> None:
    tests = rows("answer_tests", "hard_manual.jsonl")
    wanted = {(row["gold"], row["pred"]): bool(row["expected"]) for row in tests}
    assert verdicts(grader, list(wanted)) == wanted


def test_real_responses(grader: Grader) -> None:
    labeled = [
        row for row in rows("responses", "responses.jsonl") if row["fmt"] == "orz_think_answer"
    ]
    # The labels of the training log are the rewards of another grader, with its mistakes.
    labeled = [row for row in labeled if row["set"] != "orz_fork_train_log"]
    selected = random.Random(0).sample(labeled, 300)
    golds = [row["gold"] for row in selected]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grades = grader.grade([row["pred"] for row in selected], golds)
    wrong = [
        (row["gold"], grade.answer)
        for row, grade in zip(selected, grades, strict=True)
        if grade.reward != row["expected"]
    ]
    assert wrong == []
