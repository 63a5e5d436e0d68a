"""What compressing costs, method beside method, in turns on one machine.

    python tests/benchmarks/compression_cost.py --methods gptq,llmcompressor:gptq [--rounds 3]

Each round compresses the model once by every method, in the order given, each in a process of its
own as `bench run` starts it; artefacts of before are made again. Costs of a single run drift with
whatever else the machine does, so methods are compared within rounds: prints the median of each
cost, and of its ratio to the first method's in the same round. Wall and CPU seconds are those of
the method alone; peak memory is that of the whole process.
"""

import argparse
import shutil
import statistics

from bench.launch import launch
from bench.run import Request, plan

COSTS = {
    "wall s": lambda values: values["compress_s"],
    "CPU s": lambda values: values["compress_cpu_s"],
    "peak RSS MB": lambda values: (
        (values["compress_peak_rss_bytes"] + values["compress_baseline_rss_bytes"]) / 1e6
    ),
}


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="wikitext2")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    request = Request(options.model, options.data, options.methods, metrics="size")
    tasks = plan(request)[1:]  # the first is the parent
    rounds: list[list[dict[str, float]]] = []
    for number in range(options.rounds):
        rounds.append([])
        for task in tasks:
            shutil.rmtree(task.artefact, ignore_errors=True)
            record = launch(task, measure=False)
            if record["status"] != "ok":
                raise SystemExit(f"{task.job.method}: {record['error']}")
            costs = {name: cost(record["values"]) for name, cost in COSTS.items()}
            rounds[-1].append(costs)
            shown = "  ".join(f"{name} {value:.1f}" for name, value in costs.items())
            print(f"round {number + 1}  {task.job.method}: {shown}", flush=True)
    for index, task in enumerate(tasks):
        for name in COSTS:
            own = statistics.median(each[index][name] for each in rounds)
            ratio = statistics.median(each[index][name] / each[0][name] for each in rounds)
            print(f"median  {task.job.method}: {name} {own:.1f}, {ratio:.2f} of the first method's")


if __name__ == "__main__":
    main()
