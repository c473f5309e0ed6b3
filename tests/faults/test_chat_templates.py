"""Chat templates that loop, grow or nest without end: each is refused by name, in bounded time and memory."""

import resource
import signal
import time
from pathlib import Path

import pytest

from qsharded.data import template_limits
from qsharded.data.chat import ChatTemplate
from tests.data.folders import chat
from tests.processes import Command, script

LOOPS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for a in [[0]] recursive %}{{ loop([[0]]) }}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "words without end": "{{ lipsum(n=999999999) }}",
}
GROWS = {
    "a doubled string": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "one huge product": "{{ 'x' * 10000000000 }}",
    "a wide column": "{{ 'x'.ljust(10000000000) }}",
    "a wide format": "{{ '%10000000000d' % 1 }}",
    "an indent": "{{ [1] | tojson(indent=10000000000) }}",
    "output": "{% for a in range(99999) %}{% for b in range(99) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}",
}
NUMBERS = {
    "a power": "{{ 10 ** 100000000 }}",
    "a power of powers": "{{ 2 ** 63 ** 63 ** 63 }}",
    "squares of squares": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a rounding": "{{ 5 | round(100000000, 'floor') }}",
    "a sum of lists": "{{ ([[1] * 1000] * 90000) | sum(start=[]) }}",
}


def refusal(source: str) -> str:
    with pytest.raises(ValueError, match="template") as refused:
        ChatTemplate(source, {}).render(chat("a", "b"))
    return str(refused.value)


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS)
def test_a_template_that_loops_is_refused_in_bounded_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    start = time.process_time()
    said = refusal(source)
    assert time.process_time() - start < 3
    assert "takes more than 0.3 s of CPU time: it loops" in said or "is nested too deeply" in said


@pytest.mark.parametrize("source", GROWS.values(), ids=GROWS)
def test_a_template_that_grows_is_refused_in_bounded_memory(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "BYTES", 64 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = resource.getrlimit(resource.RLIMIT_AS)
    assert "takes more than 64 MiB of memory: it grows without end" in refusal(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 96 << 10  # KiB
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


@pytest.mark.parametrize("source", NUMBERS.values(), ids=NUMBERS)
def test_integers_that_nothing_can_interrupt_are_refused(source: str) -> None:
    start = time.process_time()
    refusal(source)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("source", ["{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "{% if 1 %}" * 50_000])
def test_a_template_that_nests_is_refused(source: str) -> None:
    assert "nested too deeply" in refusal(source)


def test_the_clock_is_stopped_after_a_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.05)
    assert ChatTemplate("{{ (2 ** 10) * 3 }}{{ 2.5 | round }}", {}).render(chat("a")) == "30722.0"
    start = time.process_time()
    while time.process_time() - start < 0.2:
        pass


STUCK = """
import resource
from qsharded.data import template_limits
from qsharded.data.chat import ChatTemplate
template_limits.SECONDS = 0.2
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
source = "{% set n = namespace(x=[], y=[]) %}{% for i in range(60) %}"
source += "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}"
ChatTemplate(source, {}).render([{"role": "user", "content": "a"}])
"""


def test_a_single_operation_that_does_not_come_back_ends_the_process_and_names_the_template(tmp_path: Path) -> None:
    run = Command([script(tmp_path, STUCK)])
    assert run.end() == -signal.SIGPROF
    assert any('File "<template>", line ' in line for line in run.lines), run.lines


@pytest.mark.parametrize("source", ["{% break %}", "{% for a in 'a' %}" * 25 + "{% endfor %}" * 25, "{% for"])
def test_what_is_no_program_is_refused(source: str) -> None:
    """Some of it Jinja takes, and Python not."""
    with pytest.raises(ValueError, match="the chat template is not valid: "):
        ChatTemplate(source, {})


def test_a_template_that_is_slow_for_every_row_is_refused_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "ALL_SECONDS", 0.1)
    monkeypatch.setattr(template_limits, "MEAN_SECONDS", 0.002)
    slow = ChatTemplate("{% for a in range(999) %}{% for b in range(300) %}{% endfor %}{% endfor %}", {})
    with pytest.raises(ValueError, match=r"its program took 0\.\d s of CPU time for each of \d+ renderings"):
        [slow.render(chat("a", "b")) for _ in range(500)]
    quick = ChatTemplate("{{ 1 }}", {})
    assert {quick.render(chat("a", "b")) for _ in range(1000)} == {"1"}
