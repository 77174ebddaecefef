"""What the bars say, by a clock of the test's own."""

from rich.progress import Progress

from qwen_jax.commands.progress import BYTES, CountColumn, RateColumn, TimeColumn


def test_rate_and_time_left():
    now = 0.0
    bars = Progress(get_time=lambda: now, disable=True)
    few = bars.add_task("Compiling", total=2, unit="programs", note="")
    many = bars.add_task("Reading", total=4_000_000_000, unit=BYTES, note="")

    def said(number):
        task = bars.tasks[number]
        return tuple(column().render(task).plain for column in (CountColumn, RateColumn, TimeColumn))

    assert said(few) == ("0/2 programs", "", "0:00 so far")
    now = 12.0
    assert said(few) == ("0/2 programs", "", "0:12 so far")
    now = 20.0
    bars.update(few, completed=1)
    assert said(few) == ("1/2 programs", "20.0 s each", "0:20 left")
    for now in (21.0, 22.0, 23.0):
        bars.update(many, completed=1_000_000_000 * (now - 20))
    assert said(many) == ("3,000/4,000 MB", "1,000 MB/s", "0:01 left")
    now = 90.0
    bars.update(few, completed=2)
    assert said(few) == ("2/2 programs", "45.0 s each", "1:30")


def test_before_the_number_is_known():
    bars = Progress(get_time=lambda: 0.0, disable=True)
    bars.add_task("Quantizing", total=None, unit="matrices", note="")
    task = bars.tasks[0]
    assert [column().render(task).plain for column in (CountColumn, RateColumn)] == ["", ""]
