"""Prefill and greedy decode steps, run eagerly or captured as CUDA graphs.

At batch 1 Python launches a layer slower than a GPU computes it, pruned or not. A CUDA graph launches a whole pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

Work = Callable[[], Any]
Record = Callable[[Work], Work]


def prefill(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"], cache: Cache | None = None
) -> tuple[Int[Tensor, "batch 1"], Cache]:
    """The first greedy token after a prompt, and the filled cache; None: the model makes one, as in generate()."""
    output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1].argmax(dim=-1, keepdim=True), output.past_key_values


def decode(
    model: PreTrainedModel, token: Int[Tensor, "batch 1"], cache: Cache, position: int, steps: int
) -> Int[Tensor, "batch steps"]:
    """The greedy tokens after `token`, as generate() computes but without its bookkeeping; no token stops it.

    `token` is from `prefill` and not in the cache yet; `position` is its own, which is the number of cached ones.
    """
    # Positions are explicit: the cache's own count is wrong if its first layer has no heads left.
    positions = torch.arange(position, position + steps, device=token.device).unsqueeze(0)
    tokens = []
    for step in range(steps):
        output = model(
            input_ids=token, past_key_values=cache, position_ids=positions[:, step : step + 1], use_cache=True
        )
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


class Decoding:
    """`start` runs a prompt's prefill, `run` then returns the greedy tokens after the first; as often as wanted."""

    def __init__(self, model: PreTrainedModel, prompt: Int[Tensor, "batch tokens"], steps: int) -> None:
        self.model, self.prompt, self.steps = model, prompt, steps

    def start(self) -> None:
        self.token, self.cache = prefill(self.model, self.prompt)

    def run(self) -> Int[Tensor, "batch steps"]:
        return decode(self.model, self.token, self.cache, self.prompt.shape[1], self.steps)


def recorded_prefill(model: PreTrainedModel, prompt: Int[Tensor, "batch tokens"], record: Record | None = None) -> Work:
    """`prefill` of one prompt, recorded once; call the result to run it. Raises as `RecordedDecoding`."""
    _check_window(model, prompt.shape[1])

    def work() -> tuple[Tensor, Cache]:
        # Not the model's own cache: layers with a sliding window copy its size to the device, which capture forbids.
        return prefill(model, prompt, Cache(layers=[DynamicLayer() for _ in range(model.config.num_hidden_layers)]))

    return (record or Recording)(work)


class RecordedDecoding(Decoding):
    """`Decoding` whose step is recorded once: the shapes and addresses of its tensors never change.

    The cache has room for all positions from the start. A mask hides those that are not filled yet, so each step reads
    all of it. `record` turns a step into what is called. Raises ValueError: more tokens than the sliding window.
    """

    def __init__(
        self, model: PreTrainedModel, prompt: Int[Tensor, "batch tokens"], steps: int, record: Record | None = None
    ) -> None:
        super().__init__(model, prompt, steps)
        batch, length = prompt.shape
        _check_window(model, length + steps)
        layers = model.config.num_hidden_layers
        self.cache = Cache(layers=[StaticLayer(max_cache_len=length + steps) for _ in range(layers)])
        self.columns = torch.arange(length + steps, device=prompt.device)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=prompt.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=prompt.device)
        self.tokens = torch.zeros(batch, steps, dtype=torch.int64, device=prompt.device)
        self.start()  # makes the cache's tensors
        self.step = (record or Recording)(self._step)

    def start(self) -> None:
        self.cache.reset()
        token, _ = prefill(self.model, self.prompt, self.cache)
        self.token.copy_(token)
        self.position.fill_(self.prompt.shape[1])

    def run(self) -> Int[Tensor, "batch steps"]:
        """The same tensor at every call."""
        for _ in range(self.steps):
            self.step()
        return self.tokens

    def _step(self) -> None:
        filled = (self.columns <= self.position)[None, None, None]
        output = self.model(
            input_ids=self.token,
            attention_mask=filled.expand(len(self.token), -1, -1, -1),
            position_ids=self.position[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token.copy_(output.logits[:, -1].argmax(dim=-1, keepdim=True))
        self.tokens.index_copy_(1, self.position - self.prompt.shape[1], self.token)
        self.position.add_(1)


def _check_window(model: PreTrainedModel, tokens: int) -> None:
    window = getattr(model.config, "sliding_window", None)
    if window is not None and window < tokens:
        raise ValueError(
            f"runtime graphs: {tokens} tokens are more than the model's sliding window of {window}; use fewer, or "
            "runtime eager"
        )


class Recording:
    """A CUDA graph of some work; a call replays it on the present content of its input tensors.

    `work` runs once before the capture, as a warm-up; it must not synchronise with the device. It is kept, and must
    hold all tensors that it reads: a graph replays on their addresses and keeps no references.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = work()

    def __call__(self) -> Any:
        self._graph.replay()
        return self._result
