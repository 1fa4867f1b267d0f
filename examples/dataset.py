"""Answers a dataset with Ray Data: each actor of `map_batches` hosts a gang of ranks; `size` is how many.

Uses the Ray cluster of RAY_ADDRESS, or starts one here and ends it. Prints each question with its answer.

    python examples/dataset.py configs/demo.yaml "What is a stage?" "What is a lane?"
"""

import sys
from typing import Any

import ray

from deployments.batch.ray_data import BatchModel


def request(row: dict[str, Any]) -> dict[str, Any]:
    """The request that a row makes, as /v1/chat/completions takes it."""
    return {"messages": [{"role": "user", "content": str(row["question"])}], "max_tokens": 100, "temperature": 0}


def main(config: str, questions: list[str]) -> list[dict[str, Any]]:
    """The rows of the dataset with the columns that the model adds."""
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    dataset = ray.data.from_items([{"question": question} for question in questions])
    answers = dataset.map_batches(
        BatchModel,
        fn_constructor_kwargs={"config": config, "request": request},
        batch_size=256,  # several times scheduler.max_num_seqs, or the gang idles between two batches
        # Gangs; and two batches at once in each: the next begins while the longest answers of the last go on
        compute=ray.data.ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True),
        num_cpus=0,  # of the actor itself; its gang reserves what it needs
    )
    return answers.take_all()


if __name__ == "__main__":
    for row in main(sys.argv[1], sys.argv[2:]):
        print(row["question"], row["answer"] or row["error"], sep="\n  ")
    ray.shutdown()
