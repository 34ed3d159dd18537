"""toy/tiny.py: the task is right, its tokenizer is lossless, its folder loads with transformers."""

import json
import math
import random
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ended
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import data
from grading.extract import extract
from toy import ship, tiny

FORMAT = re.compile(r" [^<>]*</think> <answer> \\boxed\{(\d+)\} </answer>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model trained for three steps: every file is there, no skill is."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny.make(folder, seed=3, steps=3)
    return folder


def responses(
    style: str, count: int = 200, slip: float = 0.0, task: tiny.Task = tiny.TINY
) -> list[tuple[str, str]]:
    """Questions of the task and responses in one style."""
    rng = random.Random(f"{style}/{slip}")
    questions = [tiny.question(rng, task.numbers, task.terms) for _ in range(count)]
    return [(question, tiny.respond(rng, question, style, slip)) for question in questions]


def total(question: str) -> str:
    return str(eval(question.removesuffix("=?")))


def test_problems_are_right_and_heldout_is_disjoint(folder: Path) -> None:
    train, heldout = data.load(folder / "train.json"), data.load(folder / "heldout.json")
    problems = train + heldout
    assert len(train) == tiny.TRAIN_PROBLEMS and len(heldout) == 1_024
    assert all(total(problem.question) == problem.answer for problem in problems)
    assert len({problem.question for problem in problems}) == len(problems)
    for problem in heldout:
        numbers = tiny.numbers(problem.question)
        assert set(numbers) <= set(tiny.TINY.numbers)
        assert len(set(numbers)) == len(numbers)
        assert len(numbers) in tiny.TINY.terms


def test_the_corpus_leaves_out_the_heldout_questions() -> None:
    rng = random.Random(0)
    unseen = frozenset(tiny.question(rng) for _ in range(20_000))
    rng = random.Random(0)
    corpus = [tiny.document(rng, tiny.TINY, False, unseen) for _ in range(500)]
    assert not any(question in unseen for question, _ in corpus)


def test_every_style_is_in_both_phases() -> None:
    for task, long in ((tiny.TINY, {"chain", "recheck"}), (tiny.LONG, {"careful", "half", "loop"})):
        for phase in (task.skill, task.habit):
            assert set(phase.styles) == {"direct", "bad"} | long
            assert sum(phase.styles.values()) == pytest.approx(1)
            assert min(phase.styles.values()) > 0


def test_chains_without_slips_end_with_the_gold_answer() -> None:
    for question, response in responses("chain") + responses("recheck"):
        assert FORMAT.fullmatch(response)[1] == total(question)
        steps = re.findall(r"(\d+\+\d+)=(\d+)", response)
        assert len(dict(steps)) == question.count("+")  # a recheck repeats a step
        assert all(str(eval(left)) == right for left, right in steps)


def test_slips_make_chains_wrong_and_rechecks_repair_them() -> None:
    def share(style: str) -> float:
        answers = responses(style, 2_000, slip=0.1)
        right = [FORMAT.fullmatch(response)[1] == total(question) for question, response in answers]
        return sum(right) / len(right)

    assert share("chain") < 0.55 < share("recheck")


def test_rechecks_use_the_papers_words() -> None:
    words = re.compile("wait,|recheck|retry|alternatively,|however,")
    assert all(words.search(word) for word in tiny.RECHECKS)
    for style in ("direct", "chain", "bad"):
        assert not any(words.search(response) for _, response in responses(style, slip=0.2))
    rechecks = responses("recheck", slip=0.2)
    assert sum(bool(words.search(response)) for _, response in rechecks) > 100


def test_a_bad_format_earns_nothing_and_a_guess_seldom_does() -> None:
    assert not any(extract(response) for _, response in responses("bad", 1_000))
    guesses = responses("direct", 2_000)
    right = [FORMAT.fullmatch(response)[1] == total(question) for question, response in guesses]
    assert 0.03 < sum(right) / len(right) < 0.15


def test_the_long_task_is_long_and_cannot_be_cut_short() -> None:
    """`tiny-long`: careful answers take 100 tokens and more, and grow with the number of terms; a
    response that stops halfway is seldom right; a stuck one never ends by itself."""
    tokenizer, task = tiny.tokenizer(tiny.LONG), tiny.LONG

    def answered(style: str) -> tuple[list[tuple[str, int]], float]:
        """Questions with the lengths of their responses, and the share of right responses."""
        documents = responses(style, 400, slip=task.habit.slip, task=task)
        questions = [question for question, _ in documents]
        lengths = [len(ids) - prompt for ids, prompt in tiny.encode(tokenizer, documents)]
        right = [
            response.endswith(f"\\boxed{{{total(question)}}} </answer>")
            for question, response in documents
        ]
        return list(zip(questions, lengths, strict=True)), sum(right) / len(right)

    careful, right = answered("careful")
    assert statistics.median(length for _, length in careful) >= 100 and right > 0.85
    by_terms = {terms: [] for terms in task.terms}
    for question, length in careful:
        by_terms[len(tiny.numbers(question))].append(length)
    means = [statistics.mean(lengths) for lengths in by_terms.values()]
    assert means == sorted(means)
    half, right = answered("half")
    assert statistics.median(length for _, length in half) < 80 and right < 0.2
    assert not any("answer" in response for _, response in responses("loop", 100, task=task))
    for _, response in responses("careful", 50, slip=0.2, task=task):
        assert tokenizer.decode(tokenizer.encode(response)) == response


def test_tokenizer_round_trips_any_text(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["naïve ∑ 日本\n\t  x", "100+2=102", " }</answer>}", data.prompt("2+3=?", data.TABLE_1)]
    for style in tiny.TINY.habit.styles:
        texts += [response for _, response in responses(style, slip=0.1)]
    texts += [data.prompt(question) for question, _ in responses("chain")]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_whole_template_is_two_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    question = "7+5+9+4=?"
    ids = tokenizer.encode(data.prompt(question))
    assert len(ids) == 2 + len(question)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == data.TEMPLATE.replace("{question}", question)


def test_the_answer_tag_is_completed_by_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    for _, response in responses("chain", 50) + responses("direct", 50):
        *_, last = tokenizer.encode(response)
        assert tokenizer.decode([last]) == "} </answer>"


def test_encode_is_the_tokenizer_on_the_whole_text(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = responses("recheck", 50, slip=0.1)
    encoded = tiny.encode(tokenizer, documents)
    for (question, response), (ids, prompt) in zip(documents, encoded, strict=True):
        assert ids[:prompt] == tokenizer.encode(data.prompt(question))
        assert ids[prompt:] == [*tokenizer.encode(response), tokenizer.eos_token_id]


def test_transformers_loads_the_folder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(loaded) == len(tokenizer)
    assert model.generation_config.eos_token_id == loaded.eos_token_id == model.config.eos_token_id
    assert model.generation_config.pad_token_id == loaded.pad_token_id == model.config.pad_token_id
    text = data.prompt("7+5+9+4=?") + responses("recheck", 1, slip=0.5)[0][1]
    assert loaded.encode(text) == tokenizer.encode(text)
    (problem,) = data.tokenize(data.load(folder / "heldout.json")[:1], loaded, 64, data.TEMPLATE)
    assert torch.isfinite(model(torch.tensor([problem.prompt_ids])).logits).all()
    assert (folder / "samples.txt").read_text(encoding="utf-8").count("<think>") > 20


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    tiny.make(tmp_path / "again", seed=3, steps=3)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert tiny.problems(3) != tiny.problems(4)


def test_an_interrupted_ensure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, seed: int, task: tiny.Task) -> None:
        folder.mkdir()
        (folder / "train.json").write_text("[")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiny, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny.ensure(5, tmp_path)
    assert list(tmp_path.iterdir()) == []

    made = []

    def complete(folder: Path, seed: int, task: tiny.Task) -> None:
        made.append(seed)
        folder.mkdir()

    monkeypatch.setattr(tiny, "make", complete)
    folder = tiny.ensure(5, tmp_path)
    assert tiny.ensure(5, tmp_path) == folder == next(tmp_path.iterdir())
    assert made == [5] and folder.name.startswith("tiny-5-")


def test_the_shipped_model_is_the_one_that_its_record_describes(tmp_path: Path) -> None:
    """Files, corpus and tokenizer are those of this recipe, and the held-out accuracy is the
    recorded one; another order of floating-point sums may change single responses."""
    record = json.loads((tiny.BASE / tiny.RECORD).read_text())
    assert set(record["sha256"]) == set(tiny.BASE_FILES)
    assert tiny.is_shipped(0, "tiny")
    tiny.copy_shipped(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *tiny.BASE_FILES,
        "train.json",
        "heldout.json",
        "samples.txt",
    }
    assert ship.digest(tmp_path / "samples.txt") == record["corpus"]
    assert record["steps"] == tiny.TINY.steps
    tiny.tokenizer().save_pretrained(tmp_path / "fresh")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "fresh" / name).read_text() == (tmp_path / name).read_text()
    measured = ship.measure(tmp_path)
    assert measured["accuracy"] == pytest.approx(record["heldout"]["accuracy"], abs=0.004)
    assert measured["length"] == pytest.approx(record["heldout"]["length"], abs=0.3)


@pytest.mark.slow
def test_a_fresh_base_model_is_as_good_as_the_shipped_one(tmp_path: Path) -> None:
    """On another kind of processor its weights differ, and only the skill can be the same."""
    tiny.make(tmp_path / "fresh")
    tiny.copy_shipped(tmp_path / "shipped")
    fresh, shipped = (ship.measure(tmp_path / name, samples=4) for name in ("fresh", "shipped"))
    p, responses = shipped["accuracy"], 4 * tiny.HELDOUT_PROBLEMS
    noise = math.sqrt(2 * p * (1 - p) / responses)
    seeds = 0.006  # standard deviation between five seeds' base models
    assert abs(fresh["accuracy"] - p) < 3 * math.hypot(noise, seeds)
    assert fresh["length"] == pytest.approx(shipped["length"], abs=2.5)
    assert fresh["format"] == pytest.approx(shipped["format"], abs=0.06)


def test_seed_0_is_copied_and_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def note(folder: Path, seed: int, task: tiny.Task) -> None:
        made.append((seed, task))
        folder.mkdir(parents=True)

    monkeypatch.setattr(tiny, "make", note)
    folder = tiny.ensure(0, tmp_path)
    assert made == []
    shipped = tiny.BASE / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == shipped.read_bytes()
    assert len(data.load(folder / "train.json")) == tiny.TRAIN_PROBLEMS
    tiny.ensure(1, tmp_path)
    tiny.ensure(0, tmp_path, "tiny-long")
    assert made == [(1, tiny.TINY), (0, tiny.LONG)]


@pytest.mark.parametrize("damage", ["weights", "missing", "record"])
def test_a_damaged_shipped_model_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, damage: str
) -> None:
    """One line says which file is damaged. The model that takes its place does not outlast it."""
    whole, base = tiny.BASE, tmp_path / "base"
    shutil.copytree(whole, base)
    file = base / (tiny.RECORD if damage == "record" else "model.safetensors")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    monkeypatch.setattr(tiny, "BASE", base)
    monkeypatch.setattr(tiny, "make", lambda folder, seed, task: folder.mkdir())
    folder = tiny.ensure(0, tmp_path / "cache")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and file.name in printed and "made on this machine" in printed
    shutil.copytree(whole, base, dirs_exist_ok=True)
    assert tiny.ensure(0, tmp_path / "cache") != folder


def test_the_command_line(
    tmp_path: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes the task that --name and --seed name in the folder --out."""
    made = []
    monkeypatch.setattr(tiny, "make", lambda *args, **kwargs: made.append((args, kwargs)))
    done = call(tiny.main, "--name", "tiny-long", "--seed", 2, "--out", tmp_path)
    assert done.code == 0 and done.out.strip() == str(tmp_path)
    assert made == [((tmp_path, 2), {"task": tiny.LONG})]
