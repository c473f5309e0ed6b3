"""Weight shapes [out_features, in_features] of the models that people ask about."""

SHAPES: dict[str, list[tuple[int, int]]] = {
    "llama3-8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "llama3-70b": [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)],
    "qwen3-32b": [(8192, 5120), (1024, 5120), (5120, 8192), (25600, 5120), (5120, 25600)],
}
SHORT = {"cuda": [(4096, 4096), (14336, 4096)], "cpu": [(4096, 4096)]}


def of_models(names: list[str]) -> list[tuple[int, int]]:
    """The shapes of these models, each once.

    Raises:
        ValueError: a model that is not in the list.
    """
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise ValueError(f"--shapes: {unknown[0]!r} is none of {', '.join(SHAPES)}")
    return list(dict.fromkeys(shape for name in names for shape in SHAPES[name]))
