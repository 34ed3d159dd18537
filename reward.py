r"""The reward: R = 1 if the final answer equals the gold answer, else 0. No format reward, no partial credit.

    response ──extract──▶ answer ──Grader──▶ worker process: Math-Verify(gold, answer) ──▶ R ∈ {0, 1}

**Extraction.** The answer is the content of the last closed `<answer>…</answer>`:

| content | answer | example |
|---|---|---|
| holds a `\boxed{…}` | what is in the last box, braces balanced | `so \boxed{\frac{1}{2}}` → `\frac{1}{2}` |
| a box that never closes | none | `\boxed{5` → `` |
| a bare answer | all of it | `x = 5`, `12 cm`, `(C)`, `\text{Evelyn}`, `no real solution` |
| prose: over 6 words, or a word that makes a sentence (`SENTENCE`) | none | `The answer is 5.` → `` |
| no closed `<answer>` (a box elsewhere does not count) | none | `</think> \boxed{5}` → `` |

`require_boxed=True` is the authors' code: without a box inside the tags there is no answer.

**Comparison.** No answer is 0 at once. Otherwise gold and answer are each read *whole*, as one formula: Math-Verify left
to itself searches a text for anything that looks like a number, so a guess hidden in words would be paid. In that order
(gold first; `verify` is not symmetric), with these rules where Math-Verify alone reads too little or too much:

| rule | equal | still unequal |
|---|---|---|
| text is compared as words, without case or article | `\text{ellipse}`, `An ellipse` | `\text{even}`, `odd` |
| a letter as gold is a choice; text after the letter is free | `C`, `(C)`, `C. 5 m` | `C`, `B`; `C`, `B. C` |
| plain and unicode notation is LaTeX | `\sqrt{53}`, `√53`; `\frac{\pi}{2}`, `pi/2` | `\sqrt{53}`, `√5` |
| `U` between intervals is a union | `(-\infty,2)\cup(3,\infty)`, `(-inf, 2) U (3, inf)` | `(0,1)`, `[0,1)` |
| ordinals are numbers | `12`, `12^{\text{th}}`; `12`, `12th` | `12`, `13th` |
| a unit or noun after a number is dropped | `1320`, `1320 km`; `48`, `48 cupcakes` | `48`, `48 or more` |
| a scale word is not a unit | `5000000`, `5 million`; `24`, `2 dozen` | `5`, `5 million` |
| percent: the bare number or the fraction | `50\%`, `50`; `50\%`, `0.5` | `50`, `0.5`; `3`, `300` |
| degrees and dollars are dropped | `90^\circ`, `90°`; `\$18.90`, `18.9` | `90^\circ`, `100` |
| 1,000 and 1 000 are one number, 1, 000 is a list | `1000`, `1,000`; `1000`, `1 000` | `32349`, `32, 349` |
| decimal comma, where the gold is a decimal | `2.5`, `2,5` | `2.345`, `2,345`; `3,5`, `3.5` |
| mixed numbers | `\frac{3}{2}`, `1 1/2` | `\frac{11}{2}`, `1 1/2` |
| tuples are ordered, lists and sets are not | `1,2`, `2,1`; `1,2`, `2 and 1` | `(1,2)`, `(2,1)`; `2`, `2,-1` |
| numbers alike to 12 digits | `\sqrt{51}`, `10\sqrt{0.51}` | `\frac{1}{3}`, `0.33` |

**Workers.** A model writes `9^{9^9}` sooner or later, and nothing in Python can interrupt it. So every comparison runs in a
separate process with a limit on its memory; one that is not done by its deadline is killed, counted and replaced.
"""

import json
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict, deque
from contextlib import suppress
from typing import NamedTuple

SENTENCE = set("is are was were be has have can cannot we it there this that therefore thus hence because since so".split())
MAX_WORDS = 6
MAX_CHARS = 2000  # no gold of the paper's data is near this long, and every parser here is slower than linear
MEMORY = 1 << 30  # address space of one worker; sympy itself takes a quarter of it
CACHE = 200_000


class Grade(NamedTuple):
    reward: float
    answer: str
    timeout: bool


# ── extraction ───────────────────────────────────────────────────────────────────────────────────────────────────────


def extract(response: str, require_boxed: bool = False) -> str:
    """The final answer of a response, "" if it gives none (table above). `<think>` is not looked at."""
    closed = [piece.partition("</answer>")[0] for piece in response.split("<answer>")[1:] if "</answer>" in piece]
    content = closed[-1].strip() if closed else ""
    if "\\boxed" in content:
        return _last_box(content)
    return "" if require_boxed or _is_prose(content) else content


def _last_box(text: str) -> str:
    start = text.rfind("\\boxed{") + len("\\boxed{")
    depth = 1
    for mark in re.finditer(r"\\.|[{}]", text[start:], re.S):
        depth += {"{": 1, "}": -1}.get(mark.group(), 0)
        if depth == 0:
            return text[start : start + mark.start()].strip()
    return ""


def _is_prose(text: str) -> bool:
    plain = re.sub(r"\\(?:text|mbox|textbf|mathrm)\b|\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", text)
    words = re.findall(r"[^\W\d_]{2,}", plain.lower())
    return len(words) > MAX_WORDS or (len(plain.split()) > 1 and not SENTENCE.isdisjoint(words))


# ── comparison, in the worker ────────────────────────────────────────────────────────────────────────────────────────

_TEXT = re.compile(r"\\(?:text\w*|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_SYMBOLS = str.maketrans(
    dict(
        zip(
            "π∞θ×·÷−–≤≥±∪∩°∈√²³",
            r"\pi  |\infty |\theta |\times |\cdot |/|-|-|\le |\ge |\pm |\cup |\cap |^\circ |\in |sqrt|^2|^3".split("|"),
            strict=True,
        )
    )
)
_SCALE = {"hundred": "10^2", "thousand": "10^3", "million": "10^6", "billion": "10^9", "dozen": "12"}
_NOT_A_UNIT = (
    r"(?:or|and|to|at|more|less|mod|over|plus|minus|times|point|squared|cubed|factorial|half|halves|thirds|quarters|\w+ths)"
)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)\\[\[\]()]|\\?\$|[€£]", ""),  # math delimiters and currency
        (r"\\q?quad\b|(?<!\\)\\[ ,;:!]|~|\s+", " "),
        (r"[\s.\\]+$|^\s+", ""),
        (r"\*\*", "^"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"(?<![A-Za-z\\])inf(?:inity|ty)?(?![A-Za-z])", r"\\infty "),
        (r"(?<![A-Za-z\\])(pi|theta|alpha|beta|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1 "),
        (r"(?<=[)\]}]) ?(?:U|union) ?(?=[(\[{\\])", r"\\cup "),
        (r"(\d) ?\^? ?\{? ?(?:\\(?:text|mathrm|mbox)\s*\{ ?)?(?:st|nd|rd|th)\b ?\}* ?$", r"\1"),
        (r",? ?(?:\\text\{,? ?(?:and|or) ?\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])) ?", ", "),
        (r"(?<=\d) ?(?:\\text\{ ?)?(" + "|".join(_SCALE) + r")\b\}?", lambda m: r"\cdot " + _SCALE[m[1]]),
        (r" ?(?:\\text\{ ?)?(?:percent|percentage|pct)\b\}?", r"\\%"),
        (r"^([-+]?\d[\d.,]*) (?![A-Za-z ]*\b" + _NOT_A_UNIT + r"\b)[A-Za-z]{3,}(?: [A-Za-z]{2,}){0,2}$", r"\1"),
        (r"^([-+]?\d{1,3}(?: \d{3})+)$", lambda m: m[1].replace(" ", "")),
        (r"^([-+]?\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"(?<!\\)sqrt ?(\d+|[a-z])\b", r"\\sqrt{\1}"),
    ]
]


def _latex(text: str) -> str:
    """A gold or an answer as one LaTeX formula, by the rules of the table."""
    text = text.translate(_SYMBOLS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    while (simpler := re.sub(r"\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", text)) != text:
        text = simpler
    return text


def _words(text: str) -> str:
    plain = _TEXT.sub(r" \1 ", text).strip(" .$").casefold()
    plain = re.sub(r"^(?:an?|the) ", "", " ".join(plain.split()))
    # A short run of letters may as well be a product: ab = ba. Text that is marked as such, or longer, is not.
    long_enough = 2 if _TEXT.search(text) else 4
    return plain if re.fullmatch(r"[a-z][a-z ,'-]*", plain) and re.search(rf"[a-z]{{{long_enough}}}", plain) else ""


def equal(gold: str, answer: str) -> bool:
    """Whether gold and answer say the same. Only for workers: it may never return and takes what memory it gets."""
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr

    if (words := _words(answer)) and _words(gold):
        return words == _words(gold)
    letter, chosen = (_TEXT.sub(r"\1", text).strip(" $") for text in (gold, answer))
    if choice := re.fullmatch(r"\(?([A-Z])\)?\.?", letter):
        if option := re.match(r"\(?([A-Z])(?:[).:]|$)", chosen):
            return option[1] == choice[1]
    if re.fullmatch(r"-?\d+\.\d+", gold.strip()) and re.fullmatch(r"-?\d+,(?!\d{3}$)\d+", answer.strip()):
        answer = answer.replace(",", ".")
    whole = [LatexExtractionConfig(boxed_match_priority=-1)]  # no ExprExtractionConfig: it would search for numbers
    expected, given = (parse(f"${_latex(text)}$", whole, parsing_timeout=None) for text in (gold, answer))
    if verify(expected, given, timeout_seconds=None):
        return True
    if not (expected and given and isinstance(expected[0], Expr) and isinstance(given[0], Expr)):
        return False
    difference = (expected[0] - given[0]).doit()
    return not difference.free_symbols and bool(abs(difference.evalf()) <= 1e-12 * abs(expected[0].evalf()))


def _work(deadline: float) -> None:
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    equal("1", "\\frac{2}{2}")  # imports sympy and builds the parser before the first clock starts
    print("ready", flush=True)
    for line in sys.stdin:
        # The parent kills what is late. Should the parent itself be gone, nobody else would end an endless comparison.
        signal.alarm(int(2 * deadline) + 2)
        try:
            same = equal(*json.loads(line))
        except Exception:
            same = False
        signal.alarm(0)
        print(int(same), flush=True)


# ── the pool, in the caller ──────────────────────────────────────────────────────────────────────────────────────────


class _Worker:
    def __init__(self, deadline: float) -> None:
        # A new program, not a fork: the caller holds threads and a GPU. Its own session, so that Ctrl-C reaches the
        # caller alone; it ends when its standard input does. -P: no file of this folder may shadow an import of sympy.
        self.process = subprocess.Popen(
            [sys.executable, "-P", os.path.abspath(__file__), "--worker", str(deadline)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        self.ready = False
        self.pair: tuple[str, str] | None = None
        self.due = 0.0

    def send(self, pair: tuple[str, str], deadline: float) -> None:
        self.pair, self.due = pair, time.monotonic() + deadline
        with suppress(BrokenPipeError):  # it died while idle: the end of its output says so next
            self.process.stdin.write(json.dumps(pair).encode() + b"\n")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Grader:
    """Grades on `workers` processes, which start at once and import while the caller goes on.

    >>> with Grader() as grader:
    ...     grader.grade(["2+2 is 4</think> <answer>\\boxed{4}</answer>"], ["4"])
    [Grade(reward=1.0, answer='4', timeout=False)]
    """

    def __init__(self, workers: int = 2, deadline: float = 3.0, require_boxed: bool = False) -> None:
        self.deadline, self.require_boxed = deadline, require_boxed
        self._known: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._selector = selectors.DefaultSelector()
        for _ in range(workers):
            self._start()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers():
            self._stop(worker)
        self._selector.close()

    def grade(self, responses: list[str], golds: list[str]) -> list[Grade]:
        """One grade per response: `extract`, then `equal`. A comparison beyond the deadline is a timeout and earns 0."""
        answers = [extract(response, self.require_boxed) for response in responses]
        verdicts = self.equal(golds, answers)
        late = verdicts.count(None)
        if late > max(1, 0.05 * len(verdicts)):
            warnings.warn(
                f"{late} of {len(verdicts)} answers hit the grader's deadline of {self.deadline} s and earned 0; if they "
                "are ordinary answers the machine is overloaded: use fewer workers or a longer deadline",
                stacklevel=2,
            )
        return [Grade(float(v is True), a, v is None) for v, a in zip(verdicts, answers, strict=True)]

    def equal(self, golds: list[str], answers: list[str]) -> list[bool | None]:
        """Whether each answer equals its gold; None where the deadline passed. Equal pairs are compared once."""
        pairs = list(zip((g.strip() for g in golds), (a.strip() for a in answers), strict=True))
        verdicts: dict[tuple[str, str], bool | None] = {}
        for gold, answer in pairs:
            if not answer or len(answer) > MAX_CHARS:
                verdicts[gold, answer] = False
            elif answer == gold:  # safe whatever it means: the same text is the same answer
                verdicts[gold, answer] = True
        verdicts |= self._compare([pair for pair in dict.fromkeys(pairs) if pair not in verdicts])
        return [verdicts[pair] for pair in pairs]

    def check_golds(self, golds: list[str]) -> list[bool]:
        """False for a gold that could never be earned: not readable, or not equal to itself once read."""
        pairs = [(gold.strip(), gold.strip()) for gold in golds]
        verdicts = self._compare(list(dict.fromkeys(pair for pair in pairs if pair[0])))
        return [bool(verdicts.get(pair)) for pair in pairs]

    def _compare(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
        with self._lock:
            verdicts: dict[tuple[str, str], bool | None] = {}
            waiting: deque[tuple[str, str]] = deque()
            for pair in pairs:
                if pair in self._known:
                    self._known.move_to_end(pair)
                    verdicts[pair] = self._known[pair]
                else:
                    waiting.append(pair)
            retried: set[tuple[str, str]] = set()
            while len(verdicts) < len(pairs):
                for worker in self._workers():
                    if waiting and worker.ready and worker.pair is None:
                        worker.send(waiting.popleft(), self.deadline)
                busy = [worker for worker in self._workers() if worker.pair]
                patience = min((w.due for w in busy), default=float("inf")) - time.monotonic()
                for key, _ in self._selector.select(None if patience == float("inf") else max(0.0, patience)):
                    worker, line = key.data, key.fileobj.readline()
                    if not line:  # it died: memory, or killed from outside. Its pair gets a second chance, no third.
                        if worker.pair in retried:
                            verdicts[worker.pair] = False
                        elif worker.pair:
                            retried.add(worker.pair)
                            waiting.append(worker.pair)
                        self._replace(worker)
                    elif not worker.ready:
                        worker.ready, self._failed_starts = True, 0
                    else:
                        verdicts[worker.pair] = self._known[worker.pair] = line.strip() == b"1"
                        worker.pair = None
                for worker in busy:
                    if worker.pair and time.monotonic() >= worker.due and worker in self._workers():
                        verdicts[worker.pair] = None  # not remembered: a timeout is no verdict
                        self._replace(worker)
            while len(self._known) > CACHE:
                self._known.popitem(last=False)
            return verdicts

    def _workers(self) -> list[_Worker]:
        return [key.data for key in self._selector.get_map().values()]

    def _start(self) -> None:
        worker = _Worker(self.deadline)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _stop(self, worker: _Worker) -> None:
        self._selector.unregister(worker.process.stdout)
        worker.kill()

    def _replace(self, worker: _Worker) -> None:
        self._stop(worker)
        self._failed_starts += not worker.ready
        if self._failed_starts > 3:
            raise RuntimeError(f"the grader's workers do not start; see why with: {sys.executable} -P {__file__} --worker 3")
        self._start()


if __name__ == "__main__":
    _work(float(sys.argv[2]))
