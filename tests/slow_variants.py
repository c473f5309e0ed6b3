"""Variants of tests that run with --slow alone: CI has 15 minutes, and others of the same test in them."""

_SHARDING = "tests/distributed/test_sharding_modes.py::test_training_goes_as_in_one_process"
_LOAD = "tests/distributed/test_load.py::test_"
_VOCAB = "tests/distributed/test_vocab_parallel.py::test_"
_GATHER = "tests/distributed/test_exact_gather.py::test_"
_TIED = "tests/checkpoint/test_tied_embeddings.py::test_ranks_decide_alike_though_one_row_alone_differs"
_TRAIN = "tests/distributed/test_train.py::test_"
_FAILING = "tests/distributed/test_stopping.py::test_a_rank_that_fails_alone_ends_all_and_its_cause_is_the_only_one"

SLOW_VARIANTS = frozenset(
    {
        f"{_SHARDING}[tied-3-1-modes4]",
        f"{_SHARDING}[tied-3-1-modes5]",
        f"{_SHARDING}[tied-4-2-modes7]",
        f"{_SHARDING}[bf16-2-1-modes9]",
        f"{_SHARDING}[bf16-2-2-modes10]",
        f"{_SHARDING}[embedding-2-1-modes13]",
        f"{_LOAD}sharding_and_recomputation_change_no_result[3-True]",
        f"{_LOAD}a_packed_checkpoint_has_the_same_bytes_on_three_ranks[bitsandbytes, not nested]",
        f"{_LOAD}a_packed_checkpoint_has_the_same_bytes_on_three_ranks[bitsandbytes]",
        f"{_LOAD}a_rank_without_rows_takes_part[16 bits]",
        f"{_LOAD}bytes_are_the_same_for_any_number_of_ranks[3-layout1]",
        f"{_LOAD}bytes_are_the_same_for_any_number_of_ranks[4-layout2]",
        f"{_VOCAB}kernels_give_the_same_where_each_has_a_part_of_a_row[4-5-0.7]",
        f"{_VOCAB}rows_are_looked_up_to_the_last_bit[torch.float32-4-5-1]",
        f"{_VOCAB}loss_and_gradient_equal_pytorchs[4-5-dtype4-1]",
        f"{_VOCAB}an_id_outside_the_vocabulary_is_refused[-1-0]",
        f"{_VOCAB}logits_and_their_gradient_equal_the_plain_product[4-5]",
        f"{_VOCAB}a_target_outside_the_vocabulary_is_refused[-1-0]",
        f"{_GATHER}exact_gather_keeps_every_pattern_on_four_ranks_and_replicated[4-1-2]",
        f"{_GATHER}exact_gather_keeps_every_pattern_on_four_ranks_and_replicated[4-5-1]",
        f"{_GATHER}weights_from_host_memory_keep_every_pattern[4-2]",
        f"{_TIED}[alone]",
        f"{_TIED}[different]",
        f"{_TRAIN}a_run_is_resumed_in_another_mode[mode1]",
        f"{_TRAIN}a_run_is_resumed_in_another_mode[mode2]",
        f"{_FAILING}[pass  # in a collective, which fails]",
        "tests/distributed/test_plan.py::test_planned_bytes_are_those_of_the_real_model[3]",
        "tests/distributed/test_gradient.py::test_same_gradient_for_every_split[4-1-3-False]",
        "tests/training/test_divergence.py::test_following_the_advice_to_the_letter_finishes_the_run[limit1]",
        "tests/faults/test_hostile_rows.py::test_a_line_without_end_is_refused_in_bounded_memory[2000]",
        "tests/benchmarks/test_train_step.py::test_a_peer_runs_through_a_small_case",
    }
)
