r"""When two answers are equal.

Gold and answer are each read *whole*, as one formula. (Math-Verify left to itself searches a text for whatever looks like a
number, and would pay for a guess inside a sentence.) Where Math-Verify alone reads too little or too much:

| rule | equal (gold, answer) | still unequal |
|---|---|---|
| text is compared as words, without case or article | `\text{ellipse}`, `An ellipse` | `\text{least}`, `stale` |
| a letter as gold is a choice, what follows is free | `C`, `(C)`; `C`, `C. 5 m`; `C`, `Option C` | `C`, `B`; `C`, `C or B` |
| so is a letter before a text as gold | `\text{(E)}\ 5`, `E` | `\text{(E)}\ 5`, `D` |
| plain text and unicode stand for LaTeX | `\sqrt{53}`, `√53`; `\frac{\pi}{2}`, `pi/2` | `\sqrt{53}`, `√5` |
| `U` between intervals is ∪ | `(-\infty,2)\cup(3,\infty)`, `(-inf, 2) U (3, inf)` | `(0,1)`, `[0,1)` |
| unicode fractions and exponents | `\frac{1}{2}`, `½`; `10^{-3}`, `10⁻³` | `\frac{1}{2}`, `⅓`; `10^{-3}`, `10³` |
| an inequality is its interval | `[-2,7]`, `-2 \le x \le 7` | `[-2,7]`, `-2 \le x < 7` |
| ordinals are numbers | `12`, `12^{\text{th}}`; `12`, `12th` | `12`, `13th` |
| a unit or noun after a number is dropped | `1320`, `1320 km`; `48`, `48 cupcakes` | `48`, `48 or more` |
| and may be left out, but not be another | `5\text{ m}`, `5`; `5`, `5 m/s` | `5\text{ m}`, `5 km`; `\$5`, `5 cents` |
| so may a base | `204_5`, `204` | `204_5`, `204_6` |
| a scale word is no unit | `5000000`, `5 million`; `24`, `2 dozen` | `5`, `5\text{ million}` |
| percent: the number or the fraction | `50\%`, `50`; `50\%`, `0.5` | `50`, `0.5`; `3`, `300` |
| degrees and currency are dropped | `90^\circ`, `90°`; `\$18.90`, `18.9` | `90^\circ`, `100` |
| but not inside a sine | `\frac{1}{2}`, `\sin 30^\circ` | `\sin 30^\circ`, `\sin 30` |
| a time of day is text | `10:00 \text{ a.m.}`, `10:00 AM` | `10:00 \text{ a.m.}`, `10:00 PM`; `6:00`, `12:00` |
| i is the imaginary unit | `6+9i`, `9i+6` | `6+9i`, `9+6i` |
| capitals are other variables | `x`, `X = x` | `n`, `N`; `3R^2`, `3r^2` |
| an equation gives its right side, if it is true | `106`, `128 - 22 = 106`; `7`, `m + n = 7` | `5`, `6 = 5` |
| an integral, sum, product or limit is a task, no answer | `\sum k`, `\sum k` | `5050`, `\sum_{k=1}^{100} k` |
| thousands may be set apart, a list may not be joined | `1000`, `1,000`; `1000`, `1 000` | `32349`, `32, 349` |
| a decimal comma, if the gold has a point | `2.5`, `2,5` | `2.345`, `2,345`; `3,5`, `3.5` |
| mixed and repeating numbers | `\frac{3}{2}`, `1 1/2`; `\frac{1}{3}`, `0.\overline{3}` | `\frac{11}{2}`, `1 1/2` |
| tuples are ordered, lists and sets are not | `1,2`, `2 and 1`; `\{1,2\}`, `\{2,1\}` | `(1,2)`, `(2,1)`; `2`, `2,-1` |
| a set is no tuple and no interval | `\{1,2\}`, `1,2` | `(1,2)`, `\{1,2\}`; `\{1,2\}`, `[1,2]` |
| fractions are exact | `10^{20}`, `100000000000000000000` | `2^{60}`, `2^{60}+1` |
| numbers alike to 12 digits are equal | `\sqrt{51}`, `10\sqrt{0.51}` | `\frac{1}{3}`, `0.33` |
| decimals are rounded, but not to nothing | `\frac{1}{3}`, `0.333333` | `1.6 \times 10^{-19}`, `3.2 \times 10^{-19}` |
| what would take over 10,000 digits is not written out | `9^{9^9}`, `9^{9^{9}}` | `7`, `9^{9^9}` |

Comparing may never end (a model will write `9^{9^9}`), so `equal` runs in a process of its own: `python -m grading.equivalence --worker`
is that process, and grading/pool.py keeps several.
"""

import json
import os
import re
import resource
import signal
import sys
from collections import Counter
from contextlib import suppress
from itertools import accumulate
from math import inf, log10
from typing import TYPE_CHECKING
from unicodedata import normalize

if TYPE_CHECKING:  # sympy takes half a second to import; the trainer needs none of it
    from sympy import Basic

# Real answers stay far below; every parser here is slower than linear in them, and some exponential in the depth.
MAX_CHARS = 500
MAX_DEPTH = 10
MAX_DIGITS = 10_000  # of a number, once written out
MEMORY = 1 << 30  # bytes of address space for a worker; sympy alone takes a quarter of it

_INTEGER = re.compile(r"0|-?[1-9]\d*", re.A)
_CLOCK = re.compile(
    r"(\d\d?):([0-5]\d)[\s~\\,]*(?:\\(?:text|mathrm|mbox)\{ *)?(?:([ap])\.?m\.?)?[ }]*", re.A | re.I
)
_UNDONE = re.compile(r"\\(?:i*int|oint|sum|prod|lim)(?![a-z])|[∫∑∏]")
_NESTING = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_BRACKET = re.compile(r"[()\[\]{}]")
_COMMON = r"(?:[dt]?frac|sqrt|pi|left|right|text|circ)"
_MARKS = re.compile(
    rf"\^(?! ?\{{? ?\\?circ)|(?<=\^\{{)\d\d\d|\de(?=\d)|[!|_<>&∞\x00-\x1f\ud800-\udfff]|\\(?!{_COMMON})[a-z]+"
)
_LETTER = re.compile(r"\(?([A-Z])(?:\)?[.:]?|\)[\\ ].*)", re.S)
_ANOTHER = r".*(?:\b(?:or|and)\b|\b[A-Z][).])"
_CHOICE = re.compile(
    rf"(?:(?i:option|choice|answer):? )?[(\[]?([A-Z])(?:[)\].:]+(?!{_ANOTHER})|$)", re.S
)
_LONE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_UNITS = {
    spelling: names.split()[-1]
    for names in """mm millimeters millimeter|cm centimeters centimeter|m meters meter|km kilometers kilometer|mg milligrams
    milligram|g grams gram|kg kilograms kilogram|inches inch|ft feet foot|yards yard|mi miles mile|s sec seconds second|min
    minutes minute|h hr hours hour|days day|weeks week|months month|years year|cents cent|dollars dollar""".split(
        "|"
    )
    for spelling in names.split()
}
_TEXT = re.compile(r"\\(?:text\w*|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_SCALE = {
    "hundred": "10^2",
    "thousand": "10^3",
    "million": "10^6",
    "billion": "10^9",
    "dozen": "12",
}
# Words after a number that change it, so that it would be wrong to drop them as if they were units.
_OPERATOR = r"(?:or|and|to|more|less|over|plus|minus|times|point|squared|cubed|factorial|half|halves|\w+ths|thirds|quarters)"
_PER = r"(?: ?/ ?(?:s|h|[a-z]{3,})(?:\^\{?\d\}?)?)?"
_TRIG = r"\\(?:sin|cos|tan|cot|sec|csc)(?: ?\^ ?\{?\d\}?)?"
_UNIT = (
    rf"(?![a-z ]*\b{_OPERATOR}\b)(?:[A-Za-z]{{3,}}|[ckm]?m(?= ?/)|[ckm]m|[km]?g|ft|in|sq)"
    rf"(?: [A-Za-z]{{2,}}){{0,2}}(?:\^\{{?\d\}}?)?{_PER}"
)


def _raised(small: re.Match) -> str:
    """⁻¹² is ^{-12}, and ₁₂ is _{12}."""
    return (
        ("_" if small[0][0] in "₀₁₂₃₄₅₆₇₈₉" else "^")
        + "{"
        + normalize("NFKC", small[0]).replace("−", "-")
        + "}"
    )


def _repeating(decimal: re.Match) -> str:
    r"""0.1\overline{6} is (16 - 1)/90."""
    whole, once, again = decimal.groups()
    return rf"\frac{{{int(whole + once + again) - int(whole + once or 0)}}}{{{'9' * len(again) + '0' * len(once)}}}"


_REWRITES = [
    (re.compile(written), meant)
    for written, meant in [
        (r"(?<!\\)\\[\[\]()]|\\?\$|[€£]|(?<=\d),\\! ?(?=\d{3})|\\!", ""),
        (r"(?:(?<!\\)\\[ ,;:]|\\q?quad\b|\s|~)+", " "),
        (r"[\s.:\\]+$|^[\s=]+", ""),
        (r"^\\text\{(\d[^{}]*)\}$", r"\1"),
        (r"[⁰¹²³⁴-⁹⁻]+|[₀-₉]+", _raised),
        (
            r"[¼-¾⅐-⅞]",
            lambda part: r"\frac{{{}}}{{{}}}".format(*normalize("NFKC", part[0]).split("⁄")),
        ),
        ("[–−]", "-"),
        ("·", r"\\cdot "),
        (r"\\varnothing|∅", r"\\emptyset "),
        (r"\\langle\b", "("),
        (r"\\rangle\b", ")"),
        ("∞", r"\\infty "),
        ("°", r"^\\circ "),
        (r"\*\*", "^"),
        (r"(?<![A-Za-z\\])(pi|theta|alpha|beta|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1 "),
        (r"(?<=[)\]}]) ?U ?(?=[(\[{\\])", r"\\cup "),
        (r"(?<=\d) ?\^? ?\{? ?(?:\\(?:text|mathrm|mbox)\{ ?)?(?:st|nd|rd|th)\b[ }]*$", ""),
        (
            r"(?<=\d) ?(?:\\text\{ ?)?(" + "|".join(_SCALE) + r")\b\}?",
            lambda word: r"\cdot " + _SCALE[word[1]],
        ),
        (rf"^([-+]?\d[\d.,]*) {_UNIT}$", r"\1"),
        (r"^[-+]?\d{1,3}(?: \d{3})+$", lambda number: number[0].replace(" ", "")),
        (r"^([-+]?\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"(?<=\d)[eE]([-+]?\d+)(?![\d.])", r"\\cdot 10^{\1}"),
        (r"^([-+\d.,/]+) ?= ?([A-Za-z])$", r"\2=\1"),
        (rf"({_TRIG} ?[({{]?)([\d.]+) ?\^ ?\{{? ?\\circ ?\}}?", r"\1{\\frac{\2\\pi}{180}}"),
        (r"(?<![A-Za-z\\])i(?![A-Za-z])", "{i}"),
        (r"(\d*)\.(\d*)\\overline\{(\d+)\}", _repeating),
        # A last letter on its own is a unit after a number (5 m), and a variable after anything else (a + b + c).
        (
            r"^(?![-+]?(?:[\d.,]+|\\[dt]?frac\{\d+\}\{\d+\}) ?\w$)(.*[^A-Za-z\\])([A-Za-z])$",
            r"\1{\2}",
        ),
        (r"(?<=\d) ?(?:\\text\{ ?)?(?:and|or) ?\}? ?(?=[A-Za-z][\w()]* ?=)", "; "),
        (r"√|(?<!\\)sqrt", r"\\sqrt "),
        (r"\\sqrt ?(\d+|[a-z]\b)", r"\\sqrt{\1}"),
    ]
]


def _latex(text: str) -> str:
    """The text as one LaTeX formula, by the rules of the second table; the order of `_REWRITES` matters."""
    for written, meant in _REWRITES:
        text = written.sub(meant, text)
    while (inner := re.sub(r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", text)) != text:
        text = inner
    return text


def _words(text: str) -> str:
    plain = " ".join(_TEXT.sub(r" \1 ", text).strip(" .$").casefold().split())
    # Few letters may be a product, and ab = ba; marked as text, or more of them, they are a word.
    letters = 2 if _TEXT.search(text) else 4
    is_text = re.fullmatch(r"[a-z][a-z0-9 ,'-]*", plain) and re.search(
        rf"[a-z]{{{letters}}}", plain
    )
    return re.sub(r"^(?:an?|the) ", "", plain) if is_text else ""


def by_text(gold: str, answer: str) -> bool | None:
    """The verdict where the two texts alone decide it, in microseconds; None where they have to be evaluated.

    >>> by_text("42", "4200"), by_text("C", "(C) 5 m"), by_text("0.5", "1/2")
    (False, True, None)
    """
    if len(answer) > MAX_CHARS or _depth(answer) > MAX_DEPTH:
        return False
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return gold == answer
    if (gold_words := _words(gold)) and (words := _words(answer)):
        return gold_words == words
    if (letter := _LETTER.fullmatch(_plain(gold))) and (choice := _CHOICE.match(_plain(answer))):
        return letter[1] == choice[1]
    if (
        (clock := _CLOCK.fullmatch(gold))
        and (other := _CLOCK.fullmatch(answer))
        and (clock[2][0] == "0" or clock[3])
    ):
        halves = {half.lower() for half in (clock[3], other[3]) if half}
        return (int(clock[1]), clock[2]) == (int(other[1]), other[2]) and len(halves) < 2
    for kind in (_base, _brackets, _unit):
        if (asked := kind(gold)) and (said := kind(answer)) and asked != said:
            return False
    undone = _UNDONE.search(answer) and not _UNDONE.search(gold)
    return False if undone or _other_case(gold, answer) else None


def _plain(text: str) -> str:
    return _TEXT.sub(r"\1", text).replace("**", "").strip(" $")


def _base(text: str) -> str:
    return written[1] if (written := re.search(r"\d_ ?\{? ?(\d+) ?\}?$", text)) else ""


def _brackets(text: str) -> str:
    r"""( of a tuple or open interval, { of a set."""
    outer = re.fullmatch(r"(\(|\\\{).*,.*(?:\)|\\\})", re.sub(r"\\left|\\right|[\s$]", "", text))
    return outer[1] if outer else ""


def _unit(text: str) -> str:
    word = re.search(
        r"\d[ ~\\,{}]*(?:\\(?:text|mathrm|mbox)\{[ ~]*)?([A-Za-z]+)[ .}$]*(?:\^\{?\d\}?)?$", text
    )
    return (
        _UNITS.get(word[1].lower(), "") if word else "dollar" if re.match(r"\\\$ ?\d", text) else ""
    )


def _other_case(gold: str, answer: str) -> bool:
    """Whether one writes n where the other writes N: Math-Verify takes them for the same."""
    ours, theirs = (
        set(_LONE.findall(re.sub(r"\w+(?:\(\w\))? ?=", "", text))) for text in (gold, answer)
    )
    return any(letter.swapcase() in theirs - ours for letter in ours - theirs)


def _depth(text: str) -> int:
    return max(accumulate(_nesting(text)), default=0) + text.count("|") // 2


def _nesting(text: str) -> list[int]:
    return [_NESTING[mark] for mark in _BRACKET.findall(text)]


def _digits(expr: "Basic") -> float:
    r"""At most how many digits it takes to write `expr` out, powers of sums multiplied out; a variable counts as a digit.

    >>> from sympy import Integer, Pow
    >>> _digits(Pow(Integer(10), Integer(100), evaluate=False))
    100.0
    """
    from sympy import Add, Float, MatrixBase, Rational

    if isinstance(expr, Rational):
        return log10(max(1, abs(expr.p), expr.q))
    if isinstance(expr, Float):
        return log10(1 + abs(expr))
    if not (
        sizes := [
            _digits(part) for part in (expr.flat() if isinstance(expr, MatrixBase) else expr.args)
        ]
    ):
        return 0.0
    first, last = (
        sizes[0],
        min(sizes[-1], 9),
    )  # nobody writes out what 9 digits of a power or factorial make
    match type(expr).__name__:
        case "Pow":
            terms = {"number" if part.is_Integer else part for part in Add.make_args(expr.base)}
            return max(1.0, first) * 10 ** (
                last * len(terms)
            )  # as many digits in each of n^(terms-1) products
        case "factorial" | "factorial2" | "subfactorial" | "gamma":
            return max(1.0, last) * 10**last
        case "binomial":
            return min(10 ** min(first, 9), max(1.0, first) * 10**last)
        case "Mul":
            return sum(sizes)
        case _:
            return max(sizes) + log10(len(sizes))


def equal(gold: str, answer: str) -> bool:
    """Whether the two say the same (table above). Call it in a worker only: it may never return."""
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Eq, I, Symbol, nan, zoo

    if (verdict := by_text(gold, answer)) is not None:
        return verdict
    if re.fullmatch(r"-?\d+\.\d+", gold) and re.fullmatch(r"-?\d+,(?!\d{3}$)\d+", answer):
        answer = answer.replace(",", ".")

    whole = [
        LatexExtractionConfig(boxed_match_priority=-1)
    ]  # and no ExprExtractionConfig, which would search
    readings = [parse(f"${_latex(text)}$", whole, parsing_timeout=None) for text in (gold, answer)]
    if not all(readings) or any(isinstance(reading[0], str) for reading in readings):
        return False  # not readable; check_golds names such golds
    expected, given = (reading[0] for reading in readings)
    if expected == given:
        return not expected.has(nan, zoo)  # 1/0 and 2/0 are the same zoo
    if max(_digits(expected), _digits(given)) > MAX_DIGITS:
        return False
    expected, given = (
        formula.xreplace({Symbol("i", real=False): I}) for formula in (expected, given)
    )
    if isinstance(given, Eq) and (gap := _gap(*given.args)) is not None and gap > 0.01:
        return False  # 6 = 5 is no way to write 5
    named = isinstance(expected, Eq) and expected.lhs.is_Symbol
    gap = _gap(
        expected.rhs if named and not isinstance(given, Eq) else expected,
        given.rhs if isinstance(given, Eq) and not isinstance(expected, Eq) else given,
    )
    if gap is not None and gap <= 1e-12:
        return True
    # Math-Verify rounds to 6 decimals: too coarse for what is small.
    return (gap is None or gap < 1e-3) and verify(
        expected, given, allow_set_relation_comp=True, timeout_seconds=None
    )


def _gap(expected: "Basic", given: "Basic") -> float | None:
    """|expected − given| / |expected| of two numbers, infinite for different fractions; None for anything else, and for
    percentages, which may be read either way."""
    from sympy import Expr, UnevaluatedExpr

    if not all(
        isinstance(side, Expr) and side.is_number and not side.has(UnevaluatedExpr)
        for side in (expected, given)
    ):
        return None
    expected, given = expected.doit(), given.doit()
    if expected.is_Rational and given.is_Rational:
        return 0.0 if expected == given else inf
    size, difference = abs(expected).evalf(), abs(expected - given).evalf()
    if not (size.is_Float and size.is_finite and difference.is_number and difference.is_finite):
        return None
    return float(difference / size)


def cost(gold: str, answer: str) -> int:
    r"""How hard to compare an answer looks beside its gold: 0 for nearly every real one. Cheap ones are compared first.

    >>> cost(r"\frac{1}{2}", r"\frac{4}{8}"), cost("1", "9^{9^9}")
    (0, 2)
    """
    marks = Counter(_MARKS.findall(answer))
    marks -= Counter(_MARKS.findall(gold))
    unbalanced = sum(_nesting(answer)) != 0
    deeper = max(0, _depth(answer) - _depth(gold) - 2)
    return marks.total() + 5 * unbalanced + deeper + max(0, len(answer) - len(gold)) // 30


def _work(deadline: float) -> None:
    """Import once, then let one child after another compare, each until it is late: the kernel's alarm ends it whatever it
    is doing, nothing of it is left to go wrong, and the next is there in milliseconds."""
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    equal("1", "\\frac{2}{2}")  # import and build the parser before the first clock runs
    while child := os.fork():
        if os.WTERMSIG(os.waitpid(child, 0)[1]) != signal.SIGALRM:
            return
        print("late", flush=True)
    _serve(deadline)
    os._exit(0)


def _serve(deadline: float) -> None:
    print("ready", flush=True)
    for line in (
        sys.stdin
    ):  # one pair at a time is under way, so a child that ends leaves nothing half read
        signal.setitimer(signal.ITIMER_REAL, deadline)
        try:
            same = equal(*json.loads(line))
        except Exception:
            same = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(same), flush=True)


if __name__ == "__main__":
    _work(float(sys.argv[2]))
