"""`python -m finetune`: prepare, pretrain, train, merge, generate, speculate, evaluate, table.

Exit codes: 0 fine; 1 something found is unusable; 2 the command line names or sets something
that cannot be; 130 stopped by Ctrl-C (training saves a checkpoint first). Errors are one line;
`--debug` adds the traceback.
"""

from bench.command_line import new_app, run_app
from finetune import evaluate, generate, merge, prepare, pretrain, speculate, table, train
from finetune.options import add_command

app = new_app("Make a language model worth compressing: from raw text, or from another model.")

PRETRAIN_EXAMPLES = """
[bold]Examples[/bold]

python -m finetune pretrain --text my-texts/ --vocabulary 4096 --layers 5 --width 256 --heads 4

python -m finetune pretrain --config big.json --data prepared --out runs/big

torchrun --standalone --nproc_per_node 2 -m finetune pretrain --strategy fsdp --data prepared
"""
TRAIN_EXAMPLES = """
[bold]Examples[/bold]

python -m finetune train --model smollm2-135m --task mrpc --out runs/mrpc

python -m finetune train --model gpt2 --task e2e --method lora --rank 8 --learning-rate 5e-4
"""

add_command(app, "prepare", prepare.Settings, prepare.run)
add_command(app, "pretrain", pretrain.Settings, pretrain.run, PRETRAIN_EXAMPLES)
add_command(app, "train", train.Settings, train.run, TRAIN_EXAMPLES)
add_command(app, "merge", merge.Settings, merge.run)
add_command(app, "generate", generate.Settings, generate.run)
add_command(app, "speculate", speculate.Settings, speculate.run)
add_command(app, "evaluate", evaluate.Settings, evaluate.run)
add_command(app, "table", table.Settings, table.run)


def main(arguments: list[str] | None = None) -> None:
    """Run one command; ends the process with the exit code said above."""
    run_app(app, "python -m finetune", arguments)
