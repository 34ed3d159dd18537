"""Models and data sets of the Hugging Face hub: downloaded once, then read from its cache.

Every function raises OSError in one line that says what to do. A file gets its name in the cache
only when it is whole, so that a broken download leaves nothing that a second try would read. With
HF_HUB_OFFLINE=1, or when the hub cannot be reached, what is in the cache is read.

This module imports nothing of the project, so every other module may import it.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    utils,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

MODEL = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
# The files of a model that are no weights: its configuration and its tokenizer.
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
# The first form that a repository has. Some hold the same weights in other forms, too.
WEIGHTS = (["model.safetensors", "model-*.safetensors"], ["pytorch_model*.bin"])
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def is_model(name: str) -> bool:
    """Whether a name can only be that of a model of the hub: no such file or folder is here."""
    return MODEL.fullmatch(name) is not None and not os.path.lexists(name)


def model_folder(name: str, weights: bool = False, commit: str | None = None) -> str:
    """The folder in the cache that holds the configuration and the tokenizer of a model of the hub,
    and with `weights` these, too. `commit`: not the newest version, but this one."""
    folder = _snapshot(name, SMALL_FILES, commit)
    if not (Path(folder) / "config.json").is_file():
        raise OSError("it has no config.json, which a model of transformers has")
    if not weights:
        return folder
    for patterns in WEIGHTS:
        _snapshot(name, patterns, commit_of(folder))
        if any(next(Path(folder).glob(pattern), None) for pattern in patterns):
            return folder
    raise OSError("it has no weights: neither model*.safetensors nor pytorch_model*.bin")


def commit_of(folder: str) -> str:
    """The commit of a model that `model_folder` has downloaded; "" for any other folder.

    >>> commit_of("hub/models--acme--tiny/snapshots/c0ffee")
    'c0ffee'
    """
    path = Path(folder)
    repository = path.parent.parent.name
    of_hub = path.parent.name == "snapshots" and repository.startswith("models--")
    return path.name if of_hub else ""


def name_of(folder: str) -> str:
    """The hub id of a model that `model_folder` has downloaded; any other folder itself.

    >>> name_of("hub/models--acme--tiny/snapshots/c0ffee"), name_of("runs/demo/policy")
    ('acme/tiny', 'runs/demo/policy')
    """
    if not commit_of(folder):
        return folder
    return Path(folder).parent.parent.name.removeprefix("models--").replace("--", "/")


def _snapshot(name: str, patterns: list[str], commit: str | None) -> str:
    _show_progress()
    try:
        return snapshot_download(
            name, revision=commit, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except Exception as error:
        raise OSError(_why(error, "model", name)) from error


def dataset_file(name: str, file: str) -> Path:
    """One file of a data set of the hub, in the cache."""
    _show_progress()
    refusal = _refusal_of(name, file)
    is_absent = isinstance(refusal, RemoteEntryNotFoundError)
    cached_only = refusal is not None and not is_absent
    try:
        return Path(hf_hub_download(name, file, repo_type="dataset", local_files_only=cached_only))
    except Exception as error:
        raise OSError(_why(refusal or error, "data set", name, file)) from error


def dataset_rows(name: str, config: str | None, split: str) -> Iterator[Any]:
    """The rows of one split of a data set. `name` is also that of a folder laid out as one."""
    from datasets import load_dataset

    _show_progress()
    if Path(name).is_dir():
        try:
            return iter(load_dataset(name, config, split=split, streaming=True))
        except Exception as error:
            raise OSError(_text(error)) from error
    refusal = _refusal_of(name, "README.md")
    try:
        if refusal is None or isinstance(refusal, RemoteEntryNotFoundError):  # it need not have one
            return iter(load_dataset(name, config, split=split))  # a stream would not be cached
        return _cached_rows(name, config, split, refusal)
    except Exception as error:  # RuntimeError: a repository with a loading script
        raise OSError(_why(error, "data set", name)) from error


def _refusal_of(name: str, file: str) -> Exception | None:
    """What the hub answers when it is asked once for a file of a data set, if that is an error. The
    clients ask again and again, and wait half a minute for a hub that is gone."""
    try:
        get_hf_file_metadata(hf_hub_url(name, file, repo_type="dataset"))
    except Exception as error:
        return error
    return None


def _cached_rows(name: str, config: str | None, split: str, refusal: Exception) -> Iterator[Any]:
    """The rows in the cache. Raises `refusal` where the data set is not there."""
    from datasets.packaged_modules.cache.cache import Cache

    owner_and_name = {"repo_id": name, "dataset_name": name.split("/")[-1]}
    try:
        found = Cache(**owner_and_name, config_name=config, version="auto", hash="auto")
    except ValueError:
        raise refusal from None
    return iter(found.as_dataset(split=split))


def _show_progress() -> None:
    """Progress bars on a terminal only; a program may have switched them off for its own."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        switch = utils.enable_progress_bars if sys.stderr.isatty() else utils.disable_progress_bars
        switch()
    if "datasets" in sys.modules and not sys.stderr.isatty():
        sys.modules["datasets"].disable_progress_bars()


def _why(error: Exception, kind: str, name: str, file: str = "") -> str:
    """Why the hub does not give a file, and what to do."""
    folder = "datasets/" if kind == "data set" else ""
    page = f"{constants.ENDPOINT}/{folder}{name}"
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, kind, page, file)
    if constants.is_offline_mode():
        return (
            f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} does not hold all of "
            f"this {kind}: unset it, or fetch the {kind} once with the network"
        )
    last = causes[-1]
    if any(map(_is_of_network, causes)):
        return (
            f"the hub at {constants.ENDPOINT} cannot be reached, or broke off ({_text(last)}); "
            "check the network and HF_ENDPOINT, and start again: whole files are kept"
        )
    return _text(error)


def _is_of_network(error: BaseException) -> bool:
    """Whether a connection failed or ended early; the clients' libraries have errors of their
    own."""
    of_client = type(error).__module__.startswith("httpx")
    return of_client or isinstance(error, ConnectionError) or "Consistency check" in str(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, …"""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _refusal(error: HfHubHTTPError, kind: str, page: str, file: str) -> str:
    """What an answer of the hub that is an error means, and what to do."""
    status = error.response.status_code
    has_token = "authorization" in error.response.request.headers
    if status == 401 and has_token:
        return f"the hub does not know your token; {LOG_IN} to a new one, or unset both"
    if isinstance(error, GatedRepoError):
        if has_token:
            return f"it is gated, and your account has no access: accept its terms at {page}"
        return f"it is gated: accept its terms at {page}, then {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        private = "correct the name" if has_token else f"correct the name, or {LOG_IN}"
        return f"the hub has no such {kind}, or it is private; {private}"
    if isinstance(error, RemoteEntryNotFoundError) and file:
        return f"it has no file {file}; its files are listed at {page}/tree/main"
    if status >= 500 or status == 429:
        return f"the hub answers with error {status}; try again later"
    return _text(error)


def _text(error: BaseException) -> str:
    """An error's message in one line, cut off; its kind where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
