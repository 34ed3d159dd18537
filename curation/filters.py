r"""Rules about one row: questions whose answer cannot be checked, other languages, pass rates.

Each rule returns why the row should be removed, or "".

| rule | removes | keeps |
|---|---|---|
| `multiple_choice` | `(A) 1 (B) 2 (C) 3 (D) 4`; gold `(C)` | `f(A) + f(B) + f(C) + f(D)` |
| `proof` | `Show that a + b > c.` | `Show that c exists and find its value.` |
| `no_gold` | gold `notfound` | gold `0` |
| `not_english` | `Calcula el perímetro de un cuadrado de lado $3$.` | `Compute $\sin 60^\circ$.` |
| `extreme_rate` | 0 of 4 right, 4 of 4 right | 1 of 4 right |
| `not_hard` | 4 of 64 right | 3 of 64 right, 0 of 64 right |
"""

import math
import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from curation import formats
from curation.dedupe import DRAWING

# Three forms of lettered options: "(A) … (B) … (C) … (D)" anywhere, but not "f(A)"; lines
# that begin with "A.", "B." and "C."; "A. … B. … C. … D." with at most 80 characters between two.
_OPTIONS = [
    re.compile(r".*?".join(rf"(?<![\w)}}\\])\({letter}\)" for letter in "ABCD"), re.S),
    re.compile(r".*?".join(rf"^[\s$*]*\(?{letter}\s*[.):]" for letter in "ABC"), re.S | re.M),
    re.compile(
        r".{1,80}?".join(rf"(?<![\w()}}\\]){letter}\s*[.:)．、]" for letter in "ABCD"), re.S
    ),
]
# If the gold is a single letter, lines that begin with letters are enough.
_LETTERED_LINES = re.compile(
    r".*?".join(rf"^\W*{letter}\b" for letter in "abc"), re.S | re.M | re.I
)
_OPTION_LETTER = re.compile(r"[\s$]*(?:\\(?:text\w*|math\w\w)\s*\{)?\s*(\(?)[A-E](\)?)[\s.}$]*")


def multiple_choice(question: str, answer: str) -> str:
    r"""Lettered options in the question, or a gold that is the letter of an option.

    >>> multiple_choice("Is 7 (A) odd (B) even (C) both (D) none?", "odd")
    'lettered options'
    >>> multiple_choice("f(A) + f(B)?", r"\text{(C)}")
    'the gold is a letter of an option'
    >>> multiple_choice("Which point lies farther out, $A$ or $B$?", "A")
    ''
    """
    question = DRAWING.sub("", question)
    if any(options.search(question) for options in _OPTIONS):
        return "lettered options"
    letter = _OPTION_LETTER.fullmatch(answer)
    if letter:
        in_parentheses = all(letter.groups())
        if in_parentheses or _LETTERED_LINES.search(question):
            return "the gold is a letter of an option"
    return ""


_PROVE = re.compile(
    r"(?:^|[.;:,!?\n)$]|\b(?:then|and|to|also|please))\s*(?:dis)?(?:prove|show|demonstrate)\b", re.I
)
_FIND = re.compile(
    r"\?|\b(?:find|determine|compute|calculate|evaluate|solve|simplify|express|estimate|how|what)\b"
    r"|\b(?:calculat|comput|determin|evaluat)ing\b"
    # "and be calculated", but not "it can be calculated"
    r"|\b(?:and|to|must|should) be (?:calculated|computed|determined|evaluated|found)\b"
    # At the start of a clause only: "State the maximum", but not "a state".
    r"|(?:^|[.;:,)\n$])\s*(?:(?:and|then|also|hence)\s+)*"
    r"(?:give|identify|list|name|obtain|state|write)\b",
    re.I,
)
_PROVED = re.compile(r"(?:\\text\{)?\s*(?:proof|proved|proven|q\.?e\.?d\.?)\s*\}?\.?", re.I)


def proof(question: str, answer: str) -> str:
    """A question that says "prove" or "show" and neither asks nor says to find anything.

    Also a question whose gold is "proof" or "proved".

    >>> proof("Prove that n! > 2^n for n > 3.", "n = 4"), proof("Find all n, and prove it.", "3")
    ('asks for a proof alone', '')
    """
    if _PROVED.fullmatch(answer.strip()):
        return "the gold says that it is proved"
    if _PROVE.search(question) and not _FIND.search(question):
        return "asks for a proof alone"
    return ""


def no_gold(answer: str) -> str:
    """A gold that says that there is none, such as NuminaMath's `notfound`."""
    return "the gold is a placeholder" if formats.is_placeholder(answer) else ""


_FORMULA = re.compile(
    r"\[asy\].*?\[/asy\]|\$\$.+?\$\$|\$.+?\$|\\\(.+?\\\)|\\\[.+?\\\]"
    r"|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\[a-zA-Z]+"
    r"|!?\[[^\]]*\]\([^)]*\)|https?://\S+",
    re.S,
)


def not_english(question: str) -> str:
    """A question in another language, by its words outside formulas.

    Either more than a third of its letters belong to another script than the Latin one; or it has
    five words or more and the language model gives English a probability below 1 %. With fewer
    words the language model is unreliable: "Compute $…$" is a whole question.
    """
    words = re.findall(r"[^\W\d_]{2,}", _FORMULA.sub(" ", question))
    letters = "".join(words)
    num_foreign = sum(not unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    if 3 * num_foreign > len(letters):
        return "another script"
    if len(words) < 5:
        return ""
    ranked = _language_model().rank(" ".join(words))
    if dict(ranked)["en"] < 0.01:
        return f"language {ranked[0][0]}"
    return ""


@cache
def _language_model() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


# ── pass rates ────────────────────────────────────────────────────────────────────────────────────


def read_count(item: Any, field: str, most: float) -> float:
    """The number from 0 to `most` at a dotted path of a row; ValueError if there is none.

    In the authors' rows, which are lists of messages, the path starts in the second message.
    """
    value = item[1] if isinstance(item, list) else item
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= most:
        raise ValueError(
            f"field {field}: expected a number from 0 to {most:g}, found {value!r:.60}"
        )
    return float(value)


def count_rollouts(paths: Iterable[str]) -> dict[str, tuple[float, int]]:
    """question → (right answers, responses) over all JSON lines of the files.

    Of a folder all *.jsonl files are read. Raises ValueError for a line without question or reward.
    """
    counts: dict[str, tuple[float, int]] = {}
    for path in map(Path, paths):
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path}: holds no *.jsonl files of rollouts")
        for place, item in (row for file in files for row in formats.rows(file)):
            try:
                question = item["question"].strip()
                reward = float(item["reward"])
                if not math.isfinite(reward):
                    raise ValueError(f"reward {reward}")
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{path}: {place}: not a graded response ({error!r})") from None
            right, responses = counts.get(question, (0.0, 0))
            counts[question] = right + reward, responses + 1
    return counts


def extreme_rate(right: float | None, out_of: float, min_rate: float, max_rate: float) -> str:
    """A pass rate right / out_of at or below `min_rate`, or at or above `max_rate`.

    A problem whose rate is unknown (None) stays.

    >>> [extreme_rate(right, 4, 0, 1) for right in (0, 1, 4, None)]
    ['too hard: 0 of 4 right', '', 'too easy: 4 of 4 right', '']
    """
    if right is None or min_rate * out_of < right < max_rate * out_of:
        return ""
    kind = "hard" if right <= min_rate * out_of else "easy"
    return f"too {kind}: {right:g} of {out_of:g} right"


def not_hard(right: float | None, out_of: float, hard: int, hard_of: int) -> str:
    """A problem that is not hard, or of which too little is known.

    It is hard if at least `hard_of` responses were recorded, and a share of them below
    hard / hard_of is right (§2.1.1: 4 / 64).

    >>> not_hard(3, 64, 4, 64), not_hard(8, 128, 4, 64), not_hard(0, 8, 4, 64)
    ('', '4 or more of 64 right', 'fewer than 64 responses recorded')
    """
    if right is None or out_of < hard_of:
        return f"fewer than {hard_of} responses recorded"
    if right * hard_of < hard * out_of:
        return ""
    return f"{hard} or more of {hard_of} right"
