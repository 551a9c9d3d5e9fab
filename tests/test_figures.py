import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from companion import plot

TEXTS = {"name": "fig-x", "caption": "A line.", "alt": "A line that rises."}


def test_a_figure_is_shown_with_its_texts_and_closed(monkeypatch):
    shown = []
    monkeypatch.setattr(plot, "display", lambda fig, metadata: shown.append((fig, metadata)))
    fig, _ = plt.subplots()
    plot.show(fig, **TEXTS)
    assert shown == [(fig, {"headbound": TEXTS})]
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize("field", TEXTS)
@pytest.mark.parametrize("empty", ["", "  \n"])
def test_no_figure_without_its_texts(field, empty):
    fig, _ = plt.subplots()
    with pytest.raises(
        ValueError, match=f"{field} = .*: every figure needs a name, a caption and an alt text"
    ):
        plot.show(fig, **{**TEXTS, field: empty})
    plt.close(fig)


def test_lines_are_told_apart_without_colour():
    with mpl.rc_context():
        plot.use_style()
        fig, axes = plt.subplots()
        lines = [axes.plot([0, 1], [i, i + 1])[0] for i in range(8)]
        assert len({(line.get_marker()) for line in lines}) == 8
        assert len({str(line._unscaled_dash_pattern) for line in lines}) == 8
        assert len({line.get_color() for line in lines}) == 8
        plt.close(fig)
