"""reports/figures.py: what is in the figures, counted by hand, and that the files are whole and come out the same."""

import json
import math
import sys
from pathlib import Path

import pytest

from reports import figures

ALWAYS = {"format": 1.0, "reflection": 0.1, "entropy": 0.4}
STEPS = [{"step": s, "reward": s / 10, "length": 20.0 + s, **ALWAYS} for s in range(8)]
EVALUATIONS = [{"step": s, "reward": s / 10, "length": 9.0, **ALWAYS} for s in (0, 8)]


def run(folder: Path, seed: int = 0, shift: float = 0.0, **settings: object) -> Path:
    """A run folder such as log.RunLog leaves it, as far as the figures need it."""
    folder.mkdir()
    config = {
        "model": "tiny",
        "name": folder.name,
        "seed": seed,
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


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["reports/figures.py", *map(str, args)])
    figures.main()


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
    m, low, high = figures.band(values)
    s = math.sqrt(sum((x - m) ** 2 for x in values) / (n - 1))
    assert (high - low) / 2 == pytest.approx(t * s / math.sqrt(n), rel=1.1e-3)


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


def test_figures_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path / "a<b>$x$")  # names of files and sets are text, never markup
    written = figures.figures(folder)
    assert [p.name for p in written] == [f"{n}.{k}" for n in ("reward_length", "format", "reflection", "health")
                                         for k in ("png", "svg")]  # fmt: skip
    assert all(p.stat().st_size > 5000 for p in written)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written[::2])
    svg = written[1].read_text()
    assert (
        "a&lt;b&gt;$x$" in svg and "response length [tokens]" in svg and "held-out problems" in svg
    )  # text is text
    assert "explained variance" not in written[-1].read_text()  # this run has no critic
    assert "entropy" in written[-1].read_text()

    monkeypatch.setattr(figures, "FIGURES", ())
    write(
        folder / "evaluations.jsonl",
        [e | {"reward/math500": 0.1, "reward/aime2024": 0.0} for e in EVALUATIONS],
    )
    _, heldout = figures.figures(folder)
    assert heldout.name == "heldout.svg"
    assert all(
        f"accuracy, {name}" in heldout.read_text()
        for name in ("math500", "aime2024", "all problems")
    )


def test_one_step_is_drawn(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    write(folder / "metrics.jsonl", STEPS[:1])
    (folder / "evaluations.jsonl").unlink()
    assert all(p.stat().st_size > 5000 for p in figures.figures(folder))


def test_the_command_compares_and_repeats_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "FIGURES", figures.FIGURES[1:2])
    folders = [run(tmp_path / f"{seed}", seed, shift=seed / 50) for seed in range(3)] + [
        run(tmp_path / "other", lam=0.95)
    ]
    command(monkeypatch, *folders, "--out", tmp_path / "out")
    files = [*sorted((tmp_path / "out").iterdir()), *sorted(folders[0].glob("*.[ps][nv]g"))]
    assert [f.name for f in files[:2]] == ["comparison.png", "comparison.svg"] and len(files) == 4
    svg = files[1].read_text()
    shown = (
        "lam 0.95 (n=1)",
        "lam 1.0 (n=3)",
        "95 % t-interval",
        "reward",
        "held-out accuracy",
        "evaluated after step",
    )
    assert all(text in svg for text in shown)
    assert "0.000 → 0.800" in capsys.readouterr().out  # the table
    before = [f.read_bytes() for f in files]
    command(monkeypatch, *folders, "--out", tmp_path / "out")
    assert [f.read_bytes() for f in files] == before


def test_compare_takes_records_of_any_trainer(tmp_path: Path) -> None:
    records = [{"step": s, "reward": s / 10} | ({"kl": 0.1} if s % 3 else {}) for s in range(9)]
    arms = {f"arm {i}": [records] for i in range(6)}
    png, svg = figures.compare(
        arms, tmp_path / "new" / "six", "Six", [("reward", "reward"), ("kl", "KL [nats]")]
    )
    assert (png.name, svg.name) == ("six.png", "six.svg")
    assert (
        "KL [nats]" in svg.read_text() and "(n=1)" not in svg.read_text()
    )  # one run each has no band to explain
    with pytest.raises(ValueError, match="7 arms"):
        figures.compare(arms | {"arm 7": arms["arm 0"]}, tmp_path / "x", "Seven")
    with pytest.raises(ValueError, match="none empty"):
        figures.compare({"a": []}, tmp_path / "x", "None")
    with pytest.raises(ValueError, match="metric length is in no run; there are kl, reward, step"):
        figures.compare(arms, tmp_path / "x", "Missing")


def test_intervals(tmp_path: Path) -> None:
    rows = [("λ = 0.95", -0.02, -0.05, 0.01), ("γ = 0.99", 0.1, 0.08, 0.12)]
    _, svg = figures.intervals(rows, tmp_path / "forest", "Differences", "difference", margin=0.03)
    assert all(
        text in svg.read_text() for text in ("λ = 0.95", "−0.02 [−0.05, +0.01]", "margin ±0.03")
    )
    with pytest.raises(ValueError, match=r"'b', 1, 2, 3.*low ≤ mean ≤ high"):
        figures.intervals([("b", 1, 2, 3)], tmp_path / "forest", "", "")


def test_lines_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"step": 1, "rew')
    assert figures.read(file) == [{"step": 0}]
    assert "line 2, the last, is cut off and left out" in capsys.readouterr().err
    file.write_text('{"step": 0}\noops\n{"step": 1}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON: 'oops'"):
        figures.read(file)


def test_folders_that_are_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"metrics\.jsonl: no such file, or no whole step"):
        command(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match=r"No such file.*config\.json"):
        command(monkeypatch, run(tmp_path / "a"), tmp_path)
