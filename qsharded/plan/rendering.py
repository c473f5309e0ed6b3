"""A plan as text."""

from collections.abc import Iterable, Sequence

from qsharded.plan.alternatives import Alternative
from qsharded.plan.gpu_memory import Plan, Row
from qsharded.plan.host_memory import HostVerdict, Need
from qsharded.utils.hardware import GIB


def render(plan: Plan, alternatives: Sequence[Alternative], host: HostVerdict, about: Sequence[str]) -> str:
    """The verdict and what would fit, what is planned, and the GPU memory of a rank: every class, and the peak."""
    config = plan.config
    step = f"{config.per_device_train_batch_size} x {config.max_length} tokens"
    lines = [
        _verdict(plan, host),
        *suggestions(plan, alternatives),
        *_for_the_host(plan, host),
        "",
        f"plan for {config.model} on {plan.ranks} GPU{'s' * (plan.ranks > 1)}, {step} a GPU and micro-batch",
        *about,
        "",
        "GPU memory of a rank, GiB",
        *(_line(row.name, row.bytes, _remark(row, plan)) for row in plan.rows),
        _line("allocated at the peak", plan.allocated, f"in the {plan.peak_phase}"),
        _line("needed", plan.needed, "with what PyTorch reserves beyond it, and CUDA's own"),
    ]
    return "\n".join(lines) + "\n"


def render_needs(title: str, needs: Iterable[Need], have: str) -> str:
    """Host memory or disk, and what there is of it."""
    needs = list(needs)
    rows = [_line(need.name, need.bytes, need.note) for need in needs]
    return "\n".join([title, *rows, _line("in all", sum(need.bytes for need in needs), have)]) + "\n"


def _line(name: str, size: int, remark: str) -> str:
    return f"  {name:<24}{size / GIB:>9.3f}  {remark}".rstrip()


def _remark(row: Row, plan: Plan) -> str:
    """Its note; rows that the peak does not meet stand in brackets."""
    return row.note if plan.peak_phase in row.phases else f"(not at the peak: {row.note})"


def _verdict(plan: Plan, host: HostVerdict) -> str:
    if plan.gpu_bytes is None:
        needed = f"needs {plan.needed / GIB:.1f} GiB of each GPU and {host.words}"
        return f"verdict: unknown, there is no GPU here; it {needed}; --gpu or --gpu-memory-gib says how much one has"
    compared = f"{plan.needed / GIB:.1f} of {plan.gpu_bytes / GIB:.1f} GiB of each GPU, {host.words}"
    return f"verdict: {'fits' if plan.fits and host.fits is not False else 'DOES NOT FIT'}, {compared}"


def _for_the_host(plan: Plan, host: HostVerdict) -> list[str]:
    """A line on what takes less of the host's memory; none where it suffices."""
    if host.fits is not False:
        return []
    ways = [
        ("without --cpu-offload", plan.on_host.weights),
        ("without --activation-checkpointing offloaded", plan.on_host.activations),
        ("with a lower --lora-r", plan.on_host.optimizer),
        ("with fewer ranks on it", plan.ranks > 1),
    ]
    found = ", ".join(words for words, helps in ways if helps)
    return [f"the host needs less {found}" if found else "it takes a host with more memory"]


def suggestions(plan: Plan, alternatives: Sequence[Alternative]) -> list[str]:
    """Lines on what would fit; none where ``plan`` does."""
    if plan.fits is not False:
        return []
    if not alternatives:
        return ["nothing that was tried fits: it takes larger GPUs, or a smaller model"]
    options = [f"  {one.words}: needs {one.plan.needed / GIB:.1f} GiB" for one in alternatives]
    return ["what fits, one of:", *options]
