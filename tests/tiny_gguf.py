"""A tiny random Llama as a GGUF file, with a byte-level tokenizer, and numpy's own reading of the same weights.

`reference` is a brute-force forward of the Llama architecture in float64, apart from the package's own engines.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD, INNER, LAYERS = 264, 64, 4, 2, 16, 96, 2
CONTROL = dict(enumerate(("<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<AC>", "<a>", "<b>", "<c>"), start=256))
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Weights = dict[str, NDArray[np.float32]]


def weights(seed: int = 0) -> Weights:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (random.standard_normal((rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)

    tensors: Weights = {"token_embd.weight": matrix(VOCABULARY, HIDDEN, 8)}
    tensors["output_norm.weight"] = np.ones(HIDDEN, np.float32)
    tensors["output.weight"] = matrix(VOCABULARY, HIDDEN, 2)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        tensors[prefix + "attn_norm.weight"] = np.ones(HIDDEN, np.float32)
        tensors[prefix + "ffn_norm.weight"] = np.ones(HIDDEN, np.float32)
        tensors[prefix + "attn_q.weight"] = matrix(HEADS * HEAD, HIDDEN, 1.5)
        tensors[prefix + "attn_k.weight"] = matrix(KV_HEADS * HEAD, HIDDEN, 1.5)
        tensors[prefix + "attn_v.weight"] = matrix(KV_HEADS * HEAD, HIDDEN)
        tensors[prefix + "attn_output.weight"] = matrix(HIDDEN, HEADS * HEAD)
        tensors[prefix + "ffn_gate.weight"] = matrix(INNER, HIDDEN)
        tensors[prefix + "ffn_up.weight"] = matrix(INNER, HIDDEN)
        tensors[prefix + "ffn_down.weight"] = matrix(HIDDEN, INNER)
    return tensors


def write(path: Path, seed: int = 0, architecture: str = "llama") -> Path:
    """The model as a GGUF file; the byte b is token b, control tokens follow."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name(f"tiny-{seed}")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([_byte_name(byte) for byte in range(256)] + list(CONTROL.values()))
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * len(CONTROL))
    writer.add_token_merges(["Ā ā"])  # llama.cpp wants one; these two bytes never meet in text
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in weights(seed).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _byte_name(byte: int) -> str:
    """GPT-2's printable stand-in for a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def reference(tensors: Weights, tokens: NDArray[np.int64], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Logits [n, vocabulary] of one masked forward. mask: [n, n], row q sees column j."""
    count = len(tokens)
    x = tensors["token_embd.weight"][tokens].astype(np.float64)
    angles = np.arange(count)[:, None] * 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD)[None, :]
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]

    def rotate(values: NDArray[np.float64]) -> NDArray[np.float64]:
        even, odd = values[..., 0::2], values[..., 1::2]  # GGUF's Llama rotates neighbouring pairs
        out = np.empty_like(values)
        out[..., 0::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
        return out

    def norm(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-5)

    for layer in range(LAYERS):
        w = {name.split(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"blk.{layer}.")}
        h = norm(x)
        q = rotate((h @ w["attn_q"].T).reshape(count, HEADS, HEAD))
        k = rotate((h @ w["attn_k"].T).reshape(count, KV_HEADS, HEAD)).repeat(HEADS // KV_HEADS, axis=1)
        v = (h @ w["attn_v"].T).reshape(count, KV_HEADS, HEAD).repeat(HEADS // KV_HEADS, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD)
        scores = np.where(mask[None], scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", p, v).reshape(count, -1) @ w["attn_output"].T
        h = norm(x)
        gate = h @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    logits: NDArray[np.float64] = norm(x) @ tensors["output.weight"].T
    return logits


def kl(expected: NDArray[np.float64], found: NDArray[np.floating]) -> NDArray[np.float64]:
    """KL(expected || found) in nats, per row of logits."""

    def log_softmax(values: NDArray[np.floating]) -> NDArray[np.float64]:
        shifted = values.astype(np.float64) - values.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(found)
    divergence: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return divergence
