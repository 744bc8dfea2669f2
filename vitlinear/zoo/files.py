"""What a checkpoint file costs to open, and whether its bytes are those that were written."""
import logging
import os
import zipfile
from functools import lru_cache

__all__ = ['check_archive']

_logger = logging.getLogger(__name__)


def check_archive(path: str | os.PathLike) -> None:
    """See that a file of `torch.save` is whole, before anything in it is read.

    Since PyTorch 1.6 such files are zip archives, whose members carry checksums that `torch.load` does not compare.
    Of other files, which have none, that is said once.

    Raises:
        ValueError: A member is damaged, or compressed: `torch.save` compresses nothing, and a few megabytes would
            unfold to any size.
    """
    with open(path, 'rb') as f:
        if f.read(4) != b'PK\x03\x04':
            _tell_unchecked(os.fspath(path))
            return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
            size = sum(m.file_size for m in members)
            if packed or size > os.path.getsize(path):
                raise ValueError(
                    f"'{path}' is not loaded: {packed[0] if packed else 'what it holds'!r} is compressed, which "
                    f'torch.save never does, and {size:,} bytes would unfold from {os.path.getsize(path):,}.')
            damaged = archive.testzip()
    except (EOFError, NotImplementedError, OSError, RuntimeError, zipfile.BadZipFile) as e:
        raise ValueError(f"'{path}' is truncated or damaged ({e}).") from e
    if damaged is not None:
        raise ValueError(
            f"'{path}' is damaged: the checksum of its part '{damaged}' does not match. Restore the file from where "
            f'it came.')


@lru_cache
def _tell_unchecked(path: str) -> None:
    _logger.warning(f"'{path}' is of a format without checksums: whether its bytes are intact cannot be told.")
