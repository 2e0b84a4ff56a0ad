"""Models on the Hugging Face hub: pin a revision, download it, and say in one line what went wrong.

huggingface_hub honours HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT by itself. Its exceptions are turned into ours
here; their texts are never shown, they run over many lines and hold URLs.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token, hf_hub_download, is_offline_mode, resolve_revision, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.errors import HTTPError as AnyHttpError  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import disable_progress_bars

from ftkit.errors import FtkitError, KeyPath, NetworkError, StorageError, UserError
from ftkit.models.files import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    INDEX_NAME,
    PROCESSOR_PATTERNS,
    PROCESSOR_TEMPLATE_NAME,
    TOKENIZER_PATTERNS,
    WEIGHTS_NAME,
    check_model_directory,
    no_weights,
    shard_names,
)

BASE_KEY: KeyPath = ("base_model",)
REVISION_KEY: KeyPath = ("model", "revision")

SMALL_FILES = [CONFIG_NAME, INDEX_NAME, GENERATION_CONFIG_NAME, *TOKENIZER_PATTERNS]
SMALL_FILES += [*PROCESSOR_PATTERNS, PROCESSOR_TEMPLATE_NAME]
"""Configuration, index of the weights, tokenizer, chat templates, processors."""

REQUEST_TIMEOUT = 10.0
"""Seconds until a request without an answer counts as a network error."""

PUBLIC_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the hub is asked for to see that it answers."""

BAD_TOKEN = "Invalid credentials in Authorization header"
"""The hub's words for a token that is not valid."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


class UnknownModelError(UserError):
    """The name is no model's on the hub, or in its cache where the network is off."""


def resolve_commit(repo_id: str, revision: str | None, *, offline: bool, weights: bool = True) -> str:
    """The commit that `revision` (None: the default branch) names, after checking that the model can be had.

    Args:
        weights: what lies in the cache counts only with its weights.

    One request lists the repository's files, a second fetches config.json: a gated repository shows its list to
    everybody. A commit that lies complete in the cache needs neither, and the cache steps in where the network fails.

    Raises:
        UserError: gated, missing, refused token, no safetensors weights, or offline and not cached.
        NetworkError: no connection, a timeout, or a server error.
    """
    if offline or is_offline_mode():
        return _resolve_cached(repo_id, revision, weights=weights)
    if revision is not None and _COMMIT.fullmatch(revision) and _is_cached(repo_id, revision, weights=weights):
        return revision
    try:
        return _resolve_online(repo_id, revision)
    except NetworkError:
        try:
            return _resolve_cached(repo_id, revision, weights=weights)
        except FtkitError:
            pass
        raise


def fetch(repo_id: str, commit: str, *, weights: bool, code: bool, offline: bool) -> Path:
    """Download what is not in the cache yet and return the snapshot's directory.

    Args:
        weights: the safetensors files too, and only those that the index lists.
        code: Python files too, for a model that brings its own.

    Raises:
        UserError, NetworkError: as `resolve_commit`.
        StorageError: the disk is full or not writable.
    """
    local = offline or is_offline_mode()
    patterns = [*SMALL_FILES, "*.py"] if code else SMALL_FILES
    with hub_errors(repo_id, commit):
        with disable_progress_bars():
            small = snapshot_download(repo_id, revision=commit, allow_patterns=patterns, local_files_only=local)
        directory = Path(small)
        if weights:
            names = shard_names(directory)
            snapshot_download(repo_id, revision=commit, allow_patterns=names, local_files_only=local)
    if weights:
        check_model_directory(directory, key=BASE_KEY)
    return directory


def fetch_tokenizer(repo_id: str, *, code: bool, offline: bool) -> Path:
    """The directory with the tokenizer of a repository's default branch, which needs no weights.

    Args:
        code: Python files too, for a tokenizer that brings its own.

    Raises:
        UserError, NetworkError, StorageError: as `fetch`.
    """
    patterns = [*SMALL_FILES, "*.py"] if code else SMALL_FILES
    local = offline or is_offline_mode()
    with hub_errors(repo_id, None), disable_progress_bars():
        return Path(snapshot_download(repo_id, allow_patterns=patterns, local_files_only=local))


def reach_hub() -> str:
    """Ask the hub for a public model; in words, who it takes us for.

    Raises:
        NetworkError: it does not answer, or the network is switched off.
        UserError: the token is refused.
    """
    if is_offline_mode():
        raise NetworkError("HF_HUB_OFFLINE is set", how="unset it")
    with hub_errors(PUBLIC_MODEL, None):
        HfApi().model_info(PUBLIC_MODEL, timeout=REQUEST_TIMEOUT)
        if get_token() is None:
            return "without a token: gated models want HF_TOKEN"
        return f"with the token of {HfApi().whoami()['name']}"


def _resolve_online(repo_id: str, revision: str | None) -> str:
    with hub_errors(repo_id, revision):
        info = HfApi().model_info(repo_id, revision=revision, timeout=REQUEST_TIMEOUT)
        names = {sibling.rfilename for sibling in info.siblings or []}
        if CONFIG_NAME not in names:
            raise UserError(f"{repo_id} has no {CONFIG_NAME}", how="name a model in transformers' format", key=BASE_KEY)
        if WEIGHTS_NAME not in names and INDEX_NAME not in names:
            raise no_weights(repo_id, names, key=BASE_KEY)
        assert info.sha is not None, "the hub answers with a commit"
        with disable_progress_bars():
            # Under the name of the revision: the cache then knows its commit when the network is off.
            hf_hub_download(repo_id, CONFIG_NAME, revision=revision)
    return info.sha


def _resolve_cached(repo_id: str, revision: str | None, *, weights: bool) -> str:
    with hub_errors(repo_id, revision):
        commit = str(resolve_revision(repo_id, revision=revision, local_files_only=True).resolved)
    fetch(repo_id, commit, weights=weights, code=False, offline=True)
    return commit


def _is_cached(repo_id: str, commit: str, *, weights: bool) -> bool:
    try:
        fetch(repo_id, commit, weights=weights, code=False, offline=True)
    except FtkitError:
        return False
    return True


@contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn huggingface_hub's exceptions into ours, a line each."""
    try:
        yield
    except FtkitError:
        raise
    except Exception as error:
        if (translated := _translate(error, repo_id, revision)) is None:
            raise
        raise translated from None


def _translate(error: BaseException, repo_id: str, revision: str | None) -> FtkitError | None:
    """Our error for one of huggingface_hub's; None for what is not its or the network's: a bug."""
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError | RevisionResolutionError):
        # "Not on this disk": because of what the network said, or because the network is off.
        if error.__cause__ is not None and not isinstance(error.__cause__, OfflineModeIsEnabled):
            return _translate(error.__cause__, repo_id, revision)
        return UnknownModelError(
            f"{repo_id}{_at(revision)} is not (wholly) in the cache, and the network is off",
            how="download it once without --offline and HF_HUB_OFFLINE, or name a local directory",
            key=BASE_KEY,
        )
    if isinstance(error, HfHubHTTPError):
        return _translate_status(error, repo_id, revision)
    if isinstance(error, EntryNotFoundError):
        return UserError(f"{repo_id}{_at(revision)} lacks a file", how="choose another revision", key=BASE_KEY)
    if isinstance(error, HFValidationError):
        return UnknownModelError(
            f"{repo_id!r} is no hub id (ORGANISATION/NAME)", how="check the spelling", key=BASE_KEY
        )
    if isinstance(error, AnyHttpError | ConnectionError | TimeoutError):
        return NetworkError(
            f"the hub ({HfApi().endpoint}) could not be reached ({type(error).__name__})",
            how=f"check the network and try again, or name a local directory instead of {repo_id}",
        )
    if isinstance(error, OSError):
        what = f"{repo_id} could not be stored: {error.strerror or type(error).__name__}"
        return StorageError(what, how="free space in the hub's cache (HF_HOME)")
    return None


def _translate_status(error: HfHubHTTPError, repo_id: str, revision: str | None) -> FtkitError:
    status = error.response.status_code
    url = f"{HfApi().endpoint}/{repo_id}"
    if isinstance(error, GatedRepoError):
        how = f"accept its licence at {url} and set HF_TOKEN to a token that may read it"
        return UserError(f"{repo_id} is gated: its owner asks for a licence to be accepted", how=how, key=BASE_KEY)
    if isinstance(error, RevisionNotFoundError):
        how = f"choose one of {url}/tree/main"
        return UserError(f"{repo_id} has no revision {revision}", how=how, key=REVISION_KEY)
    if isinstance(error, DisabledRepoError):
        return UserError(f"{repo_id} was disabled by the hub", how="choose another model", key=BASE_KEY)
    if isinstance(error, EntryNotFoundError):
        return UserError(f"{repo_id}{_at(revision)} lacks a file", how="choose another revision", key=BASE_KEY)
    if status == 401 and error.response.headers.get("X-Error-Message") == BAD_TOKEN:
        return UserError("the hub does not accept your token", how="set HF_TOKEN to a valid token, or unset it")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        # 401 is also the hub's answer to everyone without a token when there is no such model.
        if get_token() is None:
            how = "check the spelling, set HF_TOKEN if it is private, or name a local directory (./NAME)"
        else:
            how = "check the spelling and what your token may read, or name a local directory (./NAME)"
        return UnknownModelError(f"there is no model {repo_id} on the hub", how=how, key=BASE_KEY)
    if status == 403:
        return UserError(f"your token may not read {repo_id}", how="give the token read access, or use another one")
    if status == 429 or status >= 500:
        return NetworkError(f"the hub ({HfApi().endpoint}) answered with status {status}", how="try again later")
    return UserError(f"the hub refused {repo_id} with status {status}", how="check the name and revision", key=BASE_KEY)


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at revision {revision}"
