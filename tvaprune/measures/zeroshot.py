"""Zero-shot accuracy on six tasks, by lm-eval with its built-in prompts, on local rows.

lm-eval (EleutherAI, lm-evaluation-harness) asks a model for the log-likelihood of every choice; `acc` takes the
likeliest, `acc_norm` the likeliest per byte of its text.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tvaprune.architecture.topology import hidden_states
from tvaprune.artifacts import ArtifactError
from tvaprune.distributed import ALONE, World
from tvaprune.measures.comparison import POSITIONS_AT_ONCE, read_rows, spread_evenly


@dataclass(frozen=True)
class _Task:
    """Where lm-eval defines a task, which split it scores, and which columns its prompt reads."""

    prompt: str
    split: str
    columns: tuple[str, ...]


_TASKS = {
    "boolq": _Task("super_glue/boolq/default.yaml", "validation", ("passage", "question", "label")),
    "piqa": _Task("piqa/piqa.yaml", "validation", ("goal", "sol1", "sol2", "label")),
    "hellaswag": _Task(
        "hellaswag/hellaswag.yaml", "validation", ("ctx_a", "ctx_b", "activity_label", "endings", "label")
    ),
    "winogrande": _Task("winogrande/default.yaml", "validation", ("sentence", "option1", "option2", "answer")),
    "arc_easy": _Task("arc/arc_easy.yaml", "test", ("question", "choices", "answerKey")),
    "arc_challenge": _Task("arc/arc_challenge.yaml", "test", ("question", "choices", "answerKey")),
}
TASKS = tuple(_TASKS)

Rows = dict[str, list[dict[str, Any]]]


def select_rows(directory: Path, tasks: list[str], limit: int | None) -> Rows:
    """The rows to score, of each task: all, or `limit` spread evenly over its file.

    Args:
        directory: holds TASK.jsonl for every task.
        limit: None, or more than there are, takes all.

    Raises:
        ArtifactError: a file is absent or damaged, or lacks a column; names it.
    """
    selected: Rows = {}
    for task in tasks:
        path = directory / f"{task}.jsonl"
        rows = read_rows(path)
        missing = [column for column in _TASKS[task].columns if any(column not in row for row in rows)]
        if missing:
            raise ArtifactError(f"{path}: rows without {', '.join(missing)}; run the fetch_inputs stage")
        selected[task] = [rows[index] for index in spread_evenly(len(rows), min(limit or len(rows), len(rows)))]
    return selected


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    batch_size: int,
    progress: str | None = None,
    world: World = ALONE,
) -> dict[str, dict[str, float]]:
    """Score a model on every task, without examples in the prompt.

    Args:
        rows: from `select_rows`.
        batch_size: sequences in one forward; changes speed and memory only.
        progress: what a progress bar says; none is shown without.
        world: processes that share the forwards; all get the result.

    Returns:
        By task: acc and acc_stderr, and acc_norm and acc_norm_stderr where lm-eval defines it; fractions of 1.
    """
    was_training = model.training
    model.eval()
    with TemporaryDirectory() as folder:
        _write_tasks(Path(folder), rows)
        # Without the defaults: indexing lm-eval's thousands of tasks takes seconds.
        manager = TaskManager(include_path=folder, include_defaults=False)
        # Not simple_evaluate: it adds a report on the machine, seconds of subprocesses for each model.
        results = lm_eval.evaluate(
            lm=_LanguageModel(model, tokenizer, batch_size, progress, world),
            task_dict=manager.load(list(rows)),
            log_samples=False,
        )["results"]
    model.train(was_training)
    return {
        task: {
            key.removesuffix(",none"): float(value)
            for key, value in results[task].items()
            if key.endswith(",none") and key.startswith("acc")
        }
        for task in rows
    }


def summarise(accuracies: dict[str, dict[str, float]]) -> dict[str, object]:
    """One model's part of the metrics file: its tasks, the mean of their acc, and that mean's standard error."""
    errors = [accuracy["acc_stderr"] for accuracy in accuracies.values()]
    return {
        **accuracies,
        "mean_acc": sum(accuracy["acc"] for accuracy in accuracies.values()) / len(accuracies),
        "mean_acc_stderr": sum(error**2 for error in errors) ** 0.5 / len(errors),
    }


def _write_tasks(folder: Path, rows: Rows) -> None:
    """Each task's rows, and a definition that is lm-eval's own but for where the rows are. JSON is YAML."""
    built_in = Path(lm_eval.tasks.__file__).parent
    for task, selected in rows.items():
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in selected), encoding="utf-8")
        splits = {"training_split": None, "validation_split": None, "test_split": None}
        definition = {
            "include": str(built_in / _TASKS[task].prompt),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            # A cache beside the rows goes when they go; the default one would keep every run's.
            "dataset_kwargs": {"data_files": {_TASKS[task].split: str(data)}, "cache_dir": str(folder / "cache")},
            **splits,
            f"{_TASKS[task].split}_split": _TASKS[task].split,
            "num_fewshot": 0,
        }
        (folder / f"{task}.yaml").write_text(json.dumps(definition))


class _LanguageModel(HFLM):
    """lm-eval's Hugging Face model, with log-likelihoods in float32 and of the choices' tokens alone.

    lm-eval makes log-probabilities of the whole vocabulary at every position, in the model's dtype: at
    batch 16 x 400 tokens 0.6 GB in bfloat16, twice, and rounded to 1/16 nat near -10, so that choices tie.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        progress: str | None,
        world: World,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._progress = progress
        # lm-eval sees one process on each: it would share rows out, and tasks of few rows badly.
        self._processes = world

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether it is the greedy one.

        Args:
            requests: (anything, context tokens, continuation tokens).
        """
        # Requests that differ in their last token alone (yes or no) read the same input: one forward serves them.
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            sharing[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(index)
        inputs = sorted(sharing, key=lambda tokens: (-len(tokens), tokens))  # longest first: little padding
        answers = torch.zeros(len(requests), 2, dtype=torch.float64)  # nats, and 1 where greedy
        hidden_bar = self._progress is None or not self._processes.is_main
        bar = tqdm(total=len(requests), desc=self._progress, unit="choice", disable=hidden_bar)
        for turn, counts in self._processes.turns(-(-len(inputs) // self.batch_size)):
            batch = inputs[turn * self.batch_size : (turn + 1) * self.batch_size]
            # Padding is on the right, where causal attention keeps it from every position that is read.
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens in batch], batch_first=True)
            hidden = hidden_states(self.model, padded.to(self.device))
            states, targets, owners = [], [], []
            for row, tokens in enumerate(batch):
                for index in sharing[tokens]:
                    continuation = requests[index][2]
                    states.append(hidden[row, len(tokens) - len(continuation) : len(tokens)])
                    targets.extend(continuation)
                    owners.append((index, len(continuation)))
            log_likelihood, greedy = self._score(torch.cat(states), torch.tensor(targets, device=self.device))
            for (index, _), nats, all_greedy in zip(
                owners,
                log_likelihood.split([length for _, length in owners]),
                greedy.split([length for _, length in owners]),
                strict=True,
            ):
                if counts:
                    answers[index] = torch.stack([nats.sum(), all_greedy.all()])
            bar.update(min(len(owners) * self._processes.size, len(requests) - bar.n))
        bar.close()
        gathered = self._processes.sum_(answers.to(self.device)).tolist()
        return [(nats, greedy == 1) for nats, greedy in gathered]

    def _score(self, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-likelihood of each target token [n], float64 on the CPU, and whether it is the likeliest [n]."""
        lm_head = self.model.get_output_embeddings()
        nats, greedy = [], []
        for some, wanted in zip(states.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True):
            logits = lm_head(some).float()
            nats.append(-torch.nn.functional.cross_entropy(logits, wanted, reduction="none").cpu().double())
            greedy.append((logits.argmax(dim=-1) == wanted).cpu())
        return torch.cat(nats), torch.cat(greedy)
