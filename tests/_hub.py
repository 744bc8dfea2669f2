"""What the tests of the Hub share: the published checkpoint, commands, and checkpoints made for a test."""
from pathlib import Path

import timm
import torch

from vitlinear.tools.export import export_model
from vitlinear.zoo.records import Cfg, find_record

NAME = 'vvt_nano.fashion_mnist'
PUBLISHED = find_record(NAME)
ORG = dict(VITLINEAR_HUB_ORG='org')
LOAD = f'result = load({NAME!r})'
WEIGHTS = PUBLISHED.weights.read_bytes()


def make_folder(folder: Path, name: str = 'vvt_nano', num_classes: int = 3, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes, in_chans=1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.1)
    labels = tuple(f'class {i}' for i in range(num_classes))
    cfg = Cfg(num_classes, (1, 32, 32), (2, 2), 1., 'bilinear', (.5,), (.25,), labels)
    export_model(model, folder, 'test', cfg, dict(provenance=dict(
        trained_by='a test', mechanism='as published', configuration='of a test')))
    return model


def command(*words: str) -> str:
    return f'from vitlinear.tools import cli\nresult = cli.main({[str(w) for w in words]!r})'


def blobs(cache: Path) -> list:
    """Files of weights in a cache, complete or not."""
    return [p for p in cache.rglob('*') if p.is_file() and not p.is_symlink() and p.stat().st_size > 1e5]
