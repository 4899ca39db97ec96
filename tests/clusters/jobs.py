"""Small models on the meta device as jobs."""

from typing import Any

import torch

from plmtune.clusters.job import Job
from plmtune.registry import component


def job_of(
    name: str = "plm", vocab_size: int = 512, *, rows: int = 64, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> Job:
    sizes = {"embed_dim": 64, "num_layers": 8, "num_heads": 4, "max_seq_len": 128} | settings
    with torch.device("meta"):
        model: Any = component("model", name, **sizes)(vocab_size=vocab_size)
    return Job(model, seq_len=128, global_batch_size=rows, dtype=dtype)
