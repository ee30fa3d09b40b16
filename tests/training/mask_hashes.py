"""Finetune and save each process's hash of the final masks: OUT WORD... (under torchrun or alone)."""

import hashlib
import os
import sys
from pathlib import Path

from torch import nn

from sparsemae.cli import main
from sparsemae.commands import train
from sparsemae.sparsity import iter_sparse

if __name__ == "__main__":
    freeze = train.freeze

    def noted(model: nn.Module) -> list[str]:
        names = freeze(model)
        bits = b"".join(layer.weight_mask.numpy().tobytes() for _, layer in iter_sparse(model))
        Path(f"{sys.argv[1]}.{os.environ.get('RANK', '0')}").write_text(hashlib.sha256(bits).hexdigest())
        return names

    train.freeze = noted
    main(sys.argv[2:])
