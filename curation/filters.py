r"""Rules for a row on its own: questions that no answer can be rewarded for, other languages, pass rates.

Each rule returns why the row should go, or "".

| rule | goes | stays |
|---|---|---|
| `choice` | `… (A) 1 (B) 2 (C) 3 (D) 4`; any question with gold `(C)` | `f(A) + f(B) + f(C) + f(D)`; parts (a) and (b) |
| `proof` | `Show that a + b > c.` | `Show that c exists and find its value.` |
| `foreign` | `Calcula el perímetro de un cuadrado de lado $3$.` | `Compute $\sin 60^\circ$.` |
| `rated` | 0 of 4 right, 4 of 4 right | 1 of 4 right |
| `not_hard` | 4 of 64 right | 3 of 64 right, 0 of 64 right |
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from curation import formats
from curation.dedupe import DRAWING

# (A) … (D) anywhere, but no f(A); or A. B. C. at the beginnings of lines; or A. … D. near to each other.
_OPTIONS = [
    re.compile(r".*?".join(rf"(?<![\w)}}\\])\({letter}\)" for letter in "ABCD"), re.S),
    re.compile(r".*?".join(rf"^[\s$*]*\(?{letter}\s*[.):]" for letter in "ABC"), re.S | re.M),
    re.compile(
        r".{1,80}?".join(rf"(?<![\w()}}\\]){letter}\s*[.:)．、]" for letter in "ABCD"), re.S
    ),
]
# Enough where the gold is a letter: lines that begin with one.
_LINES = re.compile(r".*?".join(rf"^\W*{letter}\b" for letter in "abc"), re.S | re.M | re.I)
_OPTION = re.compile(r"[\s$]*(?:\\(?:text\w*|math\w\w)\s*\{)?\s*(\(?)[A-E](\)?)[\s.}$]*")


def choice(question: str, answer: str) -> str:
    r"""Multiple choice: lettered options in the question, or a gold that is one's letter.

    >>> choice("Is 7 (A) odd (B) even (C) both (D) none?", "odd"), choice("f(A) + f(B)?", r"\text{(C)}")
    ('lettered options', 'the gold is a letter of an option')
    >>> choice("Which point lies farther out, $A$ or $B$?", "A")
    ''
    """
    question = DRAWING.sub("", question)
    if any(options.search(question) for options in _OPTIONS):
        return "lettered options"
    letter = _OPTION.fullmatch(answer)
    if letter and (all(letter.groups()) or _LINES.search(question)):
        return "the gold is a letter of an option"
    return ""


_PROVE = re.compile(
    r"(?:^|[.;:,!?\n)$]|\b(?:then|and|to|also|please))\s*(?:dis)?(?:prove|show|demonstrate)\b", re.I
)
_SEEK = re.compile(
    r"\?|\b(?:find|determine|compute|calculate|evaluate|solve|simplify|express|estimate|how|what)\b",
    re.I,
)
_PROVED = re.compile(r"(?:\\text\{)?\s*(?:proof|proved|proven|q\.?e\.?d\.?)\s*\}?\.?", re.I)


def proof(question: str, answer: str) -> str:
    """A proof: told to prove or show something, and neither asked nor told to find anything; or "proof" for a gold.

    >>> proof("Prove that n! > 2^n for n > 3.", "n = 4"), proof("Find all n, and prove it.", "3")
    ('asks for a proof alone', '')
    """
    if _PROVED.fullmatch(answer.strip()):
        return "the gold says that it is proved"
    return (
        "asks for a proof alone" if _PROVE.search(question) and not _SEEK.search(question) else ""
    )


_FORMULA = re.compile(
    r"\[asy\].*?\[/asy\]|\$\$.+?\$\$|\$.+?\$|\\\(.+?\\\)|\\\[.+?\\\]|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\[a-zA-Z]+"
    r"|!?\[[^\]]*\]\([^)]*\)|https?://\S+",
    re.S,
)


def foreign(question: str) -> str:
    """Not English: of five words or more outside formulas, the language model gives English less than 1 %; or a third of the
    letters are of another script. Fewer words say too little, and "Compute $…$" is one.
    """
    words = re.findall(r"[^\W\d_]{2,}", _FORMULA.sub(" ", question))
    letters = "".join(words)
    if 3 * sum(not unicodedata.name(c, "").startswith("LATIN") for c in letters) > len(letters):
        return "another script"
    if len(words) < 5:
        return ""
    ranked = _identifier().rank(" ".join(words))
    return f"language {ranked[0][0]}" if dict(ranked)["en"] < 0.01 else ""


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


# ── pass rates ───────────────────────────────────────────────────────────────────────────────────────────────────────


def count(item: Any, field: str, of: float) -> tuple[float, float]:
    """A number at a dotted path; in the authors' rows it starts in the second message."""
    value = item[1] if isinstance(item, list) else item
    for step in field.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= of:
        raise ValueError(f"field {field}: expected a number from 0 to {of:g}, found {value!r:.60}")
    return float(value), of


def recorded(paths: Iterable[str]) -> dict[str, tuple[float, int]]:
    """question → (right answers, responses), over all JSON lines of the files, and of the folders' *.jsonl files."""
    counts: dict[str, tuple[float, int]] = {}
    for path in map(Path, paths):
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path}: holds no *.jsonl files of rollouts")
        for place, item in (row for file in files for row in formats.rows(file)):
            try:
                question, reward = item["question"].strip(), float(item["reward"])
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{path}: {place}: not a graded response ({error!r})") from None
            right, of = counts.get(question, (0.0, 0))
            counts[question] = right + reward, of + 1
    return counts


def rated(right: float | None, of: float, least: float, most: float) -> str:
    """A pass rate right / of at or below `least`, or at or above `most`. An unknown rate stays.

    >>> [rated(right, 4, 0, 1) for right in (0, 1, 4, None)]
    ['too hard: 0 of 4 right', '', 'too easy: 4 of 4 right', '']
    """
    if right is None or least * of < right < most * of:
        return ""
    return f"too {'hard' if right <= least * of else 'easy'}: {right:g} of {of:g} right"


def not_hard(right: float | None, of: float, hard: int, hard_of: int) -> str:
    """All but hard problems: hard is one with at least `hard_of` responses, of which a share below hard / hard_of is right.

    >>> not_hard(3, 64, 4, 64), not_hard(8, 128, 4, 64), not_hard(0, 8, 4, 64)
    ('', '4 or more of 64 right', 'fewer than 64 responses recorded')
    """
    if right is None or of < hard_of:
        return f"fewer than {hard_of} responses recorded"
    return "" if right * hard_of < hard * of else f"{hard} or more of {hard_of} right"
