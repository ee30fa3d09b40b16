"""``python -m sparsemae`` is ``sparsemae``."""

from sparsemae.cli import main

main()
