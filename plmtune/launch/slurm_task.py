"""What srun starts once a process of a job: ``python -m plmtune.launch.slurm_task run ...``.

It sets what torchrun would set (RANK, WORLD_SIZE, MASTER_ADDR) from Slurm's variables, and becomes ``plmtune run ...``.
"""

from __future__ import annotations

import runpy

from submitit.helpers import TorchDistributedEnvironment


def main() -> None:
    """Set the variables of torch.distributed, and run plmtune with the words of the command line."""
    # Each process keeps the GPUs of its node in sight, and takes the one of its local rank, as under torchrun.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    runpy.run_module("plmtune", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
