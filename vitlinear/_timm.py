"""Everything this package takes from timm's private modules, and model creation with errors worth reading.

timm may rename what starts with an underscore: this is the only file such a rename touches.
"""
import os
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Type, Union

from torch import nn

from timm.models import (
    build_model_with_cfg,
    checkpoint,
    list_pretrained,
    load_state_dict,
    register_notrace_function,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices

__all__ = [
    'build_model',
    'bundled_weights',
    'checkpoint',
    'feature_take_indices',
    'register_notrace_function',
    'register_notrace_module',
]


def bundled_weights(name: str) -> Optional[str]:
    """Path of the weights that the package carries for a model.

    Args:
        name: Architecture and tag, such as 'vvt_nano.fashion_mnist'.

    Returns:
        The path of the safetensors file: inside the package in an installed wheel, in `model_cards/` of a checkout.
        None where neither exists, so that the tag counts as one without weights.
    """
    package = Path(__file__).resolve().parent
    for root in (package, package.parent):
        path = root / 'model_cards' / name / 'model.safetensors'
        if path.is_file():
            return str(path)
    return None


def _read_weights(path: Union[str, os.PathLike]) -> Dict[str, Any]:
    """Read a checkpoint file without running anything stored in it, or say what is wrong with it."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"No checkpoint file at '{path}'.")
    try:
        # timm loads with weights_only=True and lets argparse.Namespace, a plain bag of options, through
        state_dict = load_state_dict(str(path))
    except Exception as e:
        if 'Unsupported global' in str(e.__cause__):
            raise ValueError(
                f"'{path}' holds pickled Python objects besides tensors and plain options; they are never run here. "
                f"If you trust the file, load it with torch.load('{path}', weights_only=False) in a session of your "
                f"own and save its weights with safetensors.torch.save_file(...). ({e})") from e
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(
            f"'{path}' is no readable checkpoint: truncated, or neither a safetensors nor a PyTorch file ({reason})."
        ) from e
    if not state_dict or not all(hasattr(v, 'shape') for v in state_dict.values()):
        raise ValueError(f"'{path}' holds no state dict of tensors.")
    return state_dict


def _no_weights_message(variant: str, tag: str) -> str:
    have = ' and '.join(f"'{name}'" for name in list_pretrained(f'{variant}.*'))
    return (
        f"There are no published weights for '{variant}{'.' if tag else ''}{tag}'. "
        + (f'Weights exist for {have}. ' if have else f"No tag of '{variant}' has weights yet. ")
        + f"Train it with `vitlinear train --model {variant} ...`, or load a checkpoint of your own or of the authors "
          f"with timm.create_model('{variant}', pretrained=True, pretrained_cfg_overlay=dict(file='checkpoint.pth')).")


def build_model(
        model_cls: Type[nn.Module],
        variant: str,
        pretrained: bool = False,
        pretrained_filter_fn: Optional[Callable] = None,
        pretrained_cfg: Optional[Any] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """timm's `build_model_with_cfg`, with errors that say what to do about missing or unreadable weights.

    Raises:
        ValueError: `pretrained` is set and the tag has no weights, or the file that holds them cannot be read.
        FileNotFoundError: `pretrained` is set and the file does not exist.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    read_file = False
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
        if cfg.source not in ('hf-hub', 'local-dir') and not cfg.state_dict:
            if not cfg.has_weights:
                raise ValueError(_no_weights_message(variant, cfg.tag or ''))
            read_file = bool(cfg.file)
    if read_file:
        overlay['state_dict'] = _read_weights(cfg.file)
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=pretrained_filter_fn,
        **kwargs,
    )
    if read_file:
        model.pretrained_cfg.pop('state_dict')  # the weights are in the model now, no second copy
    return model
