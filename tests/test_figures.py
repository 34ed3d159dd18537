"""reports/figures.py: its numbers against hand calculation, the texts in its figures, its files."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended
from matplotlib.figure import Figure
from matplotlib.text import Text

from reports import figures

ALWAYS = {"format": 1.0, "reflection": 0.1, "entropy": 0.4}
STEPS = [{"step": s, "reward": s / 10, "length": 20.0 + s, **ALWAYS} for s in range(8)]
EVALUATIONS = [{"step": s, "reward": s / 10, "length": 9.0, **ALWAYS} for s in (0, 8)]


def run(folder: Path, seed: int = 0, shift: float = 0.0, **settings: object) -> Path:
    """A run folder as reports.log.RunLog writes it, as far as the figures need it."""
    folder.mkdir()
    config = {
        "model": "tiny",
        "name": folder.name,
        "seed": seed,
        "steps": 8,
        "lam": 1.0,
        "machine": f"m{seed}",
        "kl_loss": 0.0,
    }
    (folder / "config.json").write_text(json.dumps(config | settings))
    (folder / "summary.json").write_text('{"seconds": 7.0}')
    write(folder / "metrics.jsonl", [r | {"reward": r["reward"] + shift} for r in STEPS])
    write(folder / "evaluations.jsonl", EVALUATIONS)
    return folder


def write(path: Path, records: list[dict[str, float]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """File name → all texts of the figure, filled whenever a figure is saved."""
    found: dict[str, str] = {}
    savefig = Figure.savefig

    def save_and_note(figure: Figure, path: Path) -> None:
        savefig(figure, path)
        shown = [text for text in figure.findobj(Text) if text.get_visible()]
        assert not any(text.get_parse_math() for text in shown if "$" in text.get_text())
        found[path.name] = "\n".join(text.get_text().replace("\n", " ") for text in shown)

    monkeypatch.setattr(Figure, "savefig", save_and_note)
    return found


def is_png(path: Path) -> bool:
    content = path.read_bytes()
    return len(content) > 5000 and content.startswith(b"\x89PNG")


def test_band_by_hand() -> None:
    assert figures.band([0.5]) == (0.5, 0.5, 0.5)
    assert figures.band([0.75, 0.25]) == (0.5, 0.25, 0.75)
    # 1, 2, 3: s = 1, t of 2 degrees of freedom = 4.3027, so ± 4.3027/√3 = 2.484
    assert figures.band([1.0, 2.0, 3.0]) == pytest.approx((2.0, -0.484, 4.484), abs=1e-3)
    assert figures.band([0.3] * 5) == pytest.approx((0.3, 0.3, 0.3))


@pytest.mark.parametrize(
    ("n", "t"), [(4, 3.1824), (11, 2.2281), (12, 2.2010), (21, 2.0860), (101, 1.9840)]
)
def test_quantile_of_t(n: int, t: float) -> None:
    values = [float(i) for i in range(n)]
    m, low, high = figures.t_interval(values)
    assert (m, low, high) == figures.band(values)
    s = math.sqrt(sum((x - m) ** 2 for x in values) / (n - 1))
    assert (high - low) / 2 == pytest.approx(t * s / math.sqrt(n), rel=1.1e-3)


def test_t_interval_of_two_values() -> None:
    """1 and 3: s = √2, t of one degree of freedom = 12.7062, so ± 12.7062·√2/√2."""
    assert figures.t_interval([1.0, 3.0]) == pytest.approx((2.0, -10.706, 14.706), abs=1e-3)


def test_what_is_missing_is_a_gap() -> None:
    one = [{"step": 0, "kl": 1.0}, {"step": 1}, {"step": 2, "kl": 3.0}, {"step": 3, "kl": 5.0}]
    two = [{"step": 0, "kl": 3.0}, {"step": 1, "kl": 9.0}, {"step": 2, "kl": 3.0}]  # still going
    assert figures.curve([one], "kl")[0] == (0, 1.0, 1.0, 1.0)
    curve = figures.curve([one, two], "kl")
    assert [row[0] for row in curve] == [0, 1, 2, 3]
    assert curve[0] == (0, 2.0, 1.0, 3.0)
    assert curve[2] == (2, 3.0, 3.0, 3.0)
    assert all(math.isnan(x) for i in (1, 3) for x in curve[i][1:])


def test_runs_are_grouped_by_what_decides_the_learning(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", seed=0), run(tmp_path / "b", seed=1, revision="other", kl_reward=0.0)
    c, d = run(tmp_path / "c", seed=0, lam=0.95), run(tmp_path / "d", seed=0, kl_loss=0.01)
    assert figures.group([a, b]) == {"same settings": [a, b]}
    assert figures.group([a, c, b]) == {"lam 1.0": [a, b], "lam 0.95": [c]}
    assert figures.group([d, a]) == {"kl_loss 0.01": [d], "kl_loss off": [a]}
    assert list(figures.group([a, c, d])) == [
        "lam 1.0, kl_loss off",
        "lam 0.95, kl_loss off",
        "lam 1.0, kl_loss 0.01",
    ]
    with pytest.raises(ValueError, match=r"a, .*e: two have the same settings and seed"):
        figures.group([a, b, run(tmp_path / "e", seed=0)])
    with pytest.raises(ValueError, match="same settings and seed"):
        figures.group([a, a])


def test_figures_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]
) -> None:
    folder = run(tmp_path / "a<b>$x$")  # names of files and sets are text, never markup
    written = figures.figures(folder)
    names = [f"{name}.png" for name in ("reward_length", "format", "reflection", "health")]
    assert [path.name for path in written] == names
    assert all(map(is_png, written))
    for shown in ("a<b>$x$", "response length [tokens]", "held-out problems"):
        assert shown in texts["reward_length.png"]
    assert "explained variance" not in texts["health.png"]  # this run has no critic
    assert "entropy" in texts["health.png"]

    monkeypatch.setattr(figures, "FIGURES", {})
    write(
        folder / "evaluations.jsonl",
        [e | {"reward/math500": 0.1, "reward/aime2024": 0.0} for e in EVALUATIONS],
    )
    (heldout,) = figures.figures(folder)
    assert heldout.name == "heldout.png"
    for name in ("math500", "aime2024", "all problems"):
        assert f"accuracy, {name}" in texts["heldout.png"]


def test_one_step_is_drawn(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    write(folder / "metrics.jsonl", STEPS[:1])
    (folder / "evaluations.jsonl").unlink()
    assert all(map(is_png, figures.figures(folder)))


def test_the_command_compares_and_repeats_byte_for_byte(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., Ended],
    texts: dict[str, str],
) -> None:
    monkeypatch.setattr(figures, "FIGURES", {"format": figures.FIGURES["format"]})
    folders = [run(tmp_path / f"{seed}", seed, shift=seed / 50) for seed in range(3)]
    folders.append(run(tmp_path / "other", lam=0.95))
    ended = call(figures.main, *folders, "--out", tmp_path / "out")
    assert ended.code == 0
    assert "0.000 → 0.800" in ended.out  # the table
    files = [*(tmp_path / "out").iterdir(), *folders[0].glob("*.png")]
    assert [file.name for file in files] == ["comparison.png", "format.png"]
    shown = (
        "lam 0.95 (n=1)",
        "lam 1.0 (n=3)",
        "95 % t-interval",
        "reward",
        "held-out accuracy",
        "evaluated after step",
    )
    assert all(text in texts["comparison.png"] for text in shown)
    before = [file.read_bytes() for file in files]
    assert call(figures.main, *folders, "--out", tmp_path / "out").code == 0
    assert [file.read_bytes() for file in files] == before


def test_the_table_holds_finished_runs_only(tmp_path: Path, call: Callable[..., Ended]) -> None:
    """A run that goes on has no summary.json; one that died has, and its last evaluation is that of
    an earlier step."""
    whole, going_on, died = (run(tmp_path / name) for name in ("whole", "going-on", "died"))
    (going_on / "summary.json").unlink()
    write(died / "evaluations.jsonl", EVALUATIONS[:1])
    for folder in (going_on, died):
        ended = call(figures.main, folder)
        assert ended.code == 0
        assert f"{folder}: not finished" in ended.out and "→" not in ended.out
    assert "0.000 → 0.800" in call(figures.main, whole).out


def test_compare_takes_records_of_any_trainer(tmp_path: Path, texts: dict[str, str]) -> None:
    records = [{"step": s, "reward": s / 10} | ({"kl": 0.1} if s % 3 else {}) for s in range(9)]
    arms = {f"arm {i}": [records] for i in range(6)}
    out = tmp_path / "new" / "six.png"
    metrics = [("reward", "reward"), ("kl", "KL [nats]")]
    assert figures.compare(arms, out, "Six", metrics) == out and is_png(out)
    assert "KL [nats]" in texts["six.png"]
    assert "(n=1)" not in texts["six.png"]  # a single run for each arm has no band to explain
    with pytest.raises(ValueError, match="7 arms"):
        figures.compare(arms | {"arm 7": arms["arm 0"]}, tmp_path / "x.png", "Seven")
    with pytest.raises(ValueError, match="none empty"):
        figures.compare({"a": []}, tmp_path / "x.png", "None")
    with pytest.raises(ValueError, match="metric length is in no run; there are kl, reward, step"):
        figures.compare(arms, tmp_path / "x.png", "Missing")


def test_intervals(tmp_path: Path, texts: dict[str, str]) -> None:
    rows = [("λ = 0.95", -0.02, -0.05, 0.01), ("γ = 0.99", 0.1, 0.08, 0.12)]
    out = tmp_path / "forest.png"
    assert figures.intervals(rows, out, "Differences", "difference", margin=0.03) == out
    for shown in ("λ = 0.95", "−0.020 [−0.050, +0.010]", "margin ±0.03"):
        assert shown in texts["forest.png"]
    with pytest.raises(ValueError, match=r"'b', 1, 2, 3.*low ≤ mean ≤ high"):
        figures.intervals([("b", 1, 2, 3)], out, "", "")


def test_lines_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"step": 1, "rew')
    assert figures.load_records(file) == [{"step": 0}]
    assert "line 2, the last, is cut off and left out" in capsys.readouterr().err
    file.write_text('{"step": 0}\noops\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2: not JSON"):
        figures.load_records(file)


def test_a_record_that_is_no_record_of_metrics(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    bad = {
        '{"step": 1, "reward": "0.5"}': "reward: expected a number, found '0.5'",
        '{"step": 1, "reward": null}': "reward: expected a number, found None",
        '{"step": "1", "reward": 1}': "step: expected a number, found '1'",
        '{"step": 1, "length": [1]}': "length: expected a number",
        '{"reward": 1}': 'expected an object with "step"',
        "[1]": 'expected an object with "step"',
    }
    for line, why in bad.items():
        file.write_text('{"step": 0, "reward": NaN}\n' + line + "\n")
        with pytest.raises(ValueError, match=re.escape(f"metrics.jsonl: line 2: {why}")) as error:
            figures.load_records(file)
        assert "\n" not in str(error.value)


def test_the_table_compares_what_was_evaluated_alike(tmp_path: Path) -> None:
    """A resumed run may evaluate with another reward, or on other problems. Early versions recorded
    neither."""
    folder = run(tmp_path / "a")
    first, last = EVALUATIONS
    middle = first | {"step": 1, "reward": 0.3}
    default = {"settings": {"reward": ""}, "problems_crc32": 1}
    kinds = {
        "early": {},
        "default": default,
        "mine": default | {"settings": {"reward": "mine:f"}},
        "others": default | {"problems_crc32": 2},
    }
    for shown, made in (
        ("0.000 → 0.800", "default default default"),
        ("0.000 → 0.800", "early early mine"),
        ("0.000 → 0.800", "mine default mine"),
        ("0.300 → 0.800", "default mine mine"),
        ("0.300 → 0.800", "default others others"),
        ("– → 0.800", "mine mine default"),
    ):
        records = zip((first, middle, last), made.split(), strict=True)
        write(folder / "evaluations.jsonl", [record | kinds[kind] for record, kind in records])
        text = figures.table([folder])
        assert shown in text, made
        assert ("other settings or problems" in text) == (shown[:5] != "0.000"), made


def test_a_damaged_summary(
    tmp_path: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "FIGURES", {})
    folder = run(tmp_path / "a")
    for text in ("{oops", "[1]", "{}", '{"seconds": "x"}'):
        (folder / "summary.json").write_text(text)
        ended = call(figures.main, folder)
        assert ended.code == 1
        assert len(ended.err.splitlines()) == 1
        assert 'summary.json: expected an object with "seconds"' in ended.err


def test_folders_that_are_no_runs(tmp_path: Path, call: Callable[..., Ended]) -> None:
    def message(*words: object) -> str:
        ended = call(figures.main, *words)
        assert ended.code == 1
        return ended.err

    assert message().startswith("reports.figures: expected at least one run folder")
    assert "metrics.jsonl: no such file, or no whole step" in message(tmp_path)
    refused = message(run(tmp_path / "a"), tmp_path)
    assert f"{tmp_path}: not a run folder, it has no config.json" in refused


def test_help_opens_with_what_the_program_does(call: Callable[..., Ended]) -> None:
    assert "Draw the paper's figures" in call(figures.main, "--help").out
