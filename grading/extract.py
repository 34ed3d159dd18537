r"""Extract the final answer from a response (§2.1.2).

The answer is taken from the content of the last closed `<answer>…</answer>`:

| content | answer | example |
|---|---|---|
| has a `\boxed{…}` | the content of the last box | `so \boxed{\frac{1}{2}}` → `\frac{1}{2}` |
| has a box that never closes | none | `\boxed{5` → `` |
| is prose | none | `The answer is 5.` → `` |
| anything else | all of it | `x = 5`, `12 cm`, `(C)`, `\text{Evelyn}`, `no real solution` |

Prose is a text of more than `MAX_WORDS` words, or of several words with one of `SENTENCE_WORDS`.
Text outside the tags never counts, boxed or not. More than `MAX_CONTENT` characters between the
tags are no answer. With `require_boxed=True`, as in the authors' code, an answer must be boxed.

The extracted answer is compared with the gold answer. reward.score makes the reward of the verdict:
a truncated response gets 0 even if its answer is right.

    response ──extract──▶ answer ──grading/equivalence.py, in a worker process──▶ equal or not
"""

import re

from grading.equivalence import MAX_CHARS

MAX_WORDS = 6
MAX_CONTENT = 20_000  # characters between the tags
SENTENCE_WORDS = re.compile(
    r"\b(is|are|was|were|be|has|have|can|cannot|we|it|there|this|that"
    r"|therefore|thus|hence|because|since|so)\b",
    re.I,
)


def extract(response: str, require_boxed: bool = False) -> str:
    """The final answer of a response, "" if it gives none (table above)."""
    end = max(0, response.rfind("</answer>"))
    start = response.rfind("<answer>", max(0, end - MAX_CONTENT), end)
    if start < 0:
        return ""
    content = response[start + len("<answer>") : response.find("</answer>", start)].strip()
    if "\\boxed" in content:
        return _last_box(content)
    if require_boxed or _is_prose(content):
        return ""
    return content


def _last_box(text: str) -> str:
    """The content of the last box with its braces balanced, "" if it has no closing brace."""
    box = text.rpartition("\\boxed")[2].lstrip()
    box = box[: 2 * MAX_CHARS]  # an answer over MAX_CHARS is never right
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", box, re.S):
        depth += {"{": 1, "}": -1}.get(mark.group(), 0)
        if depth == 0:
            return box[1 : mark.start()].strip() if box[0] == "{" else ""
    return ""


def _is_prose(text: str) -> bool:
    if len(text) > MAX_CHARS:
        return True
    plain = re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", text)
    words = re.findall(r"[^\W\d_]{2,}", plain)
    if len(words) > MAX_WORDS:
        return True
    return len(plain.split()) > 1 and SENTENCE_WORDS.search(plain) is not None
