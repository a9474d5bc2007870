"""What the hub's answers mean for someone who asked for a model, and its config in one request.

The hub's client asks five times more, half a minute long, where there is no network. Here it is
asked once, and what the cache has is taken where that fails.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, cause, lines
from .near_misses import known_names, near_name

_SIGN_IN = "sign in with 'hf auth login', or set HF_TOKEN"
_UNAUTHORIZED, _TOO_MANY, _BROKEN = 401, 429, 500


def config_of(hub_id: str) -> Path:
    """A model's config.json, downloaded or from the cache.

    Raises:
        CheckpointError: see `refusal`.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    answer: Exception | None = None
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, "config.json"))
    except (HFValidationError, HfHubHTTPError) as error:
        answer = error
        if not _may_pass(error):
            raise refusal(hub_id, error, known=True) from None
    except Exception as error:  # the client raises many kinds where there is no network
        answer = error
    try:
        cached_only = answer is not None
        return Path(hf_hub_download(hub_id, "config.json", local_files_only=cached_only))
    except Exception as error:
        raise refusal(hub_id, answer or error, known=True) from None


def refusal(
    asked_for: str, error: Exception, *, known: bool = False, hint: str = ""
) -> CheckpointError:
    """The error for a model that could not be had, as far as the hub's answer tells why.

    Args:
        known: it is for a command that knows some models' configs.
        hint: what to do where the hub cannot be asked.
    """
    from huggingface_hub import errors

    reason: BaseException = error
    incomplete = isinstance(error, errors.IncompleteSnapshotError)
    missing = isinstance(error, errors.LocalEntryNotFoundError) and not incomplete
    if missing and error.__cause__ is not None:
        reason = error.__cause__
    shipped = known_names(asked_for)
    near = near_name(asked_for, ())
    if shipped:
        near = f"its config is shipped as {shipped[0]}" + (
            "" if known else ", for 'parallama plan'"
        )
    near = near or hint
    found: tuple[str, ...]
    match reason:
        case errors.HFValidationError():
            found = (f"model {asked_for!r} is no valid hub id: {cause(reason)}", near)
        case errors.GatedRepoError():
            found = (
                f"model {asked_for!r} is gated: the hub gives it to those who accepted its terms",
                f"accept them on its page there; {_SIGN_IN}",
                near,
            )
        case errors.RepositoryNotFoundError():
            private = reason.response.status_code == _UNAUTHORIZED
            found = (
                f"the hub has no model {asked_for!r}" + (", or a private one" if private else ""),
                "check the name" + (f"; {_SIGN_IN}" if private else ", or give a folder"),
                near,
            )
        case errors.RemoteEntryNotFoundError():
            found = (
                f"model {asked_for!r} of the hub has no config.json",
                "expected a model as transformers saves it; of a .gguf file, give its path",
                near,
            )
        case errors.OfflineModeIsEnabled():
            found = (
                f"model {asked_for!r} is not in the hub's cache, and the hub is not asked",
                "unset HF_HUB_OFFLINE, or give a folder",
                near,
            )
        case errors.HfHubHTTPError():
            status = reason.response.status_code
            found = (f"the hub does not give {asked_for!r}: {_status(status)}", near)
        case errors.IncompleteSnapshotError():
            found = (
                f"model {asked_for!r} is in the hub's cache in part only",
                "download it again with a network, or give a folder",
                near,
            )
        case OSError() if not isinstance(reason, (ConnectionError, TimeoutError)) and reason.errno:
            found = (
                f"the hub's cache cannot be used: {cause(reason, 120)}",
                "check HF_HOME, and what is free there",
            )
        case _:
            found = (
                f"model {asked_for!r} is not in the hub's cache, and the hub cannot be reached: "
                f"{cause(reason, 120)}",
                "check the network, or give a folder",
                near,
            )
    return CheckpointError(lines(*found))


def _may_pass(error: Exception) -> bool:
    """Whether the hub may answer otherwise at another time."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return status == _TOO_MANY or status >= _BROKEN


def _status(status: int) -> str:
    if status == _UNAUTHORIZED:
        return f"it does not know the token (HTTP {status}); {_SIGN_IN}"
    if status == _TOO_MANY:
        return f"too many requests (HTTP {status}); try again later"
    if status >= _BROKEN:
        return f"it is out of order (HTTP {status}); try again later"
    return f"it answers HTTP {status}"
