"""The texts of `data.validation`, each as a token store of its own, made before training starts."""

from cluster.config import RunConfig, seq_len
from cluster.storage import split_uri
from jobs.token_store import TokenStoreError
from jobs.tokenize_corpus import tokenize


def validation_stores(config: RunConfig, *, tokenizer_uri: str) -> dict[str, str]:
    """The URI of each set's finished token store, by name; all of its text is in the "train" split. Needs Ray.

    Raises `TokenStoreError` for a set that is too small for one row, and what `tokenize` raises.
    """
    whole = {"tokenizer": tokenizer_uri, "weights": [], "val_fraction": 0.0, "decontaminate_ngram": None}
    stores = {}
    for name, source in config.data.validation.items():
        data = config.data.model_copy(update=whole | {"source": source})
        made = tokenize(config.model_copy(update={"data": data}))
        if made["train_tokens"] <= seq_len(config):
            raise TokenStoreError(
                f"data.validation.{name}={source} has {made['train_tokens']} tokens, a row needs {seq_len(config) + 1} "
                "(train.seq_len + 1); add text, leave the set out, or lower train.seq_len"
            )
        stores[name] = split_uri(made["manifest"])[0].uri
    return stores
