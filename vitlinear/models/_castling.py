"""What the Castling models of all backbones share: the auxiliary branch and its end, layers, checkpoints, cfg.

Documented in arXiv 2211.10526: the branch, a softmax of large weights alone, which fades while a model trains and is
gone at inference. Ours: that the threshold is relative to the number of keys, the ramp, and the checks of the switch.
"""
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..inference.fold import reparameterize
from ..layers.linear_angular import AUX_MODES, LinearAngular
from ..ops._numerics import check_choice
from ..zoo.families import Family
from ._base import check_img_size
from ._timm import base_cfg
from ._weights import fit, unwrap

_logger = logging.getLogger(__name__)

FAMILY = Family(
    name='castling_vit',
    title='Castling-ViT',
    paper=(
        'Castling-ViT: Compressing Self-Attention via Switching Towards Linear-Angular Attention at Vision Transformer '
        'Inference'),
    url='https://arxiv.org/abs/2211.10526',
    text=(
        'Linear-angular attention in the place of softmax attention in LeViT, MViTv2, PVTv2 and DeiT, with an '
        'auxiliary softmax branch for training that is gone at inference. The mechanism is as published; the '
        'authors released one attention module, https://github.com/GATECH-EIC/Castling-ViT, and no backbone, so '
        'all configurations are reconstructed: how queries, keys and values meet on pooled grids, which '
        "attentions are replaced, and the widths of LeViT's keys. In the PVTv2 models the layout (softmax in the "
        'last stage) follows later code of the same group. castling_nano is ours, for small images.'
    ),
    bibtex='''@inproceedings{you2023castling,
  title={Castling-{ViT}: Compressing Self-Attention via Switching Towards Linear-Angular Attention at Vision Transformer
    Inference},
  author={Haoran You and Yunyang Xiong and Xiaoliang Dai and Bichen Wu and Peizhao Zhang and Haoqi Fan and Peter Vajda
    and Yingyan Lin},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages={14431--14442}, year={2023}
}''',
)

# Training steps between two looks at whether the ramp is over, on devices for which a look is a wait.
_STEPS_BETWEEN_LOOKS = 100
# Constructor arguments that belong to a training, not to the model that it leaves.
SCHEDULE_ARGUMENTS = ('castling_steps', 'castling_ramp')


def check_ramp(ramp: Sequence[float]) -> tuple[float, float]:
    start, end = ramp
    if not 0. <= start < end <= 1.:
        raise ValueError(f'ramp={tuple(ramp)} must be two rising shares of the training, in [0, 1].')
    return float(start), float(end)


@contextmanager
def _evaluating(model: 'Castling') -> Iterator[None]:
    """Evaluation mode without autograd. Then each module, and each auxiliary branch, is in its own mode again."""
    training = [(module, module.training) for module in model.modules()]
    aux_modes = [(layer.aux, layer.aux.mode) for layer in model.castling_layers().values()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for aux, mode in aux_modes:
            aux.mode = mode


class Castling:
    """Mixin of models around `LinearAngular` layers."""

    castling_step: torch.Tensor
    # Forward passes in training mode between which the ramp rises, None without a schedule of the model's own.
    _castling_range: tuple[float, float] | None = None

    def castling_layers(self) -> dict[str, LinearAngular]:
        """The layers with an auxiliary branch, by name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, LinearAngular) and m.aux is not None}

    def set_castling(
            self,
            mode: str | None = None,
            threshold: float | None = None,
            weight: float | None = None,
            ramp: float | None = None,
    ) -> None:
        """Set the auxiliary branch of all layers; None leaves a setting as it is.

        Args:
            mode: 'off', 'train' (on in training mode alone) or 'always'.
            threshold: Softmax weights up to this size do not count.
            weight: Factor of what the branch adds.
            ramp: From 0 to 1, how far the threshold of each layer is on its way to 1, on a logarithmic scale.

        Raises:
            ValueError: A value is out of range; nothing is changed then.
        """
        if mode is not None:
            check_choice('aux mode', mode, AUX_MODES)
        if threshold is not None and not 0. <= threshold <= 1.:
            raise ValueError(f'threshold={threshold} must lie in [0, 1].')
        if ramp is not None and not 0. <= ramp <= 1.:
            raise ValueError(f'ramp={ramp} must lie in [0, 1].')
        for layer in self.castling_layers().values():
            if mode is not None:
                layer.aux.mode = mode
            for buffer, value in ((layer.aux.threshold, threshold), (layer.aux.weight, weight), (layer.aux.ramp, ramp)):
                if value is not None:
                    buffer.fill_(value)

    def castling_stats(self, batches: torch.Tensor | Iterable[Any]) -> dict[str, dict[str, float]]:
        """What the auxiliary branch does in each layer, with the thresholds and weights now in force.

        The branch is on while it is measured, whatever its mode, so that each layer gets what it gets in training.

        Args:
            batches: Images (B, in_chans, H, W), or a loader of them or of tuples that begin with them.

        Returns:
            For each layer by name, means over the batches: the number of `tokens` (queries) and `keys` (after
            pooling); the `density` of the mask; the share `rows_with_entry` of queries with any weight left; the
            `mass`, sum of the weights left per query, 1 without a mask; and the `gap`
            |output with - output without the branch| / |output with it|. Zero everywhere but in `tokens` and `keys`:
            switching changes nothing.
        """
        self._follow_schedule()  # a loaded state dict or a moving average brings the count alone
        layers = self.castling_layers()
        sums: dict[str, Counter] = {name: Counter() for name in layers}
        handles: list[Any] = []

        def count_entries(name: str, aux: nn.Module, args: tuple[Any, ...]) -> None:
            sums[name].update(aux.stats(*args))

        def measure_gap(name: str, layer: LinearAngular, args: tuple[Any, ...], out: Any) -> None:
            layer.aux.mode = 'off'
            without = _tensor(layer.forward(*args))
            layer.aux.mode = 'always'
            norm = torch.linalg.vector_norm(_tensor(out).float())
            gap = torch.linalg.vector_norm((_tensor(out) - without).float()) / norm.clamp(min=1e-30)
            sums[name].update(gap=gap.item())

        count = 0
        try:
            with _evaluating(self):
                for name, layer in layers.items():
                    layer.aux.mode = 'always'
                    handles.append(layer.aux.register_forward_pre_hook(partial(count_entries, name)))
                    handles.append(layer.register_forward_hook(partial(measure_gap, name)))
                for batch in [batches] if isinstance(batches, torch.Tensor) else batches:
                    self(batch if isinstance(batch, torch.Tensor) else batch[0])
                    count += 1
        finally:
            for handle in handles:
                handle.remove()
        if count == 0:
            raise ValueError('castling_stats needs at least one batch of images.')
        return {name: {k: v / count for k, v in stats.items()} for name, stats in sums.items()}

    def switch_to_inference(self, sample: torch.Tensor | None = None, tol: float = 0.) -> 'Castling':
        """Remove the auxiliary branch for good. Parameters and their names stay.

        Args:
            sample: Images (B, in_chans, H, W) on which the outputs with and without the branch are compared first.
            tol: Largest difference of an output that is let pass.

        Returns:
            The model.

        Raises:
            ValueError: The outputs differ by more than `tol`; the model is left as it was.
        """
        self._follow_schedule()
        layers = self.castling_layers().values()
        if sample is not None and any(layer.aux.mode != 'off' for layer in layers):
            with _evaluating(self):
                for layer in layers:
                    layer.aux.mode = 'off' if layer.aux.mode == 'off' else 'always'
                before = self(sample)
                self.set_castling(mode='off')
                gap = (before - self(sample)).abs().max().item()
            if not gap <= tol:
                raise ValueError(
                    f'Without the auxiliary branch an output changes by {gap:.3g}, more than tol={tol}: its masks are '
                    f'not empty. castling_stats tells in which layers; train on until the ramp has ended, or '
                    f'accept the difference with tol={float(f"{gap:.1g}") * 2:.3g}.')
        self.set_castling(mode='off')
        self._end_schedule()
        return self

    def fuse(self) -> 'Castling':
        """Fold batch norms into the layers before them and expand the convolutions of the values, in evaluation mode.

        Outputs stay the same up to rounding. The state dict becomes another, which no unfused model loads.

        Returns:
            The model.
        """
        reparameterize(self.eval())
        return self

    def schedule_castling(self, steps: int, ramp: Sequence[float] = (.1, .7)) -> None:
        """Let the model advance the ramp by itself, by the number of its forward passes in training mode.

        For training loops that cannot be changed, such as timm's train.py; others take a `CastlingSchedule`. The number
        is kept in the state dict as `castling_step`, so that a resumed training goes on where it stopped; a model
        without a schedule loads such a state dict and leaves the number out.

        Args:
            steps: Forward passes of the whole training; with gradients accumulated over n passes, n times the updates.
            ramp: Shares of these between which the thresholds rise.

        Raises:
            ValueError: A value is out of range.
        """
        if steps < 1:
            raise ValueError(f'castling_steps={steps} must be positive.')
        start, end = check_ramp(ramp)
        self._end_schedule()
        self._castling_range = start * steps, end * steps
        self._castling_calls = 0
        device = next(self.parameters()).device
        self.register_buffer('castling_step', torch.zeros((), dtype=torch.long, device=device))
        self._castling_hook = self.register_forward_pre_hook(_advance)
        self.set_castling(mode='train')

    def _schedule_from_arguments(self, castling_steps: int, castling_ramp: Sequence[float]) -> None:
        """What the arguments `castling_steps`, 0 for no schedule, and `castling_ramp` of a constructor ask for."""
        check_ramp(castling_ramp)
        if castling_steps != 0:
            self.schedule_castling(castling_steps, castling_ramp)

    def _end_schedule(self) -> None:
        if self._castling_range is not None:
            self._castling_hook.remove()
            self._castling_range = None
            del self.castling_step

    def _follow_schedule(self) -> torch.Tensor | None:
        """Set the ramp for the forward pass to come, by the count so far. None without a schedule."""
        if self._castling_range is None:
            return None
        start, end = self._castling_range
        ramp = ((self.castling_step - start) / (end - start)).clamp(0., 1.)
        for layer in self.castling_layers().values():
            layer.aux.ramp.copy_(ramp)
        return ramp

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initialise all weights; arguments as for the backbone. A schedule begins again."""
        super().init_weights(*args, **kwargs)
        self._restart_schedule()

    def _restart_schedule(self) -> None:
        if self._castling_range is not None:
            self.castling_step.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = prefix + 'castling_step'
        if self._castling_range is None:
            state_dict.pop(key, None)
        elif key not in state_dict:
            state_dict[key] = torch.zeros_like(self.castling_step)  # weights to start from
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _tensor(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


def _advance(model: nn.Module, args: Any) -> None:
    """Set the ramp for the forward pass to come and count it; all in tensors, which a compiler need not see again."""
    if not model.training:
        return
    ramp = model._follow_schedule()
    model.castling_step += 1
    if torch.compiler.is_compiling():
        return
    model._castling_calls += 1
    if model.castling_step.device.type == 'cpu' or model._castling_calls % _STEPS_BETWEEN_LOOKS == 0:
        # at the end of the ramp the branch adds exactly nothing, so it need not be computed any more
        model.set_castling(mode='off' if ramp == 1. else 'train')


class CastlingSchedule:
    """Ramp of the thresholds, advanced by the training loop. For loops of others, see `Castling.schedule_castling`.

        schedule = CastlingSchedule(model, total_steps)
        for images, targets in loader:
            ...
            schedule.step()

    From `ramp[0]` to `ramp[1]` of the steps the threshold of each layer rises to 1 on a logarithmic scale. Then the
    branch, which now adds exactly nothing, is turned off. Ours.
    """

    def __init__(
            self,
            model: nn.Module,
            total_steps: int,
            ramp: Sequence[float] = (.1, .7),
            kappa: float | None = None,
    ):
        """
        Args:
            model: A Castling model, whose branch is turned on in training mode.
            total_steps: Updates of the whole training.
            ramp: Shares of these between which the thresholds rise.
            kappa: New first threshold of each layer, relative to 1 over its number of keys; None to keep it.

        Raises:
            ValueError: A value is out of range, or the model has no auxiliary branch or a schedule of its own.
        """
        if not isinstance(model, Castling) or not model.castling_layers():
            raise ValueError(f'{type(model).__name__} has no layers with an auxiliary branch.')
        if model._castling_range is not None:
            raise ValueError('The model advances a ramp by itself already, see castling_steps.')
        if total_steps < 1:
            raise ValueError(f'total_steps={total_steps} must be positive.')
        if kappa is not None and kappa < 0.:
            raise ValueError(f'kappa={kappa} must not be negative.')
        self.model = model
        self.total_steps = total_steps
        self.ramp = check_ramp(ramp)
        for layer in model.castling_layers().values():
            if kappa is not None:
                layer.aux.kappa = float(kappa)
        self.steps = -1
        self.step()

    def step(self, steps: int | None = None) -> None:
        """Advance to the next update, or to that after `steps` updates, as to resume a training."""
        self.steps = self.steps + 1 if steps is None else steps
        start, end = (share * self.total_steps for share in self.ramp)
        ramp = min(max((self.steps - start) / (end - start), 0.), 1.)
        self.model.set_castling(mode='off' if ramp == 1. else 'train', ramp=ramp)


class LayerFactory:
    """Arguments of the linear-angular layers of a model, layer by layer, from those of its constructor."""

    def __init__(
            self,
            img_size: int | tuple[int, int],
            softmax_below: int,
            scale_with_size: bool,
            attn_kwargs: dict[str, Any] | None,
    ):
        """
        Args:
            img_size: Image size of the training.
            softmax_below: Keep softmax attention, which is cheaper there, in layers with at most this number of keys
                at `img_size`.
            scale_with_size: Have layers weigh their parts at other image sizes as at `img_size`, see `LinearAngular`.
            attn_kwargs: Further arguments of `LinearAngular`, such as `dict(conv='2d', aux_mode='train')`.

        Raises:
            ValueError: A value is out of range.
        """
        if softmax_below < 0:
            raise ValueError(f'softmax_below={softmax_below} must not be negative.')
        self.img_size = check_img_size(img_size)
        self.softmax_below = softmax_below
        self.scale_with_size = scale_with_size
        self.attn_kwargs = {'aux_kappa': 2., **(attn_kwargs or {})}

    def __call__(self, reduction: int, prefix_tokens: int = 0) -> dict[str, Any]:
        """Arguments of a layer whose keys are on the grid of this reduction."""
        H, W = (-(-side // reduction) for side in self.img_size)
        tokens = H * W + prefix_tokens
        ref_keys = tokens if self.scale_with_size else None
        return dict(self.attn_kwargs, softmax=tokens <= self.softmax_below, ref_keys=ref_keys)


def is_of_host(state_dict: dict[str, Any], model: nn.Module) -> bool:
    """Whether `checkpoint_filter_fn` takes weights for those of the backbone with softmax attention."""
    return any('.dconv.' in k for k in model.state_dict()) and not any('.dconv.' in k for k in unwrap(state_dict))


def filter_checkpoint(
        state_dict: dict[str, torch.Tensor],
        model: nn.Module,
        from_host: Callable[[dict[str, torch.Tensor], nn.Module], dict[str, torch.Tensor]],
        stem: str = 'patch_embed.proj',
) -> dict[str, torch.Tensor]:
    """Take a state dict of ours unchanged, or one of the same backbone with softmax attention to start training from.

    The latter has no convolutions of the values: the model keeps its own. What only softmax attention uses is left out.
    Arguments and errors are those of `fit`, and `from_host` brings weights of the backbone with softmax attention under
    our names.
    """
    # a schedule counts the steps of its own training, see `Castling.schedule_castling`
    state_dict = {k: v for k, v in unwrap(state_dict).items() if k != 'castling_step'}
    ours = model.state_dict()
    step = {k: v for k, v in ours.items() if k == 'castling_step'}
    own = {k: v for k, v in ours.items() if '.dconv.' in k}
    if not any('.dconv.' in k for k in state_dict):
        state_dict = from_host(state_dict, model)
        if own and f'{stem}.weight' in state_dict:
            _logger.warning('The checkpoint is of a model with softmax attention: its weights are a start for '
                            'training, outputs before that have no meaning.')
        state_dict = {**own, **state_dict}
    return fit({**state_dict, **step}, model, stem=stem)


castling_cfg = partial(
    base_cfg, pool_size=None, crop_pct=0.9, origin_url='https://github.com/GATECH-EIC/Castling-ViT',
    paper_ids='arXiv:2211.10526', paper_name='Castling-ViT')
