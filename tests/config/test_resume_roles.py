"""Every option of training has one role in a run that goes on from a checkpoint."""

from dataclasses import fields

from qsharded.config import TrainConfig
from qsharded.config.resume_roles import PATHS, all_options, options_of


def test_every_option_has_exactly_one_role() -> None:
    """A new option must be placed in the table, or a changed one would be resumed with no word of it."""
    assert sorted(all_options()) == sorted(field.name for field in fields(TrainConfig))


def test_what_the_order_of_rows_depends_on_is_fixed_and_the_rate_is_not() -> None:
    assert {"seed", "packing", "max_length"} <= set(options_of("fixed"))
    assert {"learning_rate", "adam_beta1", "weight_decay", "max_steps", "lora_dropout"} <= set(options_of("told"))
    assert set(PATHS) <= set(options_of("rows"))
