"""reports/page.py: what the page holds, and, in a headless browser, what it shows and does."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, orz_data, random_rollouts
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from data import Problem
from reports import page
from reports.transcripts import token_texts, transcripts

HOSTILE = (
    "</script><script>window.hacked = 1</script><!-- <script> <img src=x "
    "onerror='window.hacked = 1'>\u2028\u2029{{data}} {{script}} ${window.hacked = 1} "
    "{{constructor.constructor('window.hacked = 1')()}} &lt;b&gt; <svg onload=a()> "
    "\u202e 😀 \\u003c"
)
TEXTS = [
    " so",
    "\n",
    " ",
    "",
    "∑",
    "</",
    "script",
    ">",
    "<img src=x onerror=window.hacked=1>",
    "\t",
    "\\boxed{7}",
]


def row(step: int, reward: float = 0.0, tokens: int = 11, **more: Any) -> dict[str, Any]:
    """A line of rollouts.jsonl without numbers for its tokens."""
    record = {
        "step": step,
        "problem": f"train.json:{step}",
        "question": f"{step}+2=?",
        "gold": "7",
        "answer": "7",
        "response": " i guess, wait, 7",
        "reward": reward,
        "finish": "stop",
        "tokens": tokens,
        "timeout": False,
    }
    return record | more


def numbers(texts: list[str], seed: int) -> dict[str, Any]:
    """What a line of rollouts.jsonl has for each token; all numbers differ."""
    n = len(texts)
    return {
        "response": "".join(texts),
        "pieces": texts,
        "ids": [1000 * seed + t for t in range(n)],
        "tokens": n,
        "logprobs": [float(f"{-0.001 * (t + 1) - seed / 7:.4g}") for t in range(n)],
        "values": [float(f"{(t + seed % 5) / (n + 5):.4g}") for t in range(n)],
        "advantages": [float(f"{seed % 3 - t / n:.4g}") for t in range(n)],
    }


CONFIG = {
    "model": "tiny",
    "steps": 3,
    "prompts": 4,
    "samples": 4,
    "policy_lr": 1e-3,
    "critic_lr": 1e-3,
    "gamma": 1.0,
    "lam": 1.0,
    "advantage": "gae",
    "seed": 0,
    "name": HOSTILE,
}


def run_folder(
    folder: Path, rollouts: list[dict[str, Any]], steps: int = 3, finished: bool = True
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    metrics = [
        {
            "step": s,
            "reward": 0.125 * (s + 1),
            "length": 12.5 + s,
            "format": 0.5,
            "reflection": 0.25,
            "seconds": 1.5,
            "entropy": 0.4 - s / 9,
            "explained_variance": s / 10 - 0.1,
            "logp_gap": 2e-7,
        }
        for s in range(steps)
    ]
    heldout = {"reward/a": 0.2, "reward/b": 0.3, "length": 9.0, "format": 1.0}
    evaluations = [{"step": s, "reward": 0.1 + s / 10, **heldout} for s in (0, 3)]
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "evaluations.jsonl", evaluations if finished else [])
    write_lines(folder / "rollouts.jsonl", rollouts)
    if finished:
        summary = {"seconds": 9.25, "stages": {"sample": {"seconds": 4.0}}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def data_of(path: Path) -> dict[str, Any]:
    """The data of a page, read as a browser does: up to the first end of a script element."""
    text = path.read_text().split('<script type="application/json" id="data">')[1]
    return json.loads(re.split("</script", text, flags=re.IGNORECASE)[0])


def test_no_text_ends_the_data() -> None:
    text = page.embedded({"text": HOSTILE, "half": "\ud800"})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"text": HOSTILE, "half": "\ud800"}
    text.encode()


def test_the_page_allows_its_own_code_only(tmp_path: Path) -> None:
    text = page.write(run_folder(tmp_path / "run", [row(0, response=HOSTILE)])).read_text()
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]*)"', text).group(1)
    assert (
        policy.startswith("default-src 'none'; script-src 'sha256-")
        and "unsafe" not in policy
        and "{" not in policy
    )
    assert not re.search(
        r"""(src|href)=["']|url\(|@import|innerHTML|document\.write|eval\(""",
        page.TEMPLATE.read_text(),
    )
    assert data_of(tmp_path / "run" / "report.html")["rollouts"][0]["response"] == HOSTILE
    assert [p.name for p in tmp_path.glob("run/*.tmp")] == []


def test_texts_of_tokens_are_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Also if a character is split over tokens, if bytes are no character, and at a cut end."""
    for text in ["1+2=3, so ∑ 😀x", "\n\n\t  é", "中文 </think>", ""]:
        ids = tokenizer.encode(text)
        assert "".join(token_texts(tokenizer, ids)) == text
        for end in range(len(ids)):
            assert "".join(token_texts(tokenizer, ids[:end])) == tokenizer.decode(ids[:end])
    (r,) = random_rollouts([Problem("", "", "")], len(tokenizer), [3000])
    texts = token_texts(tokenizer, r.token_ids)
    assert len(texts) == 3000 and "".join(texts) == tokenizer.decode(r.token_ids)
    assert token_texts(tokenizer, tokenizer.encode("😀=")) == ["", "", "", "😀", "="]


def test_texts_of_a_real_vocabulary() -> None:
    vocab, merges = (
        str(orz_data("qwen2_tokenizer", name)) for name in ("vocab.json", "merges.txt")
    )
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|endoftext|>")
    text = "So x² ≤ \\frac{1}{2}, 𝔸 ⟹ 中文\r\n\n  however, 😀🏳️‍🌈</answer><|endoftext|>"
    ids = tokenizer.encode(text)
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids) == text
    assert "" in texts and texts[0] == "So"


def test_kept_tokens_have_their_own_numbers(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    """A token's value is that of its place in the flat vectors; the problems' rollouts are kept
    evenly."""
    rollouts = random_rollouts(
        [p for p in problems[:8] for _ in range(4)], 200, [3 + i % 5 for i in range(32)]
    )
    for i, r in enumerate(rollouts):
        r.text, r.logprobs = (
            tokenizer.decode(r.token_ids),
            [-1.23456789 * (i + 1)] * len(r.token_ids),
        )
    flat = [(i, t) for i, r in enumerate(rollouts) for t in range(len(r.token_ids))]
    values = torch.tensor([i + t / 10 for i, t in flat])
    kept = list(transcripts(rollouts, 8, 4, tokenizer, values, -values))
    assert [r["problem"] for r in kept] == [p.source for p in problems[:8]]
    assert [i for i, r in enumerate(kept) if "pieces" in r] == [0, 2, 4, 6]
    for i in (0, 2, 4, 6):
        r = kept[i]
        assert r["values"] == pytest.approx([4 * i + t / 10 for t in range(r["tokens"])])
        assert r["advantages"] == [-v for v in r["values"]]
        assert r["logprobs"] == [float(f"{-1.23456789 * (4 * i + 1):.4g}")] * r["tokens"]
        assert "".join(r["pieces"]) == r["response"] and r["ids"] == rollouts[4 * i].token_ids
    without = list(transcripts(rollouts, 8, 99, tokenizer, None, values))
    assert all("advantages" in r and "values" not in r for r in without)
    assert not any("pieces" in r for r in transcripts(rollouts, 8, 0, tokenizer, values, values))
    rollouts[0].text += "another tokenizer's"
    first, *others = transcripts(rollouts, 8, 8, tokenizer, values, values)
    assert "pieces" not in first and "values" not in first and all("pieces" in r for r in others)


def test_a_large_run_makes_a_small_page(tmp_path: Path) -> None:
    """Rollouts with numbers first, both kinds from the first step to the last, within the bytes."""
    texts = [" word"] * 200
    rows = [row(s, **(numbers(texts, s) if k < 2 else {})) for s in range(200) for k in range(6)]
    folder = run_folder(tmp_path / "run", rows)
    path = page.write(folder, rollouts=100, size=1_000_000)
    data = data_of(path)
    assert data["counted"] == {"all": 1200, "detailed": 400}
    assert (
        len(data["rollouts"]) == 100
        and path.stat().st_size < 1_000_000 + page.TEMPLATE.stat().st_size
    )
    for kind in (True, False):
        steps = [r["step"] for r in data["rollouts"] if ("pieces" in r) == kind]
        assert steps[0] == 0 and steps[-1] == 199
        gaps = [b - a for a, b in pairwise(steps)]
        assert len(steps) > 10 and max(gaps) <= min(gaps) + 1
    for r in data["rollouts"]:
        original = rows[r["line"] - 1]
        assert all(original[k] == r[k] for k in original if k in r) and r["reflects"] == (
            "wait," in original["response"]
        )


def test_old_and_broken_off_runs(tmp_path: Path) -> None:
    """Without numbers for tokens, evaluations or summary; a cut last line; NaN, no JSON number."""
    folder = run_folder(tmp_path / "old", [row(0), row(1)], finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": NaN}\n{"step": 4, "rew')
    (folder / "evaluations.jsonl").unlink()
    data = data_of(page.write(folder))
    assert data["metrics"]["step"] == [0, 1, 2, 3] and data["metrics"]["reward"] == [
        0.125,
        0.25,
        0.375,
        None,
    ]
    assert (data["summary"], data["evaluations"], len(data["rollouts"])) == (None, [], 2)
    for name in ("metrics", "rollouts"):
        (folder / f"{name}.jsonl").write_text("")
    assert data_of(page.write(folder))["rollouts"] == []


def test_refusals(tmp_path: Path, call: Any) -> None:
    def message(*words: object) -> str:
        ended: Ended = call(page.main, *words)
        assert ended.code == 1
        return ended.err.strip()

    assert message() == "reports.page: expected at least one run folder, such as runs/NAME"
    assert (
        message(tmp_path)
        == f"reports.page: {tmp_path}: not a run folder, it has no config.json; expected runs/NAME"
    )
    folder = run_folder(tmp_path / "run", [row(0)])
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    assert re.match(r"reports.page: .*metrics.jsonl: line 2: not JSON \(.*\)$", message(folder))
    (folder / "config.json").write_text("{")
    assert re.match(r"reports.page: .*config.json: not JSON", message(folder))
    fine = run_folder(tmp_path / "fine", [row(0)])
    assert call(page.main, fine) == (0, f"{fine / 'report.html'}\n", "")
    assert "Write a run as one HTML page" in call(page.main, "--help").out


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: no browser to test with"
    )
    names = """chromium chromium-browser google-chrome google-chrome-stable chrome microsoft-edge
        msedge""".split()
    found = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as driver:
        path = found or driver.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium, Chrome or Edge is installed to test with")
        root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium's sandbox refuses root
        chromium = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox"] if root else []
        )
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Open a page file. Afterwards, no error, no message and no request but for the file may have
    happened; only the script that a test adds may be reported as blocked."""
    blocked = "Executing inline script violates the following Content Security Policy directive"
    contexts, wrong = [], []

    def opened(path: Path, **settings: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1366, "height": 900}} | settings)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(5000)
        tab.on("console", lambda m: blocked in m.text or wrong.append(m.text))
        tab.on("pageerror", lambda e: wrong.append(str(e)))
        tab.on("request", lambda r: r.url.startswith(path.as_uri()) or wrong.append(r.url))
        tab.goto(path.as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rollouts of three steps; every third has no numbers, one has hostile text all over."""
    rows = [
        row(i // 4, float(i % 2), **(numbers(TEXTS * (i + 1), i) if i % 3 else {"tokens": 5}))
        for i in range(12)
    ]
    rows[5] |= {
        "question": HOSTILE,
        "gold": HOSTILE,
        "answer": HOSTILE,
        "problem": HOSTILE,
        "finish": HOSTILE,
    }
    rows[3] |= {"question": HOSTILE, "response": HOSTILE}
    return page.write(run_folder(tmp_path_factory.mktemp("pages") / "run", rows))


def shown(tab: Any, column: int) -> list[str]:
    return tab.locator(f"#rows td:nth-child({column})").all_inner_texts()


def test_header_and_curves_say_the_files_values(visit: Any, report: Path) -> None:
    tab = visit(report)
    assert tab.locator("h1").inner_text() == "run"
    assert (
        "0.100 → 0.400" in tab.locator("#tiles").inner_text()
        and "9.3 s" in tab.locator("#tiles").inner_text()
    )
    titles = tab.locator(".chart h3").all_inner_texts()
    assert titles[:4] == [
        "Reward and response length",
        "Held-out accuracy",
        "Format",
        "Reflection and length",
    ]
    chart = tab.locator(".chart").first
    box = chart.locator("svg").last.bounding_box()
    tab.mouse.move(
        box["x"] + 48 + (box["width"] - 96) / 3, box["y"] + 60
    )  # steps 0 … 3 between the axes
    assert tab.locator("#hint").inner_text() == "values at step 1"
    assert (
        re.sub(r"\s+", " ", chart.locator(".keys").inner_text())
        == "reward 0.25 length 13.5 held-out 0.1"
    )
    assert tab.locator(".cross[visibility=visible]").count() == len(titles)
    assert re.findall(r"\b[ab] 0\.\d", tab.locator(".chart").nth(1).inner_text()) == [
        "a 0.2",
        "b 0.3",
    ]
    chart.locator("svg").last.click(position={"x": 52, "y": 60})
    assert shown(tab, 1) == ["0"] * 4  # the rollouts of the step that was clicked
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#hint").inner_text() == "values at step 1"


def test_table_sorts_filters_and_chooses(visit: Any, report: Path) -> None:
    tab = visit(report)
    assert (
        tab.locator("#count").inner_text()
        == "12 of the 12 in rollouts.jsonl; 8 of 8 token by token"
    )
    assert len(shown(tab, 1)) == 12
    tab.get_by_role("button", name="tokens").click()
    tokens = [int(t) for t in shown(tab, 3)]
    assert (
        tokens == sorted(tokens)
        and tab.locator("th").nth(2).get_attribute("aria-sort") == "ascending"
    )
    tab.get_by_role("button", name="tokens").click()
    assert [int(t) for t in shown(tab, 3)] == tokens[::-1]
    filters = [
        ("first step", "1", 8),
        ("highest reward", "0.5", 4),
        ("most tokens", "100", 3),
        ("Search", "1+2=?", 2),
    ]
    for label, value, count in filters:
        tab.get_by_label(label).fill(value)
        assert len(shown(tab, 1)) == count, label
    tab.get_by_text("Reset").click()
    tab.locator("#rows tr").nth(11).wait_for()
    tab.locator("select").select_option("true")
    assert set(shown(tab, 5)) == {"yes"} and len(shown(tab, 5)) == 3
    tab.get_by_text("Reset").click()
    tab.locator("#rows tr").nth(11).wait_for()
    tab.get_by_role("button", name="step").click()
    tab.locator("#rows tr").nth(6).click()
    assert tab.url.endswith("#rollout-7") and "line 7 of" in tab.locator(".head").inner_text()
    tab.keyboard.press("ArrowDown")
    assert (
        tab.url.endswith("#rollout-8") and tab.locator("#rows tr[aria-selected=true]").count() == 1
    )
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.className") == "tokens"
    tab.reload()
    assert "line 8 of" in tab.locator(".head").inner_text()


def test_tokens_show_their_numbers(visit: Any, report: Path) -> None:
    tab = visit(report)
    tab.goto(f"{report.as_uri()}#rollout-9")
    record = json.loads((report.parent / "rollouts.jsonl").read_text().split("\n")[8])
    spans = tab.locator(".tokens span")
    assert spans.evaluate_all("all => all.map(s => s.textContent)") == record["pieces"]

    def tip() -> dict[str, str]:
        cells = tab.locator("#tip div").evaluate_all(
            "all => all.map(d => [...d.children].map(c => c.textContent))"
        )
        return {name: value.replace("−", "-") for name, value in cells}

    for t in (0, 6, 40, len(record["pieces"]) - 1):
        spans.nth(t).hover()
        seen = tip()
        assert seen["position t"] == str(t) and float(seen["token id"]) == record["ids"][t]
        for name, key in (("V(sₜ)", "values"), ("Âₜ", "advantages"), ("log π", "logprobs")):
            assert float(seen[name]) == record[key][t]
    assert float(seen["R − V(sₜ)"]) == pytest.approx(
        record["reward"] - record["values"][-1], abs=0.01
    )
    tab.locator(".tokens").focus()
    tab.keyboard.press("Home")
    tab.keyboard.press("ArrowRight")
    assert tip()["position t"] == "1" and tab.locator("#tip code").inner_text() == "⏎"
    tab.keyboard.press("Escape")
    assert not tab.locator("#tip").is_visible()
    plot = tab.locator(".head > svg")
    plot.hover(position={"x": 38, "y": 30})
    assert tip()["position t"] == "0" and "on" in spans.nth(0).get_attribute("class")

    def colors() -> list[str]:
        return spans.evaluate_all("all => all.map(s => s.style.backgroundColor)")

    painted = {}
    for name in ("values", "advantages", "logprobs"):
        tab.locator(f"[data-channel={name}]").click()
        painted[name] = colors()
        assert tab.locator("[aria-checked=true]").get_attribute("data-channel") == name
    assert len({tuple(c) for c in painted.values()}) == 3 and all(
        len(set(c)) > 5 for c in painted.values()
    )
    for a, c in zip(record["advantages"], painted["advantages"], strict=True):
        assert a == 0 or ("--bad" if a < 0 else "--good") in c
    tab.locator("#stretch").check()
    assert colors() != painted["logprobs"]


def test_hostile_text_is_only_text(visit: Any, report: Path) -> None:
    tab = visit(report)
    for line in (4, 6):
        tab.goto(f"{report.as_uri()}#rollout-{line}")
        assert tab.locator(".question").text_content() == HOSTILE
    tab.goto(f"{report.as_uri()}#rollout-4")
    assert tab.locator(".tokens").text_content() == HOSTILE
    tab.get_by_label("Search").fill("</SCRIPT>")
    assert len(shown(tab, 1)) == 9  # two, and those whose tokens spell it
    tab.locator("summary").click()
    assert HOSTILE in tab.locator("#settings").text_content()
    tab.wait_for_timeout(100)
    assert tab.evaluate(
        "[window.hacked, document.querySelectorAll('img').length, document.scripts.length]"
    ) == [None, 0, 2]
    blocked = tab.evaluate("""() => new Promise(done => {
        addEventListener("securitypolicyviolation", e => done(e.violatedDirective));
        const code = document.createElement("script");
        code.textContent = "window.hacked = 1";
        document.body.append(code) })""")
    assert blocked == "script-src-elem" and tab.evaluate("window.hacked") is None


def test_many_long_rollouts_open_fast(visit: Any, tmp_path: Path) -> None:
    rows = [row(i // 8, i % 2, **numbers([" word", ","] * 500, i)) for i in range(400)]
    path = page.write(run_folder(tmp_path / "large", rows, steps=50), size=40_000_000)
    start = time.perf_counter()
    tab = visit(path)
    assert len(shown(tab, 1)) == 400
    opened = time.perf_counter() - start
    assert tab.locator(".tokens span").count() == 1000 and opened < 8
    seconds = tab.evaluate("""() => { const start = performance.now();
        for (const th of document.querySelectorAll('th button')) th.click();
        for (const row of [...document.querySelectorAll('#rows tr')].slice(0, 20)) row.click();
        return (performance.now() - start) / 1000 }""")
    assert seconds < 3  # six orders and twenty texts of 1,000 tokens


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(visit: Any, report: Path, scheme: str) -> None:
    """No sideways scrolling; a tap shows a token's numbers inside the screen."""
    size = {"width": 390, "height": 844}
    tab = visit(report, viewport=size, is_mobile=True, has_touch=True, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.locator(".tokens span").nth(5).tap()
    box = tab.locator("#tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844
    tab.locator(".chart svg").nth(3).tap()
    assert "values at step" in tab.locator("#hint").inner_text()
    ink, paper = tab.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (sum(map(int, re.findall(r"\d+", ink))) < sum(map(int, re.findall(r"\d+", paper)))) == (
        scheme == "light"
    )


def test_runs_with_little_to_show(visit: Any, tmp_path: Path) -> None:
    """Without a critic, and before the first step is done."""
    tokens = {k: v for k, v in numbers(TEXTS, 1).items() if k != "values"}
    tab = visit(page.write(run_folder(tmp_path / "grpo", [row(0, **tokens)], steps=1)))
    assert tab.locator("[data-channel]").evaluate_all("all => all.map(b => b.dataset.channel)") == [
        "advantages",
        "logprobs",
    ]
    assert tab.locator("[aria-checked=true]").get_attribute("data-channel") == "advantages"
    empty = visit(page.write(run_folder(tmp_path / "empty", [], steps=0, finished=False)))
    assert (
        "0 of 3 steps" in empty.locator("#tiles").inner_text()
        and empty.locator(".chart").count() == 0
    )
