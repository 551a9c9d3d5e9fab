import numpy as np
import pytest

from headbound.train import repeats

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "options", [{"peak": 0.1}, {"peak": 1.0, "momentum": 0.9}, {"peak": 0.1, "layers": 1}]
)
def test_repetition_is_learned_from_a_random_head(options):
    untrained, trained = (repeats.learn(64, 8, steps=n, **options) for n in (0, 120))
    assert untrained["loss"] == pytest.approx(np.log(64), rel=0.02)
    assert untrained["kept"] == pytest.approx(8 / 64, rel=0.05)
    assert trained["loss"] < 0.1
    assert trained["learned"] == 1


def test_a_diverging_run_says_so():
    with pytest.raises(FloatingPointError, match=r"peak = 1e\+30: training diverged at V = 64"):
        repeats.learn(64, 8, 1e30, steps=20, momentum=0.9)
