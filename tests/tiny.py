"""Tiny random models and a tiny tokenizer, made in memory from seeds: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 320
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>"]
TEXT = (
    "The pump on deck two was replaced on Monday. It ran for nine hours, and the captain wrote the number down. "
    "Nobody asked why the gauge read zero! Was it the wire? The engineer said that the seal had worn through."
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=8),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=None),
    "phi3": lambda: Phi3Config(**_GROUPED),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES),
    # Layers that slide: all of them, and every other one.
    "mistral_sliding": lambda: MistralConfig(**_GROUPED, sliding_window=24),
    "gemma3": lambda: Gemma3TextConfig(
        **_GROUPED, head_dim=8, sliding_window=24, layer_types=["sliding_attention", "full_attention"]
    ),
}
ARCHITECTURES = tuple(CONFIGS)


def tiny_model(architecture: str = "llama", seed: int = 0) -> Any:
    """A random two-layer model in fp32, hidden size 32. Its weights are large enough for attention to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `VOCABULARY` tokens, with control tokens and a simple chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[2], pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_tiny(folder: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """Save a tiny model with its tokenizer as a transformers folder; returns `folder`."""
    tiny_model(architecture, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
