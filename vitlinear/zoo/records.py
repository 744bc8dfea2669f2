"""The facts about each published checkpoint, written once: `record.json` in the checkpoint's folder.

The registry's default cfgs, the model cards, the tables, the checks after a download and the tests all read them from
here. Reading needs neither torch nor timm, for it happens when the package is imported.
"""
import csv
import difflib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import IO, Any, get_args, get_origin, get_type_hints

__all__ = [
    'Cfg', 'Dataset', 'Hub', 'Metric', 'Provenance', 'Record', 'Training',
    'find_record', 'read_record', 'record_from_dict', 'record_text', 'records', 'weights_cfg', 'write_record',
    'write_text',
]

RECORD_NAME = 'record.json'
WEIGHTS_NAME = 'model.safetensors'

_ARCH_TAG = re.compile(r'[a-z][a-z0-9_]*\.[A-Za-z0-9_]+')
REPO_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', re.ASCII)
_DATASET_ID = re.compile(r'([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*', re.ASCII)
_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos', 'random')


class RecordError(ValueError):
    """A record that does not follow the schema."""


def _need(condition: Any, where: str, value: Any, valid: str) -> None:
    if not condition:
        raise RecordError(f'{where} is {value!r}; it must be {valid}')


@dataclass(frozen=True)
class Hub:
    """Where the weights stand on the Hub, once they do: repository and commit."""
    repo_id: str | None = None
    revision: str | None = None

    def check(self, where: str) -> None:
        if self.repo_id is not None:
            _need(REPO_ID.fullmatch(self.repo_id), f'{where}.repo_id', self.repo_id, "null or of the form 'org/name'")
        if self.revision is not None:
            _need(re.fullmatch('[0-9a-f]{40}', self.revision), f'{where}.revision', self.revision,
                  'null or a commit of 40 hexadecimal digits')
            _need(self.repo_id, f'{where}.repo_id', self.repo_id, 'given where revision is')


@dataclass(frozen=True)
class Cfg:
    """What timm's pretrained cfg says about the input and the classes."""
    num_classes: int
    input_size: tuple[int, ...]
    pool_size: tuple[int, ...] | None
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label_names: tuple[str, ...] | None = None
    crop_mode: str = 'center'

    def check(self, where: str) -> None:
        _need(self.num_classes >= 0, f'{where}.num_classes', self.num_classes, '0 or more')
        _need(len(self.input_size) == 3 and min(self.input_size) > 0, f'{where}.input_size', self.input_size,
              'channels, height and width')
        _need(self.pool_size is None or (len(self.pool_size) == 2 and min(self.pool_size) > 0), f'{where}.pool_size',
              self.pool_size, 'height and width')
        _need(0 < self.crop_pct <= 1, f'{where}.crop_pct', self.crop_pct, 'more than 0 and at most 1')
        _need(self.interpolation in _INTERPOLATIONS, f'{where}.interpolation', self.interpolation,
              f'one of {", ".join(_INTERPOLATIONS)}')
        for name in ('mean', 'std'):
            value = getattr(self, name)
            _need(len(value) == self.input_size[0], f'{where}.{name}', value,
                  f'{self.input_size[0]} number(s), one for each channel of input_size')
        _need(min(self.std) > 0, f'{where}.std', self.std, 'more than 0')
        names = self.label_names
        _need(names is None or len(names) == self.num_classes, f'{where}.label_names', names,
              f'null or {self.num_classes} names, one for each class')


@dataclass(frozen=True)
class Dataset:
    """What the weights were trained on; `id` is a dataset id of the Hub."""
    id: str | None
    name: str
    url: str | None = None
    license: str | None = None
    train_images: int | None = None
    test_images: int | None = None

    def check(self, where: str) -> None:
        _need(self.id is None or _DATASET_ID.fullmatch(self.id), f'{where}.id', self.id, "null or a Hub dataset's id")


@dataclass(frozen=True)
class Metric:
    """One measured number and the command that measures it again."""
    name: str
    unit: str
    value: float
    split: str
    images: int | None = None
    dtype: str | None = None
    seed: int | None = None
    command: str | None = None

    def check(self, where: str) -> None:
        _need(self.unit != '%' or 0 <= self.value <= 100, f'{where}.value', self.value, 'between 0 and 100 percent')


@dataclass(frozen=True)
class Training:
    """How the weights were made. `weights` says which of a run's weights they are, `log` names a file of the folder."""
    config: str | None = None
    command: str | None = None
    hardware: str | None = None
    wall_time: str | None = None
    epochs: int | None = None
    seeds: tuple[int, ...] = ()
    weights: str | None = None
    log: str | None = None
    software: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Provenance:
    """Who trained the weights, and what of the model is the paper's, what reconstructed and what ours."""
    trained_by: str
    mechanism: str
    configuration: str


@dataclass(frozen=True)
class Record:
    """Everything known about one checkpoint.

    Attributes:
        macs: Multiply-accumulates for one image of `cfg.input_size`, the attention products counted.
        folder: Where the record was read from.
    """
    name: str
    architecture: str
    tag: str
    file: str
    sha256: str
    size: int
    hub: Hub
    cfg: Cfg
    dataset: Dataset | None
    metrics: tuple[Metric, ...]
    parameters: int
    macs: int | None
    training: Training | None
    license: str | None
    provenance: Provenance
    limits: str | None = None
    folder: Path | None = field(default=None, compare=False, metadata={'stored': False})

    def check(self, where: str) -> None:
        _need(_ARCH_TAG.fullmatch(self.name), f'{where}name', self.name, "of the form 'architecture.tag'")
        _need(self.name == f'{self.architecture}.{self.tag}', f'{where}name', self.name,
              f"'{self.architecture}.{self.tag}', as architecture and tag say")
        _need(re.fullmatch(r'[\w-][\w.-]*\.safetensors', self.file, re.ASCII), f'{where}file', self.file,
              'the name of a safetensors file in the folder of the record')
        _need(re.fullmatch('[0-9a-f]{64}', self.sha256), f'{where}sha256', self.sha256, '64 hexadecimal digits')
        for name in ('size', 'parameters'):
            _need(getattr(self, name) > 0, f'{where}{name}', getattr(self, name), 'more than 0')

    @property
    def weights(self) -> Path | None:
        """The file of the weights, None where it is not beside the record."""
        path = self.folder / self.file if self.folder else None
        return path if path and path.is_file() else None

    def to_dict(self) -> dict[str, Any]:
        """The contents of record.json."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.metadata.get('stored', True)}


def _plain(value: Any) -> Any:
    value = asdict(value) if is_dataclass(value) else value
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value`, as read from JSON, in the type that a field is annotated with."""
    if get_origin(hint) is UnionType:
        if value is None:
            return None
        hint = get_args(hint)[0]
    if is_dataclass(hint):
        return _build(hint, value, where)
    if get_origin(hint) is tuple:
        _need(isinstance(value, (list, tuple)), where, value, 'a list')
        return tuple(_typed(get_args(hint)[0], v, f'{where}[{i}]') for i, v in enumerate(value))
    if get_origin(hint) is dict:
        _need(isinstance(value, dict), where, value, 'an object')
        return {k: _typed(get_args(hint)[1], v, f'{where}.{k}') for k, v in value.items()}
    if hint is float:
        _need(isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float('inf'), where,
              value, 'a finite number')
        return float(value)
    names = {int: 'an integer', str: 'a string'}
    _need(isinstance(value, hint) and not isinstance(value, bool), where, value, names[hint])
    _need(hint is not str or value.strip(), where, value, 'a string that is not empty')
    return value


def _build(cls: type, data: Any, where: str = '') -> Any:
    _need(isinstance(data, dict), where or 'the record', data, 'an object')
    hints = get_type_hints(cls)
    stored = {f.name: f for f in fields(cls) if f.metadata.get('stored', True)}
    prefix = f'{where}.' if where else ''
    for key in data:
        if key not in stored:
            near = difflib.get_close_matches(key, stored, n=1)
            raise RecordError(f'{prefix}{key} is no field of a record' + (f", '{near[0]}' is" if near else ''))
    for name, f in stored.items():
        if name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise RecordError(f'{prefix}{name} is missing')
    made = cls(**{name: _typed(hints[name], data[name], f'{prefix}{name}') for name in stored if name in data})
    if hasattr(made, 'check'):
        made.check(where)
    return made


def record_from_dict(data: dict[str, Any], folder: Path | None = None) -> Record:
    """Make a record of the contents of a record.json.

    Raises:
        RecordError: A field is missing, unknown, or not as the schema wants it.
    """
    record = _build(Record, data)
    object.__setattr__(record, 'folder', folder)
    return record


def read_record(folder: str | os.PathLike) -> Record:
    """Read the record of a checkpoint's folder.

    Raises:
        FileNotFoundError: The folder has no record.json.
        RecordError: The file does not follow the schema.
    """
    path = Path(folder) / RECORD_NAME
    try:
        return record_from_dict(json.loads(path.read_text(encoding='utf-8')), path.parent)
    except RecordError as e:
        raise RecordError(f"'{path}': {e}") from None
    except ValueError as e:
        raise RecordError(f"'{path}' is not readable as JSON: {e}") from e


@contextmanager
def whole_file(path: str | os.PathLike, mode: str, encoding: str | None = None) -> Iterator[IO]:
    """A file to write, which takes the place of `path` at the end, or leaves it as it is if writing fails."""
    path = Path(path)
    handle, new = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, mode, encoding=encoding) as f:
            yield f
        os.chmod(new, 0o644)  # mkstemp makes files for the owner alone
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path, 'w', encoding='utf-8') as f:
        f.write(text)


def csv_text(fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A CSV file with a line of headings."""
    out = io.StringIO(newline='')
    writer = csv.DictWriter(out, fields, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def record_text(record: Record) -> str:
    """The contents of record.json, checked."""
    data = record.to_dict()
    record_from_dict(data)
    text = json.dumps(data, indent=2, ensure_ascii=False)
    # lists of numbers on one line, as people write them
    return re.sub(r'\[\s+([-\d.e+]+(?:,\s+[-\d.e+]+)*)\s+\]', lambda m: f'[{" ".join(m[1].split())}]', text) + '\n'


def write_record(record: Record, folder: str | os.PathLike) -> None:
    """Write record.json into a folder, checked, whole or not at all."""
    write_text(Path(folder) / RECORD_NAME, record_text(record))


_RECORDS: dict[str, Record] | None = None


def _roots() -> list[Path]:
    """Folders of folders: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return [package / 'model_cards', package.parent / 'model_cards']


def records() -> dict[str, Record]:
    """The records of all published checkpoints by name, read once.

    A folder without record.json is none of ours: its tag counts as one without weights.
    """
    global _RECORDS
    if _RECORDS is None:
        found: dict[str, Record] = {}
        for path in [p for root in _roots() for p in sorted(root.glob(f'*/{RECORD_NAME}'))]:
            record = read_record(path.parent)
            folder = path.parent.name
            _need(record.name == folder, f"'{path}': name", record.name, f"that of its folder, '{folder}'")
            found.setdefault(record.name, record)
        _RECORDS = found
    return dict(_RECORDS)


def find_record(name: str) -> Record | None:
    """The record of a checkpoint by architecture and tag, None where there is none."""
    return records().get(name)


def weights_cfg(name: str) -> dict[str, Any]:
    """Fields of timm's pretrained cfg for a checkpoint such as 'vvt_nano.fashion_mnist'.

    They are those of the record's `cfg`, the licence, the file where the package carries it and the repository where
    there is one. Where there is no record there are none: the tag then has no weights.
    """
    record = find_record(name)
    if record is None:
        return {}
    cfg = {f.name: getattr(record.cfg, f.name) for f in fields(record.cfg)}
    cfg['license'] = record.license
    if record.weights is not None:
        cfg['file'] = str(record.weights)
    if record.hub.repo_id is not None:
        cfg['hf_hub_id'] = '@'.join(filter(None, (record.hub.repo_id, record.hub.revision)))
    return cfg
