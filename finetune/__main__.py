"""`python -m finetune` and `torchrun -m finetune`."""

from finetune.cli import main

main()
