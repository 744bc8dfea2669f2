"""Train a classifier: `python -m vitlinear train --config configs/NAME.yaml --data-dir DIR`, also under torchrun.

Flags, defaults, YAML files and checkpoints are those of timm's train.py, of which this is a subset built from timm's
library. Ours: an interrupted run that is resumed into its own folder ends with the weights of an uninterrupted one,
bit for bit on one kind of machine; CPUs can train in several processes; wrong input gets an answer in one line; and
--castling-ramp, for the auxiliary branch of Castling models.

    vitlinear train ... --output runs --experiment a
    vitlinear train ... --output runs --experiment a --resume runs/a/last.pth.tar
"""
import argparse
import importlib
import math
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import yaml
from timm import utils
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint

import vitlinear  # noqa: F401  registers the models

from ..models import CastlingSchedule
from ..zoo.hub import first_line
from ..zoo.records import write_text
from . import _errors, _script
from ._datasets import check_readable
from ._errors import RunError, UsageError, ignore_workers, outside_problem, usage_errors
from ._resume import Saver, changed_arguments, read_resume, trim_summary
from ._script import Progress, clock
from ._train_args import build_parser
from ._train_data import make_loaders


def seed_epoch(seed: int, rank: int, epoch: int) -> None:
    """Seed every generator as a function of the arguments alone, so that a resumed epoch draws what it would have."""
    utils.random_seed(int(np.random.SeedSequence([seed, rank, epoch]).generate_state(1)[0]))


def make_model(args: argparse.Namespace) -> nn.Module:
    for path in (args.pretrained_path, args.initial_checkpoint):
        if path and not os.path.isfile(path):
            raise UsageError(f'checkpoint {path} does not exist')
    weights = None
    if args.pretrained_path:
        with usage_errors(f'--pretrained-path {args.pretrained_path}'):
            classes = _script.classes_of_file(args)
        weights = {'file': args.pretrained_path, **({} if classes is None else {'num_classes': classes})}
    model = _script.create_model(
        args,
        pretrained=args.pretrained or weights is not None,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        pretrained_cfg_overlay=weights,
    )
    if args.initial_checkpoint:
        with usage_errors(f'--initial-checkpoint {args.initial_checkpoint}'):
            _script.load_weights(model, args.initial_checkpoint)
    with usage_errors(f'model {args.model}'), torch.no_grad():
        head = model.get_classifier()
        if args.head_init_scale is not None:
            head.weight.mul_(args.head_init_scale)
            head.bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            nn.init.constant_(head.bias, args.head_init_bias)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
    return model


def make_loss(args: argparse.Namespace, mixing: bool) -> nn.Module:
    if args.bce_loss and (mixing or args.smoothing):
        return BinaryCrossEntropy(
            smoothing=0. if mixing else args.smoothing,  # mixing smooths the targets itself
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    if mixing:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def set_lr(args: argparse.Namespace) -> None:
    """Derive args.lr from --lr-base and the global batch unless it is given, by timm's rule."""
    if args.lr:
        return
    if not args.lr_base_scale:
        args.lr_base_scale = 'sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear'
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    args.lr = args.lr_base * (ratio ** 0.5 if args.lr_base_scale == 'sqrt' else ratio)


def make_output(args: argparse.Namespace, args_text: str, size: int) -> str:
    name = args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(size)])
    folder = os.path.join(args.output or './output/train', name)
    last = os.path.join(folder, 'last.pth.tar')
    if os.path.exists(last):
        if not args.resume:
            raise UsageError(f'{folder} holds a run: continue it with --resume {last} or give another --experiment')
        if os.path.realpath(os.path.dirname(args.resume)) != os.path.realpath(folder):
            raise UsageError(f'{folder} holds another run than the one to resume: give another --experiment')
    with usage_errors(f'output folder {folder}'):
        os.makedirs(folder, exist_ok=True)
        write_text(os.path.join(folder, 'args.yaml'), args_text)
    return folder


def train_one_epoch(
        epoch: int,
        task: ClassificationTask,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        scaler: utils.NativeScaler | None,
        scheduler: Any,
        mixup_fn: Callable | None,
        progress: Progress,
        time_left: Callable[[int], str],
        castling: CastlingSchedule | None = None,
) -> 'OrderedDict[str, float]':
    task.get_trainable_module().train()
    accum = args.grad_accum_steps
    whole = len(loader) // accum * accum  # batches in full groups; those after them make a smaller last one
    num_updates = epoch * progress.steps
    loss_sum, images = 0., 0
    group_images = 0
    optimizer.zero_grad()
    for i, (input, target) in enumerate(loader):
        update = (i + 1) % accum == 0 or i + 1 == len(loader)
        group = accum if i < whole else len(loader) - whole
        if args.no_prefetcher:
            input, target = input.to(device), target.to(device)
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
        if args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)

        with nullcontext() if update else task.no_sync():
            with autocast():
                loss = task(input, target)['loss']
            value = loss.item()
            lr = sum(g['lr'] for g in optimizer.param_groups) / len(optimizer.param_groups)
            if not math.isfinite(value):
                raise RunError(f'loss is {value} in epoch {epoch}, update {i // accum}, at learning rate {lr:.3g}')
            second_order = getattr(optimizer, 'is_second_order', False)
            params = task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
            if scaler is not None:
                scaler(loss / group, optimizer, args.clip_grad, args.clip_mode, params, second_order, update)
            else:
                (loss / group).backward(create_graph=second_order)
                if update:
                    if args.clip_grad is not None:
                        utils.dispatch_clip_grad(params, args.clip_grad, mode=args.clip_mode)
                    optimizer.step()
        loss_sum += value * len(input)
        images += len(input)
        group_images += len(input)
        if not update:
            continue

        optimizer.zero_grad()
        num_updates += 1
        task.update_ema(step=num_updates)
        if castling is not None:
            castling.step(num_updates)
        if args.synchronize_step and device.type == 'cuda':
            torch.cuda.synchronize()
        progress.step(
            group_images * args.world_size,
            f'loss {loss_sum / images:.4f}, lr {lr:.3g}, run {time_left(num_updates)} left, ')
        group_images = 0
        if scheduler is not None:
            scheduler.step_update(num_updates=num_updates, metric=loss_sum / images)
    progress.close()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    mean = torch.tensor(loss_sum / images, device=device)
    metrics = OrderedDict(loss=(utils.reduce_tensor(mean, args.world_size) if args.distributed else mean).item())
    if castling is not None:  # what is left of the branch on this process's last batch, in the mean over the layers
        with autocast():
            stats = castling.model.castling_stats(input).values()
        metrics.update((f'castling_{k}', sum(s[k] for s in stats) / len(stats)) for k in ('density', 'mass', 'gap'))
    return metrics


def reason_to_stop(e: BaseException, dataset: Any, resumed: str) -> BaseException | None:
    """What a run ends with that met an exception; None where that is a fault of this program.

    Args:
        e: The exception.
        dataset: The training images.
        resumed: The checkpoint that the run goes on with, while no update with it has passed.
    """
    try:
        check_readable(dataset)  # a process that loads may have met too many first
    except RunError as unreadable:
        return unreadable
    if isinstance(e, (KeyboardInterrupt, UsageError)):
        return e
    problem = outside_problem(e)
    if problem is not None:
        return RunError(problem)
    return UsageError(f'--resume {resumed}: the first update with it fails: {first_line(e)}') if resumed else None


def train(args: argparse.Namespace) -> None:
    args.device_modules = sorted({*(args.device_modules or ()), 'vitlinear'})  # timm's train.py needs it, on args.yaml
    for module in args.device_modules:
        with usage_errors(f'--device-modules {module}'):
            importlib.import_module(module)
    del args.config
    args_text = yaml.safe_dump(vars(args), default_flow_style=False)
    _script.check_device(args.device)
    device = utils.init_distributed_device(args)
    primary = utils.is_primary(args)
    resumed = read_resume(args) if args.resume else {}
    autocast = _script.autocast_for(args, device)
    scaler = utils.NativeScaler() if args.amp and args.amp_dtype == 'float16' and device.type == 'cuda' else None

    utils.random_seed(args.seed)
    model = make_model(args)
    args.num_classes = args.num_classes or model.num_classes
    data_config = _script.data_config_for(model, args)
    train_loader, eval_loader, mixup_fn = make_loaders(args, data_config, device)
    _script.put_on_device(model, args, data_config['input_size'], device, autocast)

    set_lr(args)
    changes = changed_arguments(resumed.get('args') or argparse.Namespace(), args)
    if changes and primary:
        print(f'not an exact continuation, arguments differ: {changes}', file=sys.stderr, flush=True)
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    task = ClassificationTask(model, make_loss(args, mixing), device=device, verbose=False)
    updates = math.ceil(len(train_loader) / args.grad_accum_steps)
    metric_name = args.eval_metric if eval_loader is not None else 'loss'
    with usage_errors(f'optimizer {args.opt}'):
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    resume_epoch = None
    if args.resume:
        with usage_errors(f'--resume {args.resume}'):
            resume_epoch = resume_task_checkpoint(
                task,
                args.resume,
                optimizer=None if args.no_resume_opt else optimizer,
                loss_scaler=None if args.no_resume_opt else scaler,
            )
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device='cpu' if args.model_ema_force_cpu else None,
        )
        if args.resume:
            with usage_errors(f'--resume {args.resume}: its moving average'):
                load_task_ema_checkpoint(task, args.resume)
    with usage_errors(f'schedule {args.sched}'):
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=metric_name == 'loss'),
            updates_per_epoch=updates,
        )
    start_epoch = args.start_epoch if args.start_epoch is not None else resume_epoch or 0
    if start_epoch > num_epochs:
        raise UsageError(f'the run has {num_epochs} epochs, and is to start with number {start_epoch}: give --epochs')
    castling = None
    if args.castling_ramp:
        with usage_errors(f'--castling-ramp {" ".join(map(str, args.castling_ramp))}'):
            castling = CastlingSchedule(model, num_epochs * updates, args.castling_ramp)
        castling.step(start_epoch * updates)
    if scheduler is not None and start_epoch:
        scheduler.step_update(start_epoch * updates) if args.sched_on_updates else scheduler.step(start_epoch)

    folder, saver, summary = '', None, ''
    if primary:
        folder = make_output(args, args_text, data_config['input_size'][-1])
        summary = os.path.join(folder, 'summary.csv')
        saver = Saver(
            model,
            optimizer,
            args=args,
            amp_scaler=scaler,
            checkpoint_dir=folder,
            decreasing=metric_name == 'loss',
            max_history=args.checkpoint_hist,
            task=task,
        )
        if args.resume:
            saver.resume(args.resume, resumed.get('saver'))
        trim_summary(summary, start_epoch)
        size = 'x'.join(str(n) for n in data_config['input_size'])
        print(
            f'{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {size} images, '
            f'{args.num_classes} classes\n{len(train_loader.dataset)} training images, '
            f'{len(eval_loader.dataset) if eval_loader else 0} for evaluation; {updates} updates an epoch of '
            f'{args.batch_size * args.world_size * args.grad_accum_steps} images; learning rate {args.lr:.4g}\n'
            f'epochs {start_epoch} to {num_epochs - 1} into {folder}', flush=True)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile)
    eval_model = task.get_eval_model()  # before DDP: evaluation needs no communication between batches
    if args.distributed:
        task.prepare_distributed(device_ids=None if device.type == 'cpu' else [device])

    start, updated = time.monotonic(), False

    def time_left(done: int) -> str:
        nonlocal updated
        updated = True
        first, total = start_epoch * updates, num_epochs * updates
        return clock((time.monotonic() - start) / max(1, done - first) * (total - done))

    epoch = start_epoch
    try:
        for epoch in range(start_epoch, num_epochs):
            epoch_start = time.monotonic()
            seed_epoch(args.seed, args.rank, epoch)
            if hasattr(train_loader.sampler, 'set_epoch'):
                train_loader.sampler.set_epoch(epoch)
            if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
                train_loader.mixup_enabled = False
                if mixup_fn is not None:
                    mixup_fn.mixup_enabled = False
            train_metrics = train_one_epoch(
                epoch, task, train_loader, optimizer, args, device, autocast, scaler, scheduler, mixup_fn,
                Progress(f'epoch {epoch}', updates, args.log_interval, primary), time_left, castling)

            models = {'': (model, eval_model)}
            if task.has_ema() and not args.model_ema_force_cpu:
                models[' (EMA)'] = (task.get_trainable_module(ema=True), task.get_eval_model(ema=True))
            eval_metrics = None
            for suffix, (module, eval_module) in models.items():
                if args.distributed:
                    utils.distribute_bn(module, args.world_size, reduce=True)
                if not all(p.isfinite().all() for p in module.parameters()):
                    raise RunError(f'weights{suffix} are not finite after epoch {epoch}')
                if eval_loader is not None:
                    progress = Progress(f'evaluation{suffix}', len(eval_loader), args.log_interval, primary)
                    eval_metrics = _script.evaluate(
                        eval_module, eval_loader, args, device, autocast, progress, args.distributed)
                    check_readable(eval_loader.dataset)
                    if not math.isfinite(eval_metrics['loss']):
                        raise RunError(f'evaluation loss{suffix} is {eval_metrics["loss"]} after epoch {epoch}')

            metric = (eval_metrics or train_metrics)[metric_name]
            if primary:
                lr = sum(g['lr'] for g in optimizer.param_groups) / len(optimizer.param_groups)
                utils.update_summary(epoch, train_metrics, eval_metrics, summary, lr=lr)
                saver.save_checkpoint(epoch, metric=metric)
                text = f'epoch {epoch}: train loss {train_metrics["loss"]:.4f}'
                if eval_metrics:
                    text += (f', eval loss {eval_metrics["loss"]:.4f}, top-1 {eval_metrics["top1"]:.2f} %, '
                             f'top-5 {eval_metrics["top5"]:.2f} %')
                print(f'{text}, {time.monotonic() - epoch_start:.1f} s', flush=True)
            if scheduler is not None:
                scheduler.step(epoch + 1, metric)
    except (KeyboardInterrupt, Exception) as e:
        ignore_workers()
        stopped = reason_to_stop(e, train_loader.dataset, '' if updated else args.resume)
        if stopped is None:
            raise
        last = os.path.join(folder, 'last.pth.tar')
        if primary and isinstance(stopped, (KeyboardInterrupt, RunError)):
            hint = f'--output {args.output or "./output/train"} --experiment {os.path.basename(folder)} --resume {last}'
            told = f'continue with {hint}' if os.path.exists(last) else 'no checkpoint was written yet'
            kept = f'the last checkpoint is {last}' if os.path.exists(last) else told
            stopped.args = (
                f'Stopped in epoch {epoch}; {told}' if isinstance(stopped, KeyboardInterrupt)
                else f'{stopped}; {kept}',)
        raise stopped from None
    if primary and saver.best_metric is not None:
        percent = '' if metric_name == 'loss' else ' %'
        name = {'top1': 'top-1', 'top5': 'top-5', 'loss': 'loss'}[metric_name]
        print(f'best {name} {saver.best_metric:.4g}{percent} in epoch {saver.best_epoch}: '
              f'{os.path.join(folder, "model_best.pth.tar")}', flush=True)
    if args.distributed:
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    return _errors.run_script('train', lambda: train(build_parser().parse(argv)))


if __name__ == '__main__':
    sys.exit(main())
