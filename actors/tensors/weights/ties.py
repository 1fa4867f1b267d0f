"""Finds whether a checkpoint holds a head of its own, though its config ties the head to the embedding."""

import math
from pathlib import Path

import torch

from actors.tensors.weights.mapped import MappedFile
from actors.tensors.weights.safetensors_index import StoredTensor, stored_tensors
from actors.words.errors import CheckpointError

_NUM_ROWS = 16  # that are compared, spread over the vocabulary


def holds_own_head(folder: Path, named: str | None = None) -> bool:
    """Whether a head is stored beside the embedding and differs from it; Transformers does not tie the two then.

    Some rows are compared. Where those are equal and others are not, loading refuses the checkpoint. `named` as for
    `stored_tensors`; a folder without weights holds no head.
    """
    try:
        stored = stored_tensors(folder, named).tensors
        heads = [one for one in stored if one.key.endswith("lm_head.weight")]
        embeddings = [one for one in stored if one.key.endswith("embed_tokens.weight")]
        if len(heads) != 1 or len(embeddings) != 1 or heads[0].shape != embeddings[0].shape:
            return False
        return not torch.equal(_some_rows(heads[0]), _some_rows(embeddings[0]))
    except CheckpointError:  # loading says what is wrong with the files
        return False


def _some_rows(stored: StoredTensor) -> torch.Tensor:
    numbers = [number * stored.shape[0] // _NUM_ROWS for number in range(_NUM_ROWS)]
    row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    starts = [stored.offset + number * row_bytes for number in numbers]
    file = MappedFile(stored.file, [(start, start + row_bytes) for start in starts])
    rows = file.tensor(stored)[numbers].float()
    file.close()
    return rows
