"""Ids that a model has no row for."""


def refuse_beyond_vocabulary(largest: int, vocab_size: int) -> None:
    """Raise ValueError where ``largest``, of a tokenizer's ids, is beyond the embedding: on a GPU it would end the run
    with no word of the row at fault."""
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives id {largest}, but the model's vocab_size is {vocab_size}: the tokenizer's files and "
            "config.json are of different models, or tokens were added without resizing the embedding"
        )
