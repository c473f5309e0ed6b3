"""Our AdamW step behind bitsandbytes' operation: what it takes, what it leaves to bitsandbytes, its result on a GPU."""

from collections.abc import Iterator, Sequence
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from qsharded.integrations import bitsandbytes_kernels, bitsandbytes_optimizer
from qsharded.integrations.bitsandbytes import install, uninstall
from qsharded.optim import reference
from qsharded_kernels import cuda_adamw8bit

OPERATION = torch.ops.bitsandbytes.optimizer_update_8bit_blockwise
NUMBERS: dict[str, Any] = {
    "beta1": 0.9,
    "beta2": 0.99,
    "beta3": 0.0,
    "alpha": 0.0,
    "eps": 1e-4,  # of the size of the root, so that its place counts
    "step": 3,
    "lr": 1e-2,
    "weight_decay": 0.1,
    "gnorm_scale": 0.5,
}


def tensors(count: int = 1024, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    """A parameter in training, as the operation names what belongs to it."""
    random = torch.Generator().manual_seed(0)
    p, m = torch.randn(count, generator=random) * 0.02, torch.randn(count, generator=random) * 1e-3
    g = torch.randn(count, generator=random) * 2e-3
    given = {"g": g.to(dtype), "p": p.to(dtype)}
    for number, (moment, signed) in enumerate([(m, True), (m.square() * 2, False)], start=1):
        code = bnb.functional.create_dynamic_map(signed=signed)
        codes, state = bnb.functional.quantize_blockwise(moment, code=code, blocksize=256)
        given |= {f"state{number}": codes, f"qmap{number}": code, f"absmax{number}": state.absmax}
    return {name: value.to(device) for name, value in given.items()}


def copied(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() for name, value in given.items()}


def by_reference(
    p: Tensor,
    g: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    coefficients: Sequence[float],
    tables: tuple[Tensor, ...],
) -> None:
    """Our kernel's arithmetic, for it runs on GPUs alone."""
    moments = reference.Moments(state1, state2, absmax1, absmax2)
    reference.adamw_(p, g, moments, torch.tensor(coefficients, dtype=torch.float32, device=p.device))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Ours as if CPUs had it; the arguments of what went to bitsandbytes."""
    monkeypatch.setattr(bitsandbytes_optimizer, "FEWEST_VALUES", 1024)
    monkeypatch.setattr(bitsandbytes_optimizer, "optimizer_kernels", lambda device: cuda_adamw8bit)
    monkeypatch.setattr(cuda_adamw8bit, "update_alone", by_reference)
    return []


def assert_same_step(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """As far as two roundings of the same equations agree."""
    on_gpu = ours["p"].is_cuda
    # bf16 keeps 8 bits, and a last bit of the sum may decide the eighth
    rtol = 1e-6 if ours["p"].dtype == torch.float32 else 2**-7
    # theirs on GPUs has an approximate power in the bias correction
    torch.testing.assert_close(ours["p"], theirs["p"], rtol=rtol, atol=NUMBERS["lr"] * (1e-3 if on_gpu else 1e-5))
    # theirs on GPUs takes 1 - beta in fp32
    for scales in ("absmax1", "absmax2"):
        torch.testing.assert_close(ours[scales], theirs[scales], rtol=3e-6, atol=0)
    for codes in ("state1", "state2"):
        apart = (ours[codes].int() - theirs[codes].int()).abs()
        assert apart.max() <= 1
        # its quantizer for CPUs looks codes up in 65,536 bins, which are wider than the map's finest steps
        assert (apart > 0).float().mean() < (0.001 if on_gpu else 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_our_kernel_is_given_makes_the_step_of_bitsandbytes(on_cpu: list[Any], dtype: torch.dtype) -> None:
    given = tensors(dtype=dtype)
    ours, theirs = copied(given), copied(given)
    bitsandbytes_optimizer.update(lambda *a: on_cpu.append(a))("adam", **ours, **NUMBERS)
    assert on_cpu == []
    OPERATION("adam", **theirs, **NUMBERS)
    assert not torch.equal(theirs["p"], given["p"])
    assert_same_step(ours, theirs)


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], dim=-1)[:, 0]


def one_further(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:1], tensor])[1:]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("lamb", {}),
        ("adam", {"skip_zeros": True}),
        ("adam", tensors(1279)),
        ("adam", tensors(768)),
        ("adam", tensors(dtype=torch.float16)),
        ("adam", {"g": strided(tensors()["g"])}),
        ("adam", {"state1": one_further(tensors()["state1"])}),
        ("adam", {"qmap1": tensors()["qmap1"] * 0.5}),
        ("adam", {"qmap2": tensors()["qmap1"]}),
        ("lion", {"state2": None, "qmap2": None, "absmax2": None}),
    ],
)
def test_what_is_not_ours_goes_to_bitsandbytes(on_cpu: list[Any], name: str, changed: dict[str, Any]) -> None:
    given = {"skip_zeros": False} | tensors() | changed | NUMBERS
    bitsandbytes_optimizer.update(lambda *a: on_cpu.append(a))(name, **given)
    [arguments] = on_cpu
    expected = [given[argument.name] for argument in OPERATION.default._schema.arguments[1:]]
    assert arguments[0] == name
    assert len(arguments) == len(expected) + 1
    assert all(found is wanted for found, wanted in zip(arguments[1:], expected, strict=True))


def test_the_operation_finds_ours_and_ours_finds_the_one_before(
    on_cpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through PyTorch's dispatcher, on CPUs, where ours is put for a test."""
    name = "optimizer_update_8bit_blockwise"
    monkeypatch.setitem(bitsandbytes_kernels._REPLACED, "CPU", {name: bitsandbytes_kernels._REPLACED["CUDA"][name]})
    given, seen = tensors(), []
    step = cuda_adamw8bit.update_alone
    monkeypatch.setattr(cuda_adamw8bit, "update_alone", lambda *a: (seen.append("ours"), step(*a))[1])
    skipping = NUMBERS | {"skip_zeros": True}
    expected, ours, theirs = copied(given), copied(given), copied(given)
    OPERATION("adam", **expected, **skipping)
    install()
    try:
        OPERATION("adam", **theirs, **skipping)
        assert seen == []
        OPERATION("adam", **ours, **NUMBERS)
    finally:
        uninstall()
    assert seen == ["ours"]
    assert all(torch.equal(theirs[name], expected[name]) for name in given)
    assert_same_step(ours, expected)  # nothing in it is zero


def test_without_the_compiled_library_bitsandbytes_steps(on_cpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes_optimizer, "optimizer_kernels", lambda device: None)
    bitsandbytes_optimizer.update(lambda *a: on_cpu.append(a))("adam", **tensors(), **NUMBERS)
    assert len(on_cpu) == 1


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of what our kernel stepped."""
    seen: list[int] = []
    monkeypatch.setattr(bitsandbytes_optimizer, "FEWEST_VALUES", 0)
    step = cuda_adamw8bit.update_alone
    monkeypatch.setattr(cuda_adamw8bit, "update_alone", lambda p, *a: (seen.append(p.numel()), step(p, *a))[1])
    yield seen
    uninstall()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_the_step_of_bitsandbytes(steps: list[int], dtype: torch.dtype) -> None:
    given = tensors(2**20, dtype, "cuda")
    ours, theirs = copied(given), copied(given)
    OPERATION("adam", **theirs, **NUMBERS)
    install()
    OPERATION("adam", **ours, **NUMBERS)
    assert steps == [2**20]
    assert_same_step(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_without_a_finite_gradient_stays_as_it_does_with_bitsandbytes(steps: list[int], value: float) -> None:
    given = tensors(2**16, device="cuda")
    given["g"][::7] = value
    ours, theirs = copied(given), copied(given)
    OPERATION("adam", **theirs, **NUMBERS)
    install()
    OPERATION("adam", **ours, **NUMBERS)
    assert torch.equal(ours["p"][::7], given["p"][::7])
    assert (ours["state1"][::7] == 127).all()
    assert (ours["state2"][::7] == 0).all()
    assert_same_step(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW8bit"])
def test_its_optimizers_train_on_our_step(steps: list[int], kind: str) -> None:
    """Paged state is what PyTorch takes for a tensor on the CPU."""

    start = torch.linspace(-1, 1, 2**18, device="cuda").view(512, 512)
    # magnitudes apart by a factor of 3 at most, where a code's step moves a moment by some percent
    gradient = torch.linspace(0.5, 1.5, 512, device="cuda").expand(512, 512) * start.sign()

    def trained() -> Tensor:
        p = torch.nn.Parameter(start.clone())
        optimizer = getattr(bnb.optim, kind)([p], lr=1e-3)
        for _ in range(5):
            p.grad = gradient.clone()
            optimizer.step()
        return p.detach()

    expected = trained()
    install()
    found = trained()
    assert steps == [2**18] * 5
    assert (expected - start).abs().min() > 4e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
