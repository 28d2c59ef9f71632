"""Fine-tune a compact model's LoRA adapter with cross-entropy and distillation from the dense model.

TVA-Prune section 3 fine-tunes with LoRA on CE plus distillation: MSE in the text, 0.01 · KL in the
published code. Nothing here keeps a random state between steps: data order and dropout follow from the
seed and the step, so a resumed run is the undisturbed run bit by bit (on a deterministic device).
"""

import csv
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from tvaprune.architecture.attention import use_training_attention
from tvaprune.architecture.sharding import shard_layers
from tvaprune.distributed import ALONE, World
from tvaprune.losses import DistillationKind, distillation_loss, next_token_labels
from tvaprune.recovery.lora import LoraSettings, add_lora
from tvaprune.recovery.schedule import Schedule, learning_rate_at, mix_seed, windows_of
from tvaprune.recovery.teacher import CachedTeacher, Teacher, final_hidden, frozen_head
from tvaprune.resume import SavedState

TeacherMode = Literal["online", "cached", "none"]


class DivergedError(ValueError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class Objective:
    """ce_weight · CE + distillation_weight · D; see `tvaprune.losses.distillation_loss`.

    Attributes:
        teacher: "online" runs the dense model beside the student; "cached" runs it once before training, keeps
            its hidden states on disk and takes it off the device; "none" trains on CE alone.
    """

    teacher: TeacherMode = "online"
    ce_weight: float = 1.0
    distillation_weight: float = 1.0
    distillation: DistillationKind = "kl"
    temperature: float = 1.0
    top_k: int | None = None


class CurveRow(NamedTuple):
    """One step, after its update; None where not measured. Losses in nats a token, fp32 means."""

    step: int
    tokens: int
    learning_rate: float | None
    loss: float | None
    ce: float | None
    distillation: float | None
    validation_ce: float | None


class Finetuned(NamedTuple):
    """The best adapter and how it came about.

    Attributes:
        model: holds the weights of `best_step`.
        metrics: nested numbers for metrics/finetune.json.
        curve: a row for the start and one for every step.
    """

    model: PeftModel
    metrics: dict[str, Any]
    curve: list[CurveRow]


def finetune(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train_ids: Int[Tensor, "windows seq"],
    validation_ids: Int[Tensor, "validation_windows seq"],
    *,
    lora: LoraSettings,
    objective: Objective,
    schedule: Schedule,
    seed: int,
    device: torch.device,
    state: SavedState,
    world: World = ALONE,
    sharded: bool = False,
) -> Finetuned:
    """Train an adapter and return it as it was when its validation cross-entropy was lowest.

    Both models come in host memory and in the dtype to compute in; they are moved to `device` only while
    they are used there. The base stays frozen in that dtype, the adapter and its optimizer are fp32, and
    matmuls run in the base's dtype.

    Args:
        student: the compact model; gets the adapter in place.
        teacher: the dense model, same vocabulary. Also measured, as the aim of recovery.
        train_ids: token ids, any integer dtype.
        validation_ids: windows of other documents than `train_ids`.
        state: resumed from, and saved to by rank 0.
        world: the processes that share each step's windows; all end with the same adapter.
        sharded: split both models' layers over the processes.

    Raises:
        ValueError: inputs that do not fit together, or windows that cannot be shared equally, before any work.
        DivergedError: the loss is not finite.
    """
    _check(student, teacher, train_ids, validation_ids)
    for model in (student, teacher):
        use_training_attention(model, device)
    places = range(schedule.windows_a_step)
    own = places[world.part(len(places), "finetune_lora.batch_size x accumulation")]
    total = schedule.total_steps(len(train_ids))
    steps = [windows_of(step, own, schedule, len(train_ids), seed) for step in range(total)]
    peft_model = add_lora(student, lora, seed)
    resumed = state.load()

    teacher.requires_grad_(False)
    shard_layers(teacher, device, world.size) if sharded else teacher.to(device)
    teacher_nll = (
        resumed["teacher_nll"] if resumed else _nll(teacher, validation_ids, schedule.batch_size, device, world)
    )
    source: Teacher | CachedTeacher | None = None if objective.teacher == "none" else Teacher(teacher, train_ids)
    if isinstance(source, Teacher) and objective.teacher == "cached":
        used = {window for step in steps for window in step}
        path = state.directory / f"teacher_hidden_{world.rank}_of_{world.size}.bin"
        source = CachedTeacher(source, used, schedule.batch_size, path)
    if objective.teacher != "online" and not sharded:
        teacher.to("cpu")

    shard_layers(student, device, world.size) if sharded else peft_model.to(device)
    loop = _Loop(
        peft_model, source, train_ids, validation_ids, objective, schedule, seed, device, teacher_nll, steps, own, world
    )
    loop.resume(resumed)
    # autocast would cast every adapter's input straight back: a twentieth of a step on a CPU. DoRA computes with it.
    with disable_input_dtype_casting(peft_model, active=not lora.use_dora):
        loop.run(state)
    return loop.finish()


def write_curve(path: Path, curve: Sequence[CurveRow]) -> None:
    """CSV with a header; what was not measured is left blank, which plots skip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CurveRow._fields)
        writer.writerows(curve)


class _Loop:
    """The state of training, and one step of it."""

    def __init__(
        self,
        model: PeftModel,
        teacher: Teacher | CachedTeacher | None,
        train_ids: Tensor,
        validation_ids: Tensor,
        objective: Objective,
        schedule: Schedule,
        seed: int,
        device: torch.device,
        teacher_nll: float,
        steps: list[list[int]],
        own: range,
        world: World,
    ) -> None:
        """
        Args:
            steps: for every step, this process's windows.
            own: their places among a step's windows.
        """
        self.windows = steps
        self.own = own
        self.world = world
        self.model = model
        self.student: PreTrainedModel = model.get_base_model()
        self.teacher = teacher
        self.train_ids = train_ids
        self.validation_ids = validation_ids
        self.objective = objective
        self.schedule = schedule
        self.seed = seed
        self.device = device
        self.teacher_nll = teacher_nll
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        if schedule.gradient_checkpointing:
            self.student.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.steps = len(steps)
        self.step = 0
        self.seconds = 0.0
        self.step_seconds = 0.0
        self.best: dict[str, Tensor] = {}
        self.best_step = 0
        self.best_nll = math.inf
        self.curve: list[CurveRow] = []

    def resume(self, saved: dict[str, Any] | None) -> None:
        if saved is None:
            return
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved["parameters"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds, self.step_seconds = saved["step"], saved["seconds"], saved["step_seconds"]
        self.best, self.best_step, self.best_nll = saved["best"], saved["best_step"], saved["best_nll"]
        self.curve = [CurveRow(*row) for row in saved["curve"]]

    def save(self, state: SavedState) -> None:
        if not self.world.is_main:
            return
        state.save(
            {
                "step": self.step,
                "seconds": self.seconds,
                "step_seconds": self.step_seconds,
                "parameters": {name: p.detach() for name, p in self.parameters.items()},
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
                "best_step": self.best_step,
                "best_nll": self.best_nll,
                "curve": [tuple(row) for row in self.curve],
                "teacher_nll": self.teacher_nll,
            }
        )

    def run(self, state: SavedState) -> None:
        steps = self.steps
        if not self.curve:
            self.curve.append(CurveRow(0, 0, None, None, None, None, self._validate()))
            self.save(state)
        alone = not self.world.is_main
        with tqdm(total=steps, initial=self.step, desc="fine-tuning", unit="step", disable=alone) as bar:
            while self.step < steps:
                started = time.perf_counter()
                row = self._train_step()
                self.step_seconds += time.perf_counter() - started
                last = self.step == steps
                if last or self.step % self.schedule.validate_every == 0:
                    row = row._replace(validation_ce=self._validate())
                self.curve.append(row)
                self.seconds += time.perf_counter() - started
                if last or self.step % self.schedule.save_every == 0:
                    self.save(state)
                bar.set_postfix(loss=f"{row.loss:.3f}", validation=f"{self.best_nll:.3f}", refresh=False)
                bar.update()

    def _train_step(self) -> CurveRow:
        schedule = self.schedule
        learning_rate = learning_rate_at(self.step + 1, self.steps, schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        sums = torch.zeros(3, device=self.device)
        windows = self.windows[self.step]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for start in range(0, len(windows), schedule.batch_size):
                batch = windows[start : start + schedule.batch_size]
                # Dropout belongs to a place in the run, whichever process is there.
                torch.manual_seed(mix_seed(self.seed, self.step * schedule.windows_a_step + self.own[start]))
                loss, ce, distillation = self._loss(batch)
                share = len(batch) / len(windows)
                (loss * share).backward()
                sums += torch.stack([loss.detach(), ce, distillation]) * share
        self.world.mean_([sums, *(p.grad for p in self.parameters.values() if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), schedule.gradient_clip)
        # One transfer a step, which also makes the clock honest on a GPU.
        loss_value, ce_value, distillation_value, norm_value = torch.cat([sums, norm[None]]).tolist()
        if not math.isfinite(loss_value) or not math.isfinite(norm_value):
            raise DivergedError(
                f"fine-tuning: loss {loss_value}, gradient norm {norm_value} at step {self.step + 1}; "
                f"lower finetune_lora.learning_rate (now {schedule.learning_rate})"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return CurveRow(self.step, self._tokens(), learning_rate, loss_value, ce_value, distillation_value, None)

    def _loss(self, windows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        chosen = self.train_ids[list(windows)]
        if self.device.type == "cuda":
            chosen = chosen.pin_memory()  # so that the copy runs beside the computation
        input_ids = chosen.to(self.device, non_blocking=True).long()
        with autocast(self.student, self.device):
            hidden = final_hidden(self.student, input_ids)
        objective = self.objective
        return distillation_loss(
            hidden,
            frozen_head(self.student),
            self.teacher.hidden(windows) if self.teacher else None,
            self.teacher.head if self.teacher else None,
            next_token_labels(input_ids),
            ce_weight=objective.ce_weight,
            distillation_weight=objective.distillation_weight,
            temperature=objective.temperature,
            kind=objective.distillation,
            top_k=objective.top_k,
        )

    def _validate(self) -> float:
        """Measure the student, and keep its adapter if it is the best so far."""
        nll = _nll(self.student, self.validation_ids, self.schedule.batch_size, self.device, self.world)
        if nll < self.best_nll:
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
            self.best_step, self.best_nll = self.step, nll
        return nll

    def _tokens(self) -> int:
        return self.step * self.schedule.windows_a_step * self.train_ids.shape[1]

    def finish(self) -> Finetuned:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])
        validated = [row.validation_ce for row in self.curve if row.validation_ce is not None]
        metrics: dict[str, Any] = {
            "steps": self.step,
            "tokens": self._tokens(),
            "seconds": self.seconds,
            "step_seconds": self.step_seconds / self.step,
            "trainable_params": sum(p.numel() for p in self.parameters.values()),
            "best_step": self.best_step,
            "validation": {
                "nll_start": validated[0],
                "nll_end": validated[-1],
                "nll_best": self.best_nll,
                "nll_teacher": self.teacher_nll,
            },
        }
        lost = validated[0] - self.teacher_nll
        if lost > 0:  # a student that starts level with its teacher has nothing to recover
            share = (validated[0] - self.best_nll) / lost
            metrics["recovered"] = {
                "share": share,
                "share_per_million_tokens": share / (self._tokens() / 1e6),
                "share_per_minute": share / (self.seconds / 60),
            }
        return Finetuned(self.model, metrics, self.curve)


@torch.no_grad()
def _nll(
    model: PreTrainedModel, input_ids: Tensor, batch_size: int, device: torch.device, world: World = ALONE
) -> float:
    """Mean negative log-likelihood in nats a token, every window's first token left out."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    batches = input_ids.split(batch_size)
    for index, counts in world.turns(len(batches)):
        batch_ids = batches[index].to(device).long()
        with autocast(model, device):
            hidden = final_hidden(model, batch_ids)
        ce = distillation_loss(hidden, frozen_head(model), None, None, next_token_labels(batch_ids)).ce
        total += ce.double() * len(batch_ids) * counts
    return world.sum_(total).item() / len(input_ids)


def autocast(model: PreTrainedModel, device: torch.device) -> AbstractContextManager[Any]:
    """Matmuls in the base's dtype, beside fp32 adapters."""
    dtype = frozen_head(model).dtype
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def _check(student: PreTrainedModel, teacher: PreTrainedModel, train_ids: Tensor, validation_ids: Tensor) -> None:
    for name, ids in (("finetune_ids", train_ids), ("finetune_validation_ids", validation_ids)):
        if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise ValueError(f"{name}: expected [windows >= 1, tokens >= 2], found {list(ids.shape)}")
    vocabulary = frozen_head(student).shape[0]
    if frozen_head(teacher).shape[0] != vocabulary:
        raise ValueError(f"vocabularies differ: student {vocabulary}, teacher {frozen_head(teacher).shape[0]}")
    largest = int(torch.maximum(train_ids.max(), validation_ids.max()))
    if largest >= vocabulary:
        raise ValueError(f"finetune_ids: token {largest} is outside the model's vocabulary of {vocabulary}")
    if frozen_head(student).dtype == torch.float16:
        raise ValueError(
            "fine-tuning in float16 underflows without a loss scale: use TVAPRUNE_DTYPE=bfloat16 or float32"
        )
