"""Weights from the Hub: where a model's come from, downloads that explain their failures, and checks of what arrived.

Plain downloads are not checked by the Hub's client beyond their size: a flipped bit loads silently and stays in the
cache. Here every file of weights is hashed before it is used.
"""
import errno
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub as hf
from huggingface_hub import errors as hf_errors

from .records import RECORD_NAME, WEIGHTS_NAME, Record, find_record, read_record

__all__ = [
    'HubError', 'IntegrityError', 'cache_digest', 'check_file', 'download', 'download_weights', 'first_line',
    'folder_weights', 'hub_errors', 'hub_org', 'repo_weights', 'set_hub_org', 'sha256', 'weights_repo',
]

_logger = logging.getLogger(__name__)

ORG_VARIABLE = 'VITLINEAR_HUB_ORG'
_ORG_NAME = re.compile(r'[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?')
_UNSET = object()
_org: object = _UNSET

_FULL = {errno.ENOSPC: 'no space is left', errno.EDQUOT: 'the quota is used up', errno.EFBIG: 'the file is too large'}
_HTTP_LIBRARIES = ('httpx', 'httpx2', 'httpcore', 'httpcore2', 'requests', 'urllib3')


class HubError(RuntimeError):
    """Something could not be had from the Hub."""


class IntegrityError(HubError):
    """A file is not the one that it should be."""


def set_hub_org(org: str | None) -> None:
    """Choose the organisation or user on the Hub whose weights `pretrained=True` loads.

    With one set, the weights of 'vvt_nano.fashion_mnist' come from the repository 'ORG/vvt_nano.fashion_mnist', and not
    from the package; so a fork publishes a zoo of its own. Takes precedence over the environment variable
    VITLINEAR_HUB_ORG, which does the same.

    Args:
        org: Name on the Hub; None for the weights that the package names, whatever the environment says.
    """
    global _org
    if org is not None:
        _check_org(org, 'org')
    _org = org


def _check_org(org: str, where: str) -> None:
    if not isinstance(org, str) or not _ORG_NAME.fullmatch(org):
        raise ValueError(
            f"{where} is {org!r}; it must be the name of an organisation or user on the Hub, such as 'my-lab'")


def hub_org() -> str | None:
    """The organisation in use, None if the weights come from where the package says."""
    if _org is not _UNSET:
        return _org
    org = os.environ.get(ORG_VARIABLE) or None
    if org is not None:
        _check_org(org, f'the environment variable {ORG_VARIABLE}')
    return org


def weights_repo(name: str) -> tuple[str, str | None] | None:
    """Repository and revision that hold the weights of an architecture and tag, None if no repository does.

    A revision that the record names is used as long as the repository is the record's.
    """
    record, org = find_record(name), hub_org()
    hub = record.hub if record else None
    repo_id = f'{org}/{name}' if org else hub and hub.repo_id
    if not repo_id:
        return None
    return repo_id, hub.revision if hub and hub.repo_id == repo_id else None


def _at(repo_id: str, revision: str | None) -> str:
    return f"'{repo_id}'" + (f" at revision '{revision}'" if revision else '')


@contextmanager
def hub_errors(
        doing: str,
        repo_id: str,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
) -> Iterator[None]:
    """Turn what the Hub's client raises into a HubError in one sentence that says what to do.

    Args:
        doing: What failed, such as "'model.safetensors' of 'org/name' cannot be downloaded".
        repo_id: Repository.
        revision: Branch, tag or commit.
        cache_dir: Folder that is written to, if not the Hub's cache.
    """
    try:
        yield
    except HubError:
        raise
    except hf_errors.HFValidationError as e:
        raise HubError(f"{doing}: '{repo_id}' is no name of a repository, which looks like 'org/name'.") from e
    except hf_errors.OfflineModeIsEnabled as e:
        raise HubError(f'{doing}: HF_HUB_OFFLINE is set and it is not in the cache. Unset it to download.') from e
    except hf_errors.GatedRepoError as e:
        raise HubError(
            f'{doing}: access to it must be requested on its page, and `hf auth login` or HF_TOKEN must say who you '
            f'are.') from e
    except hf_errors.RepositoryNotFoundError as e:
        known = hf.get_token() is not None
        raise HubError(
            f"{doing}: there is no such repository on {hf.constants.ENDPOINT}, or it is private and "
            + ('your token gives no access to it.' if known else
               'no token was found: `hf auth login`, or set HF_TOKEN.')) from e
    except hf_errors.RevisionNotFoundError as e:
        raise HubError(f"{doing}: '{repo_id}' has no revision '{revision or 'main'}'.") from e
    except hf_errors.LocalEntryNotFoundError as e:
        raise HubError(f'{doing}: {hf.constants.ENDPOINT} cannot be reached and it is not in the cache.') from e
    except hf_errors.EntryNotFoundError as e:
        raise HubError(f'{doing}: {_at(repo_id, revision)} has no such file.') from e
    except hf_errors.HfHubHTTPError as e:
        status = getattr(e.response, 'status_code', None)
        if status == 401:
            reason = 'the token is not valid: `hf auth login`, or set HF_TOKEN.'
        elif status == 403:
            reason = 'the token does not permit it.'
        elif status == 429:
            reason = 'too many requests; wait a few minutes.'
        elif status is not None and status >= 500:
            reason = f'{hf.constants.ENDPOINT} has trouble of its own (HTTP status {status}); try again later.'
        else:
            reason = first_line(e)
        raise HubError(f'{doing}: {reason}') from e
    except OSError as e:
        if e.errno in _FULL:
            raise HubError(
                f"{doing}: {_FULL[e.errno]} in '{cache_dir or hf.constants.HF_HUB_CACHE}'. Free some, or point "
                f'HF_HUB_CACHE at a folder elsewhere. Nothing incomplete is kept.') from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise HubError(
                f"{doing}: '{e.filename}' cannot be written ({os.strerror(e.errno)}) and it is not in the cache. Point "
                f'HF_HUB_CACHE at a folder that can.') from e
        raise HubError(f'{doing}: {first_line(e)}') from e
    except Exception as e:
        # which HTTP library the client is built on changed twice, and with it the errors of a connection
        if type(e).__module__.partition('.')[0] not in _HTTP_LIBRARIES:
            raise
        raise HubError(
            f'{doing}: the connection to {hf.constants.ENDPOINT} failed ({first_line(e)}). Try again; nothing '
            f'incomplete is kept.') from e


def first_line(e: BaseException) -> str:
    """What an exception says, as one line; its type where it says nothing."""
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)


def _is_final(e: Exception) -> bool:
    """Whether the Hub answered that there is no such thing, so that a cached copy must not hide it."""
    return isinstance(e, (hf_errors.RevisionNotFoundError, hf_errors.HFValidationError)) or (
        isinstance(e, hf_errors.EntryNotFoundError) and not isinstance(e, hf_errors.LocalEntryNotFoundError))


def download(
        repo_id: str,
        filename: str,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Path of a file of a repository in the Hub's cache, downloaded if it is not there.

    A copy in the cache serves where the Hub cannot be reached. Without one, failure takes one request: the client
    itself would go on trying for half a minute.

    Raises:
        HubError: It cannot be had; the message says why and what to do.
    """
    with hub_errors(f"'{filename}' of {_at(repo_id, revision)} cannot be downloaded", repo_id, revision, cache_dir):
        cached = hf.try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
        if isinstance(cached, str) and re.fullmatch('[0-9a-f]{40}', revision or ''):
            return Path(cached)  # a commit never changes
        try:
            hf.get_hf_file_metadata(hf.hf_hub_url(repo_id, filename, revision=revision))
        except Exception as e:
            if not isinstance(cached, str) or _is_final(e):
                raise
            _logger.warning(f'{_at(repo_id, revision)} cannot be reached ({first_line(e)}): using the cached copy.')
            return Path(cached)
        return Path(hf.hf_hub_download(
            repo_id, filename, revision=revision, cache_dir=cache_dir, library_name='vitlinear'))


def sha256(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cache_digest(path: str | os.PathLike) -> str | None:
    """The sha256 that the Hub gave for a file in its cache, None where it gave none.

    The cache names the contents of large files after it.
    """
    name = os.path.basename(os.path.realpath(path))
    return name if re.fullmatch('[0-9a-f]{64}', name) else None


def check_file(path: str | os.PathLike, expected: str, source: str, remedy: str | None = None) -> None:
    """Compare a file with the sha256 that it should have, as `source` says.

    Raises:
        IntegrityError: It has another one; the message ends with `remedy`, or with the advice to delete the file.
    """
    found = sha256(path)
    if found != expected:
        path = os.path.realpath(path)  # in the cache: the contents, not the link, which would lead to them again
        raise IntegrityError(
            f"'{path}' is damaged or another file: its sha256 is {found}, {source} says {expected}. It was left as it "
            f"is. {remedy or 'Delete it to have it downloaded again.'}")


def _check_type(filename: str, repo_id: str, revision: str | None) -> None:
    if not filename.endswith('.safetensors'):
        raise HubError(
            f"'{filename}' of {_at(repo_id, revision)} is not loaded: only safetensors files are, which cannot hold "
            f'code. Download it and turn it into one with `vitlinear convert`.')


def download_weights(
        repo_id: str,
        revision: str | None = None,
        record: Record | None = None,
        filename: str = WEIGHTS_NAME,
        cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Path of the weights of a repository, downloaded if need be and checked.

    Args:
        repo_id: Repository.
        revision: Branch, tag or commit.
        record: Facts that the file must agree with; without them it is compared with the hash that the Hub gave.
        filename: Name of the file, which is a safetensors file.
        cache_dir: Cache to use in place of the Hub's own.

    Raises:
        HubError: The file cannot be had.
        IntegrityError: It is not what it should be.
    """
    _check_type(filename, repo_id, revision)
    path = download(repo_id, filename, revision, cache_dir)
    expected = record.sha256 if record else cache_digest(path) or _told_digest(repo_id, filename, revision)
    if expected:
        check_file(path, expected, f"the record of '{record.name}'" if record else 'the Hub')
    else:
        _logger.warning(
            f"'{filename}' of {_at(repo_id, revision)} came without a hash, and there is no record: whether its bytes "
            f'are intact cannot be told.')
    return path


def _told_digest(repo_id: str, filename: str, revision: str | None) -> str | None:
    """The sha256 in the Hub's list of files, for downloads whose headers carry none, as through some mirrors."""
    try:
        files = hf.HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=10).siblings or ()
    except Exception as e:  # whatever it is, the file itself is here
        _logger.info(f'{_at(repo_id, revision)} cannot be asked for hashes: {first_line(e)}')
        return None
    return next((f.lfs.sha256 for f in files if f.rfilename == filename and f.lfs), None)


def folder_weights(folder: str | os.PathLike) -> Path | None:
    """The file that the record of a folder covers, whatever else lies there; None for a folder without a record.

    Raises:
        IntegrityError: The file is missing, or not the one that the record is of.
        RecordError: The record does not follow the schema.
    """
    folder = Path(folder)
    if not (folder / RECORD_NAME).exists():
        return None
    record = read_record(folder)
    path = folder / record.file
    if not path.is_file():
        raise IntegrityError(
            f"'{path}' is missing, which '{folder / RECORD_NAME}' is of. Other files of the folder are not loaded in "
            f'its place: restore it, or delete the record to load what it does not cover.')
    check_file(path, record.sha256, f"'{folder / RECORD_NAME}'", 'Restore the file the record is of.')
    return path


def repo_weights(
        repo_id: str,
        revision: str | None = None,
        filename: str | None = None,
        cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Path of the weights of a repository of the caller's choice, which must agree with its record if it has one.

    Args:
        repo_id: Repository.
        revision: Branch, tag or commit.
        filename: Name of the file; by default the record's, or else model.safetensors.
        cache_dir: Cache to use in place of the Hub's own.

    Raises:
        HubError: The file cannot be had, or the record covers another one.
        IntegrityError: It is not what it should be.
        RecordError: The record does not follow the schema.
    """
    record = None
    _check_type(filename or WEIGHTS_NAME, repo_id, revision)
    try:
        record = read_record(download(repo_id, RECORD_NAME, revision, cache_dir).parent)
    except HubError as e:
        # without a connection a record that was never seen is not asked for: the weights then come from the cache; and
        # what is wrong with the repository itself, their download says
        nothing_there = isinstance(e.__cause__, (
            hf_errors.EntryNotFoundError, hf_errors.RepositoryNotFoundError, hf_errors.RevisionNotFoundError))
        nothing_there = nothing_there and not isinstance(e.__cause__, hf_errors.LocalEntryNotFoundError)
        if not nothing_there and not _is_cached(repo_id, filename or WEIGHTS_NAME, revision, cache_dir):
            raise
    if record and filename and filename != record.file:
        raise HubError(
            f"'{filename}' of {_at(repo_id, revision)} is not loaded: the repository's record covers '{record.file}'.")
    return download_weights(
        repo_id, revision, record, record.file if record else filename or WEIGHTS_NAME, cache_dir)


def _is_cached(repo_id: str, filename: str, revision: str | None, cache_dir: str | os.PathLike | None) -> bool:
    return isinstance(hf.try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision), str)
