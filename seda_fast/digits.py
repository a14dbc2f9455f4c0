"""The embedded data set: scikit-learn's handwritten digits, each with a short English text about its shape.

The images are real (1 797 scans of 8 x 8 pixels, UCI). The sentences below are hand-written for this project
and describe the shape of a class, not one scan; a sample's text is a seeded pick of two or three of its
class's sentences. No sentence names its digit.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import DataError

TEXT_DIM = 64
# Fixed apart from the run's seed: another seed means another split and other weights, not another data set.
_TEXT_SEED = 20250505

DESCRIPTIONS: tuple[tuple[str, ...], ...] = (
    (
        "A closed oval with one large hole in the middle and no ends sticking out.",
        "The pen travels once around in a ring and meets its own start.",
        "Shaped like an egg standing upright, hollow inside.",
        "A round loop, taller than wide, with empty space at its centre.",
        "Looks like a hoop or a ring seen slightly from the side.",
        "Curved on every side, with neither a corner nor a straight bar.",
        "Like a racetrack: the left and the right wall bow outward.",
        "Nothing crosses the inside; the ink lies only along the rim.",
    ),
    (
        "A single upright stroke from top to bottom, like a post.",
        "Just a tall straight bar, very narrow, with no loop and no hole.",
        "A short flag slants back from the top of a vertical stem.",
        "Resembles a walking stick or a pencil stood on its end.",
        "Nearly all the ink sits in a thin column down the centre.",
        "A plain downward movement of the pen, sometimes with a small foot beneath.",
        "No curve to speak of; the left and the right side stay blank.",
        "Like a candle with a small nick at its tip.",
    ),
    (
        "A hook curves over the top, then a slanting line runs down to a flat base.",
        "Open to the left at the top and open to the right below, it ends in a level foot.",
        "Like a swan with an arched neck and a flat body on the water.",
        "The stroke bends to the right, sweeps diagonally down to the left and closes with a horizontal bar.",
        "A rounded head, a sloping back and a straight line to stand on.",
        "Sometimes a tiny loop fills the lower left corner before the tail runs off to the right.",
        "Resembles a question mark whose end was dragged along the ground.",
        "The bottom is straight and horizontal while the top is an arc.",
    ),
    (
        "A pair of bulges, one above the other, both open toward the left.",
        "Half circles stacked on each other, meeting at a point in the middle.",
        "Like the letter B without its spine.",
        "The right edge is curved twice; loose ends point inward on the left.",
        "No closed hole anywhere: each bay can be entered from the left.",
        "Resembles a flying bird turned on its side.",
        "The pen swings out to the right, returns to a notch at the centre and swings out again.",
        "Looks like a curled moustache set upright.",
    ),
    (
        "A slanted arm on the left joins a crossbar that cuts a long upright.",
        "Open at the top like a cup, with a leg hanging down on the right.",
        "Straight strokes meet at sharp corners; a horizontal bar crosses the stem.",
        "Resembles a small sailing boat, its sail to the left of the mast.",
        "Like a chair turned upside down.",
        "A triangle or an open square sits on top of a leg at the right.",
        "An angular figure with a crossing just below the middle.",
        "The lower left is empty, since only a post reaches the ground.",
    ),
    (
        "A flat roof on top, a short wall down the left side, then a round belly open to the left.",
        "A straight cap runs to the right at the top, and the lower half bulges out to the right.",
        "Angular above and curved below, with an opening at the lower left.",
        "Like the letter S drawn with corners in its upper half.",
        "Resembles a sickle hanging from a short bar.",
        "The pen goes left along the top, down a little, then around in a big bow.",
        "No closed loop; the upper right is open under the cap, the lower left above the tail.",
        "Looks like a seated person with a peaked cap and a big stomach.",
    ),
    (
        "A long curve sweeps down from the upper right into a closed loop at the bottom.",
        "A hole sits in the lower half and a tail rises above it.",
        "Like a snail shell or a curl of hair winding inward.",
        "Heavy at the foot and thin at the head, with a round chamber beneath.",
        "Resembles a cherry with its stalk bent to the right.",
        "The top is bare on the right, while the bottom is a full circle.",
        "The stroke falls along the left side, turns beneath and closes on itself halfway up.",
        "A spiral that starts outside at the top and ends in a small ring below.",
    ),
    (
        "A level bar along the top and a slanting leg falling to the lower left.",
        "Straight strokes meet in a sharp corner at the upper right.",
        "Like a boomerang, sharp at the bend.",
        "Often a short dash crosses the leg halfway down.",
        "The foot is a thin point; everything wide is at the top.",
        "No hole and no round part: a roof with a single sloping support.",
        "Resembles a flag blown to the left of its leaning pole.",
        "The lower right stays empty as the line runs down diagonally.",
    ),
    (
        "A pair of closed loops stacked on top of each other.",
        "Holes above and beneath share a crossing in the middle.",
        "Like a snowman made of balls.",
        "An hourglass with a pinched waist and rounded ends.",
        "The pen crosses its own path at the centre and returns to the start, so there are no loose ends.",
        "Resembles spectacles turned upright.",
        "Round above and round below, narrow at the waist.",
        "Ink on both flanks encloses an upper and a lower chamber.",
    ),
    (
        "A closed loop at the top with a tail dropping from its right side.",
        "A hole in the upper half; beneath it only a single stem.",
        "Like a balloon on a string.",
        "The ring sits high and a straight or curved leg reaches the ground.",
        "Heavy at the head and thin at the foot.",
        "Resembles a magnifying glass held up by a handle on its right.",
        "The pen draws a circle first, then slides down along its right edge.",
        "The lower left is blank; the upper part is round and shut.",
    ),
)  # fmt: skip

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def scikit_learn(module: str) -> Any:
    """The module `sklearn.<module>`, which is an optional dependency; raises DataError when it is missing."""
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise DataError(
            "scikit-learn is needed to split off a test part and for the digits: pip install seda_fast[eval]"
        ) from error


def pixels() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The images as (1797, 64) float32 grey values, 0 to 16, and their (1797,) int64 labels, 0 to 9."""
    digits = scikit_learn("datasets").load_digits()
    return digits.data.astype(np.float32), digits.target.astype(np.int64)


def compose_texts(labels: NDArray[np.int64]) -> list[str]:
    """One text a row: two or three different sentences about the shape of its digit, in random order.

    Row i's text depends on i and its label only. labels: (N,) int64 from 0 to 9.
    """
    texts = []
    for row, label in enumerate(labels.tolist()):
        random = np.random.default_rng([_TEXT_SEED, row])
        sentences = DESCRIPTIONS[label]
        picked = random.permutation(len(sentences))[: random.integers(2, 4)]
        texts.append(" ".join(sentences[i] for i in picked))
    return texts


def text_features(train: list[str], test: list[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """TF-IDF over words and word pairs, then truncated SVD; both are fitted on `train` alone.

    Returns (len(train), D) and (len(test), D) float32, D = 64 unless `train` has fewer texts.
    """
    tfidf = scikit_learn("feature_extraction.text").TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    svd = scikit_learn("decomposition").TruncatedSVD(min(TEXT_DIM, len(train)), random_state=0)
    fitted = svd.fit_transform(tfidf.fit_transform(train))
    return fitted.astype(np.float32), svd.transform(tfidf.transform(test)).astype(np.float32)
