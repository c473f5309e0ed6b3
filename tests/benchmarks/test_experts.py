"""The benchmark of the experts' MLPs runs, and its ways compute the same."""

import torch

from benchmarks.experts import SHAPES, measure, random_experts, ways


def test_every_number_of_tokens_has_a_row() -> None:
    rows = measure(SHAPES["tiny"], [1, 5], 1, torch.device("cpu"))
    assert [row["tokens"] for row in rows] == [1, 5]
    assert all(row["of_16_bits"] > 0 for row in rows)


def test_the_ways_compute_the_same() -> None:
    shape = SHAPES["tiny"]
    D, J = shape.hidden, shape.intermediate
    packed = [random_experts(shape.experts, K, N) for N, K in ((J, D), (J, D), (D, J))]
    ready = [experts.packed().decoded(slice(None), torch.bfloat16) for experts in packed]
    results = [way() for way in ways(shape, 7, packed, ready, torch.device("cpu")).values()]
    assert results[0].abs().max() > 0
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
