"""Resolves Hub ids and URLs of checkpoints to local paths. Imports no JAX."""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from jaxdiff import cache
from jaxdiff.checkpoint.component import CONFIG_ONLY, INDEX, TOKENIZER_FILES, Component
from jaxdiff.checkpoint.weight_files import no_index, tokenizers, wanted_files
from jaxdiff.errors import InputError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
URL = re.compile(r"[a-z][a-z0-9+.-]+://.+")
HUB_TIMEOUT_SECONDS = 10
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}
# The metadata that distinguish the versions of a file; each file system has only some of them.
STAMPS = (
    *("ETag", "etag", "blob_id", "sha", "md5Hash", "Content-MD5", "checksum", "generation"),
    *("mtime", "modified", "modifiedTime", "modificationTime", "created"),
    *("LastModified", "last_modified", "Last-Modified"),
)


def local_path(model: str, variant: str | None, components: Mapping[str, Component]) -> Path:
    """Returns the local path of a model, after downloading it if necessary.

    Args:
      model: a path, a Hub id "owner/name" or "owner/name@revision", or a URL such as "gs://...".
        A path that exists takes precedence over a Hub id.
      variant: which weights to fetch, such as "fp16", if there are several variants.
      components: the networks that a model may have, by folder.

    Raises:
      InputError: if there is no model, or it cannot be reached.
    """
    if URL.fullmatch(model):
        return _from_url(model.rstrip("/"), variant, components)
    path = Path(model)
    if not path.exists() and HUB_ID.fullmatch(model):
        return from_hub(
            model,
            lambda names: _wanted(names, variant, model, "repository", components),
            probe=INDEX,
        )
    return path


def _wanted(
    names: Collection[str],
    variant: str | None,
    model: str,
    kind: str,
    components: Mapping[str, Component],
) -> list[str]:
    if INDEX not in names:
        raise InputError(no_index(f"model {model!r}", kind, names))
    return wanted_files(names, variant, model, components)


def hub_tokenizer(model: str, folder: str) -> Path:
    """Fetches a tokenizer from a folder of a Hub repository; "" means its root."""
    wanted = [f"{folder}/{name}" if folder else name for name in TOKENIZER_FILES]
    snapshot = from_hub(
        model,
        lambda names: [name for name in wanted if name in names],
        probe=f"{folder}/tokenizer_config.json" if folder else "tokenizer_config.json",
    )
    return snapshot / folder


def from_hub(model: str, choose: Callable[[Collection[str]], list[str]], probe: str) -> Path:
    """Returns a local snapshot of a Hub repository with at least the chosen files.

    If the Hub cannot be reached, returns the cached snapshot, provided that it contains `probe`.
    """
    from huggingface_hub import HfApi, errors, snapshot_download, try_to_load_from_cache, utils

    repository, _, revision = model.partition("@")
    try:
        utils.validate_repo_id(repository)
    except errors.HFValidationError:
        raise InputError(f"model {model!r} is neither a local path nor a Hub id") from None
    try:
        info = HfApi().model_info(
            repository, revision=revision or None, timeout=HUB_TIMEOUT_SECONDS
        )
        names = {file.rfilename for file in info.siblings}
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=choose(names))
        )
    except InputError:
        raise
    except Exception as error:  # the network library's exceptions differ between its versions
        if _is_local(error):
            raise InputError(
                f"model {model!r} cannot be written to the Hugging Face cache ({error})"
            ) from error
        problem = error
    cached = try_to_load_from_cache(repository, probe, revision=revision or None)
    if isinstance(cached, str):
        return Path(cached.removesuffix(probe))
    raise InputError(f"model {model!r} {_why_not(problem)}") from problem


def _is_local(error: Exception) -> bool:
    """Whether this machine caused the error, such as a full disk; network errors have no errno."""
    network = ConnectionError, TimeoutError
    return isinstance(error, OSError) and bool(error.errno) and not isinstance(error, network)


def _why_not(problem: Exception) -> str:
    from huggingface_hub import errors

    absent = "is neither a local path nor in the Hugging Face cache"
    if isinstance(problem, errors.GatedRepoError):
        return "is gated on the Hugging Face Hub; accept its terms there, then run `hf auth login`"
    if isinstance(problem, errors.RevisionNotFoundError):
        return "has no such revision on the Hugging Face Hub"
    if isinstance(problem, errors.RepositoryNotFoundError):
        return (
            f"{absent}, and the Hub has no public model of this name; check the name, or run "
            "`hf auth login` if it is private"
        )
    if isinstance(problem, errors.OfflineModeIsEnabled):
        return f"{absent}, and HF_HUB_OFFLINE forbids downloads; unset it, or use a local directory"
    return (
        f"{absent}, and the Hub cannot be reached ({type(problem).__name__}); use a local "
        "directory, or run this once while online"
    )


def _from_url(url: str, variant: str | None, components: Mapping[str, Component]) -> Path:
    """Copies the directory or file at `url` to the cache directory; returns the copy's path.

    Files that have not changed since they were fetched are not fetched again. If the file system
    does not reveal whether a file has changed, it is fetched each time.
    """
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = url.partition("://")[0]
        remedy = f"pip install {PACKAGES[protocol]}" if protocol in PACKAGES else str(error)
        raise InputError(
            f"model {url!r} cannot be read because a package is missing: {remedy}"
        ) from error
    try:
        return _fetch(system, root.rstrip("/"), url, variant, components)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"model {url!r} does not exist ({error}); check the URL") from error
    except Exception as error:  # file systems raise all kinds of exceptions
        reason = " ".join(str(error).split())
        raise InputError(
            f"model {url!r} cannot be read ({type(error).__name__}: {reason})"
        ) from error


def _fetch(
    system, root: str, url: str, variant: str | None, components: Mapping[str, Component]
) -> Path:
    folders = tokenizers(components)
    if root.endswith(".safetensors"):
        base, _, name = root.rpartition("/")
        found = _listing(system, base, folders)
        beside = {f"{folder}/{file}" for folder in folders for file in TOKENIZER_FILES}
        found[name] = system.info(root)
        config = f"{name.removesuffix('.safetensors')}.yaml"  # see `prediction`
        if system.exists(f"{base}/{config}"):
            found[config] = system.info(f"{base}/{config}")
        wanted = [name, *sorted((beside | {config}) & found.keys())]
    else:
        base, name = root, ""
        found = _listing(system, base, ["", *folders, *components, *CONFIG_ONLY])
        wanted = _wanted(found, variant, url, "directory", components)
    parent = url.rpartition("/")[0] if name else url
    models = cache.directory() / "models"
    stored = {
        path: _stored(system, f"{base}/{path}", f"{parent}/{path}", found[path], models / "files")
        for path in wanted
    }
    versions = "\n".join(f"{path} {copy.name}" for path, copy in stored.items())
    directory = models / _digest(f"{url}\n{versions}")
    for path, copy in stored.items():
        link = directory / path
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.unlink(missing_ok=True)  # a link to a deleted file
            link.symlink_to(os.path.relpath(copy, link.parent))
    return directory / name


def _listing(system, base: str, folders: Collection[str]) -> dict[str, dict]:
    """Returns the file system's entry for each file in the folders, by its path below `base`."""
    found = {}
    for folder in folders:
        try:
            entries = system.ls(f"{base}/{folder}".rstrip("/"), detail=True)
        except FileNotFoundError:
            continue
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if entry["type"] == "file":
                found[f"{folder}/{name}" if folder else name] = entry
    return found


def _stored(system, source: str, url: str, entry: dict, files: Path) -> Path:
    """Returns a file's copy in the cache, after fetching it atomically if it is not there."""
    if not _stamps(entry):
        entry = entry | system.info(source)  # on some file systems, more detailed than `ls`
    size, stamps = entry.get("size"), _stamps(entry)
    stored = files / _digest(" ".join([url, str(size), *stamps]))
    if stamps and stored.exists():
        return stored
    files.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=files) as scratch:
        new = Path(scratch) / "new"
        system.get_file(source, str(new))
        if size is not None and new.stat().st_size != size:
            raise InputError(f"{source} changed while it was fetched; run the same command again")
        if not stamps:  # only its contents distinguish it from other versions
            with new.open("rb") as file:
                stored = files / hashlib.file_digest(file, "sha256").hexdigest()
        return new.replace(stored)


def _stamps(entry: dict) -> list[str]:
    return [str(entry[key]) for key in STAMPS if entry.get(key) is not None]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
