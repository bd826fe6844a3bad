import pytest
import torch.distributed as dist

from avion.errors import UserError
from avion.utils.meters import AverageMeter, ProgressMeter
from tests.processes import run_processes


def test_a_mean_by_hand():
    meter = AverageMeter("loss", ":.2f")
    meter.update(2.0)
    meter.update(5.0, n=3)
    assert (meter.val, meter.sum, meter.count, meter.avg) == (5.0, 17.0, 4, 4.25)
    assert str(meter) == "loss 5.00 (4.25)"
    meter.synchronize()  # alone: nothing to do
    assert meter.avg == 4.25
    meter.reset()
    assert (meter.val, meter.sum, meter.count, meter.avg) == (0, 0, 0, 0)
    assert str(AverageMeter("Time", ":6.2f")) == "Time   0.00 (  0.00)"


def test_a_mean_of_nothing():
    meter = AverageMeter("loss")
    meter.update(3.0, n=0)
    assert meter.avg == 0


def test_the_line_that_is_printed(capsys):
    meters = [AverageMeter("a", ":.1f"), AverageMeter("b", ":.0e")]
    meters[1].update(0.03)
    ProgressMeter(120, meters, prefix="Epoch: [2]").display(7)
    assert capsys.readouterr().out == "Epoch: [2][  7/120]\ta 0.0 (0.0)\tb 3e-02 (3e-02)\n"
    ProgressMeter(3, []).display(1)
    assert capsys.readouterr().out == "[1/3]\n"
    with pytest.raises(UserError, match="num_batches: -1"):
        ProgressMeter(-1, [])


def _synchronized(rank, size):
    dist.init_process_group("gloo")
    meters = [AverageMeter("loss"), AverageMeter("never")]
    meters[0].update(0.25 * (rank + 1), n=1 + rank)  # shares of 0.25 and 0.5, twice
    ProgressMeter(1, meters).synchronize()
    return [(m.sum, m.count, m.avg) for m in meters]


def test_meters_of_two_processes(tmp_path):
    """The sum keeps its fraction, which AVION's cuts off."""
    for found in run_processes(_synchronized, 2, tmp_path):
        assert found == [(1.25, 3.0, pytest.approx(1.25 / 3)), (0.0, 0.0, 0)]
