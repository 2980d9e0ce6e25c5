"""Contests: who takes part, what is compared, what a record holds."""

from __future__ import annotations

import pytest
import torch

from gradbits.bench.contest import Contestant, Ready, UnavailableError, Work, as_dict, best_of_ours, compete, ratios
from gradbits.bench.table import summary, work_table
from gradbits.bench.timing import interleaved
from gradbits.core.errors import GradbitsError

X = torch.ones(4)


def contestant(name, run=lambda: None, output=None, ours=False, build=None):
    return Contestant(name=name, build=build or (lambda: Ready(run=run, output=output)), peak="fp32", ours=ours)


def work(*contestants, **more):
    return Work(name="w", contestants=contestants, amount=2e6, references={"fp32": ("a",), "both": ("a", "b")}, **more)


def refuse():
    raise UnavailableError("not here")


def test_rounds_run_everybody_once_and_begin_with_another():
    log = []
    times = interleaved({name: lambda name=name: log.append(name) for name in "abc"}, repeats=4)
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"
    assert [len(each) for each in times.values()] == [4, 4, 4]


def test_outputs_are_compared_with_the_first_and_a_no_op_is_called_one():
    found = compete(
        work(
            contestant("a", output=lambda: X),
            contestant("half", output=lambda: X / 2),
            contestant("same", output=X.clone),
            contestant("silent"),
        ),
        repeats=1,
    )
    assert [m.error for m in found] == [None, 0.5, 0.0, None]
    assert [bool(m.note) for m in found] == [False, False, True, False]
    assert "no-op" in found[2].note


def test_who_cannot_take_part_says_why_and_the_others_go_on():
    def fail():
        raise ValueError("broken\nin two lines")

    found = compete(work(contestant("a"), contestant("b", build=refuse), contestant("c", run=fail)), repeats=2)
    assert [len(m.times) for m in found] == [2, 0, 0]
    assert [m.note for m in found] == ["", "not here", "ValueError: broken"]
    with pytest.raises(ValueError, match="broken"):
        compete(work(contestant("a"), contestant("ours", run=fail, ours=True)), repeats=1)


def test_the_record_holds_rates_ratios_and_verdicts(monkeypatch):
    # contestants need 4, 2 and 1 ms in every round
    costs = {"a": 4.0, "b": 2.0, "mine": 1.0}
    monkeypatch.setattr(
        "gradbits.bench.contest.interleaved", lambda runs, repeats, clock: {n: (costs[n],) * repeats for n in runs}
    )
    contest = work(
        contestant("a"),
        contestant("b"),
        contestant("mine", ours=True),
        contestant("gone", build=refuse, ours=True),
        must={"fp32": 3.0, "both": 2.0},
        aim={"fp32": 5.0, "both": 2.0},
    )
    found = compete(contest, repeats=3)
    assert ratios(contest, found)["mine"] == {"fp32": 4.0, "both": 2.0}
    assert best_of_ours(found).name == "mine"
    record = as_dict(contest, found, {"fp32": 4e9})
    assert [row["median_ms"] for row in record["contestants"]] == [4.0, 2.0, 1.0, None]
    assert record["contestants"][2]["per_second"] == 2e9
    assert record["contestants"][2]["of_peak"] == 0.5
    assert record["best"] == {"name": "mine", "faster_than": {"fp32": 4.0, "both": 2.0}}
    table = work_table(record)
    assert "50 %" in table
    assert "gone: not here" in table
    lines = summary([record]).splitlines()
    assert " ".join(lines[1].split()) == "w mine 4.00 / 2.00 3.00 / 2.00 5.00 / 2.00 reached"
    record["must"]["fp32"] = 4.5
    assert summary([record]).endswith("missed")
    record["aim"]["fp32"] = 4.0
    assert summary([record]).endswith("aim reached")


def test_nobody():
    found = compete(work(contestant("a", build=refuse)), repeats=1)
    record = as_dict(work(contestant("a", build=refuse)), found, {})
    assert record["best"] is None
    assert "nobody could take part" in work_table(record)
    assert summary([record])


def test_unavailable_is_shown_as_one_line_by_the_command_line():
    assert issubclass(UnavailableError, GradbitsError)
