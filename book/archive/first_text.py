"""How `first-text.npz` was made: what `archive.first_text` gives back.

It holds the windows that the first steps of these arms read, at d = 8 and seed 0. The text is made
of installed packages' docstrings, so it comes out the same only with the packages of that day.
"""

from pathlib import Path

import numpy as np

from headbound.train import changes, tunnel

STEPS = {"baseline": 112, "10 epochs": 17, "100 epochs": 17}


def main() -> None:
    """Write the file beside this one."""
    recipe = changes.recipe("baseline", 8, 0)
    shape = (recipe.vocab_size, recipe.context, recipe.held_out_texts)
    text = tunnel.corpus(recipe.source, *shape)
    places = np.arange(len(text.stream))
    read = np.zeros(len(text.stream), bool)
    for arm, steps in STEPS.items():
        for step in range(steps):
            read[tunnel.batch(places, step, changes.recipe(arm, 8, 0)).numpy()] = True
    np.savez_compressed(
        Path(__file__).with_name("first-text.npz"),
        length=len(text.stream),
        places=places[read].astype(np.int32),
        tokens=np.asarray(text.stream)[read].astype(np.uint16),
        held_out=text.held_out.numpy().astype(np.uint16),
        tokenizer=text.tokenizer.backend_tokenizer.to_str(),
    )


if __name__ == "__main__":
    main()
