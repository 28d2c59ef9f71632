"""Fine-tune a compact model's LoRA adapter with cross-entropy and distillation from the dense model.

TVA-Prune section 3 fine-tunes with LoRA on CE plus distillation: MSE in the text, 0.01 · KL in the published code.
No random state is kept between steps: data order and dropout follow from the seed and the step, so a resumed run gives
the same bits as an uninterrupted one (on a deterministic device).
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from transformers import PreTrainedModel

from tvaprune.architecture.attention import use_training_attention
from tvaprune.architecture.sharding import to_process
from tvaprune.device import require_trainable
from tvaprune.distributed import Process
from tvaprune.losses import DivergedError
from tvaprune.options.recovery import RecoveryOptions
from tvaprune.progress import Progress
from tvaprune.recovery.lora import add_lora
from tvaprune.recovery.objective import batch_loss, mean_nll
from tvaprune.recovery.report import CurveRow, quality_metrics
from tvaprune.recovery.schedule import learning_rate_at, mix_seed, step_windows, total_steps
from tvaprune.recovery.teacher import CachedTeacher, Teacher, frozen_head
from tvaprune.resume import SavedState

# Attributes of a `_Trainer` that a saved state holds as they are.
_SAVED = ("step", "seconds", "step_seconds", "best", "best_step", "best_nll", "teacher_nll")


class Finetuned(NamedTuple):
    """The best adapter, and how training went."""

    model: PeftModel  # holds the weights of the step with the lowest validation loss
    metrics: dict[str, Any]  # nested numbers for metrics/finetune.json
    curve: list[CurveRow]  # a row for the start and one for every step


def finetune(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train_ids: Int[Tensor, "windows seq"],
    validation_ids: Int[Tensor, "validation_windows seq"],
    options: RecoveryOptions,
    process: Process,
    state: SavedState,
) -> Finetuned:
    """Train an adapter and return it as it was when its validation cross-entropy was lowest.

    Both models come in host memory and in the dtype to compute in; they are on the process's device only while they
    are used there. The base stays frozen in that dtype, the adapter and its optimizer are fp32, and matmuls run in the
    base's dtype.

    Args:
        student: the compact model; gets the adapter in place.
        teacher: the dense model, same vocabulary. Its validation loss is measured too, as the goal of recovery.
        train_ids, validation_ids: any integer dtype; windows of other documents for validation.
        process: the processes of its world share each step's windows, and end with the same adapter.
        state: resumed from, and saved to by rank 0.

    Raises:
        ValueError: inputs that do not fit together, or windows that cannot be shared equally, before any work.
        DivergedError: the loss is not finite.
    """
    _check(student, teacher, train_ids, validation_ids)
    for model in (student, teacher):
        use_training_attention(model, process.device)
    own = process.world.part(options.windows_per_step, "finetune_lora.batch_size x accumulation")
    steps = range(total_steps(options, len(train_ids)))
    own_windows = [step_windows(step, len(train_ids), options)[own] for step in steps]
    peft_model = add_lora(student, options)
    resumed = state.load()

    to_process(teacher.requires_grad_(False), process)
    nll = resumed["teacher_nll"] if resumed else mean_nll(teacher, validation_ids, options.batch_size, process)
    source: Teacher | CachedTeacher | None = None if options.teacher == "none" else Teacher(teacher, train_ids)
    if isinstance(source, Teacher) and options.teacher == "cached":
        used = {window for windows in own_windows for window in windows}
        path = state.directory / f"teacher_hidden_{process.world.rank}_of_{process.world.size}.bin"
        source = CachedTeacher(source, used, options.batch_size, path, process)
    if options.teacher != "online" and not process.sharded:
        teacher.to("cpu")

    to_process(student, process)
    trainer = _Trainer(peft_model, source, train_ids, validation_ids, options, process, own_windows, nll)
    if resumed:
        trainer.resume(resumed)
    # autocast would cast each adapter's input back at once: 5% of a step on a CPU. DoRA computes with the cast input.
    with disable_input_dtype_casting(peft_model, active=not options.use_dora):
        trainer.run(state)
    return trainer.finish()


@dataclass
class _Trainer:
    """The state of training, and one step of it."""

    model: PeftModel
    teacher: Teacher | CachedTeacher | None
    train_ids: Tensor
    validation_ids: Tensor
    options: RecoveryOptions
    process: Process
    own_windows: list[list[int]]  # for every step, the indices of this process's windows
    teacher_nll: float
    step: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_nll: float = math.inf
    curve: list[CurveRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        options = self.options
        self.student: PreTrainedModel = self.model.get_base_model()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        if options.gradient_checkpointing:
            self.student.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def resume(self, saved: dict[str, Any]) -> None:
        self._set_parameters(saved["parameters"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.curve = [CurveRow(*row) for row in saved["curve"]]
        for name in _SAVED:
            setattr(self, name, saved[name])

    def save(self, state: SavedState) -> None:
        if self.process.world.is_main:
            state.save(
                {
                    **{name: getattr(self, name) for name in _SAVED},
                    "parameters": {name: p.detach() for name, p in self.parameters.items()},
                    "optimizer": self.optimizer.state_dict(),
                    "curve": [tuple(row) for row in self.curve],
                }
            )

    def run(self, state: SavedState) -> None:
        steps = len(self.own_windows)
        if not self.curve:
            self.curve.append(CurveRow(0, 0, None, None, None, None, self._validate()))
            self.save(state)
        silent = not self.process.world.is_main
        with Progress(total=steps, initial=self.step, desc="fine-tuning", unit="step", disable=silent) as bar:
            while self.step < steps:
                started = time.perf_counter()
                row = self._train_step()
                self.step_seconds += time.perf_counter() - started
                last = self.step == steps
                if last or self.step % self.options.validate_every == 0:
                    row = row._replace(validation_ce=self._validate())
                self.curve.append(row)
                self.seconds += time.perf_counter() - started
                if last or self.step % self.options.save_every == 0:
                    self.save(state)
                bar.set_postfix(loss=f"{row.loss:.3f}", validation=f"{self.best_nll:.3f}", refresh=False)
                bar.update()

    def finish(self) -> Finetuned:
        self._set_parameters(self.best)
        metrics = {
            "steps": self.step,
            "tokens": self.curve[-1].tokens,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds / self.step,
            "trainable_params": sum(p.numel() for p in self.parameters.values()),
            "best_step": self.best_step,
            **quality_metrics(self.curve, self.best_nll, self.teacher_nll, self.seconds),
        }
        return Finetuned(self.model, metrics, self.curve)

    def _train_step(self) -> CurveRow:
        options = self.options
        learning_rate = learning_rate_at(self.step + 1, len(self.own_windows), options)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        means = self._add_gradients()
        self.process.world.mean_([means, *(p.grad for p in self.parameters.values() if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), options.gradient_clip)
        # One transfer a step, which on a GPU also makes the clock read after the work.
        loss, ce, distillation, norm_value = torch.cat([means, norm[None]]).tolist()
        if not math.isfinite(loss) or not math.isfinite(norm_value):
            raise DivergedError(
                f"fine-tuning: loss {loss}, gradient norm {norm_value} at step {self.step + 1}; "
                f"lower finetune_lora.learning_rate (now {options.learning_rate})"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        tokens = self.step * options.windows_per_step * self.train_ids.shape[1]
        return CurveRow(self.step, tokens, learning_rate, loss, ce, distillation, None)

    def _add_gradients(self) -> Tensor:
        """Forward and backward over this process's windows of the step.

        Returns the means of loss, CE and distillation over those windows, float32 [3].
        """
        options, device = self.options, self.process.device
        self.model.train()
        means = torch.zeros(3, device=device)
        windows = self.own_windows[self.step]
        first_window = self.step * options.windows_per_step + self.process.world.rank * len(windows)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for start in range(0, len(windows), options.batch_size):
                batch = windows[start : start + options.batch_size]
                # Seeded by the number of the batch's first window in the run, so a resumed run has the same dropout.
                # With a batch_size above 1 another number of processes has other batches, and so other dropout.
                torch.manual_seed(mix_seed(options.seed, first_window + start))
                losses = batch_loss(self.student, self.teacher, batch, self._input_ids(batch), options)
                share = len(batch) / len(windows)
                (losses.loss * share).backward()
                means += torch.stack([losses.loss.detach(), losses.ce, losses.distillation]) * share
        return means

    def _input_ids(self, windows: list[int]) -> Tensor:
        chosen = self.train_ids[windows]
        if self.process.device.type == "cuda":
            chosen = chosen.pin_memory()  # so that the copy runs beside the computation
        return chosen.to(self.process.device, non_blocking=True).long()

    def _validate(self) -> float:
        """Measure the student, and keep its adapter if it is the best so far."""
        nll = mean_nll(self.student, self.validation_ids, self.options.batch_size, self.process)
        if nll < self.best_nll:
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
            self.best_step, self.best_nll = self.step, nll
        return nll

    @torch.no_grad()
    def _set_parameters(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def _check(student: PreTrainedModel, teacher: PreTrainedModel, train_ids: Tensor, validation_ids: Tensor) -> None:
    """Raise a ValueError that names what does not fit."""
    for name, ids in (("finetune_ids", train_ids), ("finetune_validation_ids", validation_ids)):
        if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise ValueError(f"{name}: expected [windows >= 1, tokens >= 2], found {list(ids.shape)}")
    vocabulary, taught = (frozen_head(model).shape[0] for model in (student, teacher))
    if vocabulary != taught:
        raise ValueError(f"vocabularies differ: student {vocabulary}, teacher {taught}")
    largest = int(torch.maximum(train_ids.max(), validation_ids.max()))
    if largest >= vocabulary:
        raise ValueError(f"finetune_ids: token {largest} is outside the model's vocabulary of {vocabulary}")
    require_trainable(frozen_head(student).dtype)
