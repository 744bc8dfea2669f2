"""Small datasets in the formats of the real ones."""
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR100


def image_folder(
        root: Path,
        splits: Sequence[str] = ('train', 'validation'),
        classes: int = 3,
        per_class: int = 6,
        size: int = 32,
) -> Path:
    """ROOT/SPLIT/CLASS/N.png, where a class is a colour under noise."""
    rng = np.random.default_rng(0)
    colours = np.random.default_rng(1).integers(40, 215, (classes, 3))
    for split in splits:
        for c in range(classes):
            folder = root / split / f'class{c}'
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = colours[c] + rng.integers(-40, 41, (size, size, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
    return root


def fashion_mnist(root: Path, train: int = 40, test: int = 20) -> Path:
    """The four idx files of Fashion-MNIST, with bright squares at a place that tells the class."""
    raw = root / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for stem, n in (('train', train), ('t10k', test)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = rng.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[label * 2:label * 2 + 8, label * 2:label * 2 + 8] += 150
        (raw / f'{stem}-images-idx3-ubyte').write_bytes(struct.pack('>IIII', 0x803, n, 28, 28) + images.tobytes())
        (raw / f'{stem}-labels-idx1-ubyte').write_bytes(struct.pack('>II', 0x801, n) + labels.tobytes())
    return root


def cifar100(root: Path, monkeypatch, train: int = 200, test: int = 100) -> Path:
    """The pickles of CIFAR-100; torchvision compares md5 sums, which are taken out of its lists for the test."""
    folder = root / CIFAR100.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in (('train', train), ('test', test)):
        labels = [i % 100 for i in range(n)]
        data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({'data': data, 'fine_labels': labels}))
    (folder / 'meta').write_bytes(pickle.dumps({'fine_label_names': [f'fine{i:02d}' for i in range(100)]}))
    monkeypatch.setattr(CIFAR100, 'train_list', [['train', None]])
    monkeypatch.setattr(CIFAR100, 'test_list', [['test', None]])
    monkeypatch.setattr(CIFAR100, 'meta', {**CIFAR100.meta, 'md5': None})
    return root
