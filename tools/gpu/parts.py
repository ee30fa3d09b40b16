"""What `make gpu` runs."""

from gpu import right, speed
from gpu.bench import Part

PARTS: dict[str, Part] = {
    "masks": Part(right.masks_are_equal, 20),
    "frozen": Part(right.frozen_masks_follow, 10),
    "crops": Part(right.crops_are_the_cpus, 20),
    "jobs": Part(right.jobs_agree_with_cpu, 60),
    "resume": Part(right.jobs_resume, 60),
    "kernel": Part(speed.mask_kernel, 30),
    "peak": Part(speed.peak, 10),
    "pretrain_t": Part(speed.pretrain_t, 100),
    "finetune_t": Part(speed.finetune_t, 75),
    "timm": Part(speed.timm_step, 40),
    "schedules": Part(right.schedules_run, 45),
    "compile": Part(right.compiled_agrees, 60),
    "memory": Part(right.out_of_memory, 20),
    "nccl": Part(right.one_process_of_ddp, 20),
    "export": Part(right.exported_agrees, 20),
    "segment_t": Part(speed.segment_t, 130),
    "finetune_s": Part(speed.finetune_s, 50),
    "pretrain_s": Part(speed.pretrain_s, 50),
    "vitmae": Part(speed.vitmae_step, 60),
    "sparse-cores": Part(speed.sparse_cores, 30),
    "segment_s": Part(speed.segment_s, 70),
}  # fmt: skip
"""In order of worth."""
