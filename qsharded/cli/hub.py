"""``--push-to-hub``: a repository on the Hugging Face Hub that is seen to take files before anything is computed, and a
folder that goes there at the end, whose failure is a warning.

The client finds the token: ``HF_TOKEN``, or what ``hf auth login`` has kept.
"""

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from qsharded.utils import heartbeat
from qsharded.utils.signals import ending

_LOG_IN = "run `hf auth login`, or set HF_TOKEN, with a token that may write there"


def writable_repository(name: str, *, private: bool) -> str:
    """The owner/name of the repository ``name``, made if need be, once the Hub has said that it takes files from here.

    Args:
        name: owner/name, or a name below the token's own account.
        private: whether it is to be so if it is made; one that is there stays as it is.

    Raises:
        ValueError: no token, a name that the Hub does not take, no right to write, or no answer.
    """
    import huggingface_hub  # here: what is not pushed needs no Hub client

    if huggingface_hub.get_token() is None:
        raise ValueError(f"--push-to-hub {name}: there is no token for the Hub; {_LOG_IN}")
    api = huggingface_hub.HfApi()
    try:
        with heartbeat.working_outside("asking the Hub"):
            repository = api.create_repo(name, private=private, exist_ok=True).repo_id
            api.auth_check(repository, write=True)  # one that was there already may be another's
    except Exception as error:  # of HTTP, of the connection, of the name: its kinds change with the client's versions
        raise ValueError(f"--push-to-hub {name}: the Hub does not take it: {_line(error)}; {_LOG_IN}") from error
    return repository


def push_folder(
    folder: Path, repository: str, message: str, changed: Callable[[], Mapping[str, bytes]] = dict
) -> str | None:
    """Upload the files of ``folder`` in one commit, those that ``changed`` names with the content that it gives.

    Returns the page's address; None where it failed, after a warning with the command that tries again.
    """
    again = shlex.join(["hf", "upload", repository, str(folder), "."])
    try:
        with (
            heartbeat.working_outside("uploading to the Hub"),
            ending(f" during the upload, which this repeats: {again}"),
        ):
            return _upload(folder, repository, message, changed())
    except Exception as error:  # what was computed is on the disk
        print(f"warning: --push-to-hub {repository}: {_line(error)}. Upload it with: {again}", file=sys.stderr)
        return None


def _upload(folder: Path, repository: str, message: str, changed: Mapping[str, bytes]) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi  # here: as above

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    operations = [CommitOperationAdd(name, changed.get(name, folder / name)) for name in names]
    return str(HfApi().create_commit(repository, operations, commit_message=message).repo_url)


def _line(error: Exception) -> str:
    """What an error says, on one line, without its advice to read about HTTP and the full stop at its end."""
    said = re.sub(r"For more information check: \S+", "", str(error))
    return " ".join(said.split()).rstrip(".") or type(error).__name__
