"""Files of pretrained networks from the hubs of others: safetensors, and never a minute of retries."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

from clat.errors import InputError
from clat.text import plain

PATIENCE = 10.0  # seconds that a hub has for an answer


def from_hub(repository: str, files: Sequence[str], name: str) -> Path:
    """The folder with these files of a repository on the Hugging Face hub; what was downloaded before is taken if the
    hub cannot be reached.

    Args:
        files: their names, with ``*`` for anything
        name: of the network, for messages
    Raises:
        InputError: no such repository, or no connection
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    with reaching("The Hugging Face hub", name):
        try:  # one question to the hub, where a download of one file asks six times in half a minute
            return Path(snapshot_download(repository, allow_patterns=list(files), etag_timeout=PATIENCE))
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise InputError(f"The Hugging Face hub has no {plain(repository)!r} that you may read.") from error
        except LocalEntryNotFoundError as error:
            raise OSError("no connection, and no earlier download") from error


@contextmanager
def reaching(hub: str, name: str) -> Iterator[None]:
    """One sentence in place of what a connection raises; an answer that does not come ends it after some seconds."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    except InputError:
        raise
    except OSError as error:  # httpx's errors come inside huggingface_hub's, which are of this kind
        reason = error.reason if isinstance(error, URLError) else error
        said = plain(" ".join(str(reason).split())[:150]).rstrip(".")
        raise InputError(
            f"{hub} cannot be reached for {plain(name)} ({said}); try again with a connection, or bring files that you "
            "have, by clat import or as transformers/FOLDER."
        ) from error
    finally:
        socket.setdefaulttimeout(before)
