"""A tokenizer small enough for the tiny models: one token for each printable ASCII character."""

from pathlib import Path

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def save_tokenizer(folder: str | Path) -> Path:
    """Write tokenizer files into `folder`; ids are below `tiny_models.VOCAB`."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(SPECIAL)}
    vocabulary.update({chr(code): code - 32 + len(SPECIAL) for code in range(32, 127)})
    characters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=characters, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return Path(folder)
