"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vlaft.errors import UsageError, VlaftError

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository, before anything is written.

    Raises:
        UsageError: as said.
    """
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise UsageError(f"--push {name}: give the repository as user/name")


def push(folder: Path, repository: str, *, api: Any = None) -> str:
    """Upload a folder; a repository that does not exist yet is made, private.

    Args:
        folder: the export.
        repository: `user/name`.
        api: a `huggingface_hub.HfApi`; None makes one with the token of `hf auth login`.

    Returns:
        The address of the commit.

    Raises:
        VlaftError: the Hub cannot be reached or refuses; the folder stays.
    """
    from httpx import HTTPError  # what the Hub's client speaks with
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = api or HfApi()
    again = f"{folder} is whole; repeat only the upload with: hf upload {repository} {folder}"
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        result = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload what vlaft exported")
    except LocalTokenNotFoundError:
        raise VlaftError(f"not uploaded: there is no token for the Hub; run hf auth login. {again}") from None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise VlaftError(f"not uploaded: the Hub says: {reason}. {again}") from error
    except (HTTPError, OSError, RuntimeError) as error:  # no route, no name, HF_HUB_OFFLINE
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VlaftError(f"not uploaded: the Hub cannot be reached ({reason}). {again}") from error
    return str(result)
