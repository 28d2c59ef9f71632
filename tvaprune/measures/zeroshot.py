"""Zero-shot accuracy on six tasks: lm-eval (EleutherAI) with its built-in prompts, on local rows.

`acc` takes the choice with the largest log-likelihood, `acc_norm` the one with the largest per character of its text.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lm_eval
import torch
from jaxtyping import Bool, Float, Int
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tvaprune.architecture.topology import hidden_states
from tvaprune.artifacts import ArtifactError
from tvaprune.distributed import ALONE, World
from tvaprune.measures.comparison import POSITIONS_AT_ONCE, read_jsonl, spread_evenly
from tvaprune.options.inputs import TASK_METRICS, TaskName
from tvaprune.progress import Progress


class _Task(NamedTuple):
    """A task as lm-eval defines it."""

    prompt: str  # file of lm-eval's definition
    split: str  # scored
    columns: tuple[str, ...]  # read by the prompt


_HELLASWAG = ("ctx_a", "ctx_b", "activity_label", "endings", "label")
_ARC = ("question", "choices", "answerKey")
_TASKS: dict[TaskName, _Task] = {
    "boolq": _Task("super_glue/boolq/default.yaml", "validation", ("passage", "question", "label")),
    "piqa": _Task("piqa/piqa.yaml", "validation", ("goal", "sol1", "sol2", "label")),
    "hellaswag": _Task("hellaswag/hellaswag.yaml", "validation", _HELLASWAG),
    "winogrande": _Task("winogrande/default.yaml", "validation", ("sentence", "option1", "option2", "answer")),
    "arc_easy": _Task("arc/arc_easy.yaml", "test", _ARC),
    "arc_challenge": _Task("arc/arc_challenge.yaml", "test", _ARC),
}
TASKS = tuple(_TASKS)

Rows = dict[TaskName, list[dict[str, Any]]]


class Scores(NamedTuple):
    """How a model answers the rows of each task.

    Attributes:
        figures: acc and acc_stderr, and where lm-eval defines them acc_norm and acc_norm_stderr; fractions of 1.
        right: for each row, in order, 1 where the answer is right by the task's metric in `TASK_METRICS`, else 0.
    """

    figures: dict[str, dict[str, float]]
    right: dict[str, list[float]]


def select_rows(directory: Path, tasks: list[TaskName], limit: int | None) -> Rows:
    """Of each task all rows, or `limit` spread evenly. Raises ArtifactError, which names an unusable file."""
    selected: Rows = {}
    for task in tasks:
        path = directory / f"{task}.jsonl"
        rows = read_jsonl(path)
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
) -> Scores:
    """Score a model on each task's rows, from `select_rows`, without examples in the prompt.

    All processes of `world` share the forwards and get the result; without `progress` there is no progress bar.
    """
    was_training = model.training
    model.eval()
    with TemporaryDirectory() as folder:
        _write_tasks(Path(folder), rows)
        # Without the defaults: indexing lm-eval's thousands of tasks takes seconds.
        manager = TaskManager(include_path=folder, include_defaults=False)
        # Not simple_evaluate: it adds a report on the machine, seconds of subprocesses for each model.
        found = lm_eval.evaluate(
            lm=_LanguageModel(model, tokenizer, batch_size, progress, world),
            task_dict=manager.load(list(rows)),
            log_samples=True,
        )
    model.train(was_training)
    kinds = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    figures: dict[str, dict[str, float]] = {}
    right: dict[str, list[float]] = {}
    for task in rows:
        result = found["results"][task]
        figures[task] = {kind: float(result[f"{kind},none"]) for kind in kinds if f"{kind},none" in result}
        answers = sorted(found["samples"][task], key=lambda answer: answer["doc_id"])
        right[task] = [float(answer[TASK_METRICS[task]]) for answer in answers]
    return Scores(figures, right)


def summarise(scores: Scores, mean_of: Sequence[TaskName], dense: Scores | None = None) -> dict[str, object]:
    """One model's part of the metrics file: its tasks, and the mean over `mean_of` with its standard error.

    Each task counts by its own metric, see `TASK_METRICS`. The standard error is that of rows drawn at random. With the
    dense model's scores on the same rows also the difference of the means, `mean_minus_dense`. Its standard error is of
    paired rows, so it is less than that of two means: most rows are easy or hard for both models.
    """
    means = [scores.figures[task][TASK_METRICS[task]] for task in mean_of]
    errors = [scores.figures[task][f"{TASK_METRICS[task]}_stderr"] for task in mean_of]
    summary: dict[str, object] = {**scores.figures, "mean": fmean(means), "mean_stderr": _error_of_mean(errors)}
    if dense is None:
        return summary
    differences = [
        [own - other for own, other in zip(scores.right[task], dense.right[task], strict=True)] for task in mean_of
    ]
    errors = [stdev(rows) / len(rows) ** 0.5 for rows in differences]
    return {
        **summary,
        "mean_minus_dense": fmean(fmean(rows) for rows in differences),
        "mean_minus_dense_stderr": _error_of_mean(errors),
    }


def _error_of_mean(errors: Sequence[float]) -> float:
    """The standard error of the mean of independent estimates."""
    return sum(error**2 for error in errors) ** 0.5 / len(errors)


def describe(model: str, summary: Mapping[str, Any]) -> str:
    """One line about a model, from its part of the metrics file."""
    tasks = ", ".join(f"{task} {summary[task][TASK_METRICS[task]]:.3f}" for task in TASK_METRICS if task in summary)
    line = f"{model}: accuracy {tasks}; mean {summary['mean']:.3f} ± {summary['mean_stderr']:.3f}"
    if "mean_minus_dense" not in summary:
        return line
    return f"{line}, {summary['mean_minus_dense']:+.3f} ± {summary['mean_minus_dense_stderr']:.3f} from dense"


def _write_tasks(folder: Path, rows: Rows) -> None:
    """Write each task's rows, and lm-eval's own definition of the task with these rows as its data (as JSON)."""
    built_in = Path(lm_eval.tasks.__file__).parent
    for name, selected in rows.items():
        task, data = _TASKS[name], folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in selected), encoding="utf-8")
        definition = {
            "include": str(built_in / task.prompt),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            # The default cache directory would keep every run's rows.
            "dataset_kwargs": {"data_files": {task.split: str(data)}, "cache_dir": str(folder / "cache")},
            **{
                f"{split}_split": split if split == task.split else None for split in ("training", "validation", "test")
            },
            "num_fewshot": 0,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(definition))


class _LanguageModel(HFLM):
    """lm-eval's Hugging Face model, with log-likelihoods in float32 and only for the tokens of the choices.

    lm-eval computes log-probabilities of the whole vocabulary at every position in the model's dtype. At batch
    16 x 400 tokens that is twice 0.6 GB in bfloat16, and rounding to 1/16 nat makes choices tie.
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
        # Not lm-eval's own world: it would divide the rows of each task, and unevenly where a task has few.
        self._processes = world

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether it is the greedy one.

        `requests` are of (anything, context tokens, continuation tokens).
        """
        # Requests that differ in their last token only (yes or no) have the same input and share a forward.
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            sharing[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(index)
        inputs = sorted(sharing, key=lambda tokens: (-len(tokens), tokens))  # longest first: little padding
        answers = torch.zeros(len(requests), 2, dtype=torch.float64)  # nats, and 1 where greedy
        hide_bar = self._progress is None or not self._processes.is_main
        bar = Progress(total=len(requests), desc=self._progress, unit="choice", disable=hide_bar)
        for turn, counts in self._processes.turns(-(-len(inputs) // self.batch_size)):
            batch = inputs[turn * self.batch_size : (turn + 1) * self.batch_size]
            # Padding on the right: causal attention keeps it from every position that is read.
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens in batch], batch_first=True)
            hidden = hidden_states(self.model, padded.to(self.device))
            owners, states, targets = [], [], []
            for row, tokens in enumerate(batch):
                for index in sharing[tokens]:
                    continuation = requests[index][2][-len(tokens) :]  # what the context has room for
                    owners.append(index)
                    states.append(hidden[row, len(tokens) - len(continuation) : len(tokens)])
                    targets.append(torch.tensor(continuation))
            nats, greedy = self._score(torch.cat(states), torch.cat(targets).to(self.device))
            lengths = [len(continuation) for continuation in targets]
            for index, own_nats, own_greedy in zip(owners, nats.split(lengths), greedy.split(lengths), strict=True):
                if counts:
                    answers[index] = torch.stack([own_nats.sum(), own_greedy.all()])
            bar.update(min(len(owners) * self._processes.size, len(requests) - bar.n))
        bar.close()
        gathered = self._processes.sum_(answers.to(self.device)).tolist()
        return [(nats, greedy == 1) for nats, greedy in gathered]

    def _score(
        self, states: Float[Tensor, "tokens hidden"], targets: Int[Tensor, " tokens"]
    ) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
        """Log-likelihood of each target token, float64 on the CPU, and whether it is the likeliest token."""
        lm_head = self.model.get_output_embeddings()
        nats, greedy = [], []
        for some, wanted in zip(states.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True):
            logits = lm_head(some).float()
            nats.append(-torch.nn.functional.cross_entropy(logits, wanted, reduction="none").cpu().double())
            greedy.append((logits.argmax(dim=-1) == wanted).cpu())
        return torch.cat(nats), torch.cat(greedy)
