"""Features without a backbone: of hand-made images."""

from __future__ import annotations

import numpy as np
import pytest

from fedmutual.learning.hog import BINS, CELLS, hog, mirrored_hog


def parts(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [5, 5, 4, BINS] and colours [6, 6, 3] of one image."""
    found = hog(image[None].astype(np.uint8))[0]
    edge = CELLS - 1
    blocks = found[: edge * edge * 4 * BINS].reshape(edge, edge, 4, BINS)
    return blocks, found[edge * edge * 4 * BINS :].reshape(CELLS, CELLS, 3)


def test_a_grey_image_has_no_gradient_and_its_own_colour() -> None:
    blocks, colours = parts(np.full((30, 24, 3), 255))
    assert not blocks.any()
    np.testing.assert_allclose(colours, 0.5)


@pytest.mark.parametrize(("turned", "orientation"), [(False, 0), (True, 4)])
def test_an_edge_votes_for_its_orientation(turned: bool, orientation: int) -> None:
    """Across: angle 0, bin 0. Down: 90 degrees, between bins 4 and 5."""
    image = np.zeros((24, 24, 3))
    image[:, 12:] = 200
    blocks, _ = parts(image.transpose(1, 0, 2) if turned else image)
    votes = blocks.sum(axis=(0, 1, 2))
    assert votes.argmax() == orientation
    assert votes[orientation] == pytest.approx(votes.sum() / (2 if turned else 1))
    assert (blocks <= 0.3 + 1e-6).all()


def test_an_image_has_the_same_features_in_any_company() -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_array_equal(hog(images)[[7, 290]], hog(images[[7, 290]]))
    assert hog(images[:0]).shape == (0, 1008)


def test_a_mirror_image_has_the_same_mirrored_features() -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 17, 16, 3)).astype(np.uint8)
    other = np.ascontiguousarray(images[:, :, ::-1])
    assert not np.allclose(hog(images), hog(other), atol=0.01)
    np.testing.assert_array_equal(mirrored_hog(images), mirrored_hog(other))
    np.testing.assert_array_equal(mirrored_hog(images[1:2])[0], mirrored_hog(images)[1])


def test_tiny_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 12"):
        hog(np.zeros((1, 11, 20, 3), np.uint8))
