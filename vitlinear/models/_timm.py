"""Everything this package takes from timm's private modules; cfgs, entry points, and errors worth reading.

timm may rename what starts with an underscore: this is the only file such a rename touches.
"""
import json
import os
import reprlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
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
from timm.models._hub import hf_split
from timm.models._input import update_model_input_size
from timm.models._pretrained import PretrainedCfg
from torch import nn

from ..zoo._flax import is_flax, read_flax
from ..zoo.files import check_archive
from ..zoo.hub import (
    HubError,
    check_file,
    download,
    download_weights,
    folder_weights,
    hub_org,
    repo_weights,
    weights_repo,
)
from ..zoo.records import WEIGHTS_NAME, find_record
from ._weights import check_size

__all__ = [
    'base_cfg',
    'build_model',
    'checkpoint',
    'feature_take_indices',
    'read_weights',
    'register_notrace_function',
    'register_notrace_module',
    'update_model_input_size',
]


def read_weights(path: str | os.PathLike, use_ema: bool = True) -> dict[str, Any]:
    """Read a checkpoint file without running anything stored in it, or say what is wrong with it.

    Args:
        path: A safetensors file, a file of PyTorch, or a msgpack file of Flax.
        use_ema: Take the moving average of the weights where a training checkpoint holds one.

    Returns:
        Tensors by name, as the file has them; the parameters of Flax by their path.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or only by running code.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"No checkpoint file at '{path}'.")
    if not str(path).endswith('.safetensors'):
        if is_flax(path):
            return read_flax(path)
        check_archive(path)
    try:
        # timm loads with weights_only=True and lets argparse.Namespace, a plain bag of options, through
        state_dict = load_state_dict(str(path), use_ema=use_ema)
    except Exception as e:
        if 'Unsupported global' in str(e.__cause__):
            raise ValueError(
                f"'{path}' holds pickled Python objects besides tensors and plain options; they are never run here. "
                f"If you trust the file, load it with torch.load('{path}', weights_only=False) in a session of your "
                f"own and save its weights with safetensors.torch.save_file(...). ({e})") from e
        reason = (str(e) or type(e).__name__).splitlines()[0].partition(' No automatic')[0]  # timm's advice: run it
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


def _config_overlay(variant: str, path: Path, repo_id: str) -> dict[str, Any]:
    """What the config.json of a repository says for the pretrained cfg of a model."""
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        architecture, cfg = config['architecture'], dict(config['pretrained_cfg'])
        cfg.update({k: config[k] for k in ('num_classes', 'label_names', 'label_descriptions') if k in config})
    except (KeyError, TypeError, ValueError) as e:
        raise HubError(f"config.json of '{repo_id}' is no config of a timm model ({type(e).__name__}: {e}).") from e
    if architecture != variant:
        raise HubError(f"'{repo_id}' holds weights of {architecture}, not of {variant}.")
    names = {f.name for f in fields(PretrainedCfg)} - {'architecture'}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items() if k in names}


def _locate(
        variant: str,
        pretrained_cfg: Any | None,
        overlay: dict[str, Any],
        cache_dir: str | os.PathLike | None,
) -> tuple[Path | None, dict[str, Any]]:
    """Find, download and check the weights of a model.

    Returns:
        The file, None where timm has to load what is no file of ours; and entries for the pretrained cfg.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    if cfg.state_dict:
        return None, {}
    if cfg.source == 'local-dir':
        path = folder_weights(cfg.file) or Path(cfg.file) / WEIGHTS_NAME
        return path if path.is_file() else None, {}
    if cfg.source == 'hf-hub':
        return repo_weights(*hf_split(cfg.hf_hub_id), cfg.hf_hub_filename, cache_dir), {}

    name = f'{variant}.{cfg.tag}' if cfg.tag else variant
    given = pretrained_cfg if isinstance(pretrained_cfg, dict) else getattr(pretrained_cfg, '__dict__', {})
    if any(source.get(k) for source in (overlay, given) for k in ('file', 'url', 'hf_hub_id')):
        record, repo = None, None  # of the caller's choice
    else:
        record, repo = find_record(name), weights_repo(name)
        if repo and not hub_org() and cfg.file:
            repo = None  # the package carries what that repository has
    if repo:
        repo_id, revision = repo
        if record:
            config, path = {}, download_weights(repo_id, revision, record, record.file, cache_dir)
        else:
            config = _config_overlay(variant, download(repo_id, 'config.json', revision, cache_dir), repo_id)
            path = repo_weights(repo_id, revision, cache_dir=cache_dir)
        return path, {**config, 'file': None, 'url': None, 'hf_hub_id': '@'.join(filter(None, repo))}
    if not cfg.has_weights:
        raise ValueError(_no_weights_message(variant, cfg.tag or ''))
    if cfg.file:
        if record:
            check_file(cfg.file, record.sha256, f"the record of '{name}'", 'Install vitlinear again.')
        return Path(cfg.file), {}
    if cfg.hf_hub_id:
        return repo_weights(*hf_split(cfg.hf_hub_id), cfg.hf_hub_filename, cache_dir), {}
    return None, {}


def build_model(
        model_cls: type[nn.Module],
        variant: str,
        pretrained: bool = False,
        pretrained_filter_fn: Callable | None = None,
        pretrained_cfg: Any | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        feature_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
) -> nn.Module:
    """timm's `build_model_with_cfg`, checking the weights, with errors that say what to do about missing or wrong ones.

    Where the weights come from: the caller's choice; else the repository of the organisation in use; else the file that
    the package carries; else the repository that the record names. See `vitlinear.set_hub_org`. Features are by default
    the maps of the four stages of a pyramid.

    Raises:
        ValueError: An argument is out of range; or `pretrained` is set and the tag has no weights, or the file that
            holds them cannot be read.
        FileNotFoundError: `pretrained` is set and the file does not exist.
        HubError: `pretrained` is set and the weights cannot be had from the Hub.
        IntegrityError: `pretrained` is set and the weights are not the published ones.
    """
    feature_cfg = dict(feature_cfg or dict(out_indices=(0, 1, 2, 3), flatten_sequential=True))
    if 'out_indices' in kwargs:
        feature_cfg['out_indices'] = kwargs.pop('out_indices')
    overlay = dict(pretrained_cfg_overlay or {})
    source = path = None
    if kwargs and resolve_pretrained_cfg(variant, pretrained_cfg, overlay).source in ('local-dir', 'hf-hub'):
        check_size(variant, kwargs)  # which a file may have given
    if pretrained:
        path, located = _locate(variant, pretrained_cfg, overlay, kwargs.get('cache_dir'))
        overlay.update({k: v for k, v in located.items() if overlay.get(k) is None})
        if path is not None:
            # handed over as a state dict, which timm looks for only where no source is named
            source = resolve_pretrained_cfg(variant, pretrained_cfg, overlay).source
            overlay.update(source=None, state_dict=read_weights(path))
    try:
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=pretrained_filter_fn,
            feature_cfg=feature_cfg,
            **kwargs,
        )
    except (ArithmeticError, AssertionError, AttributeError, LookupError) as e:  # of the parts that are timm's
        given = ', '.join(f'{name}={reprlib.repr(value)}' for name, value in kwargs.items())
        raise ValueError(f'{variant} cannot be made with {given}: {str(e) or type(e).__name__}.') from e
    if path is not None:
        model.pretrained_cfg.pop('state_dict')  # the weights are in the model now, no second copy
        if source:
            model.pretrained_cfg['source'] = source
    return model


def base_cfg(**kwargs: Any) -> dict[str, Any]:
    """The pretrained cfg of a pyramid of ours at 224 pixels, with the entries of a family or tag."""
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic', 'fixed_input_size': False,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj', 'classifier': 'head',
        'license': 'apache-2.0', 'origin_url': None,
        **kwargs,
    }
