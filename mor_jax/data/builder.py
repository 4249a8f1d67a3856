"""Packed rows on disk: a TFDS data set of array_record files, written and read without TensorFlow.

TFDS's own default format, tfrecord, can be neither written nor read without TensorFlow;
array_record can, and gives random access.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils

from mor_jax.data.packing import Row
from mor_jax.errors import DataError

FIELDS = {"tokens": np.int32, "segment_ids": np.int32}
WEIGHTS = {"weights": np.float32}  # of conversations: see `packing.pack_whole`


class PackedRows(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]  # TFDS has no types
    """`rows`: for each split, a function that yields its rows in the order they are to be
    stored."""

    VERSION = tfds.core.Version("1.0.0")
    # Found otherwise with importlib_resources, which TFDS 4.9 uses on every Python but only
    # installs below 3.9. It would lead to checksums of downloads, of which there are none.
    code_path = None

    def __init__(
        self,
        *,
        rows: Mapping[str, Callable[[], Iterator[Row]]],
        context: int,
        data_dir: str,
        weighted: bool = False,
    ):
        self._rows, self._context = rows, context
        self._fields = FIELDS | WEIGHTS if weighted else FIELDS
        super().__init__(file_format="array_record", data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            n: tfds.features.Tensor(shape=(self._context,), dtype=t)
            for n, t in self._fields.items()
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Token rows of one length; segment_ids count documents, 0 is padding; weights are those of the loss.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # stored in corpus order; the loader shuffles by seed
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Row]]]:
        return {split: self._generate_examples(split) for split in self._rows}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Row]]:
        yield from enumerate(self._rows[split]())


def write_rows(
    directory: Path,
    rows: Mapping[str, Callable[[], Iterator[Row]]],
    context: int,
    *,
    weighted: bool = False,
) -> Path:
    """Write the splits `rows` somewhere under `directory`; returns the data set's own directory.
    `weighted`: whether rows have loss weights."""
    builder = PackedRows(rows=rows, context=context, data_dir=str(directory), weighted=weighted)
    shown = getattr(tqdm_utils, "_active", True)
    # ours is shown instead; TFDS has no public way to ask for the state
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself there
            builder.download_and_prepare()
    finally:
        tfds.display_progress_bar(shown)
    return Path(str(builder.data_path))


class StoredRows(Sequence[Row]):
    """Random access to one split: `rows[i]` is {"tokens": int32[context], "segment_ids":
    int32[context]}, of conversations also "weights": float32[context].

    Reading is thread-safe. Raises DataError naming the file and the record where one cannot be
    read.
    """

    def __init__(self, directory: Path, split: str):
        self._directory = directory
        try:
            builder = tfds.builder_from_directory(str(directory))
            info = builder.info.splits[split]
            self._source = builder.as_data_source(split)
        except Exception as e:  # TFDS and array_record raise their own kinds for damaged metadata
            raise DataError(f"{directory}: {_damaged(e, directory)}") from e
        self._files = [str(path) for path in info.filepaths]
        self._ends = list(itertools.accumulate(info.shard_lengths))
        self.context = int(builder.info.features["tokens"].shape[0])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[Row]:
        """Several rows at once, which is faster than one by one."""
        wanted = [int(i) + len(self) if i < 0 else int(i) for i in indices]
        if wanted and not (min(wanted) >= 0 and max(wanted) < len(self)):
            raise IndexError(f"row {max(wanted)} of {len(self)}")
        try:
            return self._source.__getitems__(wanted)
        except Exception as e:
            bad = self._first_bad(wanted)
            file = bisect.bisect_right(self._ends, bad)
            record = bad - (self._ends[file - 1] if file else 0)
            raise DataError(
                f"{self._files[file]}, record {record} (row {bad} of {len(self)}): {_damaged(e, self._directory)}"
            ) from e

    def _first_bad(self, indices: Sequence[int]) -> int:
        for index in indices:
            try:
                self._source[index]
            except Exception:
                return index
        return indices[0]


def _damaged(why: object, directory: Path) -> str:
    """What to do about a cache that cannot be read. `directory`: the data set's, one below the
    cache entry's."""
    return f"damaged data cache ({why}). Delete the directory {directory.parent} and run again; it will be prepared anew."
