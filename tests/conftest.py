import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import settings

mpl.use("Agg")
torch.set_num_threads(2)
# A shared machine is slow at times; a deadline on one example would test the machine, not the code.
settings.register_profile("headbound", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("headbound")

WORDS = ["model", "learns", "head", "rank", "small", "forgets", "ideal", "would", "say", "some"]


LONG = {"clone", "other_book", "smollm2"}  # fixtures: two whole books, and a real model
SHARED = LONG | {"small", "wheel"}  # one worker makes each of these


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What needs such a fixture is slow, and what shares one runs where that was made."""
    for item in items:
        asked = set(item.fixturenames)
        if asked & LONG:
            item.add_marker("slow")
        for name in asked & SHARED:
            item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A text that a tiny suite can learn from, beside a cache of its own."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(WORDS, 500)) for _ in range(200))
    (folder / "text.txt").write_text("\n\n".join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADBOUND_CACHE", str(folder / "cache"))
        yield str(folder / "text.txt")


@pytest.fixture(scope="module")
def one_thread():
    """Hundreds of tiny steps: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stopped(monkeypatch):
    """Call something that trains; it is stopped as by Ctrl-C when it asks for a step's windows."""
    from headbound.train import tunnel

    def call(train, at):
        real = tunnel.batch

        def batch(stream, step, *rest):
            if step == at:
                raise KeyboardInterrupt
            return real(stream, step, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(tunnel, "batch", batch)
            with pytest.raises(KeyboardInterrupt):
                train()

    return call
