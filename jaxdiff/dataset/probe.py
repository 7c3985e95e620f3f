"""Checks that a bucket can hold a dataset: that it is there, and that it keeps to conditions."""

import contextlib
import errno
import uuid
from collections.abc import Iterator

import obstore
from obstore import exceptions
from obstore.store import ObjectStore

from jaxdiff.dataset import names
from jaxdiff.errors import InputError

PROBLEMS = (exceptions.BaseError, OSError, ValueError)  # what the client raises
# In errors: the address of a machine's own identity, and what Azure's client asks for first.
NO_CREDENTIALS = ("169.254.169.254", "Account must be specified")


def check(address: str, client: ObjectStore) -> None:
    """Refuses a service that lets two writers create one object, or replace one unseen.

    Raises:
      InputError: in this case, or if the bucket cannot be used as it is.
      OSError: for other problems, which may pass.
    """
    name = f"{names.TMP}/probe-{uuid.uuid4().hex}"  # a killed process may leave it
    with contextlib.suppress(exceptions.AlreadyExistsError):  # a repeated request's own
        obstore.put(client, name, b"1", mode="create", use_multipart=False)
    first = obstore.head(client, name)
    stale = {key: first[key] for key in ("e_tag", "version") if first[key] is not None}
    try:
        is_kept = _refuses(client, name, "create")
        is_kept = is_kept and bytes(obstore.get(client, name).bytes()) == b"1"
        obstore.put(client, name, b"2", use_multipart=False)
        is_kept = is_kept and _refuses(client, name, stale)
    finally:
        obstore.delete(client, name)
    if not is_kept:
        raise InputError(
            f"--output {address}: this service ignores conditional writes, so several "
            "processes would overwrite each other's files; use another service"
        )


def _refuses(client: ObjectStore, name: str, mode: str | dict) -> bool:
    try:
        obstore.put(client, name, b"3", mode=mode, use_multipart=False)
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
        return True
    return False


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Turns the client's first errors into what is to do.

    Raises:
      InputError, OSError: as `check`.
    """
    try:
        yield
    except FileNotFoundError:
        raise InputError(
            f"--output {address}: the bucket does not exist; create it, or check its name and its "
            "account"
        ) from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
        raise InputError(
            f"--output {address}: access is denied; check the credentials in the environment and "
            "what they may do (list, read, write and delete objects)"
        ) from None
    except PROBLEMS as problem:
        if any(sign in str(problem) for sign in NO_CREDENTIALS):
            raise InputError(
                f"--output {address}: there are no credentials in the environment, and this "
                "machine has no identity that gives any; set them as in docs/buckets.md"
            ) from None
        if "redirect" in str(problem):
            raise InputError(
                f"--output {address}: the bucket is in another region; set AWS_REGION"
            ) from None
        raise OSError(errno.EIO, reason(problem), address) from None


def reason(problem: Exception) -> str:
    """Returns a client's error on one line, without the request."""
    first, *_ = str(problem).splitlines() or [type(problem).__name__]
    return first[:300]
