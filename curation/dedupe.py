r"""Which problems are the same problem: exact, n-gram (MinHash) and embedding duplicates, and overlap with evaluation sets.

    question ──tokens──▶ [find, \frac, 1, 2, x, …] ──sketch──▶ (numbers, MinHash signature)
                                  │                                   │ rows alike in numbers and in one band
                                  └──────── features ──jaccard────────┴──▶ candidates ──verified──▶ duplicates

Two problems that share their boilerplate are as alike as two wordings of one problem, so likeness alone decides nothing.
A pair is a duplicate if

1. both name the same numbers, equally often (digits, and words from two to twelve),
2. their words are alike: Jaccard similarity of `features` at least `threshold` (n-gram), or cosine of embeddings,
3. and their gold answers are equal for the reward's grader.

The later row goes. Numbers are compared first, and exactly: a row with numbers of its own is never compared with any.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from grading.pool import Grader

BANDS, ROWS, NEIGHBOURS = (
    40,
    3,
    50,
)  # similarity s makes a candidate with probability 1 - (1 - s³)^40: 0.995 at s = 0.5
MANY, FEW = (
    0.5,
    0.75,
)  # least Jaccard similarity of duplicates that name three different numbers, and of others
N, SHARE, MOST = 8, 0.6, 0.9


class Row(NamedTuple):
    """A problem, where it stands (`file:row`), and, where that is known, how many of how many responses to it were right."""

    place: str
    question: str
    answer: str
    right: float | None = None
    of: float = 0.0


class Match(NamedTuple):
    """Row `row` repeats row `other`; both are positions in the list that was searched."""

    row: int
    other: int
    similarity: float


# ── normal form ──────────────────────────────────────────────────────────────────────────────────────────────────────

# Words that another wording of the same question adds, drops or exchanges. Not "a", which may be a variable.
ASKING = frozenset(
    """find determine compute calculate evaluate give state express answer solve what which is are be was were has have does
    do did can the an of that this there these it its value values let suppose assume consider given if then and so for such
    as where when with in to we you your please problem follows following""".split()
)
_COUNTED = "two three four five six seven eight nine ten eleven twelve".split()
_NUMBER_WORDS = {word: str(n) for n, word in enumerate(_COUNTED, 2)}
DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.S)
_SYMBOLS = {
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "×": "*",
    "·": "*",
    "→": r"\to ",
    "√": r"\sqrt ",
    "π": " pi ",
}
_SYMBOLS |= {
    "∠": " angle ",
    "△": " triangle ",
    "°": " degree ",
    "²": "^2",
    "³": "^3",
}  # "…" is "..." for unicodedata
_MATH = re.compile(r"\$\$.+?\$\$|\$.+?\$|\\\(.+?\\\)|\\\[.+?\\\]", re.S)
_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_CAPITALS = re.compile(r"(?<![\\A-Za-z])[A-Z]{2,5}(?![A-Za-z])")
_REWRITES = [
    (re.compile(written, re.S), meant)
    for written, meant in [
        (r"\[asy\].*?\[/asy\]|!\[[^\]]*\]\([^)]*\)|https?://\S+", " "),
        (r"\[([^\]]*)\]\(\s*\)", r"\1"),  # a link, its address gone
        # A heading, and what a contest puts in front: number, points, year and place.
        (r"^\s*(?:#+[^\n$]{0,40}\n+)?\s*(?:(?:problem|example|exercise|task|question)\s+)?", " "),
        (r"^\s*(?:[a-z]?\d+(?:\.\d+)*[a-z]?[.:)]\s|\(\d+\)\s)", " "),
        (
            r"^\s*[(\[]\s*\d+\s*(?:points?|marks?|pts?\.?)?\s*[)\]]|\(\s*\d+ (?:points?|marks?)\s*\)",
            " ",
        ),
        (
            r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname\*?|boldsymbol)\s*\{([^{}]*)\}",
            r" \1 ",
        ),
        (r"\\(?:begin|end)\s*\{[^{}]*\}(?:\s*\{[lcr| ]+\})?", " "),
        (r"\\(?:left|right|big+[lr]?|displaystyle|limits|nolimits)(?![a-z])\.?", " "),
        (r"\\[dtc]?frac\s*(\d)\s*(\d)", r"\\frac \1 \2 "),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"(?<=\d)(?:,|\{,\}|\\,|,?\\!,?)(?=\d{3}(?!\d))", ""),
        (r"[\^_]\s*\{\s*\}", ""),
        (r"\\q?quad(?![a-z])|\\[,;:!><\s\\\[\]()]|[$~&{}]", " "),
        (
            r"\\(minus|plus|equal)(?![a-z])",
            lambda name: {"minus": "-", "plus": "+", "equal": "="}[name[1]],
        ),  # old AoPS pages
        (r"\\(le|ge|ne)q(?:slant)?(?![a-z])", r"\\\1 "),
        (r"\\(?:cdots|ldots|dotsc?|dots[bm])(?![a-z])|\.\.\.", r"\\dots "),
        (r"\\(?:cdot|times)(?![a-z])", "*"),
        (r"\\(triangle|angle|pi)(?![a-z])", r" \1 "),
        (r"\^\s*\\circ(?![a-z])|\bdegrees?\b", " degree "),
        (r"[-‐-―−]", "-"),
    ]
]
_TOKEN = re.compile(r"\\[a-z]+|[^\W\d_]+|\d+(?:\.\d+)?|[-+*/=<>^|()\[\]%]|[.?!;:,]")
_END = frozenset(".?!;:,")


def clauses(question: str) -> list[list[str]]:
    r"""Tokens of the question in normal form, cut where punctuation was.

    What two copies of a problem differ in is gone: case, spacing, `\left`, `\dfrac`, `\,`, braces, dollar signs and display
    math, names of fonts, pictures (Asymptote code, links), thousands separators, and the problem's number and points.
    Letters in formulas are single: `$AB$` is `$A B$`.

    >>> clauses(r"7. Let $AB=\dfrac12$. Find $\left( 1,\!000 \right)x^{2}$.")
    [['let', 'a', 'b', '=', '\\frac', '1', '2'], ['find', '(', '1000', ')', 'x', '^', '2']]
    """
    text = _MATH.sub(
        lambda formula: _LETTERS.sub(lambda run: " ".join(run[0]), formula[0]), question
    )
    text = _CAPITALS.sub(lambda run: " ".join(run[0]), text)
    text = text.translate(str.maketrans(_SYMBOLS))
    text = unicodedata.normalize("NFKC", re.sub(r"\]\([^)]*\)", "]()", text)).casefold()
    for written, meant in _REWRITES:
        text = written.sub(meant, text)
    found: list[list[str]] = [[]]
    for token in _TOKEN.findall(text):
        if token in _END:
            found.append([])
        else:
            found[-1].append(_NUMBER_WORDS.get(token, token))
    return [clause for clause in found if clause]


def tokens(question: str) -> list[str]:
    """The clauses as one list."""
    return list(chain.from_iterable(clauses(question)))


def features(question: str) -> set[str]:
    """Its tokens and its pairs of neighbours within a clause, `ASKING` words aside: neither the order of clauses nor the
    way of asking matters.

    >>> features("If x > 3, find y.") == features("Determine the value of y, given that x > 3.")
    True
    """
    parts = [[token for token in clause if token not in ASKING] for clause in clauses(question)]
    return {t for part in parts for t in part} | {
        f"{a} {b}" for part in parts for a, b in pairwise(part)
    }


def numbers(words: Iterable[str]) -> tuple[str, ...]:
    """The numbers among tokens, sorted, each as often as it occurs."""
    return tuple(sorted(word for word in words if word[0].isdigit()))


def digest(text: bytes) -> int:
    """64 bits of a text, the same in every process."""
    return int.from_bytes(blake2b(text, digest_size=8).digest())


def jaccard(a: set[str], b: set[str]) -> float:
    """|a ∩ b| / |a ∪ b|, and 0 of two empty sets."""
    return len(a & b) / max(1, len(a | b))


# ── duplicates ───────────────────────────────────────────────────────────────────────────────────────────────────────

_RANDOM = np.random.default_rng(0).integers(0, 2**64, (2, BANDS * ROWS), np.uint64)
_MULTIPLIER, _SHIFT = _RANDOM[0] | 1, _RANDOM[1]


class Sketch(NamedTuple):
    """What is kept of a question: digests of its tokens in order, of its numbers, and of each band of its signature."""

    exact: int
    numbers: int
    bands: np.ndarray


def sketch(question: str) -> Sketch:
    """MinHash: of each of 120 random hash functions the smallest value over the features; two questions agree in each
    value with a probability of about their Jaccard similarity. Bands of three values are hashed into one."""
    words = tokens(question)
    hashed = np.array(
        [digest(feature.encode()) for feature in features(question)] or [0], np.uint64
    )
    smallest = (hashed[:, None] * _MULTIPLIER + _SHIFT >> 32).min(axis=0).reshape(BANDS, ROWS)
    bands = np.array([digest(band.tobytes()) for band in smallest], np.uint64)
    return Sketch(
        digest((" ".join(words) or question).encode()),
        digest(" ".join(numbers(words)).encode()),
        bands,
    )


Track = Callable[[Iterable], Iterable]  # shows progress


def exact(
    rows: Sequence[Row], sketches: Sequence[Sketch], grader: Grader, track: Track = iter
) -> list[Match]:
    """Rows with the tokens and the gold of an earlier one. The gold, too, as a picture is no token."""
    first: dict[int, int] = {}
    pairs = [(first.setdefault(s.exact, row), row, 1.0) for row, s in enumerate(track(sketches))]
    return same_gold(rows, [pair for pair in pairs if pair[0] != pair[1]], grader)


def candidates(sketches: Sequence[Sketch]) -> list[tuple[int, int]]:
    """Pairs (earlier, later) that agree in their numbers and in a band. Of many rows that share one, as a series made from a
    template does, each is paired with the `NEIGHBOURS` before it: duplicates share most of their bands, and meet in another.
    """
    pairs: set[tuple[int, int]] = set()
    named = np.array([s.numbers for s in sketches], np.uint64)
    for band in range(BANDS):
        keys = named ^ np.array([s.bands[band] for s in sketches], np.uint64)
        order = np.argsort(keys, kind="stable")
        alike = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        start = -1
        for at in alike.tolist():
            start = at if start < 0 or keys[order[at]] != keys[order[start]] else start
            near = order[max(start, at + 1 - NEIGHBOURS) : at + 1].tolist()
            pairs.update((earlier, int(order[at + 1])) for earlier in near)
    return sorted(pairs)


def near(
    rows: Sequence[Row], sketches: Sequence[Sketch], grader: Grader, track: Track = iter
) -> list[Match]:
    """N-gram duplicates: candidates alike by `threshold`, with like pictures and equal golds."""
    pairs = []
    for i, j in track(candidates(sketches)):
        a, b = rows[i].question, rows[j].question
        if (s := jaccard(features(a), features(b))) >= threshold(a) and _pictures_alike(a, b):
            pairs.append((i, j, s))
    return same_gold(rows, pairs, grader)


def threshold(question: str) -> float:
    """Three different numbers nearly name a problem: half of the features is enough. Else it takes three quarters."""
    return FEW if len(set(numbers(tokens(question)))) < 3 else MANY


def embedded(
    rows: Sequence[Row],
    sketches: Sequence[Sketch],
    grader: Grader,
    track: Track = iter,
    *,
    folder: Path,
    least: float,
) -> list[Match]:
    """Embedding duplicates: the cosine of two questions' embeddings (a sentence-transformers model in `folder`) is at least
    `least`, pictures alike, golds equal. Only rows that share numbers and gold, in normal form, are embedded."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), trust_remote_code=False, local_files_only=True)
    groups = defaultdict(list)
    for row, s in enumerate(sketches):
        groups[s.numbers, *tokens(rows[row].answer)].append(row)
    wanted = [row for group in groups.values() if len(group) > 1 for row in group]
    parts = [
        [rows[row].question for row in wanted[start : start + 256]]
        for start in range(0, len(wanted), 256)
    ]
    encoded = [
        model.encode(part, normalize_embeddings=True, show_progress_bar=False)
        for part in track(parts)
    ]
    vectors = np.concatenate(encoded or [np.empty((0, 1))])
    pairs, start = [], 0
    for group in (group for group in groups.values() if len(group) > 1):
        mine = vectors[start : start + len(group)]
        start += len(group)
        for k in range(1, len(group)):
            cosines = mine[:k] @ mine[k]
            alike = [
                (group[at], group[k], float(cosines[at])) for at in np.flatnonzero(cosines >= least)
            ]
            pairs += [
                (i, j, s)
                for i, j, s in alike
                if _pictures_alike(rows[i].question, rows[j].question)
            ]
    return same_gold(rows, pairs, grader)


def same_gold(
    rows: Sequence[Row], pairs: Sequence[tuple[int, int, float]], grader: Grader
) -> list[Match]:
    """Of pairs (earlier, later, similarity) those with equal golds; of each later row the most similar."""
    equal = grader.equal(
        [rows[i].answer for i, _, _ in pairs], [rows[j].answer for _, j, _ in pairs]
    )
    best: dict[int, Match] = {}
    for (i, j, s), same in zip(pairs, equal, strict=True):
        if same and (j not in best or s > best[j].similarity):
            best[j] = Match(j, i, s)
    return [best[j] for j in sorted(best)]


def _pictures_alike(a: str, b: str) -> bool:
    """Whether two drawings, where both have one, have half of their words in common."""
    drawn = [
        {word for code in DRAWING.findall(question) for word in re.findall(r"\w+", code)}
        for question in (a, b)
    ]
    return not all(drawn) or jaccard(*drawn) >= MANY


# ── overlap with evaluation sets ─────────────────────────────────────────────────────────────────────────────────────


class Overlap:
    """Which evaluation problem a question contains: the one of whose n-grams (8 tokens in a row) it holds the greatest
    share, if that is at least 0.6 and the question holds all its numbers, three or more; or else 0.9.

    Shares, not single n-grams: "where m and n are relatively prime positive integers. Find m + n" is longer than the 13
    words that one usually looks for. A problem below 8 tokens has no n-grams: `exact` finds it as a whole.
    """

    def __init__(self, problems: Sequence[Row]) -> None:
        self.problems = problems
        words = [tokens(problem.question) for problem in problems]
        self.numbers = [Counter(numbers(w)) for w in words]
        self.sizes = [len(_ngrams(w)) for w in words]
        self.holders = defaultdict(list)
        for k, w in enumerate(words):
            for gram in _ngrams(w):
                self.holders[gram].append(k)

    def find(self, question: str) -> tuple[str, float] | None:
        """Place of the evaluation problem and the share of its n-grams, or None."""
        words = tokens(question)
        named, found = Counter(numbers(words)), []
        for k, count in Counter(
            k for gram in _ngrams(words) for k in self.holders.get(gram, ())
        ).items():
            same = len(self.numbers[k]) >= 3 and self.numbers[k] <= named
            if (share := count / self.sizes[k]) >= (SHARE if same else MOST):
                found.append((share, self.problems[k].place))
        return max(found)[::-1] if found else None


def _ngrams(words: Sequence[str]) -> set[int]:
    return {digest(" ".join(words[at : at + N]).encode()) for at in range(len(words) - N + 1)}
