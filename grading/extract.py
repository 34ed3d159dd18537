r"""The reward (§2.1.2): R = 1 if the final answer equals the gold answer, else 0. No format reward, no partial credit.

    response ──extract──▶ answer ──grading/equivalence.py, in a worker of grading/pool.py──▶ Math-Verify(gold, answer) ──▶ R ∈ {0, 1}

The answer is the content of the last closed `<answer>…</answer>`:

| content | answer | example |
|---|---|---|
| holds a `\boxed{…}` | what is in the last box, braces balanced | `so \boxed{\frac{1}{2}}` → `\frac{1}{2}` |
| holds a box that never closes | none | `\boxed{5` → `` |
| is prose: over 6 words, or one of `SENTENCE` among several | none | `The answer is 5.` → `` |
| is bare | all of it | `x = 5`, `12 cm`, `(C)`, `\text{Evelyn}`, `no real solution` |

Nothing outside the tags counts, boxed or not, and over 20,000 characters are no answer. `require_boxed=True` is the authors'
code: no box, no answer.
"""

import re

from grading.equivalence import MAX_CHARS

SENTENCE = re.compile(
    r"\b(is|are|was|were|be|has|have|can|cannot|we|it|there|this|that|therefore|thus|hence|because|since|so)\b",
    re.I,
)
MAX_WORDS = 6
LONGEST = 20_000  # characters between the tags


def extract(response: str, require_boxed: bool = False) -> str:
    """The final answer of a response, "" if it gives none (table above)."""
    end = max(0, response.rfind("</answer>"))
    start = response.rfind("<answer>", max(0, end - LONGEST), end)
    content = response[start + 8 : response.find("</answer>", start)].strip() if start >= 0 else ""
    if "\\boxed" in content:
        return _last_box(content)
    return "" if require_boxed or _is_prose(content) else content


def _last_box(text: str) -> str:
    inside = text.rpartition("\\boxed")[2].lstrip()[
        : 2 * MAX_CHARS
    ]  # a longer answer could not be right
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", inside, re.S):
        depth += {"{": 1, "}": -1}.get(mark.group(), 0)
        if depth == 0:
            return inside[1 : mark.start()].strip() if inside[0] == "{" else ""
    return ""


def _is_prose(text: str) -> bool:
    if len(text) > MAX_CHARS:
        return True
    plain = re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", text)
    words = len(re.findall(r"[^\W\d_]{2,}", plain))
    return words > MAX_WORDS or (len(plain.split()) > 1 and SENTENCE.search(plain) is not None)
