r"""The reward (§2.1.2): R = 1 if the final answer equals the gold answer, else 0. No format reward, no partial credit.

    response ──extract──▶ answer ──equal, in a worker of grader.py──▶ Math-Verify(gold, answer) ──▶ R ∈ {0, 1}

**Extraction.** The answer is the content of the last closed `<answer>…</answer>`:

| content | answer | example |
|---|---|---|
| holds a `\boxed{…}` | what is in the last box, braces balanced | `so \boxed{\frac{1}{2}}` → `\frac{1}{2}` |
| holds a box that never closes | none | `\boxed{5` → `` |
| is prose: over 6 words, or one of `SENTENCE` among several | none | `The answer is 5.` → `` |
| is bare | all of it | `x = 5`, `12 cm`, `(C)`, `\text{Evelyn}`, `no real solution` |

Nothing outside the tags counts, boxed or not. `require_boxed=True` is the authors' code: no box, no answer.

**Comparison.** No answer is 0 at once. Else gold and answer are each read *whole*, as one formula. (Math-Verify left to
itself searches a text for whatever looks like a number, and would pay for a guess inside a sentence.) Where Math-Verify
alone reads too little or too much:

| rule | equal (gold, answer) | still unequal |
|---|---|---|
| text is compared as words, without case or article | `\text{ellipse}`, `An ellipse` | `\text{least}`, `stale` |
| a letter as gold is a choice, what follows it is free | `C`, `(C)`; `C`, `C. 5 m` | `C`, `B`; `C`, `(C) or (B)` |
| plain text and unicode stand for LaTeX | `\sqrt{53}`, `√53`; `\frac{\pi}{2}`, `pi/2` | `\sqrt{53}`, `√5` |
| `U` between intervals is ∪ | `(-\infty,2)\cup(3,\infty)`, `(-inf, 2) U (3, inf)` | `(0,1)`, `[0,1)` |
| an inequality is its interval | `[-2,7]`, `-2 \le x \le 7` | `[-2,7]`, `-2 \le x < 7` |
| ordinals are numbers | `12`, `12^{\text{th}}`; `12`, `12th` | `12`, `13th` |
| a unit or noun after a number is dropped | `1320`, `1320 km`; `48`, `48 cupcakes` | `48`, `48 or more` |
| a scale word is no unit | `5000000`, `5 million`; `24`, `2 dozen` | `5`, `5\text{ million}` |
| percent: the number or the fraction | `50\%`, `50`; `50\%`, `0.5` | `50`, `0.5`; `3`, `300` |
| degrees and currency are dropped | `90^\circ`, `90°`; `\$18.90`, `18.9` | `90^\circ`, `100` |
| thousands may be set apart, a list may not be joined | `1000`, `1,000`; `1000`, `1 000` | `32349`, `32, 349` |
| a decimal comma, if the gold has a point | `2.5`, `2,5` | `2.345`, `2,345`; `3,5`, `3.5` |
| mixed and repeating numbers | `\frac{3}{2}`, `1 1/2`; `\frac{1}{3}`, `0.\overline{3}` | `\frac{11}{2}`, `1 1/2` |
| tuples are ordered, lists and sets are not | `1,2`, `2 and 1`; `\{1,2\}`, `\{2,1\}` | `(1,2)`, `(2,1)`; `2`, `2,-1` |
| numbers alike to 12 digits are equal | `\sqrt{51}`, `10\sqrt{0.51}` | `\frac{1}{3}`, `0.33` |

Comparing may never end (a model will write `9^{9^9}`), so `equal` runs in a process of its own: `python reward.py --worker`
is that process, and grader.py keeps several.
"""

import json
import re
import resource
import signal
import sys
from contextlib import suppress

SENTENCE = re.compile(
    r"\b(is|are|was|were|be|has|have|can|cannot|we|it|there|this|that|therefore|thus|hence|because|since|so)\b", re.I
)
MAX_WORDS = 6
MAX_CHARS = 2000  # real answers stay far below, and every parser here is slower than linear
MEMORY = 1 << 30  # bytes of address space for a worker; sympy alone takes a quarter of it

# ── extraction ───────────────────────────────────────────────────────────────────────────────────────────────────────


def extract(response: str, require_boxed: bool = False) -> str:
    """The final answer of a response, "" if it gives none (first table above)."""
    closed = [piece.partition("</answer>")[0] for piece in response.split("<answer>")[1:] if "</answer>" in piece]
    content = closed[-1].strip() if closed else ""
    if "\\boxed" in content:
        return _last_box(content)
    return "" if require_boxed or _is_prose(content) else content


def _last_box(text: str) -> str:
    inside = text.rpartition("\\boxed")[2].lstrip()
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", inside, re.S):
        depth += {"{": 1, "}": -1}.get(mark.group(), 0)
        if depth == 0:
            return inside[1 : mark.start()].strip() if inside[0] == "{" else ""
    return ""


def _is_prose(text: str) -> bool:
    plain = re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", text)
    words = len(re.findall(r"[^\W\d_]{2,}", plain))
    return words > MAX_WORDS or (len(plain.split()) > 1 and SENTENCE.search(plain) is not None)


# ── comparison, in a worker ──────────────────────────────────────────────────────────────────────────────────────────

_TEXT = re.compile(r"\\(?:text\w*|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_SCALE = {"hundred": "10^2", "thousand": "10^3", "million": "10^6", "billion": "10^9", "dozen": "12"}
# Words after a number that change it, so that it would be wrong to drop them as if they were units.
_OPERATOR = r"(?:or|and|to|more|less|over|plus|minus|times|point|squared|cubed|factorial|half|halves|\w+ths|thirds|quarters)"
_UNIT = rf"(?![a-z ]*\b{_OPERATOR}\b)(?:[A-Za-z]{{3,}}|[ckm]m|[km]?g|ft|in|sq)(?: [A-Za-z]{{2,}}){{0,2}}(?:\^\{{?\d\}}?)?"


def _repeating(decimal: re.Match) -> str:
    r"""0.1\overline{6} is (16 - 1)/90."""
    whole, once, again = decimal.groups()
    return rf"\frac{{{int(whole + once + again) - int(whole + once or 0)}}}{{{'9' * len(again) + '0' * len(once)}}}"


_REWRITES = [
    (re.compile(written), meant)
    for written, meant in [
        (r"(?<!\\)\\[\[\]()]|\\?\$|[€£]|(?<=\d),\\! ?(?=\d{3})|\\!", ""),
        (r"(?:(?<!\\)\\[ ,;:]|\\q?quad\b|\s)+", " "),
        (r"[\s.:\\]+$|^\s+", ""),
        ("∞", r"\\infty "),
        ("°", r"^\\circ "),
        ("²", "^2"),
        ("³", "^3"),
        (r"\*\*", "^"),
        (r"(?<![A-Za-z\\])(pi|theta|alpha|beta|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1 "),
        (r"(?<=[)\]}]) ?U ?(?=[(\[{\\])", r"\\cup "),
        (r"(?<=\d) ?\^? ?\{? ?(?:\\(?:text|mathrm|mbox)\{ ?)?(?:st|nd|rd|th)\b[ }]*$", ""),
        (r"(?<=\d) ?(?:\\text\{ ?)?(" + "|".join(_SCALE) + r")\b\}?", lambda word: r"\cdot " + _SCALE[word[1]]),
        (rf"^([-+]?\d[\d.,]*) {_UNIT}$", r"\1"),
        (r"^[-+]?\d{1,3}(?: \d{3})+$", lambda number: number[0].replace(" ", "")),
        (r"^([-+]?\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"(\d*)\.(\d*)\\overline\{(\d+)\}", _repeating),
        # A last letter on its own is a unit after a number (5 m), and a variable after anything else (a + b + c).
        (r"^(?![-+]?(?:[\d.,]+|\\[dt]?frac\{\d+\}\{\d+\}) ?\w$)(.*[^A-Za-z\\])([A-Za-z])$", r"\1{\2}"),
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
    is_text = re.fullmatch(r"[a-z][a-z0-9 ,'-]*", plain) and re.search(rf"[a-z]{{{letters}}}", plain)
    return re.sub(r"^(?:an?|the) ", "", plain) if is_text else ""


def equal(gold: str, answer: str) -> bool:
    """Whether the two say the same (second table above). Call it in a worker only: it may never return."""
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr

    if (gold_words := _words(gold)) and (words := _words(answer)):
        return gold_words == words
    letter, choice = (_TEXT.sub(r"\1", text).strip(" $") for text in (gold, answer))
    letter = re.fullmatch(r"\(?([A-Z])\)?\.?", letter)
    choice = re.match(r"\(?([A-Z])(?:[).:](?!.*(?:\bor\b|\b[A-Z][).]))|$)", choice, re.S)
    if letter and choice:
        return letter[1] == choice[1]
    if re.fullmatch(r"-?\d+\.\d+", gold) and re.fullmatch(r"-?\d+,(?!\d{3}$)\d+", answer):
        answer = answer.replace(",", ".")

    whole = [LatexExtractionConfig(boxed_match_priority=-1)]  # and no ExprExtractionConfig, which would search
    expected, given = (parse(f"${_latex(text)}$", whole, parsing_timeout=None) for text in (gold, answer))
    if not expected or isinstance(expected[0], str):
        return False  # the gold is not readable; check_golds names such rows
    if verify(expected, given, allow_set_relation_comp=True, timeout_seconds=None):
        return True
    if not (given and isinstance(expected[0], Expr) and isinstance(given[0], Expr)):
        return False
    size, difference = abs(expected[0]).evalf(), abs(expected[0] - given[0]).evalf()
    return bool(size.is_number and size.is_finite and difference.is_number and difference <= 1e-12 * size)


def _work(deadline: float) -> None:
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    equal("1", "\\frac{2}{2}")  # import and build the parser before the first clock runs
    print("ready", flush=True)
    for line in sys.stdin:
        # The caller kills what is late. Should the caller be gone, an endless comparison still has to end.
        signal.alarm(int(2 * deadline) + 2)
        try:
            same = equal(*json.loads(line))
        except Exception:
            same = False
        signal.alarm(0)
        print(int(same), flush=True)


if __name__ == "__main__":
    _work(float(sys.argv[2]))
