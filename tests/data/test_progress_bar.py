import io

from qsharded.data.progress_bar import ProgressBar


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_that_is_drawn_over() -> None:
    now, screen = [100.0], Screen()
    bar = ProgressBar("tokenizing x", 1000, screen, lambda: now[0])
    bar.show(0, 0)
    for seconds, nbytes, rows in ((0.1, 10, 1), (60, 250, 12_345), (60.1, 260, 12_399), (120, 500, 25_000)):
        now[0] = 100 + seconds
        bar.show(nbytes, rows)
    now[0] = 340
    bar.done(50_000)
    assert screen.getvalue() == (
        "\rtokenizing x:  25%, 12,345 rows, 3:00 left\rtokenizing x:  50%, 25,000 rows, 2:00 left"
        "\rtokenizing x: 50,000 rows in 4:00         \n"
    )


def test_a_file_has_a_line_now_and_then() -> None:
    now, log = [0.0], io.StringIO()
    bar = ProgressBar("tokenizing x", 0, log, lambda: now[0])
    for second in range(26):
        now[0] = second
        bar.show(0, 10 * second)
    bar.done(260)
    assert log.getvalue().splitlines() == [
        "tokenizing x: 100 rows",
        "tokenizing x: 200 rows",
        "tokenizing x: 260 rows in 0:25",
    ]


def test_what_an_earlier_run_did_is_not_taken_for_speed() -> None:
    now, screen = [0.0], Screen()
    bar = ProgressBar("x", 1000, screen, lambda: now[0])
    bar.show(600, 60)
    now[0] = 10
    bar.show(700, 70)
    assert screen.getvalue() == "\rx:  70%, 70 rows, 0:30 left"
