"""Tiny random models with a real byte-level BPE tokenizer, for tests. Costs about 0.1 s and 0.3 MB a model.

`build_tiny_model` writes a folder that `mlx_lm.load` reads. Everything is a pure function of the arguments:
two calls with the same ones give the same bytes.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BOS_ID, EOS_ID = 0, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "The quick brown fox jumps over the lazy dog and runs into the forest.",
    "A teacher writes what it knows about every token, and a student reads it later.",
    "Distillation keeps the shape of a distribution: the head, the tail, and the mass between them.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # prints 3",
    "Der Zug fährt um 12:45 Uhr nach München; naïve café, 東京, 🙂.",
    "In the beginning there was a matrix, and the matrix was without form until it was multiplied.",
)


def build_tokenizer(*, vocab_size: int = 320) -> Tokenizer:
    """A byte-level BPE with three special tokens (ids 0, 1, 2), trained on `SENTENCES`.

    Args:
        vocab_size: wanted number of tokens, at least 259; the text is small, so it stops at 482.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def save_tokenizer(folder: Path, *, vocab_size: int = 320, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`."""
    build_tokenizer(vocab_size=vocab_size).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS_ID],
        "eos_token": SPECIAL_TOKENS[EOS_ID],
        "pad_token": SPECIAL_TOKENS[EOS_ID],
        "model_max_length": 512,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def tiny_config(
    *,
    vocab_size: int = 320,
    hidden_size: int = 32,
    num_layers: int = 4,
    tie: bool = True,
    model_type: str = "llama",
    **config: Any,
) -> dict[str, Any]:
    """A config.json that most attention models of mlx-lm accept; `config` adds or overrides keys."""
    return {
        "model_type": model_type,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab_size,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    } | config


def random_model(config: dict[str, Any], *, seed: int = 0, scale: float = 3.0) -> Any:
    """An mlx-lm model of `config` with random float32 weights.

    Matrices are scaled by `scale` over MLX's own initialisation, so that logits are not almost uniform and a
    change of any layer shows in them.
    """
    import importlib

    import mlx.core as mx
    from mlx.utils import tree_map

    arch = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(seed)
    model = arch.Model(arch.ModelArgs.from_dict(config))
    scaled = tree_map(lambda w: w * scale if w.ndim >= 2 else w, model.parameters())
    model.update(scaled)
    model.eval()
    mx.eval(model.parameters())
    return model


def build_tiny_model(
    folder: Path,
    *,
    vocab_size: int = 320,
    hidden_size: int = 32,
    num_layers: int = 4,
    tie: bool = True,
    seed: int = 0,
    model_type: str = "llama",
    tokenizer_size: int | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    **config: Any,
) -> Path:
    """Writes a random model and its tokenizer as an mlx-lm folder.

    Args:
        folder: created if missing.
        vocab_size: rows of the embedding; may exceed the tokenizer's size, as in real models.
        hidden_size: width, divisible by 8.
        num_layers: transformer blocks.
        tie: whether the head is the embedding.
        seed: of the weights.
        model_type: a module of `mlx_lm.models`.
        tokenizer_size: number of tokens, `vocab_size` if None.
        chat_template: Jinja source, or None for a base model.
        **config: further keys of config.json.

    Returns:
        `folder`.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    folder.mkdir(parents=True, exist_ok=True)
    values = tiny_config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        tie=tie,
        model_type=model_type,
        **config,
    )
    model = random_model(values, seed=seed)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    save_tokenizer(folder, vocab_size=tokenizer_size or vocab_size, chat_template=chat_template)
    return folder
