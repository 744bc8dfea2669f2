"""Folders of checkpoints to the Hub, from it, and checked: `vitlinear push`, `vitlinear pull`, `vitlinear verify`.

    vitlinear push model_cards/vvt_nano.fashion_mnist org/vvt_nano.fashion_mnist --dry-run
    vitlinear pull org/vvt_nano.fashion_mnist vvt_nano.fashion_mnist
    vitlinear verify vvt_nano.fashion_mnist

The token is the one that `hf auth login` stored, or HF_TOKEN.
"""
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub as hf
from huggingface_hub import errors as hf_errors
from huggingface_hub.utils.sha import git_hash

import vitlinear

from ..zoo import hub, records
from ..zoo.records import RECORD_NAME, REPO_ID, WEIGHTS_NAME, Hub, Record, find_record, read_record
from . import _errors, _flags
from ._errors import RunError, UsageError, suggest
from ._folders import CARD_NAME, PICKLES, check_target, folder_files, folder_problems, new_folder
from .cards import render_card, write_card

__all__ = ['folder_problems', 'pull', 'push', 'repo_problems']


def _check_repo_id(repo_id: str) -> None:
    if not REPO_ID.fullmatch(repo_id):
        raise UsageError(f'{repo_id} is no name of a repository on the Hub, which looks like org/name')


def push(
        folder: str | Path,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
        dry_run: bool = False,
        finite: bool = True,
) -> str | None:
    """Send the folder of a checkpoint to the Hub: what is new or changed there, and nothing else.

    Afterwards the record in the folder names the repository and the commit.

    Args:
        folder: Folder with weights, config, record and card.
        repo_id: Repository, made if there is none.
        private: Make it a private one.
        revision: Branch, made if there is none.
        dry_run: Only list what would be sent.
        finite: Refuse NaN and Inf among the weights.

    Returns:
        The commit that holds the files, None for a dry run.
    """
    folder = Path(folder)
    _check_repo_id(repo_id)
    problems = folder_problems(folder, finite=finite)
    if problems:
        raise UsageError(f'{folder} is not fit to be published: {"; ".join(problems)}')
    record = read_record(folder)
    files: dict[str, bytes | Path] = dict(folder_files(folder))
    # the commit that a record stands in cannot be told in it
    files[RECORD_NAME] = records.record_text(replace(record, hub=Hub(repo_id))).encode()
    generated = (folder / CARD_NAME).read_text(encoding='utf-8') == render_card(record)
    if generated:
        files[CARD_NAME] = render_card(record, repo_id).encode()
    uploads = [hf.CommitOperationAdd(name, content) for name, content in files.items()]
    doing = f"'{folder}' cannot be pushed to '{repo_id}'"
    api = hf.HfApi(library_name='vitlinear', library_version=vitlinear.__version__)
    if not dry_run and hf.get_token() is None:
        raise RunError(f'{doing}: no token was found: `hf auth login`, or set HF_TOKEN.')

    info = branch = None
    try:
        with hub.hub_errors(doing, repo_id):
            info = _info(api, repo_id, None)
            branch = _info(api, repo_id, revision) if info and revision else info
    except Exception as e:
        if not dry_run:
            raise
        print(f'The Hub was not asked what it has already: {e}', file=sys.stderr)
    if info and private and not info.private:
        raise RunError(f"{doing}: it exists and is public; --private is for new repositories.")
    there = {s.rfilename: s for s in branch.siblings} if branch else {}
    changed = []
    for upload in uploads:
        state, about = _state(upload, there.get(upload.path_in_repo)), upload.upload_info
        print(f'{state:<9}  {about.size:>12,}  {about.sha256.hex()}  {upload.path_in_repo}')
        if state != 'unchanged':
            changed.append(upload)
    size = sum(upload.upload_info.size for upload in changed)
    kind = '' if info else 'private ' if private else 'public '
    where = f"the {'repository' if info else f'new {kind}repository'} {repo_id}"
    where += f', branch {revision}' if revision else ''
    if dry_run:
        print(f'Dry run: nothing was sent. {len(changed)} files of {size:,} bytes would go to {where}.')
        return None

    commit = record.hub.revision if record.hub.repo_id == repo_id else None
    if changed:
        with hub.hub_errors(doing, repo_id, revision):
            if info is None:
                api.create_repo(repo_id, private=private, exist_ok=True)
            if revision and branch is None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.create_commit(
                repo_id,
                operations=changed,
                commit_message=f'{record.name}: {", ".join(upload.path_in_repo for upload in changed)}',
                revision=revision,
            ).oid
    commit = commit or branch.sha
    record = replace(record, hub=Hub(repo_id, commit), folder=folder)
    records.write_record(record, folder)
    if generated:
        write_card(folder, record)
    print(f'{len(changed)} files of {size:,} bytes sent to {where}, commit {commit}.' if changed else
          f'Nothing to send: {where} has it all, commit {commit}.')
    return commit


def _state(upload: hf.CommitOperationAdd, remote: Any | None) -> str:
    """'new', 'changed' or 'unchanged' against a file of a repository."""
    if remote is None:
        return 'new'
    if remote.lfs:
        same = remote.lfs.sha256 == upload.upload_info.sha256.hex()
    else:
        with upload.as_file() as f:
            same = remote.blob_id == git_hash(f.read())
    return 'unchanged' if same else 'changed'


def _info(api: hf.HfApi, repo_id: str, revision: str | None) -> Any | None:
    try:
        return api.model_info(repo_id, revision=revision, files_metadata=True, timeout=10)
    except hf_errors.GatedRepoError:
        raise
    except (hf_errors.RepositoryNotFoundError, hf_errors.RevisionNotFoundError):
        return None


def _fetch(repo_id: str, revision: str | None) -> tuple[str, dict[str, Path]]:
    """The commit of a repository and its files, downloaded and each compared with the hash that the Hub gives."""
    with hub.hub_errors(f"'{repo_id}' cannot be had", repo_id, revision):
        info = hf.HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=10)
    names = [s.rfilename for s in info.siblings]
    if WEIGHTS_NAME not in names:
        raise RunError(f"'{repo_id}' has no {WEIGHTS_NAME}; it holds {', '.join(names[:8]) or 'nothing'}")
    files = {}
    for sibling in info.siblings:
        name = PurePosixPath(sibling.rfilename)
        if name.is_absolute() or any(part.startswith('.') for part in name.parts):
            continue
        if name.name.lower().endswith(PICKLES):
            print(f'{name} is left out: it is or may be a pickle', file=sys.stderr)
            continue
        path = hub.download(repo_id, str(name), info.sha)
        expected = sibling.lfs.sha256 if sibling.lfs else hub.cache_digest(path)
        if expected:
            hub.check_file(path, expected, 'the Hub')
        elif sibling.blob_id and git_hash(path.read_bytes()) != sibling.blob_id:
            raise hub.IntegrityError(
                f"'{path.resolve()}' is damaged: the Hub has other contents. Delete it to have it downloaded again.")
        files[str(name)] = path
    return info.sha, files


def pull(repo_id: str, folder: str | Path, revision: str | None = None) -> Path:
    """Download the folder of a checkpoint, check it, and put it in place whole.

    Args:
        repo_id: Repository.
        folder: Folder to write. One that holds a checkpoint already is replaced; its other files are kept.
        revision: Branch, tag or commit.
    """
    folder = Path(folder)
    _check_repo_id(repo_id)
    check_target(folder)
    commit, files = _fetch(repo_id, revision)
    with new_folder(folder) as new:
        if folder.is_dir():
            shutil.copytree(folder, new, dirs_exist_ok=True)
        for name, path in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, new / name)
        problems = folder_problems(new, need_record=False, finite=False)
        if problems:
            raise RunError(f"'{repo_id}' was not taken: {'; '.join(problems)}")
        if RECORD_NAME in files:
            record = read_record(new)
            records.write_record(replace(record, hub=Hub(repo_id, commit), folder=None), new)
        else:
            print(f'{repo_id} has no {RECORD_NAME}: its weights were compared with the hash on the Hub alone',
                  file=sys.stderr)
    print(f'{folder}: {len(files)} files of {repo_id}, commit {commit}')
    return folder


def repo_problems(repo_id: str, revision: str | None = None, record: Record | None = None) -> list[str]:
    """What is wrong with a repository: as for folders; and that its weights are not those of `record`, if given."""
    _, files = _fetch(repo_id, revision)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / repo_id.rpartition('/')[2]
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path.resolve())
        problems = folder_problems(folder)
        if record:
            found = hub.sha256(folder / WEIGHTS_NAME)
            if found != record.sha256:
                problems.append(
                    f"{WEIGHTS_NAME} has the sha256 {found}, the record of '{record.name}' says {record.sha256}")
        return problems


def _tell(what: str, problems: Sequence[str]) -> None:
    if problems:
        raise RunError(f'{what}: {"; ".join(problems)}')
    print(f'{what}: the weights are those of the record, and fit the model')


@contextmanager
def _run_errors() -> Iterator[None]:
    """Whatever fails once the command line has been understood ends the run with code 1."""
    try:
        yield
    except UsageError:
        raise
    except hub.HubError as e:
        raise RunError(str(e)) from e
    except Exception as e:
        raise RunError(f'{type(e).__name__}: {hub.first_line(e)}') from e


@_errors.command('push')
@_run_errors()
def main_push(argv: Sequence[str] | None) -> None:
    parser = _flags.Parser('push', {}, description='Send the folder of a checkpoint to the Hub.')
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='folder with weights, config, record and card')
    parser.add_argument('repo', metavar='ORG/NAME', help='repository on the Hub, made if there is none')
    parser.add_argument('--private', action='store_true', help='make a private repository')
    parser.add_argument('--revision', metavar='BRANCH', help='branch to push to, made if there is none')
    parser.add_argument('--dry-run', action='store_true', help='list what would be sent, send nothing')
    parser.add_argument('--allow-non-finite', action='store_true', help='send weights with NaN or Inf too')
    args = parser.parse_args(argv)
    push(args.folder, args.repo, args.private, args.revision, args.dry_run, not args.allow_non_finite)


@_errors.command('pull')
@_run_errors()
def main_pull(argv: Sequence[str] | None) -> None:
    parser = _flags.Parser('pull', {}, description='Download the folder of a checkpoint from the Hub and check it.')
    parser.add_argument('repo', metavar='ORG/NAME', help='repository on the Hub')
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='folder to write')
    parser.add_argument('--revision', metavar='REV', help='branch, tag or commit')
    args = parser.parse_args(argv)
    pull(args.repo, args.folder, args.revision)


@_errors.command('verify')
@_run_errors()
def main_verify(argv: Sequence[str] | None) -> None:
    parser = _flags.Parser('verify', {}, description='Check the weights of a folder, a repository or a tag.')
    parser.add_argument(
        'what', metavar='WHAT', help='folder, org/name or org/name@revision on the Hub, or architecture.tag')
    what = parser.parse_args(argv).what
    repo_id, _, revision = what.partition('@')
    if Path(what).is_dir():
        _tell(what, folder_problems(what))
    elif REPO_ID.fullmatch(repo_id):
        record = find_record(repo_id.rpartition('/')[2])
        ours = record and repo_id in (record.hub.repo_id, f'{hub.hub_org()}/{record.name}')
        _tell(what, repo_problems(repo_id, revision or None, record if ours else None))
    elif record := find_record(what):
        repo = hub.weights_repo(what)
        if record.weights:
            _tell(f'{what} in {record.folder}', folder_problems(record.folder))
        if repo:
            _tell(f'{what} in {repo[0]} on the Hub', repo_problems(*repo, record))
        if not record.weights and not repo:
            raise RunError(f'{what}: its weights are neither here nor on the Hub')
    else:
        near = suggest(what, records.records())
        raise UsageError(f'{what} is no folder, no repository org/name and no checkpoint of ours{near}')
