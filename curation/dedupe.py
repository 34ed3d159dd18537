r"""Which problems are the same problem: exact, n-gram and embedding duplicates, evaluation overlap.

    question ──▶ tokens [find, \frac, 1, 2, x, …] ──▶ sketch: numbers and MinHash bands
                    │                                    │ candidate pairs: the same numbers,
                    ▼                                    ▼ and one band in common
                 features ──▶ Jaccard similarity ──▶ similar pairs ──▶ equal golds ──▶ duplicates

Similarity alone decides nothing: two different problems with the same boilerplate can be as similar
as two wordings of one problem. A pair is a duplicate if

1. both questions contain the same numbers, equally often (digits, and words from two to twelve),
2. their words are similar: the Jaccard similarity of their `features` is at least `min_jaccard`
   (n-gram), or the cosine of their embeddings is large enough,
3. and the reward's grader finds their gold answers equal.

The later row is removed. Numbers are compared first, and exactly, so a row whose numbers no other
row has is never compared with any.
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

# MinHash: questions of Jaccard similarity s become candidates with probability 1 - (1 - s³)^40,
# which is 0.995 at s = 0.5.
NUM_BANDS = 40
BAND_SIZE = 3
NEIGHBORS = 50  # each row of a band is paired with at most so many earlier ones
# Smallest Jaccard similarity of duplicates.
MIN_JACCARD = 0.5  # of questions with three different numbers or more
MIN_JACCARD_FEW_NUMBERS = 0.75  # of all others
# Overlap with evaluation sets: the length of an n-gram, and the smallest share of n-grams.
NGRAM = 8
MIN_SHARE_SAME_NUMBERS = 0.6
MIN_SHARE = 0.9


class Row(NamedTuple):
    """A problem: its place (`file:row`), question and gold answer, and its pass rate if known.

    The pass rate is `right` of `out_of` responses.
    """

    place: str
    question: str
    answer: str
    right: float | None = None
    out_of: float = 0.0


class Match(NamedTuple):
    """Row `row` repeats row `other`; both are indices into the list that was searched."""

    row: int
    other: int
    similarity: float


# ── normal form ───────────────────────────────────────────────────────────────────────────────────

# Words that another wording of the same question may add, drop or replace. "a" is not among them,
# because it may be a variable.
FILLER_WORDS = frozenset(
    """find determine compute calculate evaluate give state express answer solve what which is are
    be was were has have does do did can the an of that this there these it its value values let
    suppose assume consider given if then and so for such as where when with in to we you your
    please problem follows following""".split()
)
_COUNTED = "two three four five six seven eight nine ten eleven twelve".split()
_NUMBER_WORDS = {word: str(n) for n, word in enumerate(_COUNTED, 2)}
DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.S)
# Not among them: …, which unicodedata turns into three dots.
_SYMBOLS = {
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "×": "*",
    "·": "*",
    "→": r"\to ",
    "√": r"\sqrt ",
    "π": " pi ",
    "∠": " angle ",
    "△": " triangle ",
    "°": " degree ",
    "²": "^2",
    "³": "^3",
}
_FORMULA = re.compile(r"\\\(.+?\\\)|\\\[.+?\\\]", re.S)
# Between two dollar signs: a word before another one, or after an amount, outside \text{…}.
_PROSE = re.compile(
    r"(?<![\\A-Za-z])[A-Za-z]{2,},?\s+(?:[a-z]{2,}|\d)|^\d[\d,.]*\s+[A-Za-z]{2,}[^\\]*\s$"
)
_TEXT_COMMAND = re.compile(r"\\(?:text\w*|math\w+|mbox|operatorname\*?)\s*\{[^{}]*\}")
_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_CAPITALS = re.compile(r"(?<![\\A-Za-z])[A-Z]{2,5}(?![A-Za-z])")
# With at most two levels of braces in numerator and denominator.
_GROUP = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
_FRACTION = rf"\\[dtc]?frac\s*{_GROUP}\s*{_GROUP}"


def _quotient(numerator: str, denominator: str) -> str:
    r"""A fraction as it is typed in a line: `\frac{1}{29}` as 1/29, `\frac{a+b}{2}` as (a+b)/2."""
    parts = (
        f"({part})" if re.search(r"[-+/=]", part) else part for part in (numerator, denominator)
    )
    return f" {'/'.join(parts)} "


# Applied in this order, after lower-casing.
_REWRITES = [
    (re.compile(pattern, re.S), replacement)
    for pattern, replacement in [
        (r"\[asy\].*?\[/asy\]|!\[[^\]]*\]\([^)]*\)|https?://\S+", " "),
        (r"\[([^\]]*)\]\(\s*\)", r"\1"),  # a link without its address
        # A heading, and what contests put in front: number and points.
        (r"^\s*(?:#+[^\n$]{0,40}\n+)?\s*(?:(?:problem|example|exercise|task|question)\s+)?", " "),
        (r"^\s*(?:[a-z]?\d+(?:\.\d+)*[a-z]?[.:)]\s|\(\d+\)\s)", " "),
        (
            r"^\s*[(\[]\s*\d+\s*(?:points?|marks?|pts?\.?)?\s*[)\]]"
            r"|\(\s*\d+ (?:points?|marks?)\s*\)",
            " ",
        ),
        (
            r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname\*?|boldsymbol)\s*\{([^{}]*)\}",
            r" \1 ",
        ),
        (r"\\(?:begin|end)\s*\{[^{}]*\}(?:\s*\{[lcr| ]+\})?", " "),
        (r"\\(?:left|right|big+[lr]?|displaystyle|limits|nolimits)(?![a-z])\.?", " "),
        (r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2 "),
        (_FRACTION, lambda part: _quotient(part[1], part[2])),
        (_FRACTION, lambda part: _quotient(part[1], part[2])),  # one inside another
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"(?<=\d)(?:,|\{,\}|\\,|,?\\!,?)(?=\d{3}(?!\d))", ""),
        (r"[\^_]\s*\{\s*\}", ""),
        (r"\\q?quad(?![a-z])|\\[,;:!><\s\\\[\]()]|[$~&{}]", " "),
        (  # old AoPS pages
            r"\\(minus|plus|equal)(?![a-z])",
            lambda name: {"minus": "-", "plus": "+", "equal": "="}[name[1]],
        ),
        (r"\\(le|ge|ne)q(?:slant)?(?![a-z])", r"\\\1 "),
        (r"\\(?:cdots|ldots|dotsc?|dots[bm])(?![a-z])|\.\.\.", r"\\dots "),
        (r"\\(?:cdot|times)(?![a-z])", "*"),
        (r"\\(triangle|angle|pi)(?![a-z])", r" \1 "),
        (r"\^\s*\\circ(?![a-z])|\bdegrees?\b", " degree "),
        (r"[-‐-―−]", "-"),
    ]
]
_TOKEN = re.compile(r"\\[a-z]+|[^\W\d_]+|\d+(?:\.\d+)?|[-+*/=<>^|()\[\]%]|[.?!;:,]")
_PUNCTUATION = frozenset(".?!;:,")


def clauses(question: str) -> list[list[str]]:
    r"""Tokens of the question in normal form, split at punctuation.

    The normal form removes what two copies of a problem differ in: case, spacing, `\left`,
    `\dfrac`, `\,`, braces, dollar signs and display math, names of fonts, pictures (Asymptote code,
    links), thousands separators, and the problem's number and points. In formulas each letter is a
    token: `$AB$` is the same as `$A B$`.

    >>> clauses(r"7. Let $AB=\dfrac12$. Find $\left( 1,\!000 \right)x^{2}$.")
    [['let', 'a', 'b', '=', '1', '/', '2'], ['find', '(', '1000', ')', 'x', '^', '2']]
    """
    text = _spaced_formulas(question)
    text = _CAPITALS.sub(_spaced, text)
    text = text.translate(str.maketrans(_SYMBOLS))
    text = re.sub(r"\]\([^)]*\)", "]()", text)
    text = unicodedata.normalize("NFKC", text).casefold()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    found: list[list[str]] = [[]]
    for token in _TOKEN.findall(text):
        if token in _PUNCTUATION:
            found.append([])
        else:
            found[-1].append(_NUMBER_WORDS.get(token, token))
    return [clause for clause in found if clause]


def _spaced_formulas(question: str) -> str:
    r"""The question with a space between the letters of formulas.

    A dollar sign may also be a currency sign: no formula starts at the first one of "$3 for each
    box and $5". Otherwise the words between two prices would become single letters.

    >>> _spaced_formulas("If $AB=2$, it costs $30 for each of us and $ab$ more.")
    'If $A B=2$, it costs $30 for each of us and $a b$ more.'
    """
    text = re.sub(r"(\\\\)|\\\$", r"\1 ", question).replace("$$", "$")
    text = _FORMULA.sub(lambda formula: _LETTERS.sub(_spaced, formula[0]), text)
    parts = text.split("$")
    opened = False
    for at, part in enumerate(parts[1:-1], 1):
        opened = not opened and _PROSE.search(_TEXT_COMMAND.sub("", part)) is None
        if opened:
            parts[at] = _LETTERS.sub(_spaced, part)
    return "$".join(parts)


def _spaced(letters: re.Match) -> str:
    return " ".join(letters[0])


def tokens(question: str) -> list[str]:
    """The clauses as one list."""
    return list(chain.from_iterable(clauses(question)))


def features(question: str) -> set[str]:
    """Its tokens, and its pairs of adjacent tokens within a clause, without `FILLER_WORDS`.

    Neither the order of the clauses nor the phrasing of the request changes them.

    >>> features("If x > 3, find y.") == features("Determine the value of y, given that x > 3.")
    True
    """
    found: set[str] = set()
    for clause in clauses(question):
        words = [token for token in clause if token not in FILLER_WORDS]
        found.update(words)
        found.update(f"{first} {second}" for first, second in pairwise(words))
    return found


def numbers(words: Iterable[str]) -> tuple[str, ...]:
    """The numbers among tokens, sorted, each as often as it occurs."""
    return tuple(sorted(word for word in words if word[0].isdigit()))


def digest(text: bytes) -> int:
    """A 64-bit hash of a text that is the same in every process."""
    return int.from_bytes(blake2b(text, digest_size=8).digest())


def jaccard(a: set[str], b: set[str]) -> float:
    """|a ∩ b| / |a ∪ b|; 0 for two empty sets."""
    return len(a & b) / max(1, len(a | b))


# ── duplicates ────────────────────────────────────────────────────────────────────────────────────

_RANDOM = np.random.default_rng(0).integers(0, 2**64, (2, NUM_BANDS * BAND_SIZE), np.uint64)
_MULTIPLIER = _RANDOM[0] | 1
_SHIFT = _RANDOM[1]


class Sketch(NamedTuple):
    """What is kept of a question: hashes of its tokens in order, of its numbers, and of each of the
    `NUM_BANDS` bands of its MinHash signature."""

    exact: int
    numbers: int
    bands: np.ndarray


def sketch(question: str) -> Sketch:
    """The hashes of a question; the bands come from MinHash.

    Each of 120 random hash functions is applied to all features, and its smallest value is kept.
    Two questions agree in such a value with a probability of about their Jaccard similarity. Three
    values are hashed into one band.
    """
    words = tokens(question)
    encoded = [digest(feature.encode()) for feature in features(question)]
    hashed = np.array(encoded or [0], np.uint64)
    values = hashed[:, None] * _MULTIPLIER + _SHIFT >> 32  # [features, functions]
    smallest = values.min(axis=0).reshape(NUM_BANDS, BAND_SIZE)
    return Sketch(
        exact=digest((" ".join(words) or question).encode()),
        numbers=digest(" ".join(numbers(words)).encode()),
        bands=np.array([digest(band.tobytes()) for band in smallest], np.uint64),
    )


Pair = tuple[int, int, float]  # index of the earlier row, of the later row, similarity
Track = Callable[[Iterable], Iterable]  # yields the items that it is given and shows progress


def exact_duplicates(
    rows: Sequence[Row], sketches: Sequence[Sketch], grader: Grader, track: Track = iter
) -> list[Match]:
    """Rows with the tokens, the gold and similar pictures of an earlier row."""
    first: dict[int, int] = {}
    pairs = []
    for later, hashes in enumerate(track(sketches)):
        earlier = first.setdefault(hashes.exact, later)
        if earlier != later and _similar_pictures(rows[earlier].question, rows[later].question):
            pairs.append((earlier, later, 1.0))
    return with_equal_golds(rows, pairs, grader)


def candidate_pairs(sketches: Sequence[Sketch]) -> list[tuple[int, int]]:
    """Pairs (earlier, later) that agree in their numbers and in at least one band.

    If many rows share a band, as a series made from a template does, each is paired only with the
    `NEIGHBORS` rows before it. Duplicates share most of their bands, so another band pairs them.
    """
    pairs: set[tuple[int, int]] = set()
    number_hashes = np.array([hashes.numbers for hashes in sketches], np.uint64)
    for band in range(NUM_BANDS):
        keys = number_hashes ^ np.array([hashes.bands[band] for hashes in sketches], np.uint64)
        order = np.argsort(keys, kind="stable")
        equals_next = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        start = -1  # where the current run of equal keys starts in `order`
        for at in equals_next.tolist():
            if start < 0 or keys[order[at]] != keys[order[start]]:
                start = at
            later = int(order[at + 1])
            neighbors = order[max(start, at + 1 - NEIGHBORS) : at + 1].tolist()
            pairs.update((earlier, later) for earlier in neighbors)
    return sorted(pairs)


def ngram_duplicates(
    rows: Sequence[Row], sketches: Sequence[Sketch], grader: Grader, track: Track = iter
) -> list[Match]:
    """Candidate pairs with similar features, similar pictures and equal golds."""
    pairs = []
    for earlier, later in track(candidate_pairs(sketches)):
        first, second = rows[earlier].question, rows[later].question
        similarity = jaccard(features(first), features(second))
        if similarity >= min_jaccard(first) and _similar_pictures(first, second):
            pairs.append((earlier, later, similarity))
    return with_equal_golds(rows, pairs, grader)


def min_jaccard(question: str) -> float:
    """The smallest similarity of a duplicate of this question.

    Three different numbers nearly identify a problem, so half of the features is enough. With
    fewer numbers it takes three quarters.
    """
    return MIN_JACCARD if has_many_numbers(question) else MIN_JACCARD_FEW_NUMBERS


def has_many_numbers(question: str) -> bool:
    """Whether it has three different numbers or more."""
    return len(set(numbers(tokens(question)))) >= 3


def embedding_duplicates(
    rows: Sequence[Row],
    sketches: Sequence[Sketch],
    grader: Grader,
    track: Track = iter,
    *,
    folder: Path,
    min_cosine: float,
) -> list[Match]:
    """Rows whose questions have similar embeddings and similar pictures, and whose golds are equal.

    The embeddings come from the sentence-transformers model in `folder`; their cosine must be at
    least `min_cosine`. Only rows that have the numbers and the gold (in normal form) of another row
    are embedded.
    """
    same_numbers_and_gold = defaultdict(list)
    for index, hashes in enumerate(sketches):
        same_numbers_and_gold[hashes.numbers, *tokens(rows[index].answer)].append(index)
    groups = [group for group in same_numbers_and_gold.values() if len(group) > 1]
    questions = [rows[index].question for group in groups for index in group]
    vectors = _embed(questions, folder, track)
    pairs: list[Pair] = []
    start = 0
    for group in groups:
        group_vectors = vectors[start : start + len(group)]
        start += len(group)
        pairs += _similar_pairs(rows, group, group_vectors, min_cosine)
    return with_equal_golds(rows, pairs, grader)


def _embed(questions: Sequence[str], folder: Path, track: Track) -> np.ndarray:
    """Embeddings of length 1, [questions, dimensions]."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), trust_remote_code=False, local_files_only=True)
    batches = [questions[start : start + 256] for start in range(0, len(questions), 256)]
    vectors = [
        model.encode(batch, normalize_embeddings=True, show_progress_bar=False)
        for batch in track(batches)
    ]
    return np.concatenate(vectors or [np.empty((0, 1))])


def _similar_pairs(
    rows: Sequence[Row], group: Sequence[int], vectors: np.ndarray, min_cosine: float
) -> list[Pair]:
    """The pairs within a group of row indices that have similar embeddings and similar pictures."""
    pairs = []
    for k, later in enumerate(group):
        cosines = vectors[:k] @ vectors[k]
        for at in np.flatnonzero(cosines >= min_cosine):
            earlier = group[at]
            if _similar_pictures(rows[earlier].question, rows[later].question):
                pairs.append((earlier, later, float(cosines[at])))
    return pairs


def with_equal_golds(rows: Sequence[Row], pairs: Sequence[Pair], grader: Grader) -> list[Match]:
    """The pairs with equal golds as matches, but of each later row only the most similar one."""
    earlier_golds = [rows[earlier].answer for earlier, _, _ in pairs]
    later_golds = [rows[later].answer for _, later, _ in pairs]
    equal = grader.equal(earlier_golds, later_golds)
    best: dict[int, Match] = {}
    for (earlier, later, similarity), is_equal in zip(pairs, equal, strict=True):
        if is_equal and (later not in best or similarity > best[later].similarity):
            best[later] = Match(later, earlier, similarity)
    return [best[later] for later in sorted(best)]


def _similar_pictures(first: str, second: str) -> bool:
    """Whether the drawings of two questions with the same numbers can show one problem; true if one
    has no drawing.

    The numbers in labels must agree. If the text has three different numbers or more, the drawing
    may otherwise be another one, but not the same one with other numbers. With fewer, all numbers
    of the drawings must agree, and half of their words.
    """
    drawings = [" ".join(DRAWING.findall(question)) for question in (first, second)]
    if not all(drawings):
        return True
    labels, others = zip(*map(_numbers_of_drawing, drawings), strict=True)
    if labels[0] != labels[1]:
        return False
    words = [set(re.findall(r"[^\W\d]\w*", code)) for code in drawings]
    if has_many_numbers(first):
        return others[0] == others[1] or words[0] != words[1]
    return others[0] == others[1] and jaccard(*words) >= MIN_JACCARD


_LAYOUT = re.compile(r"\b(?:size|unitsize|linewidth|fontsize|dotsize|arrowsize)\s*\([^()]*\)")
_NUMBER = re.compile(r"\d*\.?\d+")


def _numbers_of_drawing(code: str) -> tuple[list[float], list[float]]:
    """The numbers in the texts of a drawing, and its other ones without sizes; both sorted."""
    texts = " ".join(re.findall(r'"[^"]*"', code))
    code = _LAYOUT.sub(" ", re.sub(r'"[^"]*"', " ", code))
    in_texts, others = (sorted(map(float, _NUMBER.findall(part))) for part in (texts, code))
    return in_texts, others


# ── overlap with evaluation sets ──────────────────────────────────────────────────────────────────


class Overlap:
    """Finds the evaluation problem that a question contains, by n-grams of 8 tokens.

    That is the problem with the largest share of its n-grams in the question. The share must be at
    least 0.6 if the problem contains three different numbers and the question has all its numbers,
    and at least 0.9 otherwise.

    One common n-gram is not enough: "where m and n are relatively prime positive integers. Find
    m + n" is longer than the 13 words that are usually compared. A problem shorter than 8 tokens
    has no n-grams; `exact_duplicates` finds it as a whole.
    """

    def __init__(self, problems: Sequence[Row]) -> None:
        self.problems = problems
        self.numbers: list[Counter[str]] = []
        self.sizes: list[int] = []
        self.problems_with: defaultdict[int, list[int]] = defaultdict(list)  # n-gram → indices
        for index, problem in enumerate(problems):
            words = tokens(problem.question)
            ngrams = _ngrams(words)
            self.numbers.append(Counter(numbers(words)))
            self.sizes.append(len(ngrams))
            for ngram in ngrams:
                self.problems_with[ngram].append(index)

    def find(self, question: str) -> tuple[str, float] | None:
        """Place of the evaluation problem and the share of its n-grams, or None."""
        words = tokens(question)
        question_numbers = Counter(numbers(words))
        num_shared: Counter[int] = Counter()  # by index of the problem
        for ngram in _ngrams(words):
            num_shared.update(self.problems_with.get(ngram, ()))
        found = []
        for index, count in num_shared.items():
            problem_numbers = self.numbers[index]
            same_numbers = len(problem_numbers) >= 3 and problem_numbers <= question_numbers
            share = count / self.sizes[index]
            if share >= (MIN_SHARE_SAME_NUMBERS if same_numbers else MIN_SHARE):
                found.append((share, self.problems[index].place))
        if not found:
            return None
        share, place = max(found)
        return place, share


def _ngrams(words: Sequence[str]) -> set[int]:
    """Hashes of all runs of `NGRAM` tokens."""
    starts = range(len(words) - NGRAM + 1)
    return {digest(" ".join(words[start : start + NGRAM]).encode()) for start in starts}
