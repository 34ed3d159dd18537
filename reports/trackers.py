"""What --track sends beside the run folder: metrics, settings and some transcripts.

| --track | where | transcripts | a resumed run |
|---|---|---|---|
| tensorboard | the run's tensorboard/ | none | later steps are purged and written again |
| wandb | W&B; with WANDB_MODE=offline the run's wandb/ | two tables | the same record goes on |
| trackio | TRACKIO_DIR, or TRACKIO_SPACE_ID | traces and a table | the same record goes on |

W&B and Trackio cannot forget a step. What they have got is in the run folder's track-NAME.json, and
a step that a resumed run repeats is not sent again. wandb and trackio are optional: this file
imports them where they are asked for. Only rank 0 tracks.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from curation.files import write_atomically

NONE = "none"
PROJECT = "open-reasoner-zero"  # the name there; WANDB_PROJECT is another one for W&B
TRANSCRIPTS_EVERY = 10  # iterations: four responses of 8,000 tokens are a table of 32,000 rows
UPLOAD_SECONDS = 120.0  # that W&B may take at the end; the rest stays in the run folder
RESPONSE = ("problem", "question", "gold", "response", "answer", "reward", "finish", "tokens")
TOKEN = ("response", "t", "token", "logprob", "V", "advantage")
Kept = Sequence[dict[str, Any]]  # what reports.transcripts keeps of an iteration


class Tracked(NamedTuple):
    """The run that is tracked."""

    folder: Path
    name: str
    settings: dict[str, Any]
    first_step: int  # above 0: it goes on from a checkpoint


# ── what is refused early ─────────────────────────────────────────────────────────────────────────


def validate_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that exclude each other or are not installed: ValueError with what to do."""
    flag = " ".join(["--track", *names])
    if not names:
        raise ValueError("--track: names no tracker; pass --track none to track nothing")
    if len(set(names)) < len(names):
        raise ValueError(f"{flag}: names a tracker twice")
    if NONE in names and len(names) > 1:
        raise ValueError(f"{flag}: none stands alone; leave it or the others out")
    for name in names:
        if name != NONE and not _is_installed(name):
            raise ValueError(
                f"--track {name}: {name} is not installed here; pip install {name}, or leave it out"
            )


def _is_installed(name: str) -> bool:
    """Whether there is such a package. A folder of that name, as W&B makes, is none."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def require_login(names: Sequence[str]) -> None:
    """Refuse W&B without a login, which would ask for one after the models are loaded: ValueError.
    Nothing is sent."""
    if "wandb" not in names:
        return
    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled"):
        return
    if not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "--track wandb: not logged in; call wandb login, or set WANDB_MODE=offline and send it "
            "later with wandb sync"
        )


# ── all of them ───────────────────────────────────────────────────────────────────────────────────


class Trackers:
    """The trackers of a run. One that fails, at its start too, is left out from there on, with one
    line: the run folder holds all that it would have got."""

    def __init__(self, names: Sequence[str], run: Tracked, say: Callable[[str], None]) -> None:
        self.say = say
        self.trackers: dict[str, Any] = {}
        for name in names:
            if name != NONE:
                with self._tolerated(name):
                    self.trackers[name] = TRACKERS[name](run)

    def step(self, step: int, record: dict[str, float], kept: Kept) -> None:
        """The metrics of an iteration and, of every TRANSCRIPTS_EVERY, the transcripts kept."""
        shown = kept if step % TRANSCRIPTS_EVERY == 0 else ()
        self._each(lambda tracker: tracker.step(step, record, shown))

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Held-out metrics after `step` updates."""
        named = {f"heldout/{name}": value for name, value in metrics.items()}
        self._each(lambda tracker: tracker.evaluation(step, named))

    def close(self, failed: bool) -> None:
        """Send what is left. W&B calls a run that `failed` a failed one, until it goes on."""
        self._each(lambda tracker: tracker.close(failed))

    def _each(self, call: Callable[[Any], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            with self._tolerated(name):
                call(tracker)

    @contextmanager
    def _tolerated(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a library raises without a network or a disk
            self.trackers.pop(name, None)
            why = (str(error) or repr(error)).splitlines()[0]
            self.say(f"WARNING: --track {name} failed ({why}); the run goes on without it")


class Sent:
    """What a tracker has got of this run: `id`, the name of the record there, and the newest step
    of each kind, in track-NAME.json of the run folder. A step counts as sent just before it is: a
    process that is killed then leaves it out, and none is there twice. Raises ValueError when the
    file is not readable."""

    def __init__(self, folder: Path, tracker: str) -> None:
        self.path = folder / f"track-{tracker}.json"
        fresh = {"id": uuid.uuid4().hex[:8], "rows": 0}
        try:
            self.state = json.loads(self.path.read_bytes()) if self.path.exists() else fresh
            self.id, self.rows = self.state["id"], self.state["rows"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{self.path} cannot be read; remove it to begin a new record"
            ) from None

    def is_new(self, kind: str, step: int) -> bool:
        """Whether the step has not been sent yet. From now on it has."""
        if step <= self.state.get(kind, -1):
            return False
        self.rows += 1
        self.state |= {kind: step, "rows": self.rows}
        write_atomically(self.path, [json.dumps(self.state) + "\n"])
        return True


# ── each of them ──────────────────────────────────────────────────────────────────────────────────


class TensorBoard:
    """Event files in the run folder: metrics only."""

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        events = str(run.folder / "tensorboard")
        self.events = SummaryWriter(events, purge_step=run.first_step or None)

    def step(self, step: int, record: dict[str, float], kept: Kept) -> None:
        """Scalars; there is no table of texts."""
        self.evaluation(step, record)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Scalars."""
        for name, value in metrics.items():
            self.events.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self.events.close()


class Wandb:
    """A run of W&B. Its variables say where it goes: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY …

    W&B drops a row whose number is not above the last one's, and an evaluation comes before the
    iteration of the same number: so rows are counted here, and the axis of all plots is "step".
    """

    def __init__(self, run: Tracked) -> None:
        import wandb

        self.table = wandb.Table
        self.sent = Sent(run.folder, "wandb")
        # Its capture of the console would fill up with progress bars.
        own = {"console": "off", "reinit": "create_new", "finish_timeout": UPLOAD_SECONDS}
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.sent.id,
            name=run.name,
            resume="allow",
            dir=run.folder,
            config=run.settings,
            allow_val_change=True,  # --resume may change settings
            settings=wandb.Settings(**own),
        )
        self.run.define_metric("*", step_metric="step")

    def step(self, step: int, record: dict[str, float], kept: Kept) -> None:
        """One row: metrics, and two tables."""
        if self.sent.is_new("step", step):
            tables = {}
            if kept:
                tables["transcripts"] = self.table(columns=[*RESPONSE], data=response_rows(kept))
                tables["tokens"] = self.table(columns=[*TOKEN], data=token_rows(kept))
            self.run.log(record | tables, step=self.sent.rows)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """One row."""
        if self.sent.is_new("evaluation", step):
            self.run.log({"step": step} | metrics, step=self.sent.rows)

    def close(self, failed: bool) -> None:
        """Upload what is left, for UPLOAD_SECONDS at most."""
        self.run.finish(exit_code=int(failed))


class Trackio:
    """A run of Trackio, named after this one and the record's id: Trackio finds runs by name."""

    def __init__(self, run: Tracked) -> None:
        import trackio

        self.trackio = trackio
        self.sent = Sent(run.folder, "trackio")
        self.run = trackio.init(
            project=PROJECT,
            name=f"{run.name}-{self.sent.id}",
            config=run.settings,
            resume="allow",
            embed=False,
        )

    def step(self, step: int, record: dict[str, float], kept: Kept) -> None:
        """Metrics; a trace of each response, and a table of tokens."""
        if not self.sent.is_new("step", step):
            return
        shown: dict[str, Any] = {name: value for name, value in record.items() if name != "step"}
        if kept:
            shown["transcripts"] = [self._trace(response) for response in kept]
            shown["tokens"] = self.trackio.Table(columns=[*TOKEN], data=token_rows(kept))
        self.run.log(shown, step=step)

    def _trace(self, response: dict[str, Any]) -> Any:
        """A question and its response. What else is known of it, V(s_t) too, is its metadata."""
        roles = {"user": response["question"], "assistant": response["response"]}
        messages = [{"role": role, "content": text} for role, text in roles.items()]
        told = ("question", "response", "ids")
        metadata = {name: value for name, value in response.items() if name not in told}
        return self.trackio.Trace(messages=messages, metadata=metadata)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics."""
        if self.sent.is_new("evaluation", step):
            self.run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self.trackio.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


# ── tables ────────────────────────────────────────────────────────────────────────────────────────


def response_rows(kept: Kept) -> list[list[Any]]:
    """A row a response, with the columns of RESPONSE."""
    return [[response[column] for column in RESPONSE] for response in kept]


def token_rows(kept: Kept) -> list[list[Any]]:
    """A row a token, with the columns of TOKEN, of the responses that are kept token by token:
    which of `kept` it is, t, the text, the log-probability as sampled, V(s_t) (None without a
    critic) and Â_t.

    >>> token_rows([{"pieces": [" 4"], "logprobs": [-0.5], "values": [0.8], "advantages": [1.2]}])
    [[0, 0, ' 4', -0.5, 0.8, 1.2]]
    """
    rows = []
    for number, response in enumerate(kept):
        pieces = response.get("pieces", [])
        values = response.get("values", [None] * len(pieces))
        for t, piece in enumerate(pieces):
            measured = [response["logprobs"][t], values[t], response["advantages"][t]]
            rows.append([number, t, piece, *measured])
    return rows
