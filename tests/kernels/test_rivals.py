"""A rival kernel is chosen only where it is right and faster; the rest computes as if there were none."""

import pytest
import torch

from flagscale_kernels._rivals import ALWAYS, MEASURED, NEVER, RIVALS_VARIABLE, Rivalry

TRUTH = torch.tensor([1.0, -2.0, -torch.inf, 4.0])


@pytest.fixture(autouse=True)
def chip(monkeypatch):
    """A GPU that captures no graph, on which rivals are measured."""
    monkeypatch.setattr("flagscale_kernels._rivals.device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv(RIVALS_VARIABLE, MEASURED)
    monkeypatch.delenv("FLAGSCALE_KERNELS_AUTOTUNE", raising=False)


class Race:
    """A rivalry whose launches write `results` and take `times`, both by name."""

    def __init__(self, rival, times=(2.0, 1.0)):
        self.out, self.calls, self.rival_result = torch.zeros(4), [], rival
        times = {"plain": times[0], "rival": times[1]}
        self.rivalry = Rivalry("the rival", milliseconds=lambda call: times[self.named(call)])

    def named(self, call):
        call()
        return self.calls[-1]

    def plain(self):
        self.calls.append("plain")
        self.out.copy_(TRUTH)

    def rival(self):
        self.calls.append("rival")
        if isinstance(self.rival_result, Exception):
            raise self.rival_result
        self.out.copy_(self.rival_result)

    def launch(self, key=()):
        """The launch that filled the output."""
        self.out.zero_()
        self.rivalry.launch(self.plain, self.rival, (self.out,), key)
        torch.testing.assert_close(self.out, TRUTH, rtol=1e-2, atol=0)
        return self.calls[-1]


def test_a_rival_that_agrees_and_is_faster_is_chosen_once():
    race = Race(TRUTH * 1.001)
    assert race.launch() == "rival"
    asked = len(race.calls)
    assert race.launch() == "rival"
    assert len(race.calls) == asked + 1
    assert race.launch(key=("another",)) == "rival"
    assert len(race.calls) > asked + 2


def test_a_slower_rival_is_not_chosen():
    assert Race(TRUTH, times=(1.0, 2.0)).launch() == "plain"


@pytest.mark.parametrize(
    "wrong",
    [
        TRUTH * 1.1,
        torch.full((4,), torch.nan),
        TRUTH.masked_fill(TRUTH.isinf(), 0.0),
        RuntimeError("a kernel that does not compile"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_wrong_or_failing_rival_is_never_chosen_and_is_named_once(wrong):
    race = Race(wrong, times=(9.0, 1.0))
    with pytest.warns(UserWarning, match="the rival"):
        assert race.launch() == "plain"
    asked = race.calls.count("rival")
    assert race.launch() == "plain"
    assert race.calls.count("rival") == asked == 1


def test_nothing_is_asked_where_results_must_not_depend_on_a_measurement(monkeypatch):
    race = Race(TRUTH)
    for variable, value in ((RIVALS_VARIABLE, NEVER), ("FLAGSCALE_KERNELS_AUTOTUNE", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            race.launch()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    race.launch()
    assert "rival" not in race.calls
    monkeypatch.setenv(RIVALS_VARIABLE, ALWAYS)
    assert race.launch() == "rival"
