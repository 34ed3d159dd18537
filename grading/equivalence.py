r"""Decide whether two answers are equal.

Gold and answer are each parsed as a whole, as one formula. Math-Verify by default searches a text
for anything that looks like a number, and so would accept a number inside a sentence. These rules
hold where Math-Verify alone accepts too little or too much:

| rule | equal (gold, answer) | still unequal |
|---|---|---|
| words match without case or article | `\text{ellipse}`, `An ellipse` | `\text{least}`, `stale` |
| a single capital letter is a choice | `C`, `(C)`; `C`, `Option C` | `C`, `B`; `C`, `C or B` |
| from A to J also as a small letter | `C`, `c`; `C`, `(c)` | `C`, `b`; `C`, `a), c)`; `N`, `n` |
| text after a choice is ignored | `C`, `C. 5 m` | `C`, `D. 5 m`; `A`, `A), B, C` |
| lists of letters have no order | `\text{A,C}`, `C and A`; `b=d`, `d=b` | `A,C`, `A`; `A,C`, `AC` |
| also text after a letter in the gold | `\text{(E)}\ 5`, `E` | `\text{(E)}\ 5`, `D` |
| plain text may replace LaTeX | `\sqrt{53}`, `√53`; `\frac{\pi}{2}`, `pi/2` | `\sqrt{53}`, `√5` |
| `U` is ∪ | `(-\infty,2)\cup(3,\infty)`, `(-inf, 2) U (3, inf)` | `(0,1)`, `[0,1)` |
| Markdown's emphasis is dropped | `73`, `**73**`; `x^2`, `x**2` | `73`, `**37**`; `x^2`, `x*2` |
| full-width characters | `1,2`, `１，２`; `(A)`, `（A）` | `1,2`, `１，３` |
| Unicode roots and functions | `2`, `∛8`; `e^{16}`, `exp(16)` | `2`, `∛9`; `e^{16}`, `exp(15)` |
| Unicode fractions | `\frac{1}{2}`, `½` | `\frac{1}{2}`, `⅓` |
| Unicode exponents | `10^{-3}`, `10⁻³` | `10^{-3}`, `10³` |
| an inequality is its interval | `[-2,7]`, `-2 \le x \le 7` | `[-2,7]`, `-2 \le x < 7` |
| ordinals are numbers | `12`, `12^{\text{th}}`; `12`, `12th` | `12`, `13th` |
| also several of them | `(-\infty,1]\cup(2,3)`, `x ≤ 1 or 2 < x < 3` | `(0,1)`, `x > 0 or x < 1` |
| set operations are computed | `(1,2]`, `[0,2] \cap (1,3)` | `(1,2]`, `[0,2) \cap (1,3)` |
| words after a number are dropped | `1320`, `1320 km`; `48`, `48 cupcakes` | `48`, `48 or more` |
| known units after π, √ or a fraction | `6\pi`, `6\pi cm^2` | `6\pi`, `6 cm^2` |
| without a space: words, known units | `10`, `10weeks`; `5`, `5cm` | `10`, `10ab`; `5d`, `5c` |
| units may be abbreviated | `15`, `15 sq. m`; `5`, `5 ft.` | `15`, `51 sq. m`; `15`, `15 sq root` |
| not words that change the number | `1`, `1 hour` | `1`, `1 third`; `5`, `5\text{ squared}` |
| a unit may be missing | `5\text{ m}`, `5`; `5`, `5 m/s` | `5`, `6 m/s` |
| a unit may not differ | `5\text{ m}`, `5 m` | `5\text{ m}`, `5 km`; `\$5`, `5 cents` |
| a base may be missing, not differ | `204_5`, `204` | `204_5`, `204_6` |
| a scale word is no unit | `5000000`, `5 million`; `24`, `2 dozen` | `5`, `5\text{ million}` |
| also the large ones | `2000000000000`, `2 trillion` | `5`, `5 trillion`; `5`, `5 zillion` |
| percent is a unit, not 1/100 | `50`, `50\%`; `50\%`, `50 percent` | `0.5`, `50\%`; `50\%`, `0.5` |
| ≈ is an equals sign | `98`, `≈ 98`; `98`, `x \approx 98` | `98`, `≈ 97` |
| of exact ≈ rounded, either counts | `\frac{1}{3}`, `1/3 ≈ 0.33` | `0.34`, `1/3 ≈ 0.34` |
| degrees and currency are dropped | `90^\circ`, `90°`; `\$18.90`, `18.9` | `90^\circ`, `100` |
| degrees count inside a sine | `\frac{1}{2}`, `\sin 30^\circ` | `\sin 30^\circ`, `\sin 30` |
| a time of day is text | `10:00 \text{ a.m.}`, `10:00 AM` | `10:00 \text{ a.m.}`, `10:00 PM` |
| its half of the day may be missing | `6:00 \text{ p.m.}`, `6:00` | `6:00`, `12:00` |
| i is the imaginary unit | `6+9i`, `9i+6` | `6+9i`, `9+6i` |
| n and N are different variables | `x`, `X = x` | `n`, `N`; `3R^2`, `3r^2` |
| a true equation is its right side | `106`, `128 - 22 = 106`; `7`, `m + n = 7` | `5`, `6 = 5` |
| also a complex one | `-1`, `e^{i\pi} = -1` | `1`, `e^{i\pi} = 1` |
| equations: multiples are equal | `x^2 = 4`, `2x^2 - 8 = 0` | `x^2 = 4`, `x^2 = 9` |
| also without a solution | `x^2 = -4`, `x^2 + 4 = 0` | `x^2-4x+10=0`, `x^2-3x+10=0` |
| an unevaluated sum is no answer | `\sum k`, `\sum k` | `5050`, `\sum_{k=1}^{100} k` |
| thousands may be separated | `1000`, `1,000`; `1000`, `1 000` | `32349`, `32, 349` |
| except inside brackets | `2304`, `48^2 = 2,304`; `(2,304)`, `(2, 304)` | `2304`, `(2,304)` |
| decimal comma, if the gold has a point | `2.5`, `2,5` | `2.345`, `2,345`; `3,5`, `3.5` |
| mixed numbers | `\frac{3}{2}`, `1 1/2` | `\frac{11}{2}`, `1 1/2` |
| repeating decimals | `\frac{1}{3}`, `0.\overline{3}` | `\frac{1}{3}`, `0.\overline{4}` |
| tuples have an order | `(1,2)`, `(1, 2)` | `(1,2)`, `(2,1)` |
| named numbers: the names' order | `(1,2)`, `y = 2, x = 1` | `(1,2)`, `x = 2, y = 1` |
| names must be the same | `x=1,y=2`, `(x,y) = (1,2)` | `x=1,y=2`, `x=2,y=1`; `x=1,y=2`, `a=1,b=2` |
| alternatives are not a pair | `1,2`, `x=1 or x=2` | `(1,2)`, `x=1 or y=2`; `(1,2)`, `1 or 2` |
| lists and sets have none | `1,2`, `2 and 1`; `\{1,2\}`, `\{2,1\}` | `2`, `2,-1` |
| a set is not a tuple or an interval | `\{1,2\}`, `1,2` | `(1,2)`, `\{1,2\}`; `\{1,2\}`, `[1,2]` |
| fractions are exact | `10^{20}`, `100000000000000000000` | `2^{60}`, `2^{60}+1` |
| numbers are equal to 12 digits | `\sqrt{51}`, `10\sqrt{0.51}` | `\frac{1}{3}`, `0.33` |
| or to 6 decimals | `\frac{1}{3}`, `0.333333` | `1.6 \times 10^{-19}`, `3.2 \times 10^{-19}` |
| at most 10,000 digits are computed | `9^{9^9}`, `9^{9^{9}}` | `7`, `9^{9^9}` |

Rounding to 6 decimals must not change a number by more than 0.1 %.

A comparison may never return: a model can write `9^{9^9}`. So `equal` runs in a worker process:
this file is also the worker's program, `python -P grading/equivalence.py --worker SECONDS`, which
grading/pool.py starts. As a program it must not import any module of this project.
"""

import json
import os
import re
import resource
import signal
import sys
from collections import Counter
from contextlib import redirect_stdout, suppress
from functools import cache
from itertools import accumulate
from math import inf, log10
from typing import TYPE_CHECKING
from unicodedata import normalize

if TYPE_CHECKING:  # importing sympy takes half a second, and the trainer does not need it
    from sympy import Basic

# Real answers are far below these limits. Every parser here takes more than linear time in the
# length, and some take exponential time in the depth.
MAX_CHARS = 500
MAX_DEPTH = 10
MAX_DIGITS = 10_000  # of a number, once written out
MAX_MEMORY = 1 << 30  # bytes of address space of a worker; sympy alone takes a quarter of it

# ── patterns ──────────────────────────────────────────────────────────────────────────────────────

_INTEGER = re.compile(r"0|-?[1-9]\d*", re.A)
_TIME_OF_DAY = re.compile(
    r"(\d\d?):([0-5]\d)[\s~\\,]*(?:\\(?:text|mathrm|mbox)\{ *)?(?:([ap])\.?m\.?)?[ }]*", re.A | re.I
)
_APPROXIMATELY = r"≈|≃|\\(?:approx|simeq)(?![a-z])"
_NAME = re.compile(r"(?!e$|\\pi$)(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([^()]*\))?|[A-Za-z ]+)")
_UNEVALUATED = re.compile(r"\\(?:i*int|oint|sum|prod|lim)(?![a-z])|[∫∑∏]")
_OR = re.compile(r"\bor\b|∨|\\(?:lor|vee)(?![a-z])")
_RELATION = re.compile(r"[<>≤≥∈]|\\(?:leq?|geq?|lt|gt|in)(?![a-z])")
_ASSIGNED_NAME = re.compile(r"(?<![A-Za-z\\])(\\?[A-Za-z]++)(?:_\{?[A-Za-z0-9]++\}?)?+ ?=")
_ONE_TUPLE = re.compile(r"(?:\\left)?\([^(),]++,[^()]*+\)")
_BRACKET = re.compile(r"[()\[\]{}]")
_DEPTH_CHANGE = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_TEXT = re.compile(r"\\(?:text\w*|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_SINGLE_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")

# Full-width and mathematical characters, such as １ and 𝟏, are the plain ones: １ is 1.
_WIDE = {
    code: normalize("NFKC", chr(code))
    for code in (*range(0xFF01, 0xFF5F), *range(0x1D400, 0x1D800))
} | {0x3000: " ", 0x3001: ",", 0x3002: "."}
_EMPHASIS = re.compile(r"(?<![\w)\]}*`])(\*{1,3}|`)(?=[^\s*`])([^*`]+)(?<=\S)\1(?![\w(\[{\\*`])")

# A choice as gold, "(C)" or "(C) 5 m"; a choice as answer, "C", "c", "(C)", "Option C" or "C. salt
# water", but not "C or B", "A. B." or "A), B, C". Lists of letters: "A, C", "(A) and (C)".
_GOLD_CHOICE = re.compile(r"\(?([A-Z])(?:\)?[.:]?|\)[\\ ].*)", re.S)
_SECOND_CHOICE = r".*(?:\b(?:or|and)\b|\b{0}[).]|[,;/&(] ?{0}\b)"
_ONE_CHOICE = rf"({{0}})(?:[)\].:]++(?!{_SECOND_CHOICE})|$)"
_ANSWER_CHOICE = re.compile(
    r"(?:(?i:option|choice|answer):? )?[(\[]?"
    rf"(?:{_ONE_CHOICE.format('[A-Z]')}|{_ONE_CHOICE.format('[a-z]')})",
    re.S,
)
_LETTERS = re.compile(r"(?:\([A-Za-z]\)|[A-Za-z]\)?\.?)(?: ?(?:[,;&]|\band\b|, ?and\b) ?|$)")
_CHOICES = frozenset("ABCDEFGHIJ")

# What may make a comparison slow: powers (not degrees), long exponents, factorials, relations,
# matrices, control characters, and every command that is not common in answers.
_COMMON_COMMAND = r"(?:[dt]?frac|sqrt|pi|left|right|text|circ)"
_COSTLY = re.compile(
    r"\^(?! ?\{? ?\\?circ)"
    r"|(?<=\^\{)\d\d\d"
    r"|\de(?=\d)"
    r"|[!|_<>&∞\x00-\x1f\ud800-\udfff]"
    rf"|\\(?!{_COMMON_COMMAND})[a-z]+"
)

_UNIT_SPELLINGS = [  # the last spelling of each line is the unit's name
    "mm millimeters millimeter",
    "cm centimeters centimeter",
    "m meters meter",
    "km kilometers kilometer",
    "mg milligrams milligram",
    "g grams gram",
    "kg kilograms kilogram",
    "inches inch",
    "ft feet foot",
    "yards yard",
    "mi miles mile",
    "s sec seconds second",
    "min minutes minute",
    "h hr hours hour",
    "days day",
    "weeks week",
    "months month",
    "years year",
    "cents cent",
    "dollars dollar",
    "percentage percent",
    "rad radians radian",
]
_UNIT_NAMES = {
    spelling: spellings.split()[-1]
    for spellings in _UNIT_SPELLINGS
    for spelling in spellings.split()
}
_SCALE = {
    "hundred": "10^2",
    "thousand": "10^3",
    "million": "10^6",
    "billion": "10^9",
    "trillion": "10^12",
    "quadrillion": "10^15",
    "lakh": "10^5",
    "crore": "10^7",
    "dozen": "12",
}
_SCALE_WORD = "(?:" + "|".join(_SCALE) + r")s?\b"

# Words after a number that change it: dropping them as if they were units would be wrong.
_MODIFIER = (
    r"(?:squared|cubed|factorial|half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?"
    r"|eighths?|ninths?|(?:ten|hundred|thousand|million|billion)ths?|tens|gross"
    rf"|(?!{_SCALE_WORD})[a-z]+illions?|repeating|recurring|binary|octal|hexadecimal|base"
    r"|mod|modulo"
    r"|sq(?:uare|\.)? roots?|or (?:more|less|fewer|so))"
)
_MODIFIED_NUMBER = re.compile(rf"\d[ ~]*+(?:[A-Za-z]{{1,20}} ){{0,3}}\b{_MODIFIER}\b", re.I)
_OPERATOR = rf"(?:or|and|to|more|less|over|plus|minus|times|point|{_MODIFIER})"
_PER = r"(?: ?/ ?(?:s|h|[a-z]{3,})(?:\^\{?\d\}?)?)?"
_KNOWN_UNIT = "(?:" + "|".join(sorted(_UNIT_NAMES, key=len, reverse=True)) + ")"
_SQUARE_UNIT = rf"(?:sq|cu|square|cubic)(?:\. ?| ){_KNOWN_UNIT}\b"
_UNIT = (
    rf"(?![a-z ]*\b{_OPERATOR}\b)"
    rf"(?:{_SQUARE_UNIT}|[A-Za-z]{{3,}}|[ckm]?m(?= ?/)|[ckm]m|[km]?g|ft|in"
    r"|(?:sq|cu)(?=\.? [A-Za-z]))\.?"
    rf"(?: [A-Za-z]{{2,}}\.?){{0,2}}(?:\^\{{?\d\}}?)?{_PER}"
)
_ATTACHED_UNIT = rf"(?:{_SQUARE_UNIT}\.?|{_KNOWN_UNIT}|(?!{_SCALE_WORD}|{_MODIFIER}\b)[a-z]{{4,}})"
# After a fraction, a root or π: known units of two letters or more, as in 6π cm^2, 1 1/2 hours.
_ROOT_OR_PI = r"(?:(?:√|\\sqrt) ?\{?\d+\}?(?: ?(?:\\pi|π))?|\\pi|π)"
_NUMBER = (
    r"[-+]?(?:(?:\d+ )?\d+/\d+|\d* ?\\[dt]?frac\{[^{}]+\}\{\d+\}"
    rf"|[\d.]* ?{_ROOT_OR_PI}(?:/\d+)?)"
)
_LONG_UNIT = (
    "(?:"
    + "|".join(sorted((name for name in _UNIT_NAMES if len(name) > 1), key=len, reverse=True))
    + ")"
)
_TRIGONOMETRIC = r"\\(?:sin|cos|tan|cot|sec|csc)(?: ?\^ ?\{?\d\}?)?"


# ── text to LaTeX ─────────────────────────────────────────────────────────────────────────────────


def _script(match: re.Match) -> str:
    """Unicode superscripts and subscripts in LaTeX: ⁻¹² is ^{-12}, ₁₂ is _{12}."""
    mark = "_" if match[0][0] in "₀₁₂₃₄₅₆₇₈₉" else "^"
    digits = normalize("NFKC", match[0]).replace("−", "-")
    return f"{mark}{{{digits}}}"


def _fraction(match: re.Match) -> str:
    r"""A Unicode fraction in LaTeX: ½ is \frac{1}{2}."""
    numerator, denominator = normalize("NFKC", match[0]).split("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _repeating_decimal(match: re.Match) -> str:
    r"""0.1\overline{6} is (16 - 1)/90."""
    whole, once, repeated = match.groups()
    numerator = int(whole + once + repeated) - int(whole + once or 0)
    denominator = "9" * len(repeated) + "0" * len(once)
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _scale(match: re.Match) -> str:
    r"""hundred million is \cdot 10^2\cdot 10^6."""
    return "".join(rf"\cdot {_SCALE[word.removesuffix('s')]}" for word in match[1].split())


_SYMBOLS = {
    "·": r"\cdot ",
    "×": r"\times ",
    "÷": r"\div ",
    "±": r"\pm ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
}
_FUNCTION_OR_LETTER = (
    r"pi|theta|alpha|beta|gamma|lambda|omega|(?:arc)?(?:sin|cos|tan)|sinh|cosh|tanh|cot|log|ln|exp"
    r"|sec(?= ?\()|csc"
)
_THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")

# (pattern, replacement), applied in this order.
_REWRITE_TABLE = [
    # Math delimiters, currency, separators of thousands; white space; "about", percent.
    (r"(?<!\\)\\[\[\]()]|\\?\$|[€£¥]|(?<=\d),\\! ?(?=\d{3})|\\!", ""),
    (r"(?:(?<!\\)\\[ ,;:]|\\q?quad\b|\s|~)+", " "),
    (_APPROXIMATELY, "="),
    (r"^ ?(?:\\text\{ ?)?(?:approximately|approx\.?|about|roughly)[ }]+", ""),
    (r" ?(?:\\text\{ ?)?\b(?:percent(?:age)?|per cent|pct)\b(?: points?)?[ }]*$|\\?%", ""),
    # A last period, a first "=".
    (r"[\s.,;:\\]+$|^[\s=]+", ""),
    (r"^\\text\{(\d[^{}]*)\}$", r"\1"),
    # Unicode.
    (r"[⁰¹²³⁴-⁹⁻]+|[₀-₉]+", _script),
    (r"[¼-¾⅐-⅞]", _fraction),
    ("[–−]", "-"),
    (r"[·×÷±≤≥≠∪∩∈]", lambda match: _SYMBOLS[match[0]]),
    (r"\\varnothing|∅", r"\\emptyset "),
    (r"\\langle\b", "("),
    (r"\\rangle\b", ")"),
    (r"∨|\\(?:lor|vee)(?![a-z])", " or "),
    ("∞", r"\\infty "),
    ("°", r"^\\circ "),
    # Plain text: powers, functions, unions.
    (r"\*\*", "^"),
    (rf"(?<![A-Za-z\\])({_FUNCTION_OR_LETTER})(?![A-Za-z])", r"\\\1 "),
    (r"(?<=[)\]}]) ?U ?(?=[(\[{\\])", r"\\cup "),
    # Ordinals, scale words, units, spaces in long numbers, mixed numbers, 1e5, "5 = x".
    (r"(?<=\d) ?\^? ?\{? ?(?:\\(?:text|mathrm|mbox)\{ ?)?(?:st|nd|rd|th)\b[ }]*$", ""),
    (r"^([-+]?\d[\d.,]*) ?\\(?:text|textrm|mathrm|mbox)\{ *([^{}]*)\}", r"\1 \2"),
    (
        rf"^([-+]?\d[\d.,]*(?: {_SCALE_WORD})*)(?: (?!{_SCALE_WORD}){_UNIT}| ?{_ATTACHED_UNIT}) ?$",
        r"\1",
    ),
    (rf"^({_NUMBER}) +{_LONG_UNIT}(?:\^\{{?\d\}}?)?\.?$", r"\1"),
    (rf"(?<=\d) ?(?:\\text\{{ ?)?({_SCALE_WORD}(?: {_SCALE_WORD})*)[ }}]*", _scale),
    (rf"^([-+]?\d[\d.,]*)(?!{_KNOWN_UNIT}$|[gsh]$)([A-Za-z]{{1,3}})$", r"\1{\2}"),
    (r"^[-+]?\d{1,3}(?: \d{3})+$", lambda match: match[0].replace(" ", "")),
    (r"^([-+]?\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"(?<=\d)[eE]([-+]?\d+)(?![\d.])", r"\\cdot 10^{\1}"),
    (r"^([-+\d.,/]+) ?= ?([A-Za-z])$", r"\2=\1"),
    # Degrees inside a trigonometric function; the imaginary unit; repeating decimals.
    (rf"({_TRIGONOMETRIC} ?[({{]?)([\d.]+) ?\^ ?\{{? ?\\circ ?\}}?", r"\1{\\frac{\2\\pi}{180}}"),
    (r"\\(?:mathrm|mathit|text|imath)(?:\{i\}|(?<=imath)\b)|(?<![A-Za-z\\])i(?![A-Za-z])", "{i}"),
    (r"(\d*)\.(\d*)\\overline\{(\d+)\}", _repeating_decimal),
    # A single last letter is a unit after a number (5 m), else a variable (a + b + c).
    (
        r"^(?![-+]?(?:[\d.,]+|\\[dt]?frac\{\d+\}\{\d+\}) ?\w$)"
        r"(.*[^A-Za-z\\])(?<![,;=])(?<![,;=] )([A-Za-z])$",
        r"\1{\2}",
    ),
    # "x = 1 or x = 2" is a list; roots.
    (r"(?<=[\d})]) ?(?:\\text\{ ?)?(?:and|or) ?\}? ?(?=[A-Za-z][\w()]* ?=)", "; "),
    (r"∛|(?<![A-Za-z\\])cbrt", r"\\sqrt[3]"),
    ("∜", r"\\sqrt[4]"),
    (r"√|(?<!\\)sqrt", r"\\sqrt "),
    (r"\\sqrt(\[\d\])? ?(\d+|[a-z]\b)", r"\\sqrt\1{\2}"),
]
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in _REWRITE_TABLE]


def _latex(text: str) -> str:
    """The text as one LaTeX formula."""
    text = _THOUSANDS.sub(_joined, text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    previous = ""
    while text != previous:  # from the innermost √(…) outwards
        previous = text
        text = re.sub(r"\\sqrt(\[\d\])? ?\(([^()]*)\)", r"\\sqrt\1{\2}", text)
    return text


def _joined(match: re.Match) -> str:
    """2,304 is 2304, except inside brackets, where the comma may separate two numbers."""
    before = match.string[: match.start()]
    opened = sum(before.count(bracket) for bracket in ("(", "[", "\\{", "\\langle"))
    closed = sum(before.count(bracket) for bracket in (")", "]", "\\}", "\\rangle"))
    return match[0] if opened > closed else match[0].replace(",", "")


# ── verdicts from the texts alone ─────────────────────────────────────────────────────────────────


def by_text(gold: str, answer: str) -> bool | None:
    """The verdict if the two texts alone decide it, in microseconds; None if they must be parsed.

    >>> by_text("42", "4200"), by_text("C", "(C) 5 m"), by_text("0.5", "1/2")
    (False, True, None)
    """
    if max(len(gold), len(answer)) > MAX_CHARS or _depth(answer) > MAX_DEPTH:
        return False
    gold, answer = _tidy(gold), _tidy(answer)
    for same in (_same_integer, _same_words, _same_choice, _same_letters, _same_time):
        verdict = same(gold, answer)
        if verdict is not None:
            return verdict
    for property_of in (_number_base, _outer_bracket, _unit_name):
        expected, given = property_of(gold), property_of(answer)
        if expected and given and expected != given:
            return False
    for pattern in (_UNEVALUATED, _MODIFIED_NUMBER):
        if pattern.search(_plain(answer)) and not pattern.search(_plain(gold)):
            return False
    if _has_alternatives(gold, answer) or _differ_in_case(gold, answer):
        return False
    return None


def _tidy(text: str) -> str:
    """The text with plain characters for full-width ones and without Markdown's emphasis."""
    if not text.isascii():
        text = text.translate(_WIDE)
    return _EMPHASIS.sub(r"\2", text) if "*" in text or "`" in text else text


def _same_integer(gold: str, answer: str) -> bool | None:
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return gold == answer
    return None


def _same_words(gold: str, answer: str) -> bool | None:
    gold_words, answer_words = _words(gold), _words(answer)
    return gold_words == answer_words if gold_words and answer_words else None


def _same_choice(gold: str, answer: str) -> bool | None:
    expected = _GOLD_CHOICE.fullmatch(_plain(gold))
    given = _ANSWER_CHOICE.match(_plain(answer))
    if not expected or not given:
        return None
    capital, small = given.groups()
    if small and expected[1] not in _CHOICES:
        return None  # N and n are different variables
    return expected[1] == (capital or small.upper())


def _same_letters(gold: str, answer: str) -> bool | None:
    """Compares lists of letters, such as the choices A and C, without order."""
    expected, given = _letters(gold), _letters(answer)
    if not expected or not given or len(expected) == len(given) == 1:
        return None
    if _CHOICES.issuperset(expected):
        given = [letter.upper() for letter in given]
    return sorted(expected) == sorted(given)


def _same_time(gold: str, answer: str) -> bool | None:
    """Compares hour, minute and, if both name it, the half of the day."""
    expected, given = _TIME_OF_DAY.fullmatch(gold), _TIME_OF_DAY.fullmatch(answer)
    if not expected or not given:
        return None
    hour, minute, half = expected.groups()
    if minute[0] != "0" and not half:
        return None  # it may be a ratio, such as 3:14
    same_half = not half or not given[3] or half.lower() == given[3].lower()
    return int(hour) == int(given[1]) and minute == given[2] and same_half


def _letters(text: str) -> list[str]:
    """A and C of "A, C" or "(A) and (C)"; empty if the text is no list of letters."""
    plain = " ".join(_plain(text).split())
    letters = []
    position = 0
    while position < len(plain):
        match = _LETTERS.match(plain, position)
        if not match:
            return []
        letters.append(match[0].lstrip("(")[0])
        position = match.end()
    return letters


def _words(text: str) -> str:
    """The text in lower case without article if it consists of words, else ""."""
    plain = " ".join(_TEXT.sub(r" \1 ", text).strip(" .$").casefold().split())
    # A few letters may be a product, and ab = ba. Longer ones are words, and so is \text{ab}.
    letters = 2 if _TEXT.search(text) else 4
    if not re.fullmatch(r"[a-z][a-z0-9 ,'-]*", plain):
        return ""
    if not re.search(rf"[a-z]{{{letters}}}", plain):
        return ""
    return re.sub(r"^(?:an?|the) ", "", plain)


def _plain(text: str) -> str:
    return _TEXT.sub(r"\1", text).replace("**", "").strip(" $")


def _number_base(text: str) -> str:
    match = re.search(r"\d_ ?\{? ?(\d+) ?\}?$", text)
    return match[1] if match else ""


def _outer_bracket(text: str) -> str:
    r"""( of a tuple or open interval, \{ of a set, else ""."""
    plain = re.sub(r"\\left|\\right|[\s$]", "", text)
    if "," not in plain or not plain.endswith((")", "\\}")):
        return ""
    return next((bracket for bracket in ("(", "\\{") if plain.startswith(bracket)), "")


def _unit_name(text: str) -> str:
    match = re.search(
        r"(?:\d|\\pi(?![a-z])|π)[ ~\\,{}]*(?:\\(?:text|mathrm|mbox)\{[ ~]*)?"
        r"([A-Za-z]+)[ .}$]*(?:\^\{?\d\}?)?$",
        text,
    )
    if match:
        return _UNIT_NAMES.get(match[1].lower(), "")
    if re.search(r"\d ?\\?%[ $.]*$", text):
        return "percent"
    return "dollar" if re.match(r"\\\$ ?\d", text) else ""


def _has_alternatives(gold: str, answer: str) -> bool:
    """Whether the answer offers alternatives where the gold is the value of each name: "x = 1 or
    x = 2" is no ordered pair, and "x = 1 or y = 2" gives neither number."""
    gold, answer = _plain(gold), _plain(answer)
    parts = _OR.split(answer)
    if len(parts) == 1 or _OR.search(gold) or _RELATION.search(answer):
        return False
    names = {frozenset(_ASSIGNED_NAME.findall(part)) for part in parts} - {frozenset()}
    return len(names) > 1 or _ONE_TUPLE.fullmatch(gold) is not None


def _differ_in_case(gold: str, answer: str) -> bool:
    """Whether one has a variable n where the other has N. Math-Verify does not tell them apart."""
    expected, given = _variables(gold), _variables(answer)
    return any(letter.swapcase() in given - expected for letter in expected - given)


def _variables(text: str) -> set[str]:
    """Its single letters, except a name on the left of an equation, as in f(x) = 2."""
    return set(_SINGLE_LETTER.findall(re.sub(r"(?<!\w)\w+(?:\(\w\))? ?=", "", text)))


def _depth(text: str) -> int:
    return max(accumulate(_depth_changes(text)), default=0) + text.count("|") // 2


def _depth_changes(text: str) -> list[int]:
    return [_DEPTH_CHANGE[bracket] for bracket in _BRACKET.findall(text)]


def cost(gold: str, answer: str) -> int:
    r"""How slow the comparison may be; 0 for nearly all real answers. Low costs are compared first.

    >>> cost(r"\frac{1}{2}", r"\frac{4}{8}"), cost("1", "9^{9^9}")
    (0, 2)
    """
    costly = Counter(_COSTLY.findall(answer)) - Counter(_COSTLY.findall(gold))
    unbalanced = sum(_depth_changes(answer)) != 0
    deeper = max(0, _depth(answer) - _depth(gold) - 2)
    longer = max(0, len(answer) - len(gold)) // 30
    return costly.total() + 5 * unbalanced + deeper + longer


# ── verdicts from the formulas ────────────────────────────────────────────────────────────────────


def equal(gold: str, answer: str) -> bool:
    """Whether the answer equals the gold (table above). It may never return: call it in a worker.

    Raises what sympy raises on a formula that it cannot evaluate.
    """
    verdict = by_text(gold, answer)
    if verdict is not None:
        return verdict
    gold, answer = _tidy(gold), _tidy(answer)
    if re.fullmatch(r"-?\d+\.\d+", gold) and re.fullmatch(r"-?\d+,(?!\d{3}$)\d+", answer):
        answer = answer.replace(",", ".")
    exact, rounded = _split_rounded(answer)
    if not rounded:
        return _equal_texts(gold, answer)
    if _equal_texts(gold, exact):
        return True
    return _is_rounded(exact, rounded) and _equal_texts(gold, rounded)


def _split_rounded(text: str) -> tuple[str, str]:
    """The exact and the rounded number of "1/3 ≈ 0.33"; of "x ≈ 98" the whole, and ""."""
    exact, rounded = [*re.split(_APPROXIMATELY, text, maxsplit=1), ""][:2]
    if not exact.strip(" $") or _NAME.fullmatch(exact.strip(" $")):
        return text, ""
    return exact, rounded


def _is_rounded(exact: str, rounded: str) -> bool:
    """Whether 0.33 is 1/3 rounded to its two decimals."""
    from sympy import Eq, Rational

    match = re.search(r"\.(\d+)\D*$", rounded)
    sides = []
    for formula in (_parse(exact), _parse(rounded)):
        sides.append(formula.rhs if isinstance(formula, Eq) else formula)
    if not all(side is not None and side.is_number for side in sides):
        return False
    decimals = len(match[1]) if match else 0
    return bool(abs(sides[0] - sides[1]) <= Rational(51, 100) / 10**decimals)


def _equal_texts(gold: str, answer: str) -> bool:
    from sympy import nan, zoo

    expected, given = _parse(_split_rounded(gold)[0]), _parse(answer)
    if expected is None or given is None:
        return False
    if expected == given:
        return not expected.has(nan, zoo)  # to sympy 1/0 and 2/0 are both zoo
    if max(_digits(expected), _digits(given)) > MAX_DIGITS:
        return False
    return _equal_formulas(expected, given)


def _parse(text: str) -> "Basic | None":
    """The formula that the whole text is, None if it is not one."""
    from math_verify import LatexExtractionConfig, parse

    # Without an ExprExtractionConfig, which would search the text for a number.
    whole = [LatexExtractionConfig(boxed_match_priority=-1)]
    found = parse(f"${_latex(text)}$", whole, parsing_timeout=None)
    if not found or isinstance(found[0], str):
        return None
    either = _OR.search(text) is not None
    return _union(found[0]) if either else found[0]


def _union(expr: "Basic") -> "Basic":
    """The union of intervals that the inequalities of "x < 1 or x > 2" are."""
    from sympy import And, Eq, FiniteSet, Union
    from sympy.core.relational import Relational

    parts = expr.args if isinstance(expr, FiniteSet) else ()
    inequalities = [part for part in parts if isinstance(part, (Relational, And))]
    if not inequalities or len(inequalities) < len(parts) or expr.has(Eq):
        return expr
    return Union(*(part.as_set() for part in inequalities))


def _digits(expr: "Basic") -> float:
    r"""Upper bound on the digits of `expr` with all powers expanded; a variable counts as a digit.

    >>> from sympy import Integer, Pow
    >>> _digits(Pow(Integer(10), Integer(100), evaluate=False))
    100.0
    """
    from sympy import Add, Float, MatrixBase, Rational

    if isinstance(expr, Rational):
        return log10(max(1, abs(expr.p), expr.q))
    if isinstance(expr, Float):
        return log10(1 + abs(expr))
    parts = expr.flat() if isinstance(expr, MatrixBase) else expr.args
    sizes = [_digits(part) for part in parts]
    if not sizes:
        return 0.0
    first = sizes[0]
    last = min(sizes[-1], 9)  # an exponent of 9 digits is already over any limit
    match type(expr).__name__:
        case "Pow":
            # (a + b + c)^n has at most n^(terms-1) products, each with n times the digits of a.
            terms = {"number" if term.is_Integer else term for term in Add.make_args(expr.base)}
            return max(1.0, first) * 10 ** (last * len(terms))
        case "factorial" | "factorial2" | "subfactorial" | "gamma":
            return max(1.0, last) * 10**last
        case "binomial":
            return min(10 ** min(first, 9), max(1.0, first) * 10**last)
        case "Mul":
            return sum(sizes)
        case _:
            return max(sizes) + log10(len(sizes))


def _equal_formulas(expected: "Basic", given: "Basic") -> bool:
    from math_verify import verify
    from sympy import Eq, FiniteSet, Tuple

    _correct_math_verify()
    names, other_names = _assignments(expected).keys(), _assignments(given).keys()
    if names and other_names and names != other_names:
        return False
    if (
        names and not other_names and isinstance(given, FiniteSet)
    ):  # a list follows the gold's order, a tuple a, b, c …
        expected = Tuple(*_assignments(expected).values())
    expected, given = _prepared(expected), _prepared(given)
    if isinstance(given, Eq):
        error = _relative_error(*given.args)
        if error is not None and error > 0.01:
            return False  # 6 = 5 is not an answer, not even where 5 is right
    error = _relative_error(*_values(expected, given))
    if error is not None and error <= 1e-12:
        return True
    # Math-Verify rounds to 6 decimals, which is too coarse for small numbers.
    near = error is None or error < 1e-3
    return near and verify(expected, given, allow_set_relation_comp=True, timeout_seconds=None)


def _prepared(expr: "Basic") -> "Basic":
    """The formula with i as the imaginary unit, intersections of sets computed, and the values of
    named numbers as a tuple: x = 1, y = 2 is (1, 2)."""
    from sympy import Eq, FiniteSet, I, Intersection, Symbol, Tuple

    values = _assignments(expr)
    if values:
        expr = Tuple(*(values[name] for name in sorted(values, key=_natural)))
    elif isinstance(expr, (FiniteSet, Tuple)) and any(map(_assignments, expr.args)):
        return expr.func(*map(_prepared, expr.args))
    imaginary_unit = {Symbol("i", real=False): I}
    if isinstance(expr, Eq):  # xreplace would evaluate e^{i\pi} = -1 to true
        return Eq(*(side.xreplace(imaginary_unit) for side in expr.args), evaluate=False)
    expr = expr.xreplace(imaginary_unit)
    return expr.doit() if isinstance(expr, Intersection) else expr


def _natural(name: str) -> list[str | int]:
    """Sorts x_2 before x_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _assignments(expr: "Basic") -> "dict[str, Basic]":
    """The values of two or more names, of "x = 1, y = 2" or "(x, y) = (1, 2)"; else empty."""
    from sympy import Eq, FiniteSet, Interval, Symbol, Tuple

    pairs = []
    if isinstance(expr, Eq) and isinstance(expr.lhs, Tuple):
        # Math-Verify reads (1, 2) as an open interval.
        values = expr.rhs.args[:2] if isinstance(expr.rhs, Interval) else expr.rhs.args
        pairs = list(zip(expr.lhs.args, values, strict=len(values) == len(expr.lhs.args)))
    elif isinstance(expr, (FiniteSet, Tuple)) and all(isinstance(part, Eq) for part in expr.args):
        pairs = [part.args for part in getattr(expr, "_unsorted_args", expr.args)]
    if not all(isinstance(name, Symbol) for name, _ in pairs):
        return {}
    values = {name.name: value for name, value in pairs}
    return values if 2 <= len(values) == len(pairs) else {}


@cache
def _correct_math_verify() -> None:
    """To Math-Verify all equations without a solution are equal, and of most others it does not
    see that they are. Here equations are equal if they are multiples of one another, too."""
    from math_verify import grader
    from sympy import Eq, simplify, solve

    compare = grader.sympy_solve_and_compare

    def compare_solutions(gold: "Basic", given: "Basic", *precision: int) -> bool:
        if not isinstance(gold, Eq) or not isinstance(given, Eq):
            return compare(gold, given, *precision)
        ratio = simplify((gold.lhs - gold.rhs) / (given.lhs - given.rhs))
        if ratio.is_number and ratio.is_finite and ratio.is_nonzero:
            return True
        return bool(solve(gold, gold.free_symbols)) and compare(gold, given, *precision)

    grader.sympy_solve_and_compare = compare_solutions


def _values(expected: "Basic", given: "Basic") -> "tuple[Basic, Basic]":
    """Both formulas; of an equation that is compared with a value, the right side."""
    from sympy import Eq

    if isinstance(expected, Eq) == isinstance(given, Eq):
        return expected, given
    if isinstance(given, Eq):
        return expected, given.rhs
    return (expected.rhs if expected.lhs.is_Symbol else expected), given


def _relative_error(expected: "Basic", given: "Basic") -> float | None:
    """|expected − given| / |expected| of two numbers; infinite for two different fractions.

    None if one is not a number.
    """
    from sympy import Expr

    for side in (expected, given):
        if not isinstance(side, Expr) or not side.is_number:
            return None
    expected, given = expected.doit(), given.doit()
    if expected.is_Rational and given.is_Rational:
        return 0.0 if expected == given else inf
    size = abs(expected).evalf()
    difference = abs(expected - given).evalf()
    if not (size.is_Float and size.is_finite and difference.is_number and difference.is_finite):
        return None
    return float(difference / size)


# ── the worker process ────────────────────────────────────────────────────────────────────────────


def _run_worker(deadline: float) -> None:
    """Import sympy once, then fork a child that compares, and a new child when that one is late.

    The kernel's alarm kills a late child whatever it is doing. A killed child leaves no broken
    state behind, and the next one starts in milliseconds, without a new import.
    """
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    equal("1", "\\frac{2}{2}")  # import and build the parser before the first deadline starts
    while True:
        child = os.fork()
        if child == 0:
            _serve(deadline)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WTERMSIG(status) != signal.SIGALRM:
            return
        print("late", flush=True)


def _serve(deadline: float) -> None:
    """Answer each line [gold, answer] of stdin with 1, 0 or "memory" (there was not enough),
    within `deadline` seconds each."""
    print("ready", flush=True)
    # The caller sends one pair at a time, so a killed child leaves no line half read.
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, deadline)
        try:
            with redirect_stdout(sys.stderr):  # stdout is for verdicts, whatever a library prints
                verdict = str(int(equal(*json.loads(line))))
        except MemoryError:
            verdict = "memory"
        except Exception:
            verdict = "0"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(verdict, flush=True)


if __name__ == "__main__":
    _run_worker(float(sys.argv[2]))
