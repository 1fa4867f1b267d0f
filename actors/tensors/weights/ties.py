"""Finds whether a checkpoint holds a head of its own, though its config ties the head to the embedding."""

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
    file = MappedFile(stored.file, stored.offset)
    num_rows = stored.shape[0]
    rows = file.tensor(stored)[[number * num_rows // _NUM_ROWS for number in range(_NUM_ROWS)]].float()
    file.close()
    return rows
