"""Folders of checkpoints: what may be written where, what is wrong with one; and the operations of a model."""
import io
import json
import os
import pickletools
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models._weights import check_size
from ..zoo.hub import first_line, sha256
from ..zoo.records import RECORD_NAME, WEIGHTS_NAME, Record, RecordError, read_record
from ._errors import UsageError

CARD_NAME = 'README.md'
PICKLES = ('.bin', '.pth', '.pt', '.pkl', '.pickle', '.ckpt', '.tar', '.npy', '.npz', '.joblib', '.dill', '.msgpack')
_CODE = ('.py', '.pyc', '.pyd', '.so', '.dll', '.dylib', '.exe', '.sh', '.bat', '.js', '.ipynb')
_ARCHIVES = (b'PK\x03\x04', b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'7z\xbc\xaf', b'Rar!')
# where a pickle may begin: the mark of protocols 2 to 5, and the instructions that older ones import with
_PICKLE_START = re.compile(rb'\x80[\x02-\x05]|[ci][\w.]+\n[\w.]+\n')


def count_macs(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-accumulates for one image, the attention products counted.

    Args:
        model: A model on the device 'meta'.
        input_size: Channels, height and width.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device='meta'))
    return counter.get_total_flops() // 2


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` once it is complete and leaves nothing behind otherwise."""
    folder = Path(os.path.abspath(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'.{folder.name}.'))
    except OSError as e:
        raise UsageError(f'{folder} cannot be made: {e.strerror}') from e
    try:
        new = work / folder.name  # cards name the folder
        new.mkdir()
        yield new
        for path in new.rglob('*'):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for the owner alone
        if folder.exists():
            folder.rename(work / 'old')
        new.rename(folder)
    except OSError as e:
        raise UsageError(f'{folder} cannot be written: {e.strerror or e}') from e
    finally:
        if (work / 'old').exists() and not folder.exists():
            (work / 'old').rename(folder)
        shutil.rmtree(work, ignore_errors=True)


def check_target(folder: Path) -> None:
    """Refuse to put a checkpoint in the place of something else."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f'{folder} is a file')
    if folder.is_dir() and any(folder.iterdir()) and not any(
            (folder / name).is_file() for name in (RECORD_NAME, 'config.json')):
        raise UsageError(f'{folder} holds other things than a checkpoint: give a new or empty folder')


def danger(path: Path) -> str | None:
    """Why a file is not published: what it is or may be, by name or by content; None for plain data."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        return 'is or may be a pickle, which can run code when loaded'
    if suffix in _CODE:
        return 'is code'
    if suffix == '.safetensors':
        return None  # read by its own parser alone, see `folder_problems`
    data = path.read_bytes()
    if data.startswith(_ARCHIVES) or zipfile.is_zipfile(path) or data[257:262] == b'ustar':
        return 'is an archive, in which anything may lie'
    stream = io.BytesIO(data)
    for start in _PICKLE_START.finditer(data):
        stream.seek(start.start())
        if _runs_code(stream):
            return 'holds a pickle, which can run code when loaded'
    return None


def _runs_code(stream: io.BytesIO) -> bool:
    """Whether a stream goes on with a whole pickle, of any protocol, that calls something."""
    found = set()
    try:
        for opcode, _, _ in pickletools.genops(stream):
            found.add(opcode.name)
    except Exception:  # no pickle; the parser raises whatever it stumbles over
        return False
    return not found.isdisjoint({'REDUCE', 'INST', 'OBJ', 'NEWOBJ', 'NEWOBJ_EX', 'BUILD'})


def folder_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that belong on the Hub, by name there: all but hidden ones."""
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob('*')) if p.is_file()}
    return {name: p for name, p in found.items() if not any(part.startswith('.') for part in name.split('/'))}


def folder_problems(folder: str | Path, need_record: bool = True, finite: bool = True) -> list[str]:
    """What is wrong with the folder of a checkpoint, as phrases; nothing if the list is empty.

    Checked are the hash and size that the record gives, the agreement of record, config and card, that the weights fit
    the architecture in names and shapes and are finite, and that no file can run code.

    Args:
        folder: The folder.
        need_record: Whether a missing record is a problem.
        finite: Whether NaN and Inf among the weights are.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f'{folder} is no folder']
    dangers = {name: danger(path) for name, path in folder_files(folder).items()}
    problems = [
        f'{name} {reason}: safetensors files and plain data are published, nothing else'
        for name, reason in dangers.items() if reason]
    config = _read_config(folder, problems)
    shapes = _read_shapes(folder, problems, finite)
    if config and shapes:
        problems += _misfits(folder, config, shapes)
    try:
        record = read_record(folder)
    except FileNotFoundError:
        return problems + ([f'{RECORD_NAME} is missing: there is nothing to check the weights against'] * need_record)
    except RecordError as e:
        return [*problems, str(e)]
    path = folder / record.file
    if record.file != WEIGHTS_NAME:
        problems.append(f'{RECORD_NAME} is about {record.file}; the weights are called {WEIGHTS_NAME} on the Hub')
    elif path.is_file():
        found, size = sha256(path), path.stat().st_size
        if found != record.sha256:
            problems.append(f'{record.file} has the sha256 {found}, {RECORD_NAME} says {record.sha256}')
        if size != record.size:
            problems.append(f'{record.file} has {size} bytes, {RECORD_NAME} says {record.size}')
    if config:
        problems += _disagreements(record, config)
    card = folder / CARD_NAME
    if not card.is_file():
        problems.append(f'{CARD_NAME} is missing: `vitlinear card {folder}` writes it')
    else:
        hashes = set(re.findall(r'\b[0-9a-f]{64}\b', card.read_text(encoding='utf-8', errors='replace')))
        if hashes and record.sha256 not in hashes:
            problems.append(f'{CARD_NAME} names the sha256 of other weights: `vitlinear card {folder}` writes it anew')
    return problems


def _read_config(folder: Path, problems: list[str]) -> dict[str, Any]:
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        architecture = config['architecture']
        if not isinstance(config['pretrained_cfg'], dict):
            raise TypeError('pretrained_cfg is no object')
    except FileNotFoundError:
        problems.append('config.json is missing')
    except (KeyError, TypeError, ValueError) as e:
        problems.append(f'config.json is no config of a timm model ({type(e).__name__}: {e})')
    else:
        if timm.is_model(architecture):
            return config
        problems.append(f'config.json names the architecture {architecture!r}, unknown to this vitlinear and timm')
    return {}


def _read_shapes(folder: Path, problems: list[str], finite: bool) -> dict[str, tuple[int, ...]]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        problems.append(f'{WEIGHTS_NAME} is missing')
        return {}
    shapes, wrong = {}, []
    try:
        with safe_open(path, 'pt') as f:
            for k in f.keys():
                x = f.get_tensor(k)
                shapes[k] = tuple(x.shape)
                if finite and not x.isfinite().all():
                    wrong.append(k)
    except (OSError, SafetensorError) as e:
        problems.append(f'{WEIGHTS_NAME} is no readable safetensors file ({e})')
        return {}
    if wrong:
        problems.append(
            f'{WEIGHTS_NAME} holds NaN or Inf in {len(wrong)} weights, {wrong[0]} among them (--allow-non-finite lets '
            f'them through)')
    return shapes


def _misfits(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    try:
        check_size(config['architecture'], config.get('model_args') or {})
        model = timm.create_model(f'local-dir:{folder}', pretrained=False, device='meta')
    except Exception as e:
        return [f'config.json makes no model ({first_line(e)})']
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    wrong = sorted(k for k in {*own, *shapes} if own.get(k) != shapes.get(k))
    if not wrong:
        return []
    name = wrong[0]
    return [
        f'{WEIGHTS_NAME} does not fit the model of config.json in {len(wrong)} places: {name} is '
        f'{shapes.get(name, "missing")}, expected {own.get(name, "nothing")}']


def _disagreements(record: Record, config: dict[str, Any]) -> list[str]:
    own = {k: config[k] for k in ('architecture', 'num_classes', 'label_names') if k in config}
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in {**config['pretrained_cfg'], **own}.items()}
    told = dict(architecture=record.architecture, tag=record.tag, **{
        name: getattr(record.cfg, name)
        for name in ('num_classes', 'input_size', 'mean', 'std', 'crop_pct', 'interpolation', 'label_names')})
    return [
        f'config.json says {name} = {found.get(name)!r}, {RECORD_NAME} {value!r}'
        for name, value in told.items() if found.get(name) != value]
