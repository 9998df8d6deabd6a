"""The distance estimator: from images to features whose inner products tell distances."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import cast

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from .. import distances, structures
from ..backend import keras
from ..errors import InputError
from ..io import files
from ..io.files import PathLike
from ..preprocessing import Preprocessing
from . import networks, weights
from .weights import Json

__all__ = ["Estimator", "Prediction", "load_estimator"]

#: So many images that tracing a network, a second or two, soon pays.
MANY = 256
#: Pixel sizes that differ by no more than this are one; and what rounding to pixels may do to them.
ALIKE, ROUNDED = 0.01, 0.015


@dataclass(frozen=True)
class Prediction:
    """What an estimator predicts of images.

    Attributes
    ----------
    features : (n, f) float32 array
    shifts_px : (n, 2) array or None
        Where the particle was moved to, (x, y), pixels of the frame; None from a network that does
        not predict it.
    expected_error_rad : (n,) array or None
        Mean angle by which the orientation is expected to be off.
    """

    features: Float[np.ndarray, "n f"]
    shifts_px: Float[np.ndarray, "n 2"] | None
    expected_error_rad: Float[np.ndarray, " n"] | None


@dataclass
class Estimator:
    """An encoder with all that its use needs.

    Attributes
    ----------
    encoder : keras.Model
        From prepared images to features.
    head : {'exact', 'cosine', 'euclidean'}
    preprocessing : Preprocessing
    architecture : str
    feature_dim : int
    symmetry : str
        The particle's point group.
    passes : int
        How often an image is read: after each pass but the last it is centred by the shift that
        was predicted.
    precision : str
        See :func:`cryoem.estimator.networks.build`.
    notes : dict
        What made the weights: particle, seed, number of images, and so on; JSON.
    shift_network : keras.Model or None
        A network of its own for all passes but the last, which predicts the shift, so that the
        encoder need only know centred images (:meth:`split_off_shift_network`). None: the encoder
        reads every time.
    """

    encoder: keras.Model
    head: str
    preprocessing: Preprocessing
    architecture: str
    feature_dim: int
    symmetry: str = "C1"
    passes: int = 1
    precision: str = "float32"
    notes: dict[str, Json] = field(default_factory=dict)
    shift_network: keras.Model | None = None

    @classmethod
    def create(
        cls,
        preprocessing: Preprocessing,
        *,
        architecture: str = "steerable",
        head: str = "exact",
        feature_dim: int = 16,
        symmetry: str = "C1",
        passes: int = 1,
        seed: int | None = 0,
        precision: str = "float32",
    ) -> Estimator:
        """Build an untrained estimator.

        ``seed`` sets Keras' global seed, and by it the initial weights; None leaves it alone. The
        paper's is ``architecture="paper", head="cosine", feature_dim=512``.
        """
        if head not in distances.HEADS:
            raise InputError(f"head must be one of {', '.join(distances.HEADS)}, got {head!r}")
        if seed is not None:
            keras.utils.set_random_seed(seed)
        settings = (head, preprocessing, architecture, feature_dim, symmetry, passes, precision)
        estimator = cls(None, *settings)
        estimator.encoder, estimator.feature_dim = estimator._network()
        return estimator

    def _network(self) -> tuple[keras.Model, int]:
        """An untrained network of these settings, and how many features it gives."""
        return networks.build(
            self.architecture,
            self.preprocessing.crop_px,
            self.feature_dim,
            normalise=self.head != "euclidean",
            symmetry=self.symmetry,
            precision=self.precision,
        )

    def reading(self, box_px: int, pixel_size_angstrom: float) -> Estimator:
        """Give this estimator for images of another box or other pixels, where that loses nothing.

        It reads images down-sampled, and of those the middle. Finer pixels are down-sampled
        further, and how wide the frame is about that middle does not matter.

        Raises
        ------
        InputError
            The images are coarser than what it reads, or narrower.
        """
        p = self.preprocessing
        alike = abs(pixel_size_angstrom / p.pixel_size_angstrom - 1) <= ALIKE
        if box_px == p.frame_px and alike:
            return self
        read = p.pixel_size_angstrom * p.frame_px / p.down_px
        extent = box_px * pixel_size_angstrom
        down = round(extent / read)
        if not (p.crop_px <= down <= box_px and abs(down * read / extent - 1) <= ROUNDED):
            raise InputError(
                f"made for images of {p.frame_px} px of {p.pixel_size_angstrom:g} A, of which it "
                f"reads the middle {p.crop_px * read:.0f} A in pixels of {read:.2f} A; got "
                f"{box_px} px of {pixel_size_angstrom:g} A"
            )
        other = Preprocessing(box_px, down, p.crop_px, pixel_size_angstrom)
        return replace(self, preprocessing=other)

    # ----------------------------------------------------------------------------------
    # What it predicts

    def predict(
        self,
        images: Float[np.ndarray, "n size size"],
        *,
        ctf: Float[np.ndarray, "n size half"] | None = None,
        prepared: bool = False,
        batch_size: int = 512,
    ) -> Prediction:
        """Predict features, and, where the network does, shifts and how far off orientations are.

        Parameters
        ----------
        images : (n, frame_px, frame_px) array
            Or (n, crop_px, crop_px) where ``prepared``; these are read once.
        ctf : (n, frame_px, frame_px // 2 + 1) array, optional
            See :func:`cryoem.imaging.ctf`; phases are flipped by its sign.
        prepared : bool
            The preprocessing has been done.
        batch_size : int

        Returns
        -------
        Prediction
        """
        p, f = self.preprocessing, self.feature_dim
        outputs = [np.zeros((0, self.encoder.output_shape[1]), np.float32)]
        undone = [np.zeros((0, 2))]
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            small = images[batch]
            shifts = np.zeros((len(small), 2))
            if not prepared:
                small = p.reduce(small, ctf=None if ctf is None else ctf[batch])
                shifts, small = self.centre(small)
            outputs.append(_output(self.encoder, small))
            undone.append(shifts)
        out, shifts = np.concatenate(outputs), np.concatenate(undone)
        if out.shape[1] == f:
            return Prediction(out, None, None)
        shifts = (shifts + out[:, f : f + 2]) * p.frame_px / p.down_px
        return Prediction(out[:, :f], shifts, _mean_angle(out[:, f + 2]))

    def embed(
        self,
        images: Float[np.ndarray, "n size size"],
        *,
        ctf: Float[np.ndarray, "n size half"] | None = None,
        prepared: bool = False,
        batch_size: int = 512,
    ) -> Float[np.ndarray, "n f"]:
        """Features of images, (n, feature_dim) float32: those of :meth:`predict`."""
        return self.predict(images, ctf=ctf, prepared=prepared, batch_size=batch_size).features

    def centre(
        self, small: Float[np.ndarray, "n down_px down_px"]
    ) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n crop_px crop_px"]]:
        """Predict the shifts of reduced images, in all passes but the last, and undo them.

        Parameters
        ----------
        small : (n, down_px, down_px) array
            See :meth:`Preprocessing.reduce <cryoem.preprocessing.Preprocessing.reduce>`.

        Returns
        -------
        shifts : (n, 2) array
            (x, y), pixels of ``small``.
        images : (n, crop_px, crop_px) array
            What is left for the encoder to read.
        """
        p, f = self.preprocessing, self.feature_dim
        network = self.encoder if self.shift_network is None else self.shift_network
        shifts, images = np.zeros((len(small), 2)), p.cut(small)
        for _ in range(self.passes - 1 if self.centres_images else 0):
            shifts = shifts + _output(network, images)[:, f : f + 2]
            images = p.cut(small, shifts_px=shifts)
        return shifts, images

    @property
    def centres_images(self) -> bool:
        """Whether it predicts shifts and was asked to undo them before the last pass."""
        return self.passes > 1 and self.encoder.output_shape[1] > self.feature_dim

    def distances(self, features: ArrayLike, others: ArrayLike) -> Float[np.ndarray, "n m"]:
        """Distances between two sets of features, (n, m), radians."""
        return distances.from_features(features, others, self.head)

    # ----------------------------------------------------------------------------------
    # Its weights

    def split_off_shift_network(self) -> None:
        """Make a copy of the encoder the shift network, in place.

        The encoder can then be trained on, with centred images alone. It reads them once the shift
        network has made as many passes as the encoder had to.
        """
        if self.shift_network is not None or not self.centres_images:
            raise InputError(
                "wanted an estimator that centres images (passes > 1) and has no shift network yet"
            )
        self.shift_network, _ = self._network()
        self.shift_network.set_weights(self.encoder.get_weights())
        self.passes += 1

    @property
    def settings(self) -> dict[str, Json]:
        """All that the weights belong to, as it is kept in the file."""
        return {
            "architecture": self.architecture,
            "head": self.head,
            "feature_dim": self.feature_dim,
            "symmetry": self.symmetry,
            "passes": self.passes,
            "shift_network": self.shift_network is not None,
            "preprocessing": asdict(self.preprocessing),
        }

    @property
    def _networks(self) -> dict[str, keras.Model]:
        """All that has weights, by its name in the file."""
        both = {"weight": self.encoder, "shift_network": self.shift_network}
        return {name: network for name, network in both.items() if network is not None}

    @property
    def _weights(self) -> dict[str, list[np.ndarray]]:
        return {name: network.get_weights() for name, network in self._networks.items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights and settings: equal where features are, whatever the notes say."""
        settings = {**self.settings, "precision": self.precision}
        digest = hashlib.sha256(json.dumps(settings).encode())
        for network in self._weights.values():
            for weight in network:
                digest.update(weight.tobytes())
        return digest.hexdigest()

    def save(self, path: PathLike) -> None:
        """Write weights, settings and notes to one ``.npz`` file, atomically.

        It holds nothing that could be executed on loading; most weights are kept in eight bits.
        """
        weights.write(path, {**self.settings, "notes": self.notes}, self._weights)

    def __reduce__(self) -> tuple[Callable[..., Estimator], tuple[object, ...]]:
        """Pickle settings and weights, for the workers of a cluster, and not Keras' own objects."""
        return _restored, ({**self.settings, "notes": self.notes}, self._weights, self.precision)


def load_estimator(name_or_path: PathLike, *, precision: str = "float32") -> Estimator:
    """Load a trained estimator: one that ships, by its particle's name, or a file.

    Parameters
    ----------
    name_or_path : str or path
        ``"4jsv"`` or ``"1i10"`` (D2): trained on fresh projections of the density that
        :func:`cryoem.structures.load_density` makes, in the conditions of
        :func:`cryoem.estimator.broad_ranges`; their ``notes`` say how. The hash of their file is
        checked. Anything else is the path to a file that :meth:`Estimator.save` wrote.
    precision : str
        See :func:`cryoem.estimator.networks.build`.

    Returns
    -------
    Estimator

    Raises
    ------
    InputError
        Not such a file, one of another version, or weights that do not fit the network.
    """
    name = str(name_or_path).lower()
    shipped = name in structures.SHIPPED
    path = structures.shipped_file(f"{name}.npz") if shipped else files.existing(name_or_path)
    settings, arrays = weights.read(path)
    try:
        return _restored(settings, arrays, precision)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a whole estimator ({error})") from error


def _restored(
    settings: dict[str, Json], arrays: dict[str, list[np.ndarray]], precision: str
) -> Estimator:
    """The estimator of these settings (with the notes) and weights."""
    known = cast(dict, settings)
    estimator = Estimator.create(
        Preprocessing(**known["preprocessing"]),
        architecture=known["architecture"],
        head=known["head"],
        feature_dim=known["feature_dim"],
        symmetry=known["symmetry"],
        passes=known["passes"],
        seed=None,
        precision=precision,
    )
    estimator.notes = dict(known["notes"])
    if known["shift_network"]:
        estimator.shift_network, _ = estimator._network()
    for name, network in estimator._networks.items():
        try:
            network.set_weights(arrays.get(name, []))
        except ValueError as error:
            raise InputError(
                f"the weights do not fit a {estimator.architecture} network"
            ) from error
    return estimator


def _output(
    network: keras.Model, images: Float[np.ndarray, "n crop_px crop_px"]
) -> Float[np.ndarray, "n out"]:
    """What a network makes of prepared images; of many by its graph, which is traced once.

    Layer by layer, weights are laid out anew for every batch.
    """
    if len(images) < MANY or keras.backend.backend() != "tensorflow":
        return keras.ops.convert_to_numpy(network(images, training=False))
    if not hasattr(network, "traced"):
        from ..backend import tf

        seen = tf.TensorSpec((None, *network.input_shape[1:]), "float32")
        network.traced = tf.function(lambda x: network(x, training=False), input_signature=[seen])
    return network.traced(images).numpy()


def _mean_angle(log_variance: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Mean length of a Gaussian rotation vector with this variance on each axis."""
    return 2 * np.sqrt(2 / np.pi) * np.exp(np.clip(log_variance, -16, 3) / 2)
