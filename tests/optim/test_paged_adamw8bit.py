"""PagedAdamW8bit: against torch.optim.AdamW and bitsandbytes, torch's optimizer contract, paging."""

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from qsharded.optim import PagedAdamW8bit, clipping_scale
from qsharded.optim.arena import BLOCK_BYTES
from qsharded.quant.blockwise8 import dynamic_map
from tests.kernels.cases import assert_same_bits
from tests.optim import cases

SMALL_BUCKETS = {"bucket_bytes": 7 * BLOCK_BYTES}
PAGING = [
    {"page_budget": "max"},
    {"page_budget": 0, **SMALL_BUCKETS},
    {"page_budget": 17 * BLOCK_BYTES, **SMALL_BUCKETS},  # the first parameter stays
    {"page_budget": "none"},
]


def assert_same_training(one: Any, other: Any) -> None:
    """Parameters and state of two optimizers, to the bit."""
    for group, its in zip(one.param_groups, other.param_groups, strict=True):
        for parameter, twin in zip(group["params"], its["params"], strict=True):
            assert_same_bits(parameter.detach().cpu(), twin.detach().cpu())
    assert_same_state(one.state_dict()["state"], other.state_dict()["state"])


def assert_same_state(one: dict[int, Any], other: dict[int, Any]) -> None:
    assert one.keys() == other.keys()
    for index, state in one.items():
        assert state.keys() == other[index].keys()
        for name, value in state.items():
            if isinstance(value, Tensor):
                assert_same_bits(value.cpu(), other[index][name].cpu())
            else:
                assert value == other[index][name]


def test_a_thousand_steps_of_a_transformer_end_where_fp32_moments_do() -> None:
    reference = cases.final_transformer_loss(lambda held: AdamW(held, lr=1e-3), 1000)
    assert cases.final_transformer_loss(lambda held: PagedAdamW8bit(held, lr=1e-3), 1000) == pytest.approx(
        reference, rel=0.01
    )
    assert reference < 1.2  # of ln 64 = 4.2 at first: it has learnt, so the moments mattered


def quadratic_losses(optimizer: type, steps: int) -> list[float]:
    x = nn.Parameter(torch.randn(100, 100, generator=torch.Generator().manual_seed(0)))
    curvature = torch.logspace(-2, 1, x.numel()).view_as(x)
    adam, losses = optimizer([x], lr=1e-2, weight_decay=0.0), []
    for _ in range(steps):
        losses.append((curvature * x.detach() ** 2).mean().item())
        x.grad = 2 * curvature * x.detach() / x.numel()
        adam.step()
    return losses


def test_a_thousand_steps_down_a_quadratic_stay_beside_fp32_moments() -> None:
    ours, theirs = quadratic_losses(PagedAdamW8bit, 1000), quadratic_losses(AdamW, 1000)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.01 * theirs[0]
    assert theirs[-1] < 1e-4 * theirs[0]


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.3}, {"maximize": True}, {"betas": (0.5, 0.9), "eps": 1e-3}, {"lr": 0.1}]
)
def test_the_first_steps_of_small_parameters_are_adamws(options: dict[str, Any]) -> None:
    """With fp32 moments only the order of roundings differs."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(50))] for _ in range(2))
    one, other = PagedAdamW8bit(ours, **options), AdamW(theirs, **options)
    for _ in range(5):
        ours[0].grad = torch.randn(50, generator=generator)
        theirs[0].grad = ours[0].grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert (ours[0] - 1).abs().max() > 1e-4


def test_codes_and_scales_are_those_of_bitsandbytes() -> None:
    """Of its PyTorch implementation: the one for CPUs looks codes up in a table too coarse for small moments."""
    from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_pytorch

    ours = nn.Parameter(torch.randn(16, 1000, generator=torch.Generator().manual_seed(0)))
    theirs, blocks = ours.detach().clone(), 63
    codes = [torch.zeros(16, 1000, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(blocks) for _ in range(2)]
    optimizer = PagedAdamW8bit([ours], lr=1e-3, weight_decay=0.1)
    for step in range(1, 6):
        ours.grad = torch.randn(16, 1000, generator=torch.Generator().manual_seed(step)) * 1e-3
        optimizer.step()
        optimizer_update_8bit_blockwise_pytorch(
            theirs,
            ours.grad,
            *codes,
            *(0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-3),
            *(dynamic_map(True), dynamic_map(False)),
            *scales,
            *(0.1, 1.0, False),
            optimizer_name="adam",
        )
        state = optimizer.state[ours]
        if step == 1:
            for mine, its in zip((state["state1"], state["state2"]), codes, strict=True):
                apart = (mine.int() - its.int()).abs()
                assert (apart == 0).float().mean() > 0.99
                assert apart.max() <= 1
            torch.testing.assert_close(state["absmax1"], scales[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(state["absmax2"], scales[1], rtol=1e-6, atol=0)
    moved = (ours - torch.randn(16, 1000, generator=torch.Generator().manual_seed(0))).abs().mean()
    assert (ours - theirs).abs().mean() < 0.01 * moved


@pytest.mark.parametrize("options", PAGING)
def test_where_state_lies_changes_no_bit(options: dict[str, Any]) -> None:
    here, elsewhere = PagedAdamW8bit(cases.parameters()), PagedAdamW8bit(cases.parameters(), **options)
    cases.train(here, 5, skip=[(0, 2), (2, 0), (3, 1)])
    for step in range(5):
        elsewhere.prefetch()
        cases.train(elsewhere, 1, seed=step, skip=[(0, n) for s, n in [(0, 2), (2, 0), (3, 1)] if s == step])
    assert_same_training(here, elsewhere)


@pytest.mark.parametrize("budget", [0, 17 * BLOCK_BYTES, 37 * BLOCK_BYTES])
def test_the_device_holds_the_budget_and_two_buckets(budget: int) -> None:
    optimizer = PagedAdamW8bit(cases.parameters(), page_budget=budget, **SMALL_BUCKETS)
    cases.train(optimizer, 1)
    store, blocks = optimizer._store, 17 + 20
    assert store is not None
    assert store.host_bytes == {0: blocks, 17: 20, 37: 0}[budget // BLOCK_BYTES] * BLOCK_BYTES
    assert store.device_bytes <= budget + 2 * SMALL_BUCKETS["bucket_bytes"]


def test_hard_gradients_leave_finite_parameters_and_moments() -> None:
    optimizer = PagedAdamW8bit(cases.parameters(), lr=1e-2)
    cases.train(optimizer, 10)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert parameter.isfinite().all()
            for value in optimizer.parameter_state(parameter).values():
                assert value.isfinite().all()


@pytest.mark.parametrize("shape", [(4096,), (4097,), (4351,), (64, 64), (3, 1371), (17, 16, 16), (256, 33)])
def test_any_shape_keeps_moments_within_half_a_gap_of_fp32(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    optimizer = PagedAdamW8bit([parameter])
    optimizer.step()
    state = optimizer.state[parameter]
    for codes, scales, signed, exact, gap in (
        ("state1", "absmax1", True, 0.1 * gradient, 0.9 / 64),
        ("state2", "absmax2", False, 0.001 * gradient**2, 0.9 / 128),
    ):
        scale = state[scales].repeat_interleave(256)[: gradient.numel()].view(shape)
        dequantized = dynamic_map(signed)[state[codes].int()] * scale
        assert ((dequantized - exact).abs() <= gap / 2 * scale * 1.0001).all()
        tail = exact.view(-1)[-(gradient.numel() % 256 or 256) :].abs().max()
        assert state[scales][-1] == pytest.approx(tail.item(), rel=1e-6)


def test_a_negative_moment_keeps_its_sign() -> None:
    parameter = nn.Parameter(torch.zeros(4096))
    parameter.grad = torch.full((4096,), -1e-9)
    parameter.grad[::256] = 1.0
    parameter.grad[1::256] = 1e-9
    optimizer = PagedAdamW8bit([parameter])
    optimizer.step()
    assert optimizer.state[parameter]["state1"].view(-1, 256)[0, :3].tolist() == [255, 127, 126]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad: float) -> None:
    optimizer, twin = PagedAdamW8bit(cases.parameters()), PagedAdamW8bit(cases.parameters())
    for one in (optimizer, twin):
        cases.train(one, 2)
    for number, gradient in enumerate(cases.hard_gradients(cases.parameters(), 9)):
        optimizer.param_groups[0]["params"][number].grad = gradient
    optimizer.param_groups[0]["params"][3].grad[5] = bad
    optimizer.step()
    assert_same_training(optimizer, twin)
    assert optimizer.skipped_steps.item() == 1
    for one in (optimizer, twin):
        cases.train(one, 1, seed=2)  # later steps are not thrown off by it
    assert_same_training(optimizer, twin)


def test_a_scale_clips_as_scaled_gradients_would_and_leaves_them() -> None:
    scaled, twin = PagedAdamW8bit(cases.parameters()), PagedAdamW8bit(cases.parameters())
    gradients = [torch.randn_like(p.float()).to(p.dtype) for p in cases.parameters()]
    mine, its = scaled.param_groups[0]["params"], twin.param_groups[0]["params"]
    for one, other, gradient in zip(mine, its, gradients, strict=True):
        one.grad, other.grad = gradient.clone(), gradient * 0.25  # exact in bf16 too
    scaled.step(grad_scale=torch.tensor(0.25))
    twin.step()
    assert_same_training(scaled, twin)
    assert all(torch.equal(p.grad, g) for p, g in zip(mine, gradients, strict=True))
    scaled.step(grad_scale=clipping_scale(torch.tensor(torch.inf), 1.0))
    assert_same_training(scaled, twin)
    assert scaled.skipped_steps.item() == 1


@pytest.mark.parametrize(("norm", "limit", "scale"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (4.0, 0.0, 1.0)])
def test_clipping_scale(norm: float, limit: float, scale: float) -> None:
    assert clipping_scale(torch.tensor(norm), limit).item() == pytest.approx(scale, rel=1e-6)
    assert clipping_scale(torch.tensor(torch.nan), limit).isnan()


def test_groups_have_their_own_settings_and_may_be_added_and_changed() -> None:
    """Against fp32 AdamW, on parameters small enough for fp32 moments."""
    ours, theirs = ([nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(60))] for _ in range(2))
    optimizers = [kind([{"params": held[:1], "lr": 1e-2}]) for kind, held in ((PagedAdamW8bit, ours), (AdamW, theirs))]
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        if step == 2:
            for optimizer, held in zip(optimizers, (ours, theirs), strict=True):
                optimizer.add_param_group({"params": held[1:], "lr": torch.tensor(1e-3), "weight_decay": 0.5})
        if step == 4:
            for optimizer in optimizers:
                optimizer.param_groups[0].update(lr=3e-3, betas=(0.8, 0.99))
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_a_scheduler_and_a_closure() -> None:
    parameter = nn.Parameter(torch.ones(5000))
    optimizer = PagedAdamW8bit([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5000
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert parameter.grad is not None


def test_a_copy_goes_on_alike_and_by_itself() -> None:
    original = PagedAdamW8bit(cases.parameters(), page_budget=0, **SMALL_BUCKETS)
    cases.train(original, 2)
    copied, twin = copy.deepcopy(original), copy.deepcopy(original)
    cases.train(copied, 2, seed=5)
    assert_same_training(original, twin)
    cases.train(original, 2, seed=5)
    assert_same_training(original, copied)


def test_a_state_dict_goes_on_alike_through_a_file() -> None:
    original, resumed = PagedAdamW8bit(cases.parameters(), lr=1e-2), PagedAdamW8bit(cases.parameters(), page_budget=0)
    cases.train(original, 3)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    for mine, its in zip(resumed.param_groups[0]["params"], original.param_groups[0]["params"], strict=True):
        mine.data.copy_(its)
    assert_same_training(original, resumed)
    for optimizer in (original, resumed):
        cases.train(optimizer, 2, seed=7)
    assert_same_training(original, resumed)


def test_parameters_that_start_to_train_later_get_state_then() -> None:
    held = cases.parameters()
    held[0].requires_grad_(False)
    optimizer = PagedAdamW8bit(held)
    cases.train(optimizer, 2, skip=[(0, 0), (1, 0)])
    assert len(optimizer.state_dict()["state"]) == 3
    held[0].requires_grad_(True)
    cases.train(optimizer, 1)
    assert [optimizer.state[p]["step"].item() for p in held] == [1, 3, 3, 3]


def test_parameters_that_are_cast_keep_their_moments() -> None:
    parameter = nn.Parameter(torch.ones(5000))
    optimizer = PagedAdamW8bit([parameter])
    cases.train(optimizer, 2)
    moments = optimizer.state[parameter]["state1"].clone()
    parameter.grad, parameter.data = None, parameter.data.bfloat16()
    optimizer.step()
    assert_same_bits(optimizer.state[parameter]["state1"], moments)
    cases.train(optimizer, 1)
    assert optimizer.state[parameter]["step"] == 3
    assert parameter.isfinite().all()


def test_no_gradient_is_no_step() -> None:
    held = cases.parameters()
    optimizer = PagedAdamW8bit(held)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(held, cases.parameters(), strict=True))
    assert all(state["step"] == 0 for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1"),
        ({"eps": -1e-8}, "eps must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"page_budget": "some"}, "page_budget must be 'auto', 'max', 'none' or a number of bytes, got 'some'"),
        ({"page_budget": -1}, "page_budget must be"),
        ({"lr": torch.ones(2)}, "one element"),
    ],
)
def test_a_value_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagedAdamW8bit([nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (torch.ones(3, dtype=torch.float64), "float32 or bfloat16"),
        (torch.ones(3, 4).t(), "contiguous"),
    ],
)
def test_a_parameter_of_another_kind_is_named(parameter: Tensor, message: str) -> None:
    parameter = nn.Parameter(parameter)
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=message):
        PagedAdamW8bit([parameter]).step()


def test_everything_is_freed() -> None:
    def cycle() -> None:
        optimizer = PagedAdamW8bit(cases.parameters(), page_budget=0, **SMALL_BUCKETS)
        cases.train(optimizer, 1)
        copy.deepcopy(optimizer)

    def live_tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    cycle()
    before = live_tensors()
    for _ in range(200):
        cycle()
    assert live_tensors() <= before  # what other tests left may go meanwhile
