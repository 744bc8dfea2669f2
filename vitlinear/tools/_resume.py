"""Checkpoints of a run: what writes them, and what has to hold before one is continued."""
import argparse
import math
import os
import re
from typing import Any

from timm import utils

from ._errors import UsageError

# Arguments that may differ between a run and its continuation without changing what is computed.
_NOT_COMPUTED = {'resume', 'output', 'experiment', 'log_interval', 'checkpoint_hist', 'device_modules', 'pin_mem',
                 'data', 'data_dir', 'dataset_download', 'start_epoch', 'validation_batch_size', 'synchronize_step',
                 'rank', 'local_rank', 'no_resume_opt'}


class Saver(utils.CheckpointSaver):
    """timm's saver, leaving good files in place until the new ones are complete, whenever the process is killed."""

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
        epoch, metric = state['pending']
        if metric is not None and (state['best_metric'] is None or self.cmp(metric, state['best_metric'])):
            self._duplicate(path, self._checkpoint_path(epoch))  # the run may have died before doing so
        self.load_state_dict(state)
        if self.checkpoint_files and self.checkpoint_files[0][1] == self.best_metric:
            self._duplicate(self.checkpoint_files[0][0], os.path.join(self.checkpoint_dir, 'model_best.pth.tar'))


def check_history(history: Any) -> None:
    """Raise UsageError unless the history in a checkpoint speaks of checkpoints in the folder of its run alone.

    The saver links, overwrites and deletes the files that it names.
    """
    def is_metric(x: Any) -> bool:
        return x is None or (isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x))

    def is_epoch(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and x >= 0

    def need(condition: bool, name: str, value: Any, valid: str) -> None:
        if not condition:
            raise UsageError(f'the history of the run has {name} {value!r:.80}, which must be {valid}')

    need(isinstance(history, dict), 'the form', history, 'a dict')
    pending = history.get('pending')
    need(isinstance(pending, (list, tuple)) and len(pending) == 2 and is_epoch(pending[0]) and is_metric(pending[1]),
         'pending', pending, 'an epoch and a metric')
    files = history.get('checkpoint_files')
    need(isinstance(files, (list, tuple)), 'checkpoint_files', files, 'a list')
    for entry in files:
        need(isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], str)
             and re.fullmatch(r'checkpoint-[0-9]{1,9}\.pth\.tar', entry[0]) is not None and is_metric(entry[1]),
             'the checkpoint', entry, "a name like 'checkpoint-0.pth.tar' and a metric")
    best_epoch, best_metric = history.get('best_epoch'), history.get('best_metric')
    need(best_epoch is None or is_epoch(best_epoch), 'best_epoch', best_epoch, 'an epoch')
    need(is_metric(best_metric), 'best_metric', best_metric, 'a finite number')


def read_resume(args: argparse.Namespace) -> dict[str, Any]:
    """Everything but the tensors of the --resume file, or what is wrong with it."""
    if not os.path.isfile(args.resume):
        raise UsageError(f'--resume {args.resume}: no such file')
    if args.sched == 'plateau':
        raise UsageError('--resume: checkpoints do not hold the state of --sched plateau, such runs cannot be resumed')
    try:
        checkpoint = utils.load_checkpoint_metadata(args.resume)
    except Exception as e:
        raise UsageError(f'--resume {args.resume}: damaged, or not a checkpoint') from e
    if not isinstance(checkpoint, dict) or not {'epoch', 'state_dict', 'optimizer'} <= checkpoint.keys():
        raise UsageError(f'--resume {args.resume}: not a training checkpoint (weights alone: --initial-checkpoint)')
    if checkpoint.get('arch', args.model).partition('.')[0] != args.model.partition('.')[0]:
        raise UsageError(f'--resume {args.resume}: a checkpoint of {checkpoint["arch"]}, not of {args.model}')
    if checkpoint.get('saver') is not None:
        try:
            check_history(checkpoint['saver'])
        except UsageError as e:
            raise UsageError(f'--resume {args.resume}: {e}') from None
    return checkpoint


def changed_arguments(before: argparse.Namespace, now: argparse.Namespace) -> str:
    """What differs between the arguments of a run and those of its continuation and has an effect on the weights."""
    keys = vars(before).keys() & vars(now).keys() - _NOT_COMPUTED
    pairs = [(k, getattr(before, k), getattr(now, k)) for k in sorted(keys)]
    return ', '.join(f'{k} {old} -> {new}' for k, old, new in pairs if old != new)
