"""Text from a model, printed as it comes: one answer to a prompt, or a conversation."""

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from tvaprune.checkpoint.loading import load
from tvaprune.device import pick_device, pick_dtype
from tvaprune.runtime.text import continuation


class Speaker:
    """A model and its tokenizer on the device of the environment.

    Args:
        directory: a model directory, dense or pruned.
        new_tokens: the most that one answer has.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
    """

    def __init__(self, directory: Path, new_tokens: int, temperature: float) -> None:
        device = pick_device()
        self._model: PreTrainedModel = load(directory, pick_dtype(device), device)
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
        self._new_tokens, self._temperature = new_tokens, temperature

    def go_on(self, prompt: str) -> str:
        """Print the prompt and what the model writes after it; returns what it wrote."""
        print(prompt, end="", flush=True)
        return self._answer(self._tokenizer(prompt, return_tensors="pt"))

    def converse(self, lines: Iterable[str]) -> None:
        """Answer each line, with what came before it as context; without a chat template each line is continued.

        The oldest lines and answers are left out where the model's context has no room for all and an answer.
        """
        messages: list[dict[str, str]] = []
        for line in lines:
            if self._tokenizer.chat_template is None:
                self.go_on(line)
                continue
            messages.append({"role": "user", "content": line})
            while not self._fits(prompt := self._chat(messages)) and len(messages) > 1:
                messages = messages[2:]
            messages.append({"role": "assistant", "content": self._answer(prompt)})

    def _chat(self, messages: list[dict[str, str]]) -> BatchEncoding:
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def _fits(self, prompt: BatchEncoding) -> bool:
        return prompt["input_ids"].shape[1] + self._new_tokens <= self._model.config.max_position_embeddings

    def _answer(self, prompt: BatchEncoding) -> str:
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        return continuation(self._model, self._tokenizer, prompt, self._new_tokens, self._temperature, streamer)
