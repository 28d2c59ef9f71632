"""Throughput of the dense and the pruned model in vLLM, side by side.

`python -m tools.vllm_speed PYTHON` takes the interpreter of an environment that has vLLM (docs/serving.md). It holds
each model in a process of its own, times them in turn, and prints a row for each number of requests at once. It needs
an otherwise idle machine, and records how busy it was. The dense model is also timed in vLLM's transformers backend,
which an uneven model runs in. All times go to a file, from which `tools.results` makes the table of docs/serving.md.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from typer import Argument, Option, echo

from stages._command import command
from stages._options import Compact, Model
from tools import _vllm_speed_script as script
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.tensor_files import Checkpoint
from tvaprune.measures import markdown
from tvaprune.proof.vllm_runtime import ENVIRONMENT

Times = dict[str, float]  # as the script prints them
MEASURED = Path("docs/vllm_speed.json")
SERVING = {Path("metrics/serving.json"): "0.2", Path("docs/serving_0.5.json"): "0.5"}  # file -> sparsity


class Server:
    """A process that holds one model."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.version: str = self.answer()["vllm"]

    def answer(self, request: str = "") -> dict[str, Any]:
        """Send a request, and read the next result. Raises RuntimeError where the process ended instead."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(request)
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise RuntimeError(f"vLLM ended with status {self.process.wait()}; its messages are above")


@contextmanager
def served(python: Path, directory: Path, backend: str, dtype: str, tokens: tuple[int, int]) -> Iterator[Server]:
    """A loaded model; `tokens` are those of a prompt and the new ones."""
    vocabulary = load_config(directory).vocab_size
    arguments = [str(directory.resolve()), backend, dtype, str(vocabulary), *map(str, tokens)]
    variables = os.environ | {"HF_HUB_OFFLINE": "1"} | ENVIRONMENT
    started = [str(python), "-P", str(Path(script.__file__).resolve()), *arguments]
    process = subprocess.Popen(started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, text=True)
    try:
        yield Server(process)
    finally:
        process.stdin.close()  # type: ignore[union-attr]  # the script ends with its input
        process.wait()


def measure(servers: dict[str, Server], requests: int, repeats: int) -> dict[str, list[Times]]:
    """Times by model, taken in turn after one unrecorded round."""
    rounds = [{name: each.answer(f"{requests}\n") for name, each in servers.items()} for _ in range(repeats + 1)]
    return {name: [one[name] for one in rounds[1:]] for name in servers}


def row(found: dict[str, list[Times]], requests: int, new_tokens: int) -> list[str]:
    """One row: for each model tokens a second and milliseconds to the first token, medians with their ranges."""
    cells = [str(requests)]
    for times in found.values():
        rates = [requests * new_tokens / one["whole_s"] for one in times]
        first = median(one["first_s"] for one in times)
        cells.append(f"{median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f}), {1e3 * first:.0f} ms")
    return cells


def table(measured: dict[str, Any]) -> str:
    """What `main` wrote, in Markdown: a row for each number of requests, and what the figures are of."""
    times = {int(requests): found for requests, found in measured["times"].items()}
    rows = [row(found, requests, measured["new_tokens"]) for requests, found in times.items()]
    rounds = len(next(iter(next(iter(times.values())).values())))
    sentences = [
        f"Tokens a second, the median of {rounds} rounds (lowest-highest); and the time until all requests have their",
        f"first token. Prompts of {measured['prompt_tokens']} tokens, {measured['new_tokens']} new ones,",
        f"{measured['dtype']}, vLLM {measured['vllm']} on {measured['processors']} CPU cores. The pruned weights are",
        f"{measured['weights_ratio']:.2f} of the dense. The load of the machine before the run was",
        f"{measured['busy_with_others']:.1f} processes.",
    ]
    return "\n\n".join([markdown.table(["requests", *next(iter(times.values()))], rows), " ".join(sentences)])


def agreement(found: list[dict[str, float]]) -> str:
    """What `tvaprune verify --vllm` wrote for the models of SERVING, in Markdown."""
    head = [
        "sparsity",
        "new tokens",
        "largest difference of a log-probability",
        "prompts with the same tokens",
        "prompts that pass",
    ]
    rows = []
    for sparsity, figures in zip(SERVING.values(), found, strict=True):
        shares = [f"{figures[name]:.0%}" for name in ("token_agreement", "top5_agreement")]
        rows.append([sparsity, f"{figures['tokens']:.0f}", f"{figures['max_abs_logprob_diff']:.0e} nats", *shares])
    return markdown.table(head, rows)


def compare_served(
    python: Path,
    dense: Path,
    compact: Path,
    requests: list[int],
    tokens: tuple[int, int],
    repeats: int,
    dtype: str,
) -> dict[str, Any]:
    """Time the dense and the pruned model; returns the times and what they are of, as `table` takes them."""
    pruned = "transformers" if load_config(compact).model_type == "tvaprune" else "auto"
    models = {"dense": (dense, "auto"), "dense, transformers backend": (dense, "transformers")}
    models["pruned" + (", transformers backend" if pruned == "transformers" else "")] = (compact, pruned)
    busy = os.getloadavg()[0]
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(served(python, directory, backend, dtype, tokens))
            for name, (directory, backend) in models.items()
        }
        times = {str(each): measure(servers, each, repeats) for each in requests}
    read = [sum(info.nbytes for info in Checkpoint.of(each).info.values()) for each in (dense, compact)]
    return {
        "vllm": next(iter(servers.values())).version,
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "busy_with_others": busy,
        "dtype": dtype,
        "prompt_tokens": tokens[0],
        "new_tokens": tokens[1],
        "weights_ratio": read[1] / read[0],
        "times": times,
    }


@command
def main(
    python: Annotated[Path, Argument(help="Interpreter of an environment that has vLLM.")],
    dense: Model = Path("data/model"),
    compact: Compact = Path("artifacts/compact"),
    requests: Annotated[str, Option(help="Numbers of requests at once.")] = "1,8,32",
    tokens: Annotated[tuple[int, int], Option(help="Tokens of a prompt, and new ones.")] = (128, 32),
    repeats: Annotated[int, Option(help="Timed rounds.")] = 3,
    dtype: Annotated[str, Option(help="vLLM's dtype.")] = "bfloat16",
    out: Annotated[Path, Option(help="JSON file for the times.")] = MEASURED,
) -> None:
    """Writes the times and prints the table, in Markdown."""
    sizes = [int(each) for each in requests.split(",")]
    measured = compare_served(python, dense, compact, sizes, tokens, repeats, dtype)
    write_json(out, measured)
    echo(table(measured))
