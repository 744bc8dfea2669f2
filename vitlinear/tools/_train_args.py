"""The arguments of `vitlinear train`."""
from timm import utils

from . import _flags
from ._flags import natural_int, positive_int

# Destinations of the flags of timm's train.py that are left out, with timm's defaults: a YAML may hold them unchanged.
UNSUPPORTED = {
    'train_num_samples': None, 'val_num_samples': None, 'dataset_trust_remote_code': False, 'fuser': '',
    'fast_norm': False, 'torchcompile_mode': None, 'torchscript': False, 'model_dtype': None, 'no_ddp_bb': False,
    'local_rank': 0, 'lr_noise': None, 'lr_noise_pct': 0.67, 'lr_noise_std': 1.0, 'epoch_repeats': 0., 'aug_splits': 0,
    'jsd_loss': False, 'resplit': False, 'drop_connect': None, 'drop_block': None, 'bn_momentum': None, 'bn_eps': None,
    'sync_bn': False, 'dist_bn': 'reduce', 'split_bn': False, 'val_interval': 1, 'recovery_interval': 0,
    'save_images': False, 'tta': 0, 'use_multi_epochs_loader': False, 'log_wandb': False, 'wandb_project': None,
    'wandb_tags': [], 'wandb_resume_id': '', 'train_img_sizes': None, 'train_batch_sizes': None,
    'train_size_probs': None, 'train_size_schedule': 'constant', 'train_size_schedule_spread': 0.65,
    'train_size_random_mix': 0.1, 'train_batches_per_epoch': None, 'train_steps_per_epoch': None,
    'variable_batch_loss_scale': 'none', 'naflex_loader': False, 'naflex_train_seq_lens': [128, 256, 576, 784, 1024],
    'naflex_max_seq_len': 576, 'naflex_patch_sizes': None, 'naflex_patch_size_probs': None,
    'naflex_loss_scale': 'linear', 'naflex_patchify_channels_first': False, 'kd_model_name': None,
    'kd_distill_type': 'logit', 'kd_loss_type': 'kl', 'distill_loss_weight': None, 'task_loss_weight': None,
    'kd_temperature': 4.0, 'kd_student_feature_dim': None, 'kd_teacher_feature_dim': None,
    'kd_token_distill_type': 'soft',
}


def build_parser() -> _flags.Parser:
    parser = _flags.Parser('train', UNSUPPORTED, description='Train a classifier.')
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file, or name of a packaged config')

    flag = parser.add_argument_group('data').add_argument
    _flags.add_data_flags(flag)
    flag('--train-split', default='train', metavar='NAME', help='split to train on')
    flag('--val-split', default='validation', metavar='NAME', help='split to evaluate on, none if empty')

    flag = parser.add_argument_group('model').add_argument
    flag('--model', default='resnet50', metavar='NAME', help='any model that timm can create')
    flag('--pretrained', action='store_true', help='start from the published weights')
    flag('--pretrained-path', metavar='FILE', help='take these as the published weights, adapting the head')
    flag('--initial-checkpoint', default='', metavar='FILE', help='start from the weights in this file')
    flag('--resume', default='', metavar='FILE', help='continue the run that wrote this checkpoint')
    flag('--no-resume-opt', action='store_true', help='with --resume, start with a fresh optimizer')
    _flags.add_input_flags(flag)
    flag('-b', '--batch-size', type=positive_int, default=128, metavar='N', help='images per step and process')
    flag('-vb', '--validation-batch-size', type=positive_int, metavar='N', help='the same for evaluation')
    flag('--grad-accum-steps', type=positive_int, default=1, metavar='N', help='steps whose gradients make one update')
    flag('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass')
    flag('--head-init-scale', type=float, metavar='X', help='factor on the initial weights of the classifier')
    flag('--head-init-bias', type=float, metavar='X', help='initial bias of the classifier')
    flag('--drop', type=float, default=0.0, metavar='P', help='dropout rate')
    flag('--drop-path', type=float, metavar='P', help='stochastic depth rate')
    flag('--castling-ramp', type=float, nargs=2, metavar='SHARE', help='of all updates: between these two the '
         'auxiliary branch of a Castling model fades, before them it is on (without this flag it is off)')

    flag = parser.add_argument_group('device').add_argument
    _flags.add_device_flags(flag)
    flag('--synchronize-step', action='store_true', help='wait for the GPU at the end of each update')
    flag('--device-modules', nargs='+', metavar='MODULE', help='modules to import first')

    flag = parser.add_argument_group('optimizer').add_argument
    flag('--opt', default='sgd', metavar='NAME', help="any of timm's optimizers")
    flag('--opt-eps', type=float, metavar='X', help='epsilon')
    flag('--opt-betas', type=float, nargs='+', metavar='X', help='betas')
    flag('--momentum', type=float, default=0.9, metavar='X', help='momentum')
    flag('--weight-decay', type=float, default=2e-5, metavar='X', help='weight decay')
    flag('--clip-grad', type=float, metavar='X', help='clip gradients to this')
    flag('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='what --clip-grad limits')
    flag('--layer-decay', type=float, metavar='X', help='factor on the learning rate from each layer to the one below')
    flag('--layer-decay-min-scale', type=float, default=0, metavar='X', help='lower limit of that factor')
    flag('--layer-decay-no-opt-scale', type=float, metavar='X', help='freeze layers whose factor falls below this')
    flag('--opt-kwargs', nargs='*', default={}, action=utils.ParseKwargs, metavar='K=V', help='optimizer arguments')

    flag = parser.add_argument_group('schedule').add_argument
    flag('--epochs', type=positive_int, default=300, metavar='N', help='epochs')
    flag('--start-epoch', type=natural_int, metavar='N', help='number of the first epoch')
    flag('--sched', default='cosine', metavar='NAME', help='cosine, tanh, step, multistep, poly, wsd, ...')
    flag('--sched-on-updates', action='store_true', help='change the learning rate at every update')
    flag('--lr', type=float, metavar='X', help='learning rate, instead of --lr-base')
    flag('--lr-base', type=float, default=0.1, metavar='X', help='learning rate at a batch of --lr-base-size')
    flag('--lr-base-size', type=positive_int, default=256, metavar='N', help='batch that --lr-base refers to')
    flag('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'), help='growth with the batch (default by --opt)')
    flag('--lr-cycle-mul', type=float, default=1.0, metavar='X', help='growth of the cycles')
    flag('--lr-cycle-decay', type=float, default=0.5, metavar='X', help='factor on the learning rate at each cycle')
    flag('--lr-cycle-limit', type=positive_int, default=1, metavar='N', help='cycles')
    flag('--lr-k-decay', type=float, default=1.0, metavar='X', help='k-decay of cosine and poly')
    flag('--warmup-lr', type=float, default=1e-5, metavar='X', help='learning rate at the start of warmup')
    flag('--min-lr', type=float, default=0, metavar='X', help='lowest learning rate')
    flag('--warmup-epochs', type=natural_int, default=5, metavar='N', help='epochs of warmup')
    flag('--warmup-prefix', action='store_true', help='add warmup to --epochs instead of counting it in')
    flag('--cooldown-epochs', type=natural_int, default=0, metavar='N', help='epochs at --min-lr, at the end')
    flag('--patience-epochs', type=natural_int, default=10, metavar='N', help='patience of plateau')
    flag('--decay-epochs', type=float, default=90, metavar='N', help='epochs between two steps')
    flag('--decay-milestones', type=natural_int, nargs='+', default=[90, 180, 270], metavar='N', help='for multistep')
    flag('--decay-rate', '--dr', type=float, default=0.1, metavar='X', help='factor of each step')

    flag = parser.add_argument_group('augmentation and regularisation').add_argument
    flag('--no-aug', action='store_true', help='no augmentation at all')
    flag('--train-crop-mode', metavar='MODE', help='rrc, rkrc or rkrr')
    flag('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='X', help='area of the random crop')
    flag('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], metavar='X', help='aspect ratio of the random crop')
    flag('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip')
    flag('--vflip', type=float, default=0., metavar='P', help='probability of a vertical flip')
    flag('--color-jitter', type=float, default=0.4, metavar='X', help='strength of the colour jitter')
    flag('--color-jitter-prob', type=float, metavar='P', help='probability of colour jitter')
    flag('--grayscale-prob', type=float, metavar='P', help='probability of losing the colours')
    flag('--gaussian-blur-prob', type=float, metavar='P', help='probability of blur')
    flag('--aa', metavar='POLICY', help='rand-m9-mstd0.5-inc1, augmix-m3, v0, ...')
    flag('--aug-repeats', type=float, default=0, metavar='X', help='copies of an image among the processes')
    flag('--reprob', type=float, default=0., metavar='P', help='probability of random erasing')
    flag('--remode', default='pixel', metavar='MODE', help='what erasing writes: const, rand or pixel')
    flag('--recount', type=positive_int, default=1, metavar='N', help='erased rectangles')
    flag('--mixup', type=float, default=0.0, metavar='ALPHA', help='mixup, if above 0')
    flag('--cutmix', type=float, default=0.0, metavar='ALPHA', help='cutmix, if above 0')
    flag('--cutmix-minmax', type=float, nargs='+', metavar='X', help='range of the cutmix area, instead of alpha')
    flag('--mixup-prob', type=float, default=1.0, metavar='P', help='probability of mixing a batch')
    flag('--mixup-switch-prob', type=float, default=0.5, metavar='P', help='share of cutmix when both are on')
    flag('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='what shares one mixing factor')
    flag('--mixup-off-epoch', type=natural_int, default=0, metavar='N', help='stop mixing at this epoch, never if 0')
    flag('--smoothing', type=float, default=0.1, metavar='X', help='label smoothing')
    flag('--train-interpolation', default='random', metavar='NAME', help='interpolation of the random crop')
    flag('--bce-loss', action='store_true', help='binary cross entropy')
    flag('--bce-sum', action='store_true', help='sum it over classes')
    flag('--bce-target-thresh', type=float, metavar='X', help='binarise its targets at this value')
    flag('--bce-pos-weight', type=float, metavar='X', help='its weight of positives')

    flag = parser.add_argument_group('moving average of the weights').add_argument
    flag('--model-ema', action='store_true', help='keep one; it is what gets evaluated')
    flag('--model-ema-force-cpu', action='store_true', help='keep it on the CPU and do not evaluate it')
    flag('--model-ema-decay', type=float, default=0.9998, metavar='X', help='decay')
    flag('--model-ema-warmup', action='store_true', help='let the decay grow from zero')

    flag = parser.add_argument_group('run').add_argument
    flag('--seed', type=natural_int, default=42, metavar='N', help='seed of everything random')
    flag('--worker-seeding', default='all', choices=('all', 'part'), help='whether workers seed numpy as well')
    flag('--log-interval', type=positive_int, default=50, metavar='N', help='updates between two lines of progress')
    flag('--checkpoint-hist', type=positive_int, default=10, metavar='N', help='numbered checkpoints to keep')
    _flags.add_loader_flags(flag)
    flag('--output', default='', metavar='DIR', help='folder of the runs (default: output/train)')
    flag('--experiment', default='', metavar='NAME', help='folder of this run (default: time, model, size)')
    flag('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'), help='what the best checkpoint is best in')
    return parser
