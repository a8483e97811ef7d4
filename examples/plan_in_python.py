"""Find the smallest number of GPUs that serves a model, and what each more would buy, from Python.

    python examples/plan_in_python.py MODEL --gpu 'RTX PRO 6000' --link pcie5 [--context 32768]

MODEL is a checkpoint folder, a config.json, or a hub id. `ep2tp plan` asks the same for one number of GPUs. All times
are computed bounds (docs/planning.md).
"""

from __future__ import annotations

import argparse

from ep2tp.planner.advise import advise
from ep2tp.planner.compare import Question, assess_all
from ep2tp.planner.machine import choose_gpu, choose_link
from ep2tp.planner.source import load_model


def main() -> None:
    """One line for each number of GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--link", required=True)
    parser.add_argument("--context", type=int, default=8192)
    given = parser.parse_args()

    facts, inventory = load_model(given.model)
    print(f"{'GPUs':>4}  {'best plan':12} {'weights a GPU':>13} {'sequences':>9} {'batch 1':>9} {'batch 64':>9}")
    for gpus in (1, 2, 4, 8, 16):
        link, gpu = choose_link(given.link, gpus, choose_gpu(given.gpu, None))
        question = Question(facts, inventory, gpus, gpu, link, batches=(1, 64), context=given.context)
        best = advise(question, assess_all(question)).best
        if best is None:
            print(f"{gpus:>4}  no plan fits")
            continue
        weights, times = f"{best.weights.total / 1e9:.1f} GB", [f"{step.total:.2f} ms" for step in best.decode.values()]
        print(f"{gpus:>4}  {best.layout!s:12} {weights:>13} {best.sequences:>9} {times[0]:>9} {times[1]:>9}")


if __name__ == "__main__":
    main()
