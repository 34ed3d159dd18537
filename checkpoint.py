"""Policies and critics as Hugging Face folders."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer to `folder`, loadable by transformers and, for a policy,
    by vLLM. Written beside and renamed when complete, so `folder` is never half a model."""
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
