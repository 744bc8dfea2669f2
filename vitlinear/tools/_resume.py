"""Checkpoints of a run: what writes them, and what has to hold before one is continued."""
import argparse
import csv
import io
import math
import os
import re
import reprlib
from typing import Any

from timm import utils

from ..zoo.files import check_archive
from ..zoo.records import write_text
from ._errors import UsageError, usage_errors

# Arguments that may differ between a run and its continuation without changing what is computed.
_NOT_COMPUTED = {'resume', 'output', 'experiment', 'log_interval', 'checkpoint_hist', 'device_modules', 'pin_mem',
                 'data', 'data_dir', 'dataset_download', 'start_epoch', 'validation_batch_size', 'synchronize_step',
                 'rank', 'local_rank', 'no_resume_opt', 'max_unreadable'}

_LEFT_OVER = re.compile(r'tmp\.pth\.tar|(checkpoint-[0-9]+|model_best)\.pth\.tar\.new')


class Saver(utils.CheckpointSaver):
    """timm's saver, leaving good files in place until the new ones are complete, whenever the process is killed."""

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        try:
            super()._save(save_path, epoch, metric)
        except BaseException:
            if os.path.exists(save_path):
                os.unlink(save_path)
            raise

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        new = f'{dst}.new'
        super()._duplicate(src, new)
        os.replace(new, dst)
        if os.path.exists(new):  # renaming a hard link over another one of the same file does nothing
            os.unlink(new)

    def resume(self, path: str, state: dict[str, Any] | None) -> None:
        """Take up the history that came with the checkpoint `path`, if that lies in the folder of this saver."""
        if state is None or os.path.realpath(os.path.dirname(path)) != os.path.realpath(self.checkpoint_dir):
            return
        for name in filter(_LEFT_OVER.fullmatch, os.listdir(self.checkpoint_dir)):
            os.unlink(os.path.join(self.checkpoint_dir, name))
        epoch, metric = state['pending']
        self.load_state_dict({**state, 'pending': (None, None)})
        # what follows the writing of a checkpoint, which the run may have died before doing
        worst = self.checkpoint_files[-1][1] if self.checkpoint_files else None
        if len(self.checkpoint_files) < self.max_history or worst is None or (
                metric is not None and self.cmp(metric, worst)):
            if len(self.checkpoint_files) >= self.max_history:
                self._cleanup_checkpoints(1)
            self._duplicate(path, self._checkpoint_path(epoch))
            self._track_checkpoint(self._checkpoint_path(epoch), epoch, metric, update_best_file=False)
        if self.checkpoint_files and self.checkpoint_files[0][1] == self.best_metric:
            self._duplicate(self.checkpoint_files[0][0], os.path.join(self.checkpoint_dir, 'model_best.pth.tar'))


def _is_metric(x: Any) -> bool:
    return x is None or (isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x))


def _is_epoch(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 10 ** 9


def _need(condition: bool, where: str, name: str, value: Any, valid: str) -> None:
    if not condition:
        raise UsageError(f'{where} has {name} {reprlib.repr(value)}, which must be {valid}')


def check_history(history: Any, where: str) -> None:
    """Raise UsageError unless the history in a checkpoint speaks of checkpoints in the folder of its run alone.

    The saver links, overwrites and deletes the files that it names.
    """
    _need(isinstance(history, dict), where, 'the form', history, 'a dict')
    pending = history.get('pending')
    _need(isinstance(pending, (list, tuple)) and len(pending) == 2 and _is_epoch(pending[0]) and _is_metric(pending[1]),
          where, 'pending', pending, 'an epoch and a metric')
    files = history.get('checkpoint_files')
    _need(isinstance(files, (list, tuple)), where, 'checkpoint_files', files, 'a list')
    for entry in files:
        _need(isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], str)
              and re.fullmatch(r'checkpoint-[0-9]{1,9}\.pth\.tar', entry[0]) is not None and _is_metric(entry[1]),
              where, 'the checkpoint', entry, "a name like 'checkpoint-0.pth.tar' and a metric")
    best_epoch, best_metric = history.get('best_epoch'), history.get('best_metric')
    _need(best_epoch is None or _is_epoch(best_epoch), where, 'best_epoch', best_epoch, 'an epoch')
    _need(_is_metric(best_metric), where, 'best_metric', best_metric, 'a finite number')


def read_resume(args: argparse.Namespace) -> dict[str, Any]:
    """Everything but the tensors of the --resume file, or what is wrong with it."""
    where = f'--resume {args.resume}:'
    if not os.path.isfile(args.resume):
        raise UsageError(f'{where} no such file')
    if args.sched == 'plateau':
        raise UsageError('--resume: checkpoints do not hold the state of --sched plateau, such runs cannot be resumed')
    with usage_errors(where[:-1]):
        check_archive(args.resume)
    try:
        checkpoint = utils.load_checkpoint_metadata(args.resume)
    except Exception as e:
        raise UsageError(f'{where} damaged, or not a checkpoint') from e
    if not isinstance(checkpoint, dict) or not {'epoch', 'state_dict', 'optimizer'} <= checkpoint.keys():
        raise UsageError(f'{where} not a training checkpoint (weights alone: --initial-checkpoint)')
    it = f'{where} it'
    entries = {'arch': args.model, 'version': 2, **checkpoint}
    kinds = [('state_dict', dict, 'a dict'), ('optimizer', dict, 'a dict'), ('arch', str, 'the name of a model'),
             ('version', int, 'a whole number'), ('args', (argparse.Namespace, type(None)), 'a Namespace')]
    for name, kind, valid in kinds:
        _need(isinstance(entries.get(name), kind), it, name, entries.get(name), valid)
    _need(_is_epoch(entries['epoch']), it, 'epoch', entries['epoch'], 'a whole number, not negative')
    _need(_is_metric(entries.get('metric')), it, 'metric', entries.get('metric'), 'a finite number')
    if entries['arch'].partition('.')[0] != args.model.partition('.')[0]:
        raise UsageError(f'{where} a checkpoint of {entries["arch"]}, not of {args.model}')
    if args.model_ema and not any(isinstance(entries.get(k), dict) for k in ('state_dict_ema', 'model_ema')):
        raise UsageError(
            f'{where} it holds no moving average for --model-ema to go on with; to begin one with these weights, start '
            f'a run with --initial-checkpoint')
    if entries.get('saver') is not None:
        check_history(entries['saver'], f'{where} the history of the run')
    return checkpoint


def trim_summary(path: str, start_epoch: int) -> None:
    """Drop the rows of summary.csv at and after an epoch, and what is no whole row; whole or not at all."""
    if not os.path.exists(path):
        return
    with usage_errors(f'{path} is no table of a run, move it away'):
        with open(path, newline='') as f:
            rows = list(csv.reader(f))
    header = rows[0] if rows else []
    kept = [row for row in rows[1:] if len(row) == len(header) and row[0].isdecimal() and int(row[0]) < start_epoch]
    out = io.StringIO(newline='')
    csv.writer(out).writerows([header, *kept] if kept else [])
    write_text(path, out.getvalue())


def changed_arguments(before: argparse.Namespace, now: argparse.Namespace) -> str:
    """What differs between the arguments of a run and those of its continuation and has an effect on the weights."""
    keys = vars(before).keys() & vars(now).keys() - _NOT_COMPUTED
    pairs = [(k, getattr(before, k), getattr(now, k)) for k in sorted(keys)]
    return ', '.join(f'{k} {old} -> {new}' for k, old, new in pairs if old != new)
