"""The trunk cache: what the layers below the first prompt give, computed once and kept on disk.

Letters: B rows, T tokens, H hidden size.
"""

import errno
import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers

from ptv2_core.data.batching import collate, sorted_batches
from ptv2_core.data.encoding import EncodedSplit, LongArray
from ptv2_core.files import fsync_path, locked, source_digest, umask_mode
from ptv2_core.model.backbones.base import Backbone, Trunk

# padded tokens of a forward that fills the cache
TOKEN_BUDGET = 8192
# a folder that cannot hold the states is no reason to end a training
UNUSABLE = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOLCK, errno.EACCES, errno.EPERM,
        errno.EROFS,
    }
)  # fmt: skip
MODEL_CODE = Path(__file__).parents[1] / "model"
# numpy has no bf16: its bits are kept as whole numbers
STORED: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(np.uint16),
}


@dataclass(frozen=True, kw_only=True)
class TrunkStates:
    """The states of every token of a split, memory-mapped and shared by all that read them.

    Attributes:
        values: `[all tokens, H]`, in the stored form of `dtype`.
        offsets: `[rows + 1]`, as in the split.
        dtype: The backbone's number format.
        num_layers: How many layers the states have passed.
        device: Where batches of them are wanted.
    """

    values: np.ndarray
    offsets: LongArray
    dtype: torch.dtype
    num_layers: int
    device: torch.device

    def batch(self, rows: LongArray, width: int) -> Trunk:
        """Return the states of some rows, `[B, T, H]`, zero beyond a row's tokens.

        Args:
            rows: `[B]`, their places in the split.
            width: T.
        """
        padded = np.zeros((len(rows), width, self.values.shape[1]), dtype=self.values.dtype)
        for place, row in enumerate(rows):
            start, end = self.offsets[row], self.offsets[row + 1]
            padded[place, : end - start] = self.values[start:end]
        states = torch.from_numpy(padded).view(self.dtype).to(self.device)
        return Trunk(hidden=states, num_layers=self.num_layers)


class TrunkCache:
    """A folder of trunk states, bounded in size; several processes may use it at once."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        """Keep at most `limit_bytes` in `folder`, which is made when it is needed."""
        self._folder = folder
        self._limit = limit_bytes

    def fits(self, backbone: Backbone, splits: Sequence[EncodedSplit]) -> bool:
        """Tell whether the states of all splits fit the limit together.

        Splits that are used in turn and do not would push each other out at each use.
        """
        return sum(_size(backbone, split) for split in splits) <= self._limit

    def states(
        self, backbone: Backbone, split: EncodedSplit, num_layers: int
    ) -> TrunkStates | None:
        """Return the states of a split, computing them if nobody has.

        Args:
            backbone: Whose lowest layers are run.
            split: The rows.
            num_layers: How many layers.

        Returns:
            None where they do not fit the limit or the disk, or the folder cannot be used: they
            are then computed at each use.
        """
        if num_layers == 0 or len(split) == 0 or not self.fits(backbone, [split]):
            return None
        try:
            values = self._values(backbone, split, num_layers)
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            return None
        if values is None:
            return None
        return TrunkStates(
            values=values,
            offsets=split.offsets,
            dtype=backbone.dtype,
            num_layers=num_layers,
            device=backbone.device,
        )

    def _values(
        self, backbone: Backbone, split: EncodedSplit, num_layers: int
    ) -> np.ndarray | None:
        """Map the file of the states, written first where there is none."""
        key = _key(backbone, split, num_layers)
        file = self._folder / f"{key}.npy"
        with locked(file.with_suffix(".lock")):
            values = _open(file, len(split.input_ids), backbone)
            if values is None:
                return self._write(file, backbone, split, num_layers)
            # one that another process removed to make room is ours as long as we have it mapped
            with suppress(FileNotFoundError):
                os.utime(file)
            return values

    def _write(
        self, file: Path, backbone: Backbone, split: EncodedSplit, num_layers: int
    ) -> np.ndarray | None:
        temporary = self._reserve(file, _size(backbone, split))
        if temporary is None:
            return None
        try:
            with temporary.open("r+b") as stream:
                _fill(stream, backbone, split, num_layers)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(umask_mode(0o666))
            values = _open(temporary, len(split.input_ids), backbone)
            assert values is not None, "what was written can be read"
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(self._folder)
        return values

    def _reserve(self, file: Path, size: int) -> Path | None:
        """Make room for `size` bytes, and a file that takes it; None where others have it all.

        The longest unused files go; whoever has one mapped keeps reading it.
        """
        with locked(self._folder / "cache.lock"):
            for left in self._folder.glob("*.tmp"):
                _remove_if_nobodys(left, own=file)
            kept = [entry for entry in map(_entry, self._folder.glob("*.npy")) if entry]
            writing = [entry for entry in map(_entry, self._folder.glob("*.tmp")) if entry]
            total = size + sum(taken for _, taken, _ in (*kept, *writing))
            for _, freed, unused in sorted(kept):
                if total <= self._limit:
                    break
                unused.unlink(missing_ok=True)
                total -= freed
            if total > self._limit:
                return None
            descriptor, name = tempfile.mkstemp(
                prefix=f"{file.stem}.", suffix=".tmp", dir=self._folder
            )
            try:
                os.ftruncate(descriptor, size)  # for others to count before it is filled
            except OSError:
                Path(name).unlink()
                raise
            finally:
                os.close(descriptor)
            return Path(name)


def digest_arrays(*arrays: np.ndarray) -> str:
    """Return the hexadecimal sha256 of arrays; mapped ones are read, not copied."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _size(backbone: Backbone, split: EncodedSplit) -> int:
    return len(split.input_ids) * backbone.spec.hidden_size * STORED[backbone.dtype].itemsize


def _key(backbone: Backbone, split: EncodedSplit, num_layers: int) -> str:
    """Return a name that changes with all that the states depend on; labels are none of it."""
    parts = [
        digest_arrays(split.input_ids, split.token_type_ids, split.offsets),
        backbone.answering_digest,
        backbone.dtype,
        backbone.device.type,
        num_layers,
        torch.__version__,
        transformers.__version__,
        source_digest(MODEL_CODE),
    ]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def _open(file: Path, num_tokens: int, backbone: Backbone) -> np.ndarray | None:
    """Map the file; None where there is none, or another than this one should be."""
    try:
        values: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    wanted = (num_tokens, backbone.spec.hidden_size)
    is_right = values.shape == wanted and values.dtype == STORED[backbone.dtype]
    return values if is_right else None


def _fill(stream: BinaryIO, backbone: Backbone, split: EncodedSplit, num_layers: int) -> None:
    """Write an `.npy` file; not through a mapping, where a full disk is no error but a SIGBUS."""
    width, stored = backbone.spec.hidden_size, STORED[backbone.dtype]
    header = {
        "descr": np.lib.format.dtype_to_descr(stored),
        "fortran_order": False,
        "shape": (len(split.input_ids), width),
    }
    np.lib.format.write_array_header_1_0(stream, header)
    start = stream.tell()
    for rows in sorted_batches(split.lengths, batch_size=len(split), token_budget=TOKEN_BUDGET):
        batch = collate(split, rows).to(backbone.device)
        trunk = backbone.trunk(
            batch.input_ids, batch.token_mask, batch.token_type_ids, num_layers=num_layers
        )
        hidden = trunk.hidden.cpu()
        bits = hidden.view(torch.uint16) if hidden.dtype == torch.bfloat16 else hidden
        for place, row in enumerate(rows):
            first, length = int(split.offsets[row]), int(split.lengths[row])
            stream.seek(start + first * width * stored.itemsize)
            stream.write(bits[place, :length].contiguous().numpy().tobytes())


def _entry(file: Path) -> tuple[float, int, Path] | None:
    """Return when a file was last used and its size; None where it has gone."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime, status.st_size, file


def _remove_if_nobodys(left: Path, *, own: Path) -> None:
    """Remove a temporary file whose writer is dead: whose lock is ours, or free."""
    key = left.name.partition(".")[0]
    if key == own.stem:
        left.unlink(missing_ok=True)
        return
    with suppress(BlockingIOError), locked(left.with_name(f"{key}.lock"), wait=False):
        left.unlink(missing_ok=True)
