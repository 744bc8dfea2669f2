"""pytest plugin that points timm's own tests/test_models.py at the architectures of this package, without editing it.

test_models.py parametrises over `timm.list_models(...)` when it is imported. This plugin is imported before that, so it
registers our models, makes `list_models` return ours alone, and drops the `module=` argument by which timm restricts
the feature and pruning tests to its own files. Tests that are not about one of our architectures are deselected, as
are those which download weights.

CONFORMANCE_FILTER: comma-separated wildcards of architecture names, default all.
"""
import fnmatch
import os

import pytest
import timm
import timm.models
from timm.models import _registry

_filters = os.environ.get('CONFORMANCE_FILTER', '*').split(',')
_timm_entrypoints = dict(_registry._model_entrypoints)
_list_models = _registry.list_models

import vitlinear  # noqa: E402, F401

OURS = {
    name for name, fn in _registry._model_entrypoints.items()
    if fn.__module__.split('.')[0] == 'vitlinear' and any(fnmatch.fnmatch(name, f) for f in _filters)
}
OVERWRITTEN = sorted(name for name, fn in _timm_entrypoints.items() if _registry._model_entrypoints[name] is not fn)


def _ours(model_name) -> bool:
    return isinstance(model_name, str) and _registry.get_arch_name(model_name) in OURS


# Patterns by which the suite puts backbones without a map at their end into its less strict group, and our models
# around these backbones.
_NON_STD = {'deit*': 'castling_deit_*', 'mvitv2*': 'castling_mvitv2_*'}


def _with_ours(filters):
    return filters if isinstance(filters, str) else [*filters, *(_NON_STD[f] for f in filters if f in _NON_STD)]


def list_models(filter='', module='', exclude_filters='', **kwargs):
    names = _list_models(_with_ours(filter), exclude_filters=_with_ours(exclude_filters), **kwargs)
    return [name for name in names if _ours(name)]


def list_pretrained(filter='', exclude_filters=''):
    return list_models(filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)


for _namespace in (timm, timm.models):
    _namespace.list_models = list_models
    _namespace.list_pretrained = list_pretrained


def pytest_configure(config):
    if not OURS:
        raise pytest.UsageError(f'no architecture of vitlinear matches {_filters}')
    if OVERWRITTEN:
        raise pytest.UsageError(f'vitlinear overwrote timm architectures: {OVERWRITTEN}')


def pytest_report_header(config):
    return f'timm {timm.__version__} model tests on {sorted(OURS)}'


def pytest_collection_modifyitems(config, items):
    keep, drop = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, 'callspec') else {}
        ours = _ours(params.get('model_name')) and 'pretrained' not in item.originalname
        (keep if ours else drop).append(item)
    config.hook.pytest_deselected(items=drop)
    items[:] = keep
